"""Facts that every method obeys, on every flavour of ViT."""

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise, product

import pytest
import timm
import torch
from models import (
    DROP_NOTHING,
    FLAVOURS,
    HOSTS,
    KINDS,
    METHODS,
    ON_HOSTS,
    ONE_OF_EACH,
    flavours,
    images,
    small_vit,
    vary,
)
from timm.layers import Attention, Mlp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from adaptvit import ATSConfig, AViTConfig, Dense, Masked, Packed, Plan, Slab, Usage, dense_macs, macs, measure_plan
from adaptvit.backbones.forward import scores
from adaptvit.methods import METHODS as ALL
from adaptvit.model import AdaptiveViT

MEAN = "average pool, no class token"
LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)


def takes(method: str, flavour: str) -> bool:
    if flavour in HOSTS:
        whole = "parallel" in flavour and "adavit" in method
        return method in ON_HOSTS and not whole
    stays = "stays" in method and ("average" in flavour or "attention pool" in flavour)  # without a class token
    return flavour in flavours(method) and not stays


def pairs(methods: Iterable[str], flavours: Iterable[str], hosts: Iterable[str] = HOSTS) -> list[tuple[str, str]]:
    """One setting of each method on these flavours and hosts, and every setting on a class token and on a mean, as they
    take."""
    of_methods = [name for name in ONE_OF_EACH if name in methods]
    found = [*product(of_methods, [*flavours, *hosts]), *product(methods, ("class token", MEAN))]
    return [pair for pair in dict.fromkeys(found) if takes(*pair)]


def each(methods: Iterable[str], flavours: Iterable[str], hosts: Iterable[str] = HOSTS) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("method", "flavour"), pairs(methods, flavours, hosts))


def each_with_layouts(methods: Iterable[str], flavours: Iterable[str]) -> pytest.MarkDecorator:
    """The same in both layouts, on hosts in one."""
    found = [(*pair, layout) for pair in pairs(methods, flavours, []) for layout in (Masked, Packed)]
    found += [(*pair, Packed) for pair in pairs(methods, flavours) if pair[1] in HOSTS]
    return pytest.mark.parametrize(("method", "flavour", "layout"), found)


plain = cache(small_vit)


@cache
def build(method: str, flavour: str = "class token", **settings: object) -> AdaptiveViT:
    """One for all tests, which copy what they change."""
    return vary(METHODS[method].build(plain(flavour, **settings)))


def assert_same_record(record: Usage, expected: Usage) -> None:
    for name, value in vars(expected).items():
        found = getattr(record, name)
        assert torch.equal(found, value) if isinstance(value, Tensor) else found == value, name


@pytest.mark.parametrize(
    ("method", "flavour"), [pair for pair in product(METHODS, FLAVOURS) if pair[1] not in flavours(pair[0])]
)
def test_what_a_method_needs_is_refused_by_name_where_it_is_missing(method: str, flavour: str) -> None:
    with pytest.raises(TypeError, match=r"needs (attention|token norms)"):
        METHODS[method].build(plain(flavour))


@each(DROP_NOTHING, FLAVOURS)
def test_dropping_nothing_is_the_plain_vit(method: str, flavour: str) -> None:
    model = DROP_NOTHING[method].build(plain(flavour)).eval()
    batch = images(model.vit)
    with torch.inference_mode():
        wanted = scores(model.vit(batch))[0]
        for layout in (Masked, Packed):
            output = model(batch, layout, detailed=True)
            torch.testing.assert_close(output.logits, wanted, atol=1e-5, rtol=1e-5)
            assert output.usage.live.all()


@each(METHODS, KINDS)
def test_layouts_agree(method: str, flavour: str) -> None:
    model = build(method, flavour, dtype=torch.float64).eval()
    batch = images(model.vit, count=8, dtype=torch.float64)
    with torch.inference_mode():
        masked = model(batch, Masked, detailed=True)
        for layout in (Packed, Slab, *([Dense] if model.even else [])):
            output = model(batch, layout, detailed=True)
            torch.testing.assert_close(output.logits, masked.logits, atol=1e-12, rtol=1e-10)
            assert_same_record(output.usage, masked.usage)


@pytest.mark.parametrize("method", METHODS)
def test_dense_is_for_methods_that_keep_as_many_tokens_of_every_image(method: str) -> None:
    model = build(method).eval()
    even = not method.startswith(("avit", "ats", "adavit", "merge")) and "threshold" not in method
    assert model.even == even
    if not even:
        with pytest.raises(ValueError, match=r"layout=Dense has as many tokens of every image, but .* keeps what each"):
            model(images(model.vit), Dense)


