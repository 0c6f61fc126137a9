"""Runs of two processes."""

import faulthandler
import multiprocessing
from collections.abc import Callable
from pathlib import Path

from torch import distributed
from torch.multiprocessing import ProcessExitedException, start_processes

LIBRARIES = ["timm", "torch.distributed.fsdp", "adaptvit"]


def start_two(run: Callable[[int, str], None], folder: Path) -> None:
    """Call it with 0 and with 1 and the folder, in processes that come from one in which the libraries are imported."""
    multiprocessing.set_forkserver_preload(LIBRARIES)
    try:
        start_processes(_noted, (run, str(folder)), nprocs=2, start_method="forkserver")
    except ProcessExitedException as error:
        error.add_note("\n".join(path.read_text() for path in folder.glob("fault-*.txt")))
        raise


def _noted(rank: int, run: Callable[[int, str], None], folder: str) -> None:
    """The call, and where it was if it is killed; neither ends before the other is done with it."""
    with Path(folder, f"fault-{rank}.txt").open("w") as file:
        faulthandler.enable(file)
        run(rank, folder)
        if distributed.is_initialized():
            distributed.barrier()
            distributed.destroy_process_group()
        faulthandler.disable()
