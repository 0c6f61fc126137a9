"""Imports go down only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "adaptvit"

LAYERS: list[set[str]] = [
    {"checks"},
    {"files", "process", "terminal"},
    {"records", "tensorfiles"},
    {"tokens.base", "tokens.kernels"},
    {"tokens.masked", "tokens.packed"},
    {"seeds", "macs", "tokens", "priors", "losses", "t2t", "gates"},
    {"usage", "parts"},
    {"vit"},
    {"model", "gated"},
    {"budget", "timing"},
    {"methods.base"},
    {"methods.regression", "methods.full"},
    {"methods.avit_gate"},
    {
        "methods.avit",
        "methods.ats",
        "methods.adavit",
        "methods.evit",
        "methods.dynamicvit",
        "methods.tome",
    },
    {"methods.released.avit", "methods.released.ats", "methods.released.adavit", "methods.released.dynamicvit"},
    {"methods.released"},
    {"methods"},
    {"flax.samplers"},
    {"flax.ats_vit"},
    {"flax", "flax.convert"},
    {"names"},
    {"data.images", "data.preparation", "data.classes", "data.tars"},
    {"data.folders"},
    {"data.libraries", "data.shards"},
    {"data.sets"},
    {"pictures", "checkpoints", "data"},
    {"evaluate", "bench", "report", "untrained"},
    {"train", "predict", "draw"},
    {"run", "demo"},
    {"recipes", "compare", "compare_methods", "playground"},
    {"comparisons", "page"},
    {"cli"},
]
"""A module imports from the layers above its own only; `adaptvit` itself, the public names, may import all but cli."""

FORBIDDEN = {
    "pictures": ("adaptvit.methods", "adaptvit.vit", "timm"),
    "macs": ("adaptvit.methods", "adaptvit.vit", "timm"),
    "usage": ("timm",),
    **{f"tokens.{name}": ("timm",) for name in ("base", "kernels", "masked", "packed")},
    "flax.ats_vit": ("torch", "timm", "adaptvit.tokens", "adaptvit.vit"),
    "flax.samplers": ("torch", "timm"),
}
"""What a module must not know of, whatever its layer."""


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = path
    names.pop("")
    return names


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports when it is loaded, type checking apart."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in members if name.removeprefix("adaptvit.") in modules()}
            found |= submodules or {node.module}
    return found


def test_every_module_has_its_layer() -> None:
    assert set(modules()) == set().union(*LAYERS)


@pytest.mark.parametrize("module", modules())
def test_imports_go_down_only(module: str) -> None:
    level = next(index for index, layer in enumerate(LAYERS) if module in layer)
    below = set().union(*LAYERS[:level])
    ours = {name.removeprefix("adaptvit.") for name in imported(modules()[module]) if name.startswith("adaptvit.")}
    assert ours & set(modules()) <= below


@pytest.mark.parametrize("module", FORBIDDEN)
def test_what_a_module_must_not_know(module: str) -> None:
    for name in imported(modules()[module]):
        assert not name.startswith(FORBIDDEN[module]), f"{module} imports {name}"


@pytest.mark.parametrize("module", [name for name in modules() if not name.startswith("flax")])
def test_only_the_flax_side_needs_jax(module: str) -> None:
    roots = {name.split(".")[0] for name in imported(modules()[module])}
    assert not roots & {"jax", "flax", "optax", "orbax"}
    assert not any(name.startswith("adaptvit.flax") for name in imported(modules()[module]))
