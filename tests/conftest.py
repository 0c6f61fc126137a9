import gc
import os
from pathlib import Path

import pytest
import torch

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)  # pytest-xdist already fills the cores

# The first backward pass decides which threads autograd has: none on a CPU, but some once `torch.compile` has run, and
# a process that has them cannot be forked by a test that trains.
torch.ones(1, requires_grad=True).backward()


def pytest_addoption(parser: pytest.Parser) -> None:
    # pytest's own --fixtures lists fixture functions; that listing stays available under its other name, --funcargs
    listing = parser.optparser._option_string_actions.pop("--fixtures")
    listing.option_strings.remove("--fixtures")
    parser.addoption(
        "--fixtures",
        type=Path,
        default=Path(__file__).parent / "parity",
        help="folder of recorded numbers of the published code, one sub-folder per method",
    )


def pytest_collection_finish() -> None:
    """Libraries and tests stay to the end: no collection of garbage need walk through them, half a second each."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()
