import pytest
import torch
from models import METHODS, small_vit

from adaptvit import FullConfig, Masked, Packed, dense_macs, macs
from adaptvit.data import Images
from adaptvit.evaluate import evaluate, speed


@pytest.fixture(scope="module")
def data() -> Images:
    generator = torch.Generator().manual_seed(0)
    return Images(torch.randn(10, 3, 32, 32, generator=generator), torch.arange(10) % 7)


@pytest.mark.parametrize("name", METHODS)
def test_both_layouts_evaluate_alike(name: str, data: Images) -> None:
    model = METHODS[name].build(small_vit())
    masked, packed = (evaluate(model, data, layout, batch_size=4) for layout in (Masked, Packed))
    assert (masked.top1, masked.gmacs, masked.depth_mean) == (packed.top1, packed.gmacs, packed.depth_mean)
    assert masked.loss == pytest.approx(packed.loss, rel=1e-5)


def test_the_figures_are_those_of_one_forward_pass(data: Images) -> None:
    model = METHODS["avit"].build(small_vit())
    result = evaluate(model, data, batch_size=4)
    with torch.inference_mode():
        output = model.eval()(data.images)
    right = [int(row.argmax()) == label for row, label in zip(output.logits, data.labels.tolist(), strict=True)]
    among = [label in row.topk(5).indices.tolist() for row, label in zip(output.logits, data.labels, strict=True)]
    assert result.images == 10
    assert result.top1 == pytest.approx(sum(right) / 10)
    assert result.top5 == pytest.approx(sum(among) / 10)
    assert result.gmacs == pytest.approx(macs(output.usage, model.shape).double().mean().item() / 1e9)
    assert result.gmacs_p10 <= result.gmacs <= result.gmacs_p90
    assert torch.equal(result.usage.live, output.usage.live)
    depth = output.usage.patch_depth
    assert (result.depth_min, result.depth_max) == (depth.min(), depth.max())


def test_a_timm_model_costs_all_its_macs(data: Images) -> None:
    vit = small_vit()
    result, full = evaluate(vit, data), evaluate(FullConfig().build(vit), data)
    assert result.gmacs == pytest.approx(dense_macs(FullConfig().build(vit).shape, (4, 4)) / 1e9)
    assert (result.top1, result.depth_min) == (full.top1, 4)


def test_evaluation_leaves_the_mode_as_it_was(data: Images) -> None:
    model = METHODS["full"].build(small_vit()).train()
    evaluate(model, data)
    assert model.training


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(small_vit(), Images(torch.zeros(0, 3, 32, 32), torch.zeros(0)))


def test_speed_times_all_three(data: Images) -> None:
    vit = small_vit()
    figures = speed(vit, METHODS["avit"].build(vit), data.images, rounds=2)
    assert min(figures.dense, figures.masked, figures.packed, figures.gain) > 0
