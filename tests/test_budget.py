import pytest
import torch
from models import images, small_vit

from adaptvit import AdaptiveViT, ATSConfig, AViTConfig, FullConfig, budget, meet_target
from adaptvit.budget import Trial, attempt


@pytest.mark.parametrize("target", [0.45, 0.6, 0.75])
@pytest.mark.parametrize("training", [False, True])
def test_the_knob_meets_the_target(target: float, training: bool) -> None:
    vit = small_vit().train(training)
    batch = images(vit, count=24)
    model = AViTConfig(gate_scale=4.0).build(vit)
    config = meet_target(model, batch, target)
    assert attempt(model, batch).share == pytest.approx(target, abs=0.02)
    assert vit.training is training
    assert config.gate_scale == 4.0


def test_a_target_above_all_computes_everything() -> None:
    vit = small_vit().eval()
    batch = images(vit)
    config = meet_target(AViTConfig().build(vit), batch, 1.0)
    assert torch.equal(config.build(vit)(batch).logits, FullConfig().build(vit)(batch).logits)


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
