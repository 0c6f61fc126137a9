"""What somebody puts into a ViT's blocks after a model was built acts, or is refused."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from models import DROP_NOTHING, METHODS, images, small_vit, vary
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from adaptvit import Masked, Packed, save
from adaptvit.model import AdaptiveViT

MAPS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


class LowRank(nn.Module):
    """LoRA: a frozen map, and two small ones beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def low_rank(block: nn.Module, name: str) -> None:
    block.set_submodule(name, LowRank(block.get_submodule(name)))


def doubled(block: nn.Module, name: str) -> None:
    base = block.get_submodule(name)
    other = Doubled(base.in_features, base.out_features)
    other.load_state_dict(base.state_dict())
    block.set_submodule(name, other)


def weight_norm(block: nn.Module, name: str) -> None:
    layer = parametrizations.weight_norm(block.get_submodule(name))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(1.5)


def pruned(block: nn.Module, name: str) -> None:
    prune.random_unstructured(block.get_submodule(name), "weight", 0.5)
    with torch.no_grad():
        block.get_submodule(name).weight_orig.mul_(1.5)  # a step, which the weight follows when it is next called


def hooked(block: nn.Module, name: str) -> None:
    block.get_submodule(name).register_forward_hook(lambda layer, given, out: 1.5 * out)


PUT_IN = {put.__name__: put for put in (low_rank, doubled, weight_norm, pruned, hooked)}


def put(model: AdaptiveViT, into: Callable[[nn.Module, str], None]) -> AdaptiveViT:
    torch.manual_seed(1)
    for block in model.vit.blocks:
        for name in MAPS:
            into(block, name)
    return model


@pytest.mark.parametrize("into", PUT_IN)
@pytest.mark.parametrize("method", DROP_NOTHING)
def test_where_nothing_is_dropped_it_acts_as_in_the_vit(method: str, into: str) -> None:
    vit = small_vit(dtype=torch.float64).eval()
    model, batch = DROP_NOTHING[method].build(vit).to(torch.float64).eval(), images(vit, dtype=torch.float64)
    before = model(batch)
    put(model, PUT_IN[into]).to(torch.float64)
    for layout in (Masked, Packed):
        torch.testing.assert_close(model(batch, layout), vit(batch), atol=1e-10, rtol=1e-8)
    assert not torch.allclose(model(batch), before, atol=1e-3)


@pytest.mark.parametrize("into", ["low_rank", "hooked"])
@pytest.mark.parametrize("method", METHODS)
def test_layouts_agree_on_it(method: str, into: str) -> None:
    model = vary(METHODS[method].build(small_vit(dtype=torch.float64)).to(torch.float64)).eval()
    put(model, PUT_IN[into]).to(torch.float64)
    batch = images(model.vit, dtype=torch.float64)
    masked, packed = (model(batch, layout, detailed=True) for layout in (Masked, Packed))
    torch.testing.assert_close(packed.logits, masked.logits, atol=1e-10, rtol=1e-8)
    assert torch.equal(packed.usage.attended, masked.usage.attended)


@pytest.mark.parametrize("method", METHODS)
def test_low_rank_maps_have_the_gradients_that_follow_from_the_whole_maps(method: str) -> None:
    model = vary(METHODS[method].build(small_vit(dtype=torch.float64)).to(torch.float64)).train()
    put(model, low_rank).to(torch.float64)
    whole = copy.deepcopy(model)
    for block in whole.vit.blocks:
        for name in MAPS:
            put_in = block.get_submodule(name)
            with torch.no_grad():
                put_in.base.weight += put_in.up.weight @ put_in.down.weight
            block.set_submodule(name, put_in.base.requires_grad_(True))
    batch = images(model.vit, dtype=torch.float64)
    for one in (model, whole):
        torch.manual_seed(0)
        one(batch, detailed=True).logits.square().sum().backward()
    for number, block in enumerate(model.vit.blocks):
        for name in MAPS:
            put_in, wanted = block.get_submodule(name), whole.vit.blocks[number].get_submodule(name).weight.grad
            torch.testing.assert_close(put_in.up.weight.grad, wanted @ put_in.down.weight.T, atol=1e-8, rtol=1e-6)
            torch.testing.assert_close(put_in.down.weight.grad, put_in.up.weight.T @ wanted, atol=1e-8, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*(quantiz|Storage)")  # of torch: what it deprecates
@pytest.mark.parametrize("method", DROP_NOTHING)
def test_dynamic_int8_maps_act_as_in_the_vit(method: str) -> None:
    model = DROP_NOTHING[method].build(small_vit()).eval()
    batch = images(model.vit)
    before = model(batch)
    model.vit = torch.ao.quantization.quantize_dynamic(model.vit, {nn.Linear}, dtype=torch.qint8)
    assert model.vit.blocks[0].attn.qkv.weight().dtype == torch.qint8
    wanted = model.vit(batch)
    rounding = (wanted - before).abs().max()  # by steps that follow the largest value of the tokens at hand
    for layout in (Packed, Masked):
        assert (model(batch, layout) - wanted).abs().max() < 1.5 * rounding
    assert 0 < rounding < 0.2 * before.std()


@pytest.mark.parametrize("into", ["low_rank", "doubled", "weight_norm", "pruned"])
def test_a_file_that_could_not_be_read_again_is_not_written(into: str, tmp_path: Path) -> None:
    model = put(METHODS["avit"].build(small_vit()), PUT_IN[into])
    with pytest.raises(
        ValueError, match="has parts that its timm name and arguments do not give, so it cannot be saved"
    ):
        save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_a_hook_on_a_block_or_its_attention_is_refused(method: str) -> None:
    for part in ("blocks.2", "blocks.1.attn"):
        model = METHODS[method].build(small_vit()).eval()
        hook = model.vit.get_submodule(part).register_forward_hook(lambda *_: None)
        with pytest.raises(NotImplementedError, match=rf"in block {part[7]} of test_vit would not be called"):
            model(images(model.vit))
        hook.remove()
        model(images(model.vit))


def test_what_is_put_around_a_block_is_refused() -> None:
    class Wrapper(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block
            self.forward = partial(block.forward)

    model = METHODS["avit"].build(small_vit()).eval()
    model.vit.blocks[3] = Wrapper(model.vit.blocks[3])
    with pytest.raises(NotImplementedError, match="Wrapper around block 3 of test_vit would not act"):
        model(images(model.vit))
