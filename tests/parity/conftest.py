import json
from pathlib import Path

import pytest


def cases(folder: Path, method: str) -> list[Path]:
    """The recorded model runs of a method: json files that hold a manifest of weights."""
    return [path for path in sorted((folder / method).glob("*.json")) if "manifest" in json.loads(path.read_text())]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a parameter `avit_case` runs once for every recorded case of `avit`, and so on."""
    for name in metafunc.fixturenames:
        if name.endswith("_case"):
            folder = metafunc.config.getoption("--fixtures")
            found = cases(folder, name.removesuffix("_case"))
            metafunc.parametrize(name, found, ids=[path.stem for path in found])
