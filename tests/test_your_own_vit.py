"""A family kept outside the package, with rotary positions, obeys the facts by its row."""

import re
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from adaptvit import (
    FAMILIES,
    AdaViTConfig,
    ATSConfig,
    AViTConfig,
    DynamicViTConfig,
    EViTConfig,
    FullConfig,
    GridConfig,
    Masked,
    MergeConfig,
    MethodConfig,
    Packed,
    ToMeConfig,
    adapt,
    dense_macs,
    save,
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "your_own_vit.py"
METHODS: dict[str, MethodConfig] = {
    "full": FullConfig(),
    "avit": AViTConfig(gate_scale=4.0, gate_center=2.0),
    "ats": ATSConfig(blocks=(0, 1, 3), rate=0.3),
    "evit": EViTConfig(blocks=(0, 1, 3), keep_rate=0.7),
    "tome": ToMeConfig(r=3),
    "merge": MergeConfig(thresholds=0.3),
    "grid": GridConfig(rate=0.8),
    "dynamicvit": DynamicViTConfig(blocks=(0, 1, 3), select="threshold", threshold=0.5),
    "adavit, patches": AdaViTConfig(policies=("patches",), macs_target=None),
    "adavit, sublayers": AdaViTConfig(policies=("sublayers",), macs_target=None),
}
DROP_NOTHING: dict[str, MethodConfig] = {
    "full": FullConfig(),
    "avit": AViTConfig(gate_center=1e4),
    "ats": ATSConfig(rate=1e6),
    "evit": EViTConfig(keep_rate=1.0),
    "tome": ToMeConfig(r=0),
    "merge": MergeConfig(shift=2.0),
    "grid": GridConfig(rate=0.0),
    "dynamicvit": DynamicViTConfig(keep_rate=1.0),
    "adavit": AdaViTConfig(policies=("patches", "sublayers"), macs_target=None, lean=30.0),
}
EVERY = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:  # the rows go when the tests end
        patch.setattr(FAMILIES, "_families", dict(FAMILIES._families))
        patch.setattr(FAMILIES, "_parts", dict(FAMILIES._parts))
        spec = spec_from_file_location("your_own_vit", EXAMPLE)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        patch.setitem(sys.modules, "your_own_vit", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def vit(example: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    vit = example.TurningViT(size=32, width=64, depth=4, classes=7)
    for weight in vit.parameters():
        if weight.ndim < 2:
            weight.data += 0.3 * torch.randn_like(weight)
        elif weight is not vit.begin:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return vit.double().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    contrasts = torch.tensor([0.3, 1.0, 2.0, 3.0], dtype=torch.float64)[:, None, None, None]
    return torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * contrasts


def build(config: MethodConfig, vit: nn.Module) -> nn.Module:
    """The method on this ViT, with weights of its own that tell tokens and images apart."""
    model = config.build(vit).eval()
    generator = torch.Generator().manual_seed(2)
    own = {name: weight for name, weight in model.named_parameters() if not name.startswith("vit.")}
    for weight in own.values():
        if weight.ndim > 1:
            weight.data.normal_(std=2 * weight[0].numel() ** -0.5, generator=generator)
    return model


@pytest.mark.parametrize("size", [(32, 32), (48, 24)], ids=str)
@pytest.mark.parametrize("method", DROP_NOTHING)
def test_dropping_nothing_is_the_vit(method: str, size: tuple[int, int], vit: nn.Module) -> None:
    batch = torch.randn(3, 3, *size, dtype=torch.float64)
    model = DROP_NOTHING[method].build(vit).eval()
    with torch.no_grad():
        for layout in (Masked, Packed):
            output = model(batch, layout, detailed=True)
            torch.testing.assert_close(output.logits, vit(batch), atol=1e-12, rtol=1e-10)
            assert output.usage.live.all()
    assert output.usage.grid == (size[0] // 8, size[1] // 8)


@EVERY
def test_packed_and_masked_agree_and_images_are_alone(method: str, vit: nn.Module, images: Tensor) -> None:
    model = build(METHODS[method], vit)
    with torch.no_grad():
        packed, masked = (model(images, layout, detailed=True) for layout in (Packed, Masked))
        torch.testing.assert_close(packed.logits, masked.logits, atol=1e-12, rtol=1e-10)
        assert packed.usage == masked.usage
        for number in range(len(images)):
            alone = model(images[number : number + 1], detailed=True)
            torch.testing.assert_close(alone.logits[0], packed.logits[number], atol=1e-12, rtol=1e-10)
            assert alone.usage == packed.usage.of_images(torch.tensor([number]))
        most = FullConfig().build(vit)(images[:1], detailed=True).usage.macs
    assert (packed.usage.macs.double().mean() < 0.98 * most) == (method != "full")


@EVERY
def test_macs_are_what_torch_counts(method: str, vit: nn.Module, images: Tensor) -> None:
    model = build(METHODS[method], vit).requires_grad_(False)
    try:
        for image in images.split(1):
            with FlopCounterMode(display=False) as counter:
                usage = model(image, detailed=True).usage
            assert 2 * int(usage.macs) == counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            vit(images[:1])
        assert 2 * dense_macs(model.shape, usage.grid) == counter.get_total_flops()
    finally:
        vit.requires_grad_(True)


@EVERY
def test_every_part_of_the_vit_has_a_gradient(method: str, vit: nn.Module, images: Tensor) -> None:
    model = build(METHODS[method], vit).train()
    model(images).square().sum().backward()
    without = [name for name, weight in vit.named_parameters() if weight.grad is None or not weight.grad.any()]
    vit.zero_grad()
    model.eval()
    assert not without


@pytest.mark.parametrize("method", ["avit", "ats", "evit", "tome", "merge", "grid"])
def test_packed_training_has_the_gradients_of_masked_training(method: str, vit: nn.Module, images: Tensor) -> None:
    model, found = METHODS[method].build(vit).train(), []
    for layout in (Masked, Packed):
        torch.manual_seed(3)
        output = model(images, layout, detailed=True)
        loss = output.logits.square().sum() + sum(output.terms.values())
        found.append(torch.autograd.grad(loss, list(vit.parameters())))
    model.eval()
    torch.testing.assert_close(*found, atol=1e-12, rtol=1e-8)


def test_rotation_acts_on_the_tokens_that_are_left(vit: nn.Module, images: Tensor) -> None:
    model = METHODS["evit"].build(vit).eval()
    turns = vit.turns
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        before = model(images)
        patch.setattr(vit, "turns", lambda *grid: turns(*grid).roll(1, dims=0))
        assert (model(images) - before).abs().max() > 1e-3


def test_a_budget_is_met(example: ModuleType, vit: nn.Module, images: Tensor) -> None:
    model = adapt(vit, images, 0.7, tolerance=0.1)
    assert model(images, detailed=True).usage.share.mean() == pytest.approx(0.7, abs=0.1)


def test_what_needs_timms_own_blocks_is_refused_by_name(vit: nn.Module) -> None:
    with pytest.raises(TypeError, match="AdaViT needs timm's plain blocks, but TurningViT has Layer"):
        AdaViTConfig().build(vit)


def test_without_its_row_the_argument_is_refused_by_name(example: ModuleType, vit: nn.Module) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FAMILIES, "_families", {})
        with pytest.raises(TypeError, match="tells its blocks turns, of which nothing is known"):
            FullConfig().build(vit)


def test_it_is_stored_by_its_state_dict_alone(vit: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"TurningViT was not made by timm\.create_model"):
        save(FullConfig().build(vit), tmp_path / "own.safetensors")


def test_the_page_shows_the_row_of_the_example() -> None:
    page = (EXAMPLE.parents[1] / "docs" / "your_own_vit.md").read_text()
    (row,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert row in EXAMPLE.read_text()


def test_the_example_runs(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    shares = re.findall(r"(\d+)% of dense MACs", capsys.readouterr().out)
    assert [abs(int(share) - 60) <= 1 for share in shares] == [True, True]
