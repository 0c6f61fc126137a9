"""A whole training: from weights and images to a file that evaluate, predict and draw take."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from adaptvit import AdaViTConfig, AViTConfig, FullConfig, MergeConfig, load, save
from adaptvit.budget import Trial
from adaptvit.commands.adapt import set_budget
from adaptvit.data import DataConfig
from adaptvit.training.recipe import Recipe
from adaptvit.training.recipes import RECIPES
from adaptvit.training.run import Run, train_run
from adaptvit.weights.opening import open_model, start_from

SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 3, "patch_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright and dark noise, in two splits."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        for label, level in (("bright", 180), ("dark", 60)):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(level - 50, level + 50, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{number}.png")
    return root


@pytest.fixture
def small(folder: Path, tmp_path: Path) -> Run:
    return Run(
        model="vit_tiny_patch16_224",
        model_args=SMALL,
        img_size=32,
        method=AViTConfig(class_token="stays", sharpness=2.0),
        fit=True,
        data=DataConfig(root=folder, scale=(0.5, 1.0), workers=0, mean=(0.4, 0.5, 0.6)),
        recipe=Recipe(epochs=2, batch_size=8, target=0.6, ease_epochs=1.0, steer_every=2),
        output=tmp_path / "run",
    )


def test_a_run_leaves_a_model_at_its_target_and_its_figures(small: Run) -> None:
    outcome = train_run(small)
    stored = load(outcome.file)
    assert stored.config == outcome.model.config
    assert stored.pretrained_cfg["mean"] == (0.4, 0.5, 0.6)
    assert stored.pretrained_cfg["input_size"] == (3, 32, 32)
    figures = json.loads((small.output / "result.json").read_text())
    assert figures == outcome.result.figures
    assert figures["gmacs"] / figures["gmacs_dense"] == pytest.approx(0.6, abs=0.1)
    assert figures["images"] == 12
    assert len(outcome.history) == 2


@pytest.mark.parametrize(("steered", "trained"), [(0.7, None), (None, 0.7)])
def test_noisy_gates_are_set_to_the_target_as_evaluation_decides(
    small: Run, steered: float | None, trained: float | None
) -> None:
    config = AdaViTConfig(macs_target=trained, patch_threshold=0.5)
    recipe = replace(small.recipe, target=steered)
    figures = train_run(replace(small, method=config, recipe=recipe)).result.figures
    assert figures["gmacs"] / figures["gmacs_dense"] == pytest.approx(0.7, abs=0.1)


def test_a_method_is_fitted_to_a_budget(small: Run) -> None:
    untargeted = replace(small.recipe, target=None)
    for method in (AdaViTConfig(macs_target=None), MergeConfig()):
        with pytest.raises(ValueError, match=r"Run\.fit needs a budget to fit to: set Recipe\.target"):
            replace(small, method=method, recipe=untargeted)
    assert replace(small, method=AdaViTConfig(macs_target=0.7), recipe=untargeted).target == 0.7


def test_thresholds_are_fitted_before_training(small: Run) -> None:
    outcome = train_run(replace(small, method=MergeConfig()))
    assert isinstance(outcome.model.config, MergeConfig)
    assert len(set(outcome.model.config.thresholds)) == SMALL["depth"]  # one number for all blocks before
    assert outcome.result.figures["gmacs"] / outcome.result.figures["gmacs_dense"] == pytest.approx(0.6, abs=0.1)


def test_a_finished_run_is_refused_unless_resumed_and_then_the_same(small: Run) -> None:
    train_run(small)
    before = (small.output / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="resume it"):
        train_run(small)
    train_run(small, resume=True)
    assert (small.output / "model.safetensors").read_bytes() == before


def test_weights_are_started_from_and_their_head_left_out(small: Run, tmp_path: Path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=5, **SMALL)
    save(FullConfig().build(source), tmp_path / "weights.safetensors")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2, **SMALL)
    head = vit.head.weight.clone()
    assert not start_from(vit, tmp_path / "weights.safetensors")
    assert torch.equal(vit.blocks[2].mlp.fc1.weight, source.blocks[2].mlp.fc1.weight)
    assert torch.equal(vit.head.weight, head)
    same = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=5, **SMALL)
    assert start_from(same, tmp_path / "weights.safetensors")
    assert torch.equal(same.head.weight, source.head.weight)
    with pytest.raises(ValueError, match="does not fit"):
        start_from(timm.create_model("vit_tiny_patch16_224", **{**SMALL, "depth": 5}), tmp_path / "weights.safetensors")


def test_what_does_not_go_together_is_refused(small: Run) -> None:
    with pytest.raises(ValueError, match=r"Run\.fit is for methods with a knob, which full has not"):
        replace(small, method=FullConfig())
    with pytest.raises(ValueError, match="a model of EViT: take 'deit_small_patch16_224', and the method 'evit'"):
        replace(small, model="evit_small_patch16_224")
    with pytest.raises(ValueError, match=r"Run\.model must be the name of a timm ViT, got 'vit_huge'"):
        replace(small, model="vit_huge")
    with pytest.raises(ValueError, match=r"Run\.weights .* one of them"):
        replace(small, weights=Path("here"), pretrained=True)


def test_digits_recipe_takes_images_of_its_own(folder: Path, tmp_path: Path) -> None:
    digits = RECIPES["digits"]()
    recipe = replace(digits.recipe, epochs=2, batch_size=8, ease_epochs=1, warmup_epochs=0)
    outcome = train_run(replace(digits, data=DataConfig(root=folder, workers=0), recipe=recipe, output=tmp_path))
    assert outcome.model.pretrained_cfg["input_size"] == (1, 32, 32)
    assert outcome.model.pretrained_cfg["mean"] == pytest.approx((0.5,), abs=0.05)


@pytest.mark.parametrize("name", ["imagenette_evit", pytest.param("imagenette_dynamicvit", marks=pytest.mark.long)])
def test_recipes_of_methods_with_fixed_counts_meet_their_target(name: str, folder: Path, tmp_path: Path) -> None:
    made = RECIPES[name]()
    recipe = replace(made.recipe, epochs=2, batch_size=8, target=0.7, steer_every=1)
    method = replace(made.method, blocks=(0, 1))
    made = replace(made, model_args=SMALL, img_size=64, weights=None, method=method, recipe=recipe, output=tmp_path)
    outcome = train_run(replace(made, data=DataConfig(root=folder, workers=0)))
    assert outcome.result.gmacs / outcome.result.gmacs_dense == pytest.approx(0.7, abs=0.05)
    again = open_model(outcome.file)
    assert again.config == outcome.model.config


@pytest.mark.parametrize(
    "method", ["calibrated", "merge", *(pytest.param(name, marks=pytest.mark.long) for name in ("ats", "avit", "evit"))]
)
def test_a_budget_is_met_without_training(method: str, folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2, **SMALL)
    save(FullConfig().build(vit.eval()), tmp_path / "dense.safetensors")
    told: list[Trial] = []
    dense, at_70, at_50 = (tmp_path / name for name in ("dense.safetensors", "70.safetensors", "50.safetensors"))
    config = set_budget(str(dense), folder, at_70, 0.7, method=method, tell=told.append)
    made = open_model(at_70)
    assert made.config == config
    assert config.method == method
    assert told[-1].share == pytest.approx(0.7, rel=0.05)
    assert all(0 <= trial.top1 <= 1 for trial in told)
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(made.vit(images), open_model(dense).vit(images), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=f"is {method} already"):
        set_budget(str(at_70), folder, at_50, 0.5, method="avit" if method == "ats" else "ats")
    with pytest.raises(ValueError, match="unit 'gmacs' needs a target"):
        set_budget(str(at_70), folder, at_50, unit="gmacs")
    if method == "calibrated":
        assert set_budget(str(dense), folder, at_50, 0.7) == config
    steered = set_budget(str(at_70), folder, at_50)
    moved = getattr(steered, config.knob.field) - getattr(config, config.knob.field)
    assert moved * config.knob.sign < 0
    assert replace(steered, **{config.knob.field: 1.0}) == replace(config, **{config.knob.field: 1.0})
