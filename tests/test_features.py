"""Maps in which every patch has a vector: timm's with nothing dropped, and what became of it where some are."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import FLAVOURS, METHODS, ONE_OF_EACH, images, small_vit, vary
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div, normalize
from torch.utils.flop_counter import FlopCounterMode

from adaptvit import (
    AViTConfig,
    Dense,
    DynamicViTConfig,
    EViTConfig,
    FullConfig,
    Masked,
    Packed,
    Plan,
    Slab,
    ToMeConfig,
    adapt,
)
from adaptvit.methods.base import DropConfig
from adaptvit.methods.losses import divergence
from adaptvit.model import AdaptiveViT
from adaptvit.tokens import Tokens

PAGE = Path(__file__).parents[1] / "docs" / "dense.md"
MEAN = "average pool, no class token"
RELEASED = "avit, official"
"""Its pass to the end is of `Masked` alone."""
SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "DINOv3": lambda: timm.create_model("vit_small_patch16_dinov3", img_size=64, **SMALL),
    "EVA-02": lambda: timm.create_model("eva02_tiny_patch14_224", img_size=56, **SMALL),
    "DINOv2 with registers": lambda: timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, **SMALL),
    "BEiT": lambda: timm.create_model("beit_base_patch16_224", img_size=64, **SMALL),
}


def in_float64(vit: nn.Module) -> nn.Module:
    return vit.double().eval()


@cache
def build(method: str, flavour: str = "class token") -> AdaptiveViT:
    return vary(METHODS[method].build(small_vit(flavour, torch.float64))).eval()


def batch_of(model: AdaptiveViT, count: int = 4) -> Tensor:
    return images(model.vit, count, dtype=next(model.parameters()).dtype)


@pytest.mark.parametrize("live", [(), (0, 3, 4), (1, 2, 6), range(8)], ids=str)
def test_tokens_write_into_their_slots_and_leave_the_others(live: tuple[int, ...]) -> None:
    x, canvas = torch.randn(2, 8, 3), torch.randn(2, 8, 3)
    alive = torch.zeros(2, 8, dtype=torch.bool)
    alive[0, list(live)] = True
    alive[1, :3] = True
    wanted = torch.where(alive[..., None], x, canvas)
    before = canvas.clone()
    for layout in (Masked, Packed, Slab):
        assert torch.equal(layout.of(x).keep(alive).write(canvas), wanted)
    index = torch.tensor([[0, 2, 7], [1, 4, 5]])
    alive = torch.zeros_like(alive).scatter(1, index, True)
    for kind in (Masked, Packed, Slab, Dense):
        assert torch.equal(kind.of(x).take(index).write(canvas), torch.where(alive[..., None], x, canvas))
    assert torch.equal(canvas, before)


@pytest.mark.parametrize("name", [*FLAVOURS, *FAMILIES])
def test_with_nothing_dropped_maps_are_timms(name: str) -> None:
    torch.manual_seed(0)
    vit = small_vit(name, torch.float64).eval() if name in FLAVOURS else in_float64(FAMILIES[name]())
    batch = images(vit, 2, dtype=torch.float64)
    model = FullConfig().build(vit)
    with torch.no_grad():
        for how in ({"norm": True}, {"indices": 2, "output_fmt": "NLC"}, {"indices": [-1, 0], "stop_early": True}):
            found = model.forward_intermediates(batch, return_prefix_tokens=True, **how)
            wanted = vit.forward_intermediates(batch, return_prefix_tokens=True, **how)
            if "stop_early" in how:  # which changes what timm's has last
                found, wanted = found[1], wanted[1]
            torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
        maps = model.features(batch, layers=range(model.depth), layout=Masked)
        torch.testing.assert_close(
            maps, vit.forward_intermediates(batch, norm=True, intermediates_only=True), atol=1e-10, rtol=1e-10
        )
        torch.testing.assert_close(model.features(batch), maps[-1], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(model.forward_features(batch), vit.forward_features(batch), atol=1e-10, rtol=1e-10)
    assert [info["num_chs"] for info in model.feature_info] == [info["num_chs"] for info in vit.feature_info]
    assert model.feature_info[0]["reduction"] == vit.feature_info[0]["reduction"]


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "SiglipVision"])
def test_with_nothing_dropped_maps_are_the_hidden_states_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    config = getattr(transformers, f"{kind}Config")(**sizes, intermediate_size=96)
    vit = getattr(transformers, f"{kind}Model")(config).double().eval()
    batch = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = FullConfig().build(vit)
    with torch.no_grad():
        told = vit(batch, output_hidden_states=True)
        for layout in (Masked, Packed):
            maps = model.features(batch, layers=range(3), norm=False, layout=layout)
            for found, wanted in zip(maps, told.hidden_states[1:], strict=True):
                torch.testing.assert_close(found.flatten(2).mT, wanted[:, model.prefix :], atol=1e-10, rtol=1e-10)
            last = model.features(batch, layout=layout)
            wanted = told.last_hidden_state[:, model.prefix :]
            torch.testing.assert_close(last.flatten(2).mT, wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("method", "flavour"),
    [*((name, "class token") for name in METHODS), *((name, MEAN) for name in ONE_OF_EACH if name != RELEASED)],
)
def test_layouts_have_the_same_maps_and_records(method: str, flavour: str) -> None:
    model = build(method, flavour)
    batch = batch_of(model)
    layouts: list[type[Tokens]] = [Packed, Slab, Dense] if model.even else [Packed, Slab]
    if method == RELEASED:
        layouts = []
    with torch.no_grad():
        wanted, record = model.features(batch, range(model.depth), Masked, with_prefix=True, detailed=True)
        for layout in layouts:
            found, other = model.features(batch, range(model.depth), layout, with_prefix=True, detailed=True)
            torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
            assert torch.equal(record.macs, other.macs)
        x = model.forward_features(batch)
        assert x.shape == (4, model.prefix + 16, 64)
        if model.read is not None or method in ("tome", "merge", "grid", "full", "adavit"):
            torch.testing.assert_close(model.forward_head(x), model(batch))


@pytest.mark.parametrize("method", [name for name in ONE_OF_EACH if name != RELEASED])
def test_macs_of_features_are_what_torch_counts(method: str) -> None:
    model = vary(METHODS[method].build(small_vit())).eval().requires_grad_(False)
    image, costs = images(model.vit, 1), []
    for layers in ([-1], [0]):
        with FlopCounterMode(display=False) as counter:
            _, usage = model.features(image, layers, layout=Packed, detailed=True)
        costs.append(usage.macs.item())
        assert 2 * costs[-1] == counter.get_total_flops()
    whole, few = costs  # behind the first block nobody asks for the whole of the last, which AdaViT may have off
    assert whole > few or not usage.updated[:, -1].any()


def test_merged_patches_share_their_tokens_vector() -> None:
    for method in ("tome", "merge", "grid"):
        model = build(method)
        with torch.no_grad():
            x, usage = model.features(batch_of(model), detailed=True)
        for vectors, groups in zip(x.flatten(2).mT, usage.groups[:, -1], strict=True):
            same = (vectors[:, None] == vectors).all(dim=2)
            assert torch.equal(same, groups[:, None] == groups)
            assert same.sum() > len(same)


@dataclass(frozen=True, kw_only=True)
class SomeConfig(DropConfig):
    """Drops patches 3 and 5 behind the second block."""

    method = "some"
    gone = (3, 5)

    def decide(self, before: Tokens, after: Tokens, block: int) -> Tensor | None:
        slots = torch.arange(after.shape[1])
        return (~torch.isin(slots, torch.tensor(self.gone) + 1)).expand(after.shape) if block == 1 else None


def test_a_dropped_patch_has_what_it_had_last() -> None:
    vit = small_vit(dtype=torch.float64).eval()
    batch = images(vit, dtype=torch.float64)
    model, gone = SomeConfig().build(vit), list(SomeConfig.gone)
    with torch.no_grad():
        *_, third, last = (x.flatten(2).mT for x in model.features(batch, layers=(2, 3)))
        _, second, other, _ = vit.forward_intermediates(batch, norm=True, intermediates_only=True, output_fmt="NLC")
    for x in (third, last):
        torch.testing.assert_close(x[:, gone], second[:, gone], atol=1e-10, rtol=1e-10)
    stay = [patch for patch in range(16) if patch not in gone]
    assert (third[:, stay] - second[:, stay]).abs().amax(dim=2).min() > 0.01
    assert (third[:, stay] - other[:, stay]).abs().max() > 1e-6  # the others no longer attended to those


def test_a_patch_that_is_dropped_in_training_has_what_it_had_last() -> None:
    torch.manual_seed(0)
    model = vary(DynamicViTConfig(blocks=(2,), keep_rate=0.5).build(small_vit(dtype=torch.float64)))
    model.train()
    (second, last), usage = model.features(batch_of(model), layers=(1, 3), norm=False, detailed=True)
    kept = usage.live[:, -1, 1:]
    assert torch.equal((second == last).all(dim=1).flatten(1), ~kept)
    assert 0 < kept.sum() < kept.numel()


def test_fused_patches_have_the_fused_tokens_vector() -> None:
    model = EViTConfig(blocks=(0, 2), keep_rate=0.6).build(small_vit(dtype=torch.float64).eval())
    batch = batch_of(model)
    with torch.no_grad():
        (first, second, third, last), usage = model.features(batch, layers=range(4), detailed=True)
    for number, x in enumerate((first, second, third)):
        live, fused = usage.live[:, number + 1, 1:], usage.fused[:, number + 1, 1:]
        for vectors, alive, holds in zip(x.flatten(2).mT, live, fused, strict=True):
            own = vectors[holds]  # a fused token that is dropped is in the next one; one that stays, stays by itself
            assert all((own == vector).all(dim=1).any() for vector in vectors[~alive])
            distinct = vectors.unique(dim=0)
            assert len(distinct) == alive.sum()
    assert last.shape == first.shape


def test_features_of_a_vit_read_patches_to_their_own_end() -> None:
    model = AViTConfig(gate_scale=4.0, gate_center=2.0).build(small_vit(dtype=torch.float64).eval())
    batch = batch_of(model, 8)
    with torch.no_grad():
        found, usage = model.features(batch, detailed=True)
        assert torch.equal(usage.depth, model.to_the_end(batch).usage.depth)
        assert not torch.equal(usage.depth, model(batch, detailed=True).usage.depth)
        torch.testing.assert_close(model.train().features(batch, layout=Masked), found)


@pytest.mark.parametrize("method", ONE_OF_EACH)
def test_gradients_of_maps_reach_the_blocks_and_the_terms_come_along(method: str) -> None:
    torch.manual_seed(0)
    model = vary(METHODS[method].build(small_vit())).train()
    maps = model.features(images(model.vit), layers=(1, 3))
    assert all(one.isfinite().all() for one in maps)
    sum(one.square().mean() for one in maps).backward()
    assert all(parameter.grad is not None for parameter in model.vit.blocks.parameters())
    if method == "avit":
        carried = torch.autograd.grad(0 * model.features(images(model.vit)).sum(), model.vit.blocks[0].norm1.weight)
        terms = sum(model(images(model.vit), detailed=True).terms.values())
        wanted = torch.autograd.grad(terms, model.vit.blocks[0].norm1.weight)
        torch.testing.assert_close(carried, wanted)
        assert wanted[0].abs().max() > 0


def test_a_slab_with_too_few_rows_is_run_again() -> None:
    model = vary(METHODS["ats"].build(small_vit(dtype=torch.float64))).eval()
    batch = batch_of(model, 32)
    with torch.no_grad():
        wanted = model.features(batch, layout=Packed)
        model.plan = Plan(means=[1.0] * 3, spreads=[0.0] * 3, images=10**6)
        torch.testing.assert_close(model.features(batch, layout=Slab), wanted, atol=1e-10, rtol=1e-10)


def test_timms_tools_take_an_adaptive_model() -> None:
    model = ToMeConfig(r=2).build(small_vit().eval())
    getter = FeatureGetterNet(model, out_indices=(1, -1))
    assert [one.shape for one in getter(images(model.vit))] == [(3, 64, 4, 4)] * 2
    assert (getter.feature_info.channels(), getter.feature_info.reduction()) == ([64, 64], [8, 8])
    named = timm.create_model("tome_tiny_patch16_224", features_only=True, out_indices=(0, 1), img_size=32, depth=2)
    assert [one.shape for one in named(torch.randn(1, 3, 32, 32))] == [(1, 192, 2, 2)] * 2
    layers = model.get_intermediate_layers(images(model.vit), n=[0, 3], reshape=True, norm=True)
    torch.testing.assert_close(layers, model.features(images(model.vit), layers=[0, 3]))


def test_what_maps_cannot_be_had_of_is_refused() -> None:
    model = build("full")
    batch = batch_of(model)
    for layers in ([4], [-5], [], 0, 5):
        with pytest.raises(ValueError, match=re.escape("layers must be blocks of test_vit, 0..3")):
            model.features(batch, layers=layers)
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NLC, got 'NHWC'"):
        model.forward_intermediates(batch, output_fmt="NHWC")
    for asked in ({"attn_mask": torch.ones(1)}, {"is_causal": True}):
        with pytest.raises(NotImplementedError, match="dense decides which tokens attend to which"):
            model.forward_features(batch, **asked)
    with pytest.raises(ValueError, match="layout=Dense"):
        build("ats").features(batch, layout=Dense)
    with pytest.raises(ValueError, match="images have shape"):
        model.features(batch[:, :1])


def test_images_that_are_not_finite_have_no_finite_map() -> None:
    for method in ("full", "ats", "tome", "evit"):
        batch = batch_of(build(method)).clone()
        batch[1, 0, 3, 3] = torch.nan
        with torch.no_grad():
            x = build(method).features(batch)
        assert x.isfinite().flatten(1).all(dim=1).tolist() == [True, False, True, True]


def test_embeddings_of_a_model_without_classes_find_their_image() -> None:
    vit = small_vit(num_classes=0).eval()
    gallery = images(vit, 16, seed=5)
    with torch.no_grad():
        dense = vit(gallery)
        torch.testing.assert_close(FullConfig().build(vit)(gallery), dense, atol=1e-5, rtol=1e-5)
        model = adapt(vit, gallery, 0.75, ToMeConfig())
        found = model(gallery)
    assert model.num_classes == 0
    assert found.shape == dense.shape == (16, 64)
    assert not torch.allclose(found, dense, atol=1e-3)
    alike = normalize(found, dim=1) @ normalize(dense, dim=1).mT
    assert torch.equal(alike.argmax(dim=1), torch.arange(16))
    torch.testing.assert_close(divergence(found, dense, headless=True), 1 - cosine_similarity(found, dense).mean())


def test_divergence_of_classes_is_in_nats() -> None:
    given, wanted = torch.randn(2, 5, 7, dtype=torch.float64).log_softmax(dim=-1)
    expected = kl_div(given, wanted, reduction="batchmean", log_target=True)
    torch.testing.assert_close(divergence(given + 3, wanted - 1, headless=False), expected)
    assert divergence(wanted, 2 * wanted, headless=True).item() == pytest.approx(0, abs=1e-12)


@cache
def code() -> tuple[str, ...]:
    return tuple(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))


def test_the_page_runs() -> None:
    features, pyramid, detector, embeddings, tower = code()
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec("\n".join((features, pyramid, embeddings)), names)
    assert names["x"].shape == (2, 192, 4, 4)
    maps = names["Pyramid"](names["model"])(names["images"])
    assert [tuple(one.shape[1:]) for one in maps.values()] == [(64, 8, 8), (64, 4, 4), (64, 2, 2)]
    if find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed, so the detector of docs/dense.md did not run")
    exec(detector, names)
    assert all(loss.isfinite() for loss in names["losses"].values())
    blocks = names["model"].vit.blocks
    assert all(parameter.grad.isfinite().all() for parameter in blocks.parameters())
    assert blocks[0].attn.qkv.weight.grad.abs().max() > 0
    exec(tower, names)
    assert names["tokens"].shape == names["tower"](torch.zeros(2, 3, 64, 64)).shape == (2, 4, 1024)
