"""Imports go down only: the floors are those that docs/design.md draws."""

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import adaptvit

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "adaptvit"
DRAWING = (ROOT / "docs" / "design.md").read_text().split("## Floors")[1].split("\n## ")[0]
FLOORS = [words.split() for words in re.findall(r"^    ((?:\w+(?:/|\.py) ?)+)", DRAWING, flags=re.M)]
"""Folders and files of the package, from the top."""

FORBIDDEN = {
    "show.pictures": ("adaptvit.methods", "adaptvit.backbones", "timm"),
    "macs": ("timm",),
    "usage": ("timm",),
    **{f"tokens.{name}": ("timm",) for name in ("base", "kernels", "masked", "packed")},
    "flax.ats_vit": ("torch", "timm", "adaptvit.tokens", "adaptvit.backbones"),
    "flax.samplers": ("torch", "timm"),
}
"""What a module must not know of, whatever its floor."""


@cache
def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = path
    names.pop("")
    return names


@cache
def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in members if name.removeprefix("adaptvit.") in modules()}
            found |= submodules or {node.module}
    return found


def ours(module: str) -> set[str]:
    """Modules of the package that one of them imports."""
    return {name.removeprefix("adaptvit.") for name in imported(modules()[module])} & set(modules())


def floor(module: str) -> int:
    top = module.split(".")[0]
    return next(number for number, names in enumerate(FLOORS) if {f"{top}/", f"{top}.py"} & set(names))


def test_the_drawing_has_every_folder_and_file() -> None:
    there = {path.name + ("/" if path.is_dir() else "") for path in PACKAGE.iterdir()}
    assert {name for names in FLOORS for name in names} == there - {"__init__.py", "__pycache__/", "py.typed"}


@pytest.mark.parametrize("module", modules())
def test_imports_go_down_only(module: str) -> None:
    top = module.split(".")[0]
    above = {name for name in ours(module) if name.split(".")[0] != top and floor(name) <= floor(module)}
    assert not above


def test_no_modules_import_each_other() -> None:
    graph = {module: ours(module) - {module} for module in modules()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)  # raises CycleError


@pytest.mark.parametrize("module", FORBIDDEN)
def test_what_a_module_must_not_know(module: str) -> None:
    for name in imported(modules()[module]):
        assert not name.startswith(FORBIDDEN[module]), f"{module} imports {name}"


@pytest.mark.parametrize("module", [name for name in modules() if not name.startswith("flax")])
def test_only_the_flax_side_needs_jax(module: str) -> None:
    roots = {name.split(".")[0] for name in imported(modules()[module])}
    assert not roots & {"jax", "flax", "optax", "orbax"}
    assert not any(name.startswith("adaptvit.flax") for name in imported(modules()[module]))


def test_the_package_shows_its_public_names() -> None:
    assert dir(adaptvit) == sorted(adaptvit.__all__)
    assert all(hasattr(adaptvit, name) for name in dir(adaptvit))