@pytest.mark.parametrize("method", ["avit", "ats", "merge", "dynamicvit, threshold", "adavit"])
def test_dense_runs_one_image_whatever_it_keeps_where_that_is_gone_for_good(method: str) -> None:
    model = build(method).eval()
    for one in images(model.vit, count=3).split(1):
        if not model.drops:
            with pytest.raises(ValueError, match=r"keeps what each needs: choose adaptvit\.Packed"):
                model(one, Dense)
            return
        with torch.inference_mode():
            found, wanted = model(one, Dense, detailed=True), model(one, Packed, detailed=True)
        torch.testing.assert_close(found.logits, wanted.logits, atol=1e-5, rtol=1e-5)
        assert_same_record(found.usage, wanted.usage)


@pytest.mark.parametrize("method", ["avit", "ats", "merge", "evit", "dynamicvit, threshold", "adavit"])
def test_a_batch_for_which_slab_has_too_few_rows_is_run_again(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptvit.tokens.slab.TILE", 1)
    model = copy.deepcopy(build(method, dtype=torch.float64)).eval()
    batch = images(model.vit, count=8, dtype=torch.float64)
    with torch.inference_mode():
        packed = model(batch, Packed, detailed=True)
        model.plan = measure_plan(model, batch)
        rows = model.plan.rows(8)
        assert max(rows) < 8 * packed.usage.live.shape[2] * 1.5
        enough = model(batch, Slab, detailed=True)
        model.plan = Plan(means=[1.0] * len(rows), spreads=[0.0] * len(rows), images=9)
        again = model(batch, Slab, detailed=True)
    torch.testing.assert_close(enough.logits, packed.logits, atol=1e-12, rtol=1e-10)
    assert torch.equal(again.logits, packed.logits)
    assert_same_record(again.usage, packed.usage)


def test_a_plan_keeps_three_deviations_in_reserve_and_goes_when_the_knob_is_turned() -> None:
    plan = Plan(means=(50.0, 20.0), spreads=(10.0, 0.0), images=900)
    assert plan.rows(256) == (13568, 5120)  # 12,800 and 3 x 10 x (16 + 256 / 30) = 736, in tiles of 128
    model = copy.deepcopy(build("ats")).eval()
    model.plan = plan
    model.config = replace(model.config, rate=0.5)
    assert model.plan is None
    model.plan = plan
    model.train()(images(model.vit))
    assert model.plan is None  # its weights are about to change


@each_with_layouts(METHODS, KINDS)
def test_a_batch_is_its_images_one_by_one(method: str, flavour: str, layout: type) -> None:
    model = build(method, flavour, dtype=torch.float64).eval()
    batch = images(model.vit, dtype=torch.float64)
    with torch.inference_mode():
        together = model(batch, layout, detailed=True)
        for index in range(len(batch)):
            alone = model(batch[index : index + 1], layout, detailed=True)
            torch.testing.assert_close(alone.logits[0], together.logits[index], atol=1e-12, rtol=1e-10)
            assert_same_record(alone.usage, together.usage.of_images(torch.tensor([index])))


@each_with_layouts(METHODS, ["class token", MEAN, "attention pool", "mixer"])
def test_an_image_that_is_not_finite_has_no_finite_logit_and_spoils_no_other(
    method: str, flavour: str, layout: type
) -> None:
    model = build(method, flavour, dtype=torch.float64).eval()
    batch = images(model.vit, count=5, dtype=torch.float64)
    spoilt = batch.clone()
    spoilt[1] = torch.nan
    spoilt[3, 0, 5, 3] = torch.inf  # in one patch
    with torch.inference_mode():
        whole, output = model(batch, layout, detailed=True), model(spoilt, layout, detailed=True)
    sound = [0, 2, 4]
    torch.testing.assert_close(output.logits[sound], whole.logits[sound], atol=1e-12, rtol=1e-10)
    assert torch.equal(output.usage.live[sound], whole.usage.live[sound])
    assert not output.logits[[1, 3]].isfinite().any()
    with torch.inference_mode():
        alone = model(spoilt[3:4], layout, detailed=True)
    assert not alone.logits.isfinite().any()
    assert torch.equal(alone.usage.live[0], output.usage.live[3])


@pytest.mark.parametrize(
    "method",
    [
        "avit",
        "avit, class token stays",
        "ats",
        "ats, released",
        "adavit",
        "adavit, patches",
        "dynamicvit, threshold",
        "merge",
        "merge, by block",
    ],
)
def test_the_settings_of_these_tests_do_drop_different_tokens(method: str) -> None:
    model = build(method).eval()
    with torch.inference_mode():
        usage = model(images(model.vit, count=8), detailed=True).usage
    assert 0.2 < usage.live.float().mean() < 0.9
    assert len({tuple(row) for row in usage.attended.tolist()}) > 4


@each(["adavit", "adavit, heads hidden", "adavit, heads identity"], KINDS)
def test_the_settings_of_these_tests_do_switch_off_all_there_is(method: str, flavour: str) -> None:
    model = build(method, flavour).eval()
    batch = images(model.vit, count=32)
    with torch.inference_mode():
        usage = model(batch, Masked, detailed=True).usage
    attention, mlp, heads, prefix, most = usage.attention, usage.mlp, usage.heads, usage.prefix, model.heads[0]
    for some in (attention & mlp, attention & ~mlp, mlp & ~attention, ~mlp & ~attention):
        assert some.any()
    for some in (heads == 0, (heads > 0) & (heads < most), heads == most):
        assert (some & attention).any()
        assert (some & mlp).any()
    assert (usage.attended[attention] == prefix).any()
    assert (usage.attended[attention] > prefix + 1).any()
    assert len({tuple(row) for row in torch.cat([heads, attention, mlp], dim=1).tolist()}) > 8


@each(METHODS, FLAVOURS)
def test_macs_are_what_torch_counts(method: str, flavour: str) -> None:
    model = copy.deepcopy(build(method, flavour)).eval().requires_grad_(False)
    for seed in range(3 if flavour == "class token" else 1):
        batch = images(model.vit, count=1, seed=seed)
        with FlopCounterMode(display=False) as counter:
            usage = model(batch, Packed, detailed=True).usage
        assert 2 * macs(usage, model.shape).item() == counter.get_total_flops()


def uneven_vit(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Blocks of different MLPs, heads and widths of heads."""
    vit = small_vit()
    dim = vit.embed_dim
    vit.blocks[1].mlp = Mlp(dim, 3 * dim // 2)
    vit.blocks[2].attn = Attention(dim, num_heads=2, qkv_bias=True)
    vit.blocks[3].attn = Attention(dim, num_heads=4, attn_head_dim=8, qkv_bias=True)
    return vit.to(dtype).eval()


@pytest.mark.parametrize("name", [name for name in ALL if name in METHODS])
def test_blocks_may_differ(name: str) -> None:
    vit = uneven_vit(torch.float64)
    if name == "adavit":
        with pytest.raises(TypeError, match=r"AdaViT needs equal heads, but the blocks of .* have 2 or 4"):
            ALL[name]().build(vit)
        return
    model = vary(METHODS[name].build(vit)).eval().requires_grad_(False)
    batch = images(vit, count=4, dtype=torch.float64)
    masked, packed = model(batch, Masked, detailed=True), model(batch, Packed, detailed=True)
    torch.testing.assert_close(packed.logits, masked.logits, atol=1e-12, rtol=1e-10)
    assert_same_record(packed.usage, masked.usage)
    assert packed.usage.heads.max(dim=0).values.tolist() == [block.attn.num_heads for block in vit.blocks]
    for image in batch.split(1):
        with FlopCounterMode(display=False) as counter:
            usage = model(image, detailed=True).usage
        assert 2 * macs(usage, model.shape).item() == counter.get_total_flops()


def test_a_stem_is_counted_once_and_left_in_its_mode() -> None:
    vit = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, depth=2).train()
    vit.patch_embed.backbone.eval()  # frozen statistics
    modes = [part.training for part in vit.modules()]
    with pytest.MonkeyPatch.context() as patch:
        runs = []
        patch.setattr(vit.patch_embed.backbone, "forward", partial(_noted, runs, vit.patch_embed.backbone.forward))
        model = ATSConfig(blocks=(0,)).build(vit)
        assert [part.training for part in vit.modules()] == modes
        assert len(runs) == 1
        with torch.inference_mode():
            output = model(torch.randn(1, 3, 64, 64), detailed=True)
        macs(output.usage, model.shape)
        assert len(runs) == 2


def _noted(runs: list[int], forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    runs.append(len(x))
    return forward(x)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_dense_macs_are_what_torch_counts_for_timm(flavour: str) -> None:
    model = copy.deepcopy(build("full", flavour)).eval().requires_grad_(False)
    batch = images(model.vit, count=1)
    with FlopCounterMode(display=False) as counter:
        model.vit(batch)
    assert 2 * dense_macs(model.shape, model(batch, detailed=True).usage.grid) == counter.get_total_flops()


@each([name for name in METHODS if not name.startswith("adavit")], KINDS)
def test_a_dead_token_never_returns(method: str, flavour: str) -> None:
    model = build(method, flavour).eval()
    live = model(images(model.vit), detailed=True).usage.live
    for before, after in pairwise(live.unbind(dim=1)):
        assert not (after & ~before).any()


@each(
    [name for name in METHODS if not re.search("adavit|official|dynamicvit", name)],
    KINDS,
    hosts=[name for name in HOSTS if name != "parallel"],  # which drops whole images' paths, and is refused
)
def test_packed_training_has_the_gradients_of_masked_training(method: str, flavour: str) -> None:
    model = build(method, flavour, dtype=torch.float64, drop_path_rate=0.3).train()
    batch = images(model.vit, dtype=torch.float64)
    trained = {name: parameter for name, parameter in model.vit.named_parameters() if parameter.requires_grad}
    gradients, losses = {}, {}
    for layout in (Masked, Packed):
        torch.manual_seed(3)
        output = model(batch, layout, detailed=True)
        loss = cross_entropy(output.logits, torch.tensor([0, 1, 2])) + sum(output.terms.values())
        losses[layout] = loss.detach()
        gradients[layout] = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    torch.testing.assert_close(losses[Packed], losses[Masked], atol=0, rtol=1e-12)
    for name, packed, masked in zip(trained, gradients[Packed], gradients[Masked], strict=True):
        assert (packed is None) == (masked is None), name
        if masked is not None:
            torch.testing.assert_close(packed, masked, atol=1e-12, rtol=1e-8, msg=lambda text, name=name: name + text)


@LAYOUTS
@pytest.mark.parametrize("method", METHODS)
def test_decisions_are_float32_whatever_the_features(method: str, layout: type) -> None:
    model = build(method, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        output = model(images(model.vit, dtype=torch.bfloat16), layout, detailed=True)
    assert output.logits.dtype == torch.bfloat16
    assert output.logits.isfinite().all()


def test_a_reset_classifier_counts() -> None:
    model = AViTConfig().build(small_vit())
    before = model.shape.head
    model.vit.reset_classifier(21)
    assert model.shape.head == 3 * before
    assert model.num_classes == 21


@LAYOUTS
@each(ONE_OF_EACH, [], hosts=[])
def test_an_empty_batch_has_no_logits(method: str, flavour: str, layout: type) -> None:
    model = build(method, flavour).eval()
    output = model(images(model.vit, count=0), layout, detailed=True)
    assert output.logits.shape == (0, 7)
    assert macs(output.usage, model.shape).shape == (0,)
    assert output.usage.patch_depth.shape == (0, 4, 4)


@pytest.mark.parametrize("name", ["full", "avit", "evit", "tome", "merge", "grid"])
def test_one_block_is_enough(name: str) -> None:
    vit = small_vit(depth=1)
    model, batch = ALL[name]().build(vit), images(vit)
    for layout in (Masked, Packed):
        assert model.train()(batch, layout).isfinite().all()
        assert model.eval()(batch, layout, detailed=True).usage.live.shape[1] == 1


@pytest.mark.parametrize(("name", "field"), [("ats", "blocks"), ("adavit", "first_block"), ("dynamicvit", "blocks")])
def test_one_block_is_refused_by_name_where_it_is_too_few(name: str, field: str) -> None:
    with pytest.raises(ValueError, match=rf"{type(ALL[name]()).__name__}\.{field}"):
        ALL[name]().build(small_vit(depth=1))


def test_outputs_and_records_compare_by_value() -> None:
    model = build("merge").eval()
    batch = images(model.vit)
    one, same, other = (model(given, detailed=True) for given in (batch, batch, batch.flip(0)))
    assert one == same
    assert one.usage == same.usage
    assert one != other
    assert one.usage != other.usage != other.usage.compact()
