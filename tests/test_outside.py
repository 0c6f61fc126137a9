"""A method kept outside the package goes wherever one of its own does."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
from models import images, small_vit
from samples import picture
from test_imports import imported, modules

from adaptvit import DropConfig, FullConfig, Masked, MethodConfig, Packed, Tokens, adapt, cli, load, save
from adaptvit.commands.sessions import Playground, PlaygroundConfig, Session
from adaptvit.methods import METHODS, Named, Published, untrained
from adaptvit.weights.names import default_cfgs, method_of

EXAMPLE = Path(__file__).parents[1] / "examples" / "your_own_method.py"
NAMED = {"training.recipes", "commands.comparisons", "commands.demo"}
"""Modules of experiments that are about certain methods, and so name them."""
SHARED = {"adaptvit.methods.gates", "adaptvit.methods.losses"}
"""Of the files of methods those that are of none: arithmetic that training needs too."""
ORDINARY = {"full", "random", "grid"}
"""Names of methods that are words of other things too."""


@pytest.fixture(scope="module")
def example() -> type[MethodConfig]:
    spec = spec_from_file_location("norm_method", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["norm_method"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NormConfig


@pytest.fixture
def known(example: type[MethodConfig]) -> Iterator[str]:
    METHODS.register(example)
    yield example.method
    del METHODS._known[example.method]


def test_it_takes_a_dozen_lines() -> None:
    tree = ast.parse(EXAMPLE.read_text())
    (config,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    first = config.decorator_list[0].lineno
    blank = sum(not line.strip() for line in EXAMPLE.read_text().splitlines()[first - 1 : config.end_lineno])
    assert config.end_lineno - first + 1 - blank <= 12


def test_the_commands_take_it(known: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = tmp_path / "run"
    sizes = "--recipe.epochs 1 --recipe.batch_size 64 --recipe.warmup_epochs 0 --recipe.ease_epochs 0"
    words = f"train digits --method-name {known} --method.threshold 0.7 {sizes} --recipe.target 0.85 --output {run}"
    small = "{img_size: 32, patch_size: 8, in_chans: 1, embed_dim: 24, depth: 4, num_heads: 2}"
    assert cli.main([*words.split(), "--model_args", small, "--data.workers", "0"]) == 0
    trained = load(run / "model.safetensors")
    assert trained.config.method == known
    assert trained.dial is not None


def test_a_plain_vit_becomes_one_and_is_measured_drawn_and_compared(
    known: str, example: type[MethodConfig], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    settings = {"img_size": 32, "embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 2}
    vit = timm.create_model("vit_tiny_patch16_224", patch_size=8, **settings)
    dense, fast, images = tmp_path / "dense.safetensors", tmp_path / "fast.safetensors", tmp_path / "images"
    for number in range(12):
        (images / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        picture(number).save(images / "ab"[number % 2] / f"{number}.png")
    save(FullConfig().build(vit), dense)
    assert cli.main(["adapt", str(dense), str(images), str(fast), "--target", "0.85", "--method", known]) == 0
    assert isinstance(load(fast).config, example)
    assert cli.main(["draw", str(fast), str(images / "a"), "--output", str(tmp_path / "drawn")]) == 0
    assert cli.main(["evaluate", str(fast), str(images), "--workers", "0"]) == 0
    few = ["--rounds=1", "--latencies=2", "--timed=2", "--workers=0", f"--output={tmp_path / 'compared'}"]
    words = ["compare", "methods", str(dense), str(images), f"--methods=[{known}]", "--budgets=[0.85]", *few]
    assert cli.main(words) == 0
    assert f"{known}," in (tmp_path / "compared" / "methods.csv").read_text()
    playground = Playground(PlaygroundConfig(models=(str(dense),)))
    view = Session(playground).view(str(dense), known, 0.85)
    assert view.budget.share == pytest.approx(0.85, abs=0.1)


def test_it_is_adapted_and_turned(example: type[MethodConfig]) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=64, depth=4, num_heads=2)
    model = adapt(vit, torch.randn(16, 3, 64, 64), 0.78, example())
    model.compute = 0.79
    assert model.compute == pytest.approx(0.79)


def test_a_package_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "found_method.py").write_text(EXAMPLE.read_text())
    told = tmp_path / "found_method-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: found-method\nVersion: 1.0\n")
    points = "[adaptvit.methods]\nnorm = found_method:NormConfig\nlost = found_method:LostConfig\n"
    (told / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(METHODS, "_known", {**METHODS._known})
    monkeypatch.setattr(METHODS, "_searched", False)
    with pytest.warns(UserWarning, match="the method 'lost' of found_method:LostConfig cannot be loaded: "):
        assert METHODS["norm"].__module__ == "found_method"
    assert "norm" in untrained()


def test_timm_learns_the_names_that_it_declares(example: type[MethodConfig]) -> None:
    names = {"norm_mini_patch16_32": Named(inside="deit_tiny_patch16_224", about="Small.", fields={"threshold": 0.5})}
    kind = type("Other", (example,), {"method": "other_norm", "published": Published(names=names)})
    assert not timm.is_model("norm_mini_patch16_32")
    METHODS.register(kind)
    try:
        model = timm.create_model("norm_mini_patch16_32", img_size=32, depth=2)
        assert method_of("norm_mini_patch16_32") is kind
    finally:
        del METHODS._known["other_norm"]
        default_cfgs.pop("norm_mini_patch16_32")
    assert model.config == kind(threshold=0.5)
    assert model.pretrained_cfg["crop_pct"] == 0.9


@dataclass(frozen=True, kw_only=True)
class GivenConfig(DropConfig):
    """Drops what it is told to, after the first block."""

    method: ClassVar[str] = "given"
    going: Any = None

    def decide(self, before: Tokens, after: Tokens, block: int) -> Any:
        return self.going if block == 0 else None


def test_a_decision_of_another_kind_is_refused_in_a_sentence() -> None:
    vit = small_vit().eval()
    for going in (torch.ones(3, 17), torch.ones(3, 16, dtype=torch.bool), [True]):
        with pytest.raises(TypeError, match=r"GivenConfig\.decide must give a bool tensor \(3, 17\), .* or None; got "):
            GivenConfig(going=going).build(vit)(images(vit))


@pytest.mark.parametrize("layout", [Masked, Packed])
def test_an_image_of_which_nothing_would_go_on_keeps_what_it_has(layout: type[Tokens]) -> None:
    vit = small_vit("average pool, no class token").eval()
    going = torch.ones(3, 16, dtype=torch.bool)
    going[0], going[1, 3:] = False, False
    output = GivenConfig(going=going).build(vit)(images(vit), layout, detailed=True)
    assert output.usage.attended[:, 1].tolist() == [16, 3, 16]
    torch.testing.assert_close(output.logits[::2], vit(images(vit))[::2], atol=1e-5, rtol=1e-5)


def test_two_methods_of_one_name_are_refused(example: type[MethodConfig], known: str) -> None:
    with pytest.raises(ValueError, match="there is a method 'norm' already, of NormConfig"):
        METHODS.register(type("Other", (example,), {"method": "norm"}))


@pytest.mark.parametrize("module", [name for name in modules() if name.split(".")[0] not in ("methods", "flax")])
def test_no_method_is_told_from_others_outside_methods(module: str) -> None:
    """By its class or by its name: what is said there holds for all methods, those of other packages too."""
    if module in NAMED:
        return
    path = modules()[module]
    files = {name for name in imported(path) if name.startswith("adaptvit.methods.")} - SHARED
    assert not files
    words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    assert not words & (set(METHODS) - ORDINARY)
