"""Runs of two processes."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

from torch.multiprocessing import start_processes

LIBRARIES = ["timm", "torch.distributed.fsdp", "adaptvit"]


def start_two(run: Callable[[int, str], None], folder: Path) -> None:
    """Call it with 0 and with 1 and the folder, in processes that come from one in which the libraries are imported."""
    multiprocessing.set_forkserver_preload(LIBRARIES)
    start_processes(run, (str(folder),), nprocs=2, start_method="forkserver")
