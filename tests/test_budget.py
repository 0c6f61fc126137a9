from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import images, small_vit

from adaptvit import (
    AdaptiveViT,
    ATSConfig,
    AViTConfig,
    EViTConfig,
    FullConfig,
    MethodConfig,
    ToMeConfig,
    budget,
    load,
    macs,
    measure_plan,
    meet_target,
    save,
)
from adaptvit.budget import Trial, attempt
from adaptvit.methods import turned
from adaptvit.model import Dial


@pytest.mark.parametrize("target", [0.45, 0.6, 0.75])
def test_the_knob_meets_the_target(target: float) -> None:
    vit = small_vit().eval()
    batch = images(vit, count=24)
    model = AViTConfig(gate_scale=4.0).build(vit)
    config = meet_target(model, batch, target)
    assert attempt(model, batch).share == pytest.approx(target, abs=0.02)
    assert config.gate_scale == 4.0


def test_a_budget_is_not_met_in_training_mode() -> None:
    model = AViTConfig().build(small_vit().train())
    with pytest.raises(ValueError, match=r"training mode.*call eval\(\) first"):
        meet_target(model, images(model.vit), 0.6)


@pytest.mark.parametrize("config", [AViTConfig(gate_scale=4.0), ATSConfig(), EViTConfig(), ToMeConfig()], ids=str)
def test_the_dial_sets_other_budgets_without_images(config: MethodConfig, tmp_path: Path) -> None:
    vit = small_vit(img_size=64).eval()
    batch = images(vit, count=24)
    model = turned(config.build(vit), batch, 0.65)
    assert model.compute == pytest.approx(0.65, abs=0.02)
    model.plan = None if model.even else measure_plan(model, batch)
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors").eval()
    assert again.dial == model.dial
    assert again.plan == model.plan
    for share in (0.55, 0.6, 0.7):
        again.compute = share
        assert again.compute == pytest.approx(share)
        assert attempt(again, batch).share == pytest.approx(share, abs=0.03)
    before = again.config
    with pytest.raises(
        ValueError, match=r"compute must lie in \[0\.\d+, 0\.\d+\], what the dial was measured for, got 0.01"
    ):
        again.compute = 0.01
    assert again.config == before


def test_a_model_without_a_dial_says_what_gives_it_one() -> None:
    model = AViTConfig().build(small_vit().eval())
    with pytest.raises(ValueError, match=r"compute needs a dial.*adaptvit\.measure_dial"):
        model.compute = 0.5


@pytest.mark.parametrize(
    ("knobs", "shares"),
    [((), ()), ((1.0,), (0.5, 0.6)), ((1.0, 2.0), (0.6, 0.5)), ((1.0, 1.0), (0.5, 0.6)), (("a",), (1,))],
)
def test_a_dial_that_says_nothing_is_refused(knobs: tuple, shares: tuple) -> None:
    with pytest.raises(ValueError, match=r"Dial\.knobs"):
        Dial(knobs, shares)


def test_of_a_built_model_only_the_knob_can_be_set() -> None:
    model = ATSConfig(blocks=(1, 2)).build(small_vit())
    model.config = replace(model.config, rate=0.5)
    with pytest.raises(ValueError, match=r"ATSConfig\.tokens was read when this model was built, where rate can still"):
        model.config = replace(model.config, tokens=3)
    with pytest.raises(TypeError, match="built from ATSConfig, got AViTConfig"):
        model.config = AViTConfig()
    assert model.config == ATSConfig(blocks=(1, 2), rate=0.5)


def test_a_target_above_all_computes_everything() -> None:
    vit = small_vit().eval()
    batch = images(vit)
    config = meet_target(AViTConfig().build(vit), batch, 1.0)
    assert torch.equal(config.build(vit)(batch), FullConfig().build(vit)(batch))


@pytest.mark.parametrize(
    ("config", "target", "said"),
    [
        (FullConfig(), 0.5, "FullConfig has no knob"),
        (AViTConfig(), 0.0, r"target must lie in \(0, 1\].*got 0.0"),
        (AViTConfig(), 1.2, r"target must lie in \(0, 1\].*got 1.2"),
        (AViTConfig(), 0.01, r"no gate_center meets the target of 0.01 \(share\): the nearest is 0\.\d+"),
    ],
    ids=str,
)
def test_impossible_targets_are_refused(config: object, target: float, said: str) -> None:
    vit = small_vit().eval()
    with pytest.raises(ValueError, match=said):
        meet_target(config.build(vit), images(vit), target)


def test_a_budget_in_gmacs_is_met_and_each_trial_told() -> None:
    vit = small_vit().eval()
    batch = images(vit, count=24)
    labels = vit(batch).argmax(dim=1)
    dense = attempt(FullConfig().build(vit), batch, labels)
    assert (dense.knob, dense.top1) == (None, 1.0)
    told: list[Trial] = []
    config = meet_target(ATSConfig().build(vit), batch, 0.7 * dense.gmacs, "gmacs", 0.02, labels, told.append)
    assert told[-1].gmacs == pytest.approx(0.7 * dense.gmacs, rel=0.02)
    assert told[-1].knob == config.rate
    assert all(0 <= trial.top1 <= 1 for trial in told)


def test_a_trial_tells_how_far_off_its_share_is_to_be_expected() -> None:
    vit = small_vit().eval()
    batch = images(vit, count=24)
    model = ATSConfig().build(vit)
    with torch.inference_mode():
        shares = macs(model(batch, detailed=True).usage, model.shape).double() / (attempt(model, batch).gmacs * 1e9)
    trial = attempt(model, batch)
    assert trial.share_error == pytest.approx(trial.share * shares.std().item() / 24**0.5)
    assert trial.share_error > 0
    assert attempt(ToMeConfig(r=2).build(vit), batch).share_error == 0
    assert attempt(model, batch[:1]).share_error is None


def test_a_budget_in_images_per_second_is_met_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = small_vit().eval()
    batch = images(vit)

    def clock(model: AdaptiveViT, *_: object) -> Trial:
        knob = model.config.gate_center
        return Trial(knob, 0.5, 0.1, images_per_s=1e5 / (knob + 1010), top1=None)

    monkeypatch.setattr(budget, "attempt", clock)
    config = meet_target(AViTConfig().build(vit), batch, 200.0, "images_per_s")
    assert 1e5 / (config.gate_center + 1010) == pytest.approx(200, rel=0.01)
    with pytest.raises(
        ValueError, match=r"no gate_center meets the target of 20000 \(images_per_s\): the nearest is 1e\+04"
    ):
        meet_target(AViTConfig().build(vit), batch, 2e4, "images_per_s")
