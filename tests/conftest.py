import os
from pathlib import Path

import pytest
import torch

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)  # pytest-xdist already fills the cores


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
