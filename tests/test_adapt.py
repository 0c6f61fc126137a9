"""Pretrained ViTs made adaptive without training."""

from pathlib import Path

import pytest
import torch
from models import images, small_vit
from torch import nn

from adaptvit import (
    AViTConfig,
    CalibratedConfig,
    EViTConfig,
    FullConfig,
    MergeConfig,
    MethodConfig,
    ToMeConfig,
    adapt,
    load,
    meet_target,
    save,
)
from adaptvit.budget import attempt
from adaptvit.methods import METHODS, untrained
from adaptvit.methods.losses import divergence as apart
from adaptvit.methods.merge import SLOPES
from adaptvit.methods.merging import MergingViT


@pytest.mark.parametrize("target", [0.55, 0.8])
@pytest.mark.parametrize("method", untrained())
def test_every_method_meets_the_target_and_leaves_the_vit_as_it_was(method: str, target: float) -> None:
    vit = small_vit(img_size=64)
    batch = images(vit, count=24)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    model = adapt(vit, batch, target, METHODS[method]())
    assert attempt(model, batch).share == pytest.approx(target, abs=0.02)
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    assert not model.training
    assert not model.vit.training
    assert (model.vit is vit) == (method != "avit")
    vit.eval()
    torch.testing.assert_close(model.vit(batch), vit(batch), atol=1e-4, rtol=1e-4)


def test_tome_at_a_budget_merges_as_evenly_as_it_can() -> None:
    vit = small_vit(img_size=64).eval()
    r = adapt(vit, images(vit, count=2), 0.6, ToMeConfig()).config.schedule(4)
    assert max(r) - min(r) <= 1


@pytest.mark.parametrize(("config", "classes"), [(MergeConfig(), 7), (CalibratedConfig(), 0)])
def test_merging_is_where_it_changes_predictions_or_features_least(
    config: MethodConfig, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = small_vit(img_size=64, depth=12, num_classes=classes).eval()
    batch, divergence = images(vit, count=8), {}

    def recorded(self: MergingViT, vit: nn.Module, config: MethodConfig) -> None:
        built(self, vit, config)
        models.append(self)

    models, built = list[MergingViT](), MergingViT.__init__
    monkeypatch.setattr(MergingViT, "__init__", recorded)
    chosen = config.fitted(vit, batch, 0.8)
    monkeypatch.undo()
    with torch.inference_mode():
        dense = vit(batch)
        for model in models:
            if type(model) is MergingViT and type(model.config) is type(config) and model.config != config:
                divergence[model.config] = apart(model(batch), dense, headless=not classes).item()
    assert len({*divergence.values()}) == 1 + len(SLOPES)
    assert any(not tried.merges(0, 12) for tried in divergence)  # some begin late
    assert divergence[chosen.config] == min(divergence.values())


def test_merging_goes_as_low_as_an_even_schedule() -> None:
    vit = small_vit(img_size=64).eval()
    batch = images(vit, count=24)
    with pytest.raises(ValueError, match="no rate meets the target"):
        meet_target(ToMeConfig(inflection=1.0).build(vit), batch, 0.45)
    assert attempt(adapt(vit, batch, 0.45), batch).share == pytest.approx(0.45, abs=0.02)


def test_a_model_that_merges_little_can_be_steered_far_later(tmp_path: Path) -> None:
    vit = small_vit(img_size=64).eval()
    batch = images(vit, count=24)
    save(adapt(vit, batch, 0.95), tmp_path / "merge.safetensors")
    model = load(tmp_path / "merge.safetensors").eval()
    meet_target(model, batch, 0.5)
    assert attempt(model, batch).share == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("method", "flavour", "target", "kind", "said"),
    [
        ("merge", "class token", 0.1, ValueError, r"no rate meets the target of 0.1 \(share\)"),
        ("calibrated", "class token", 0.1, ValueError, r"no rate meets the target of 0.1 \(share\)"),
        ("tome", "class token", 0.1, ValueError, r"no rate meets the target of 0.1"),
        ("ats", "class token", 0.05, ValueError, "no rate meets the target"),
        (
            "avit",
            "average pool, no class token",
            0.5,
            TypeError,
            "a gate needs a class token, but .* pools all",
        ),
        ("avit", "QK norm", 0.0, ValueError, r"target must lie in \(0, 1\]"),
        (
            "merge",
            "mixer",
            0.5,
            TypeError,
            "merging by similarity needs attention, but the blocks of .* have",
        ),
        ("full", "class token", 0.5, ValueError, "FullConfig has no knob to move"),
        ("adavit", "class token", 0.5, ValueError, "AdaViT decides by what training gives it"),
    ],
)
def test_what_a_vit_or_a_method_cannot_do_is_said(
    method: str, flavour: str, target: float, kind: type[Exception], said: str
) -> None:
    vit = small_vit(flavour).eval()
    with pytest.raises(kind, match=said):
        adapt(vit, images(vit), target, METHODS[method]())


def test_what_is_no_plain_vit_or_no_config_is_refused_in_a_sentence() -> None:
    vit = small_vit()
    with pytest.raises(TypeError, match=r"config must be a method's, such as adaptvit\.EViTConfig\(\), got 'evit'"):
        adapt(vit, images(vit), 0.6, "evit")
    with pytest.raises(TypeError, match=r"config must be a method's"):
        adapt(vit, images(vit), 0.6, EViTConfig)
    with pytest.raises(TypeError, match="adapt takes a plain ViT, got a Full: move its budget"):
        adapt(FullConfig().build(vit), images(vit), 0.6)


def test_fields_that_fitting_replaces_are_named() -> None:
    vit = small_vit(img_size=64)
    with pytest.warns(UserWarning, match=r"AViTConfig\.gate_scale is fitted to the images: .*, not the 5\.0 given"):
        adapt(vit, images(vit, count=4), 0.8, AViTConfig(gate_scale=5.0))
