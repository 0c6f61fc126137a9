import pytest
import torch
from models import images, small_vit

from adaptvit import AViTConfig, FullConfig, meet_target
from adaptvit.budget import executed_share


@pytest.mark.parametrize("target", [0.45, 0.6, 0.75])
@pytest.mark.parametrize("training", [False, True])
def test_the_knob_meets_the_target(target: float, training: bool) -> None:
    vit = small_vit().train(training)
    batch = images(vit, count=24)
    config = meet_target(AViTConfig(gate_scale=4.0), vit, batch, target)
    assert executed_share(config, vit, batch) == pytest.approx(target, abs=0.02)
    assert vit.training is training
    assert config.gate_scale == 4.0


def test_a_target_above_all_computes_everything() -> None:
    vit = small_vit().eval()
    batch = images(vit)
    config = meet_target(AViTConfig(), vit, batch, 1.0)
    assert torch.equal(config.build(vit)(batch).logits, FullConfig().build(vit)(batch).logits)


@pytest.mark.parametrize(
    ("config", "target", "said"),
    [
        (FullConfig(), 0.5, "FullConfig has no knob"),
        (AViTConfig(), 0.0, r"target must lie in \(0, 1\].*got 0.0"),
        (AViTConfig(), 1.2, r"target must lie in \(0, 1\].*got 1.2"),
        (AViTConfig(), 0.01, r"no gate_center comes down to target 0.01: the least is 0\.\d+ of dense MACs"),
    ],
    ids=str,
)
def test_impossible_targets_are_refused(config: object, target: float, said: str) -> None:
    vit = small_vit().eval()
    with pytest.raises(ValueError, match=said):
        meet_target(config, vit, images(vit), target)
