import copy
import itertools
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import images
from timm.models.mlp_mixer import MixerBlock
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from adaptvit import (
    AdaViTConfig,
    ATSConfig,
    AViTConfig,
    DynamicViTConfig,
    EViTConfig,
    FullConfig,
    Masked,
    MergeConfig,
    Packed,
    ToMeConfig,
    ViTConfig,
    load,
    macs,
    save,
)
from adaptvit.backbones.parts import ATTENTIONS, BLOCKS, NORMS, POSITIONS, InstanceNorm, Mixer, PartsViT, Rotary, cosine
from adaptvit.backbones.record import describe, rebuild
from adaptvit.backbones.t2t import sinusoid
from adaptvit.backbones.turn import set_channel
from adaptvit.data import DataConfig
from adaptvit.methods.avit_gate import fit_gate
from adaptvit.methods.evit import EViT
from adaptvit.methods.released import ReleasedAViTConfig
from adaptvit.tokens import Tokens
from adaptvit.training.recipe import Recipe
from adaptvit.training.run import Run, train_run
from adaptvit.weights.opening import start_from

SIZES: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 5,
}
SMALL = SIZES | {"num_heads": 3}
GRID = [
    dict(zip(("position", "norm", "attention", "block"), names, strict=True))
    for names in itertools.product(POSITIONS, NORMS, ATTENTIONS, BLOCKS)
    if names[3] == "attention" or (names[0] != "rotary" and names[2] == "dot")
]
"""Every combination that is not refused."""
HALTING = AViTConfig(gate_scale=4.0, gate_center=2.0)
SAMPLING = ATSConfig(blocks=(0, 1), tokens=(10, 6))
PARTS = pytest.mark.parametrize("parts", GRID, ids=lambda parts: "-".join(parts.values()))
LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)


@cache
def made(**settings: Any) -> PartsViT:
    """In evaluation and float64, its tokens unlike one another."""
    torch.manual_seed(0)
    vit = ViTConfig(**{**SIZES, "num_heads": 2, "embed_dim": 16, **settings}).build()
    for name, parameter in vit.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(("token", "pos_embed")) or parameter.ndim < 2:
            parameter.data += 0.3 * torch.randn_like(parameter)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return vit.double().eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(vit: PartsViT, count: int = 3) -> Tensor:
    return images(vit, count, dtype=torch.float64)


# ---- every combination


@PARTS
def test_dropping_nothing_is_the_plain_forward(parts: dict[str, str]) -> None:
    vit = made(**parts)
    given = batch(vit)
    with torch.inference_mode():
        expected = vit(given)
        for config in (FullConfig(), AViTConfig(gate_center=1e4)):
            for layout in (Masked, Packed):
                found = config.build(vit)(given, layout)
                torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


@PARTS
def test_masked_is_packed_is_one_by_one_where_tokens_go(parts: dict[str, str]) -> None:
    vit = made(**parts)
    given = batch(vit, 4)
    for config in (HALTING, SAMPLING)[: 1 if parts["block"] == "mixer" else 2]:
        model = config.build(vit)
        with torch.inference_mode():
            masked, packed = model(given, Masked, detailed=True), model(given, Packed, detailed=True)
            alone = [model(image[None], Packed)[0] for image in given]
        assert not packed.usage.live.all()
        assert torch.equal(packed.usage.live, masked.usage.live)
        torch.testing.assert_close(packed.logits, masked.logits, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(torch.stack(alone), packed.logits, atol=1e-12, rtol=1e-10)


@PARTS
def test_macs_are_what_torch_counts(parts: dict[str, str]) -> None:
    vit = made(**parts)
    given = batch(vit, 1)
    for config in (FullConfig(), HALTING, SAMPLING)[: 2 if parts["block"] == "mixer" else 3]:
        model = config.build(vit)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            usage = model(given, Packed, detailed=True).usage
        assert 2 * macs(usage, model.shape).item() == counter.get_total_flops()


@PARTS
def test_a_described_vit_can_be_rebuilt(parts: dict[str, str]) -> None:
    vit = made(**parts)
    twin = rebuild(describe(vit)).double().eval()
    twin.load_state_dict(vit.state_dict())
    with torch.inference_mode():
        assert torch.equal(twin(batch(vit)), vit(batch(vit)))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_mean_of_the_patches_can_be_classified(norm: str, block: str) -> None:
    vit = made(norm=norm, block=block, global_pool="avg")
    given = batch(vit)
    assert vit.num_prefix_tokens == 0
    with torch.inference_mode():
        torch.testing.assert_close(FullConfig().build(vit)(given), vit(given), atol=1e-12, rtol=1e-10)
        masked, packed = (HALTING.build(vit)(given, layout, detailed=True) for layout in (Masked, Packed))
    torch.testing.assert_close(packed.logits, masked.logits, atol=1e-12, rtol=1e-10)


def test_images_that_have_left_are_not_mixed() -> None:
    model = HALTING.build(made(block="mixer"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        usage = model(batch(model.vit, 8), Packed, detailed=True).usage
    assert (usage.attended[:, -1] == 0).any()
    assert (usage.attended[:, -1] > 0).any()
    assert 2 * macs(usage, model.shape).sum().item() == counter.get_total_flops()


# ---- DeiT's own parts


def test_the_defaults_are_deit_tiny() -> None:
    with torch.device("meta"):
        vit, deit = ViTConfig().build(), timm.create_model("deit_tiny_patch16_224")
    assert {key: value.shape for key, value in vit.state_dict().items()} == {
        key: value.shape for key, value in deit.state_dict().items()
    }


def test_deits_weights_load_and_give_its_logits(tmp_path: Path) -> None:
    deit = timm.create_model("deit_tiny_patch16_224", **SMALL).eval()
    for parameter in deit.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    torch.save(deit.state_dict(), tmp_path / "deit.pth")
    given = torch.randn(2, 3, 32, 32)
    by_hand, by_name = ViTConfig(**SMALL).build(), timm.create_model("parts_vit", **SMALL)
    by_hand.load_state_dict(deit.state_dict())
    assert start_from(by_name, tmp_path / "deit.pth")
    with torch.inference_mode():
        for vit in (by_hand, by_name):
            assert torch.equal(vit.eval()(given), deit(given))


def test_weights_of_other_parts_are_refused_by_name(tmp_path: Path) -> None:
    torch.save(ViTConfig(**SMALL).build().state_dict(), tmp_path / "deit.pth")
    with pytest.raises(ValueError, match="unexpected pos_embed"):
        start_from(ViTConfig(**SMALL, position="none").build(), tmp_path / "deit.pth")


# ---- positions


def test_a_rotary_product_depends_on_the_offset_alone() -> None:
    turn = Rotary(8, (5, 7), prefix=1).double()
    q, k = noise(2, 8)
    turned = [turn(x.expand(1, 1, 36, 8))[0, 0, 1:].view(5, 7, 8) for x in (q, k)]
    for rows, columns in ((0, 0), (2, 1), (1, -3), (-2, 2)):
        products = {
            (turned[0][y, x] @ turned[1][y + rows, x + columns]).item()
            for y in range(max(0, -rows), 5 - max(0, rows))
            for x in range(max(0, -columns), 7 - max(0, columns))
        }
        assert max(products) - min(products) < 1e-6  # the table is in float32
    distinct = [(turned[0][2, 3] @ turned[1][y, x]).item() for y in range(5) for x in range(7)]
    assert len({round(product, 4) for product in distinct}) == 35


def test_rotary_leaves_the_class_token_and_the_lengths() -> None:
    turn, x = Rotary(8, (4, 4), prefix=1).double(), noise(2, 3, 17, 8)
    turned = turn(x)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(turned[:, :, 1], x[:, :, 1])  # row 0, column 0
    assert not torch.isclose(turned[:, :, 2:], x[:, :, 2:]).all(dim=-1).any()


def test_rotary_turns_by_the_angle_row_or_column_times_frequency() -> None:
    turned = Rotary(8, (4, 4), prefix=0).double()(torch.ones(1, 1, 16, 8, dtype=torch.float64))[0, 0]
    row, column = 3, 2
    for pair, angle in enumerate((row, row / 100, column, column / 100)):
        angle = torch.tensor(angle, dtype=torch.float64)
        expected = torch.stack([angle.cos() - angle.sin(), angle.cos() + angle.sin()])
        found = turned[4 * row + column, 2 * pair : 2 * pair + 2]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@LAYOUTS
def test_rotary_turns_a_live_token_by_its_own_slot(layout: type[Tokens]) -> None:
    turn, x = Rotary(8, (4, 4), prefix=1).double(), noise(3, 17, 2, 8)
    live = noise(3, 17, seed=1) > 0
    tokens, (features,) = layout.of(x.flatten(2)).filter(
        layout.of(x.flatten(2)).spread(live), layout.of(x.flatten(2)).spread(x)
    )
    found = tokens.grid(turn.on(features, tokens))
    assert torch.equal(found[live], turn(x.transpose(1, 2)).transpose(1, 2)[live])


def test_sinusoids_of_rows_and_columns_have_known_values() -> None:
    table = made(position="sinusoidal").pos_embed[0]
    assert not table.requires_grad
    assert not table[0].any()
    for slot in (1, 7, 16):
        row, column = divmod(slot - 1, 4)
        angles = torch.tensor([place / 10000 ** (band / 4) for place in (row, column) for band in range(4)])
        torch.testing.assert_close(table[slot], torch.cat([angles.sin(), angles.cos()]).double(), atol=1e-6, rtol=0)


def test_sinusoids_of_slots_are_t2t_vits() -> None:
    assert torch.equal(made(position="sinusoidal_1d").pos_embed, sinusoid(17, 16).double())


def test_without_positions_the_order_of_the_patches_does_not_matter() -> None:
    given = batch(made())
    cut = given.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)[:, :, torch.randperm(16)].unflatten(2, (4, 4))
    shuffled = cut.permute(0, 1, 2, 4, 3, 5).reshape(given.shape)
    for position in POSITIONS:
        vit = made(position=position)
        assert torch.allclose(vit(shuffled), vit(given), atol=1e-9) == (position == "none")


def test_another_size_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"made for 32 x 32 pixels: build another with img_size"):
        made(position="rotary").set_input_size((64, 64))


# ---- norms


@LAYOUTS
def test_instance_norm_is_torchs_on_each_images_live_tokens(layout: type[Tokens]) -> None:
    norm, torchs = InstanceNorm(6).double(), nn.InstanceNorm1d(6, affine=True).double()
    for parameter, value in zip(norm.parameters(), noise(2, 6), strict=True):
        parameter.data = value
    torchs.load_state_dict(norm.state_dict())
    x, live = 3 + 5 * noise(4, 9, 6), noise(4, 9, seed=1) > 0
    live[2] = False
    whole = layout.of(x)
    torch.testing.assert_close(whole.grid(norm.on(whole.x, whole)), torchs(x.mT).mT)
    torch.testing.assert_close(norm(x), torchs(x.mT).mT)
    tokens = whole.keep(live)
    found = tokens.grid(norm.on(tokens.x, tokens))
    for image in (0, 1, 3):
        torch.testing.assert_close(found[image, live[image]], torchs(x[image, live[image]].T[None])[0].T)


@LAYOUTS
def test_instance_norm_of_a_single_token_is_its_shift_and_has_gradients(layout: type[Tokens]) -> None:
    x = noise(2, 5, 6).requires_grad_()
    tokens = layout.of(1e6 * x).keep(torch.arange(5)[None] < 1)
    norm = InstanceNorm(6).double()
    found = norm.on(tokens.x, tokens)
    torch.testing.assert_close(found, torch.zeros_like(found))
    (gradient,) = torch.autograd.grad(found.square().sum(), [x])
    assert gradient.isfinite().all()


@LAYOUTS
def test_instance_norm_counts_in_float32(layout: type[Tokens]) -> None:
    x = (300 + noise(2, 50, 4)).bfloat16()
    expected = layout.of(x.float()).standardise(layout.of(x.float()).x, 1e-5).bfloat16()
    assert torch.equal(layout.of(x).standardise(layout.of(x).x, 1e-5), expected)


def test_the_norm_before_the_head_is_of_one_token() -> None:
    assert [type(made(norm=norm).norm).__name__ for norm in NORMS] == ["LayerNorm", "LayerNorm", "RmsNorm"]


# ---- attention


def test_cosine_attention_forgets_the_lengths_of_queries_and_keys() -> None:
    q_part, k_part = (part.double() for part in cosine(8))
    q, k = noise(2, 2, 3, 5, 8)
    longer = noise(2, 2, 3, 5, 1, seed=1).exp()
    torch.testing.assert_close(q_part(q * longer[0]), q_part(q))
    torch.testing.assert_close(k_part(k * longer[1]), k_part(k))
    logits = q_part(q) @ k_part(k).mT / 8**0.5
    cosines = normalize(q, dim=-1) @ normalize(k, dim=-1).mT
    torch.testing.assert_close(logits, 10 * cosines)
    q_part.scale.data.fill_(50.0)
    torch.testing.assert_close(q_part(q) @ k_part(k).mT / 8**0.5, 100 * cosines)


def test_the_temperature_is_learned() -> None:
    vit = ViTConfig(**SMALL, attention="cosine").build()
    vit(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(block.attn.q_norm.scale.grad.abs() > 0 for block in vit.blocks)


# ---- mixers


def test_a_mixer_block_is_timms() -> None:
    block = made(block="mixer", norm="layer").blocks[1]
    timms = MixerBlock(16, 17).double()
    names = {"attn.mlp.": "mlp_tokens.", "mlp.": "mlp_channels."}
    state = {re.sub(r"^(attn\.)?mlp\.", lambda found: names[found[0]], key): v for key, v in block.state_dict().items()}
    timms.load_state_dict(state)
    x = noise(2, 17, 16)
    torch.testing.assert_close(block(x), timms(x))


def test_in_a_mixer_a_patch_influences_another_unless_it_has_halted() -> None:
    mixer, x = made(block="mixer").blocks[0].attn, noise(1, 17, 16)
    other = x.clone()
    other[0, 5] += 1
    live = (torch.arange(17) != 5)[None]
    for layout in (Masked, Packed):
        whole, changed = layout.of(x), layout.of(other)
        assert not torch.isclose(mixer.on(whole.x, whole), mixer.on(changed.x, changed)).any()
        some, same = whole.keep(live), changed.keep(live)
        found = some.grid(mixer.on(some.x, some))
        assert torch.equal(found, same.grid(mixer.on(same.x, same)))
        absent = x * live[..., None]
        torch.testing.assert_close(found[0, live[0]], mixer(absent)[0, live[0]])


def test_a_mixer_has_no_use_for_a_mask() -> None:
    with pytest.raises(ValueError, match="TokenMLP stands in the place of attention and takes no attention mask"):
        made(block="mixer")(batch(made()), attn_mask=torch.ones(17, 17))


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (SAMPLING.build, "ATS needs attention"),
        (AdaViTConfig(macs_target=None, policies=("patches",)).build, "AdaViT needs attention"),
        (EViTConfig().build, "EViT needs attention"),
        (DynamicViTConfig().build, "DynamicViT needs attention"),
        (MergeConfig().build, "merging by similarity needs attention"),
        (ReleasedAViTConfig().build, "A-ViT as released needs attention"),
        (lambda vit: fit_gate(vit, batch(vit)), "fitting a gate needs attention"),
        (lambda vit: set_channel(vit, noise(16)), "turning the residual stream needs attention"),
    ],
)
def test_what_a_mixer_cannot_do_is_refused_by_name(attempt: Any, said: str) -> None:
    with pytest.raises(TypeError, match=f"{said}, but the blocks of PartsViT have TokenMLP in its place"):
        attempt(made(block="mixer"))


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (
            AdaViTConfig(macs_target=None).build,
            "AdaViT needs token norms, but PartsViT has Instance",
        ),
        (EViTConfig().build, "EViT needs token norms"),
        (DynamicViTConfig().build, "DynamicViT needs token norms"),
        (ToMeConfig().build, "ToMe needs token norms"),
        (ReleasedAViTConfig().build, "A-ViT as released needs token norms"),
        (lambda vit: set_channel(vit, noise(16)), "PartsViT has InstanceNorm; only with LayerNorm"),
    ],
)
def test_what_an_instance_norm_cannot_do_is_refused_by_name(attempt: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        attempt(made(norm="instance"))


def turned_as_in(slots: list[int], block: nn.Module) -> nn.Module:
    """A block of timm's that turns the tokens of one image as if they were in these slots."""
    block = copy.deepcopy(block)
    for part in block.modules():
        if isinstance(part, Rotary):
            part.table = part.table[slots]
    return block


@LAYOUTS
@pytest.mark.parametrize("attention", ["dot", "cosine"])
def test_a_merged_token_is_turned_where_it_was(attention: str, layout: type) -> None:
    """The token that others join keeps its place, in whatever order the tokens are then."""
    vit = made(position="rotary", attention=attention)
    model, slots = FullConfig().build(vit), 17
    orders = [[0, 5, 3, 16, 1, 9, 2], [0, 1, 2, 4, 8, 16, 12]]
    place, moved = torch.zeros(2, slots, dtype=torch.long), torch.ones(2, slots, dtype=torch.bool)
    for image, order in enumerate(orders):
        place[image] = torch.arange(slots) % (len(order) - 1) + 1  # the others join any of them but the class token
        place[image, order] = torch.arange(len(order))
        moved[image, order] = False
    with torch.inference_mode():
        tokens = model.enter(batch(vit, 2), layout)
        merged, _ = tokens.merge(place, moved, tokens.spread(torch.ones(2, slots, dtype=torch.float64)))
        for some in (merged, merged.keep(torch.tensor([[True, True, False, True, True, False, True]]))):
            found = model.run_block(1, some)
            features, after = some.grid(some.x), found.grid(found.x)
            for image, order in enumerate(orders):
                alive = some.live[image]
                block = turned_as_in(torch.tensor(order)[alive].tolist(), vit.blocks[1])
                expected = block(features[image, alive][None])[0]
                torch.testing.assert_close(after[image, alive], expected, atol=1e-12, rtol=1e-10)


@LAYOUTS
def test_a_fused_token_is_turned_where_its_best_patch_was(layout: type, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = made(position="rotary")
    model, given, seen = EViTConfig(blocks=(0, 1), tokens=(9, 5)).build(vit), batch(vit, 2), []
    run_block = type(model).run_block

    def watched(self: EViT, number: int, tokens: Tokens, *others: Any, **acts: Any) -> Tokens:
        after = run_block(self, number, tokens, *others, **acts)
        seen.append((number, tokens, after))
        return after

    monkeypatch.setattr(type(model), "run_block", watched)
    with torch.inference_mode():
        usage = model(given, layout, detailed=True).usage
        assert usage.fused[:, 2].any(dim=1).all()
        number, tokens, after = seen[-1]
        features = tokens.grid(tokens.x)
        for image in range(2):
            alive = usage.live[image, number]
            block = turned_as_in(alive.nonzero().flatten().tolist(), vit.blocks[number])
            expected = block(features[image, alive][None])[0]
            torch.testing.assert_close(after.first(after.x, 1)[image], expected[:1], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("settings", [{"position": "rotary"}, {"attention": "cosine"}], ids=str)
def test_a_mixer_of_ones_own_has_no_queries_and_keys_either(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Swap(Mixer):
        macs = 0

        def mix(self, x: torch.Tensor) -> torch.Tensor:
            return x.flip(1)

        def on(self, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
            return tokens.spread(self.mix(tokens.grid(x)))

    monkeypatch.setitem(BLOCKS, "swap", lambda vit: Swap())
    with pytest.raises(ValueError, match="block='swap' has no queries and keys, which"):
        made(block="swap", **settings)


def test_a_fixed_table_stays_when_weights_of_other_positions_are_started_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    table = made(position="sinusoidal").pos_embed.clone()
    for position in ("learned", "sinusoidal_1d", "none"):
        torch.save(made(position=position).state_dict(), tmp_path / "other.pth")
        vit = made(position="sinusoidal")
        start_from(vit, tmp_path / "other.pth")
        assert torch.equal(vit.pos_embed, table)
    turn = torch.linalg.qr(noise(16, 16)).Q
    turned = made(position="sinusoidal").state_dict()
    turned["pos_embed"] = turned["pos_embed"] @ turn
    torch.save(turned, tmp_path / "turned.pth")
    vit = made(position="sinusoidal")
    start_from(vit, tmp_path / "turned.pth")
    assert torch.equal(vit.pos_embed, turned["pos_embed"])


def test_an_instance_norm_is_as_exact_in_half_precision_as_its_packed_self() -> None:
    norm = InstanceNorm(16).to(torch.bfloat16)
    x = (noise(2, 17, 16) * 0.02 + 1).to(torch.bfloat16)
    packed = Packed.of(x)
    torch.testing.assert_close(packed.grid(norm.on(packed.x, packed)), norm(x), atol=0.02, rtol=0)


# ---- settings, names, files


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"position": "rope"}, "position must be one of learned, sinusoidal, sinusoidal_1d, rotary, none, got 'rope'"),
        ({"norm": "batch"}, "norm must be one of layer, instance, rms, got 'batch'"),
        ({"attention": "linear"}, "attention must be one of dot, cosine, got 'linear'"),
        ({"block": "conv"}, "block must be one of attention, mixer, got 'conv'"),
        ({"global_pool": "map"}, "global_pool must be one of token, avg, got 'map'"),
        ({"block": "mixer", "position": "rotary"}, "'mixer' has no queries and keys, which position='rotary' is for"),
        ({"block": "mixer", "attention": "cosine"}, "'mixer' has no queries and keys, which attention='cosine' is for"),
        ({"patch_size": 7}, r"patch_size \(7, 7\) does not divide img_size \(32, 32\)"),
        ({"num_heads": 5}, "num_heads is 5, which does not divide embed_dim 24"),
        ({"num_heads": 4, "position": "rotary"}, "divisible by 4, got 24 / 4"),
        ({"embed_dim": 6, "position": "sinusoidal"}, "divisible by 4, got 6"),
        ({"depth": 0}, "depth must lie in 1..1024, got 0"),
        ({"img_size": 0}, "img_size must lie in 1..65536, got 0"),
        ({"mlp_ratio": 0}, r"mlp_ratio must lie in \(0, 1024\], got 0"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\), got 1.0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_in_one_sentence(settings: dict[str, Any], said: str) -> None:
    for make in (lambda: ViTConfig(**SIZES | settings), lambda: timm.create_model("parts_vit", **SIZES | settings)):
        with pytest.raises(ValueError, match=said) as error:
            make()
        assert "\n" not in str(error.value)


def test_a_setting_that_nobody_knows_is_refused() -> None:
    with pytest.raises(TypeError, match="qk_norm"):
        timm.create_model("parts_vit", qk_norm=True)


def test_there_are_no_weights_to_download() -> None:
    with pytest.raises(ValueError, match="parts_vit has no weights to download"):
        timm.create_model("parts_vit", pretrained=True)


def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    vit = timm.create_model("parts_vit", **SIZES, position="rotary", norm="rms", attention="cosine")
    vit.reset_classifier(9)
    model = HALTING.build(vit).eval()
    save(model, tmp_path / "model.safetensors")
    back = load(tmp_path / "model.safetensors").eval()
    assert (back.vit.config.position, back.vit.config.norm, back.vit.config.attention) == ("rotary", "rms", "cosine")
    given = torch.randn(2, 3, 32, 32)
    assert torch.equal(back(given), model(given))


def test_a_vit_changed_by_hand_is_not_described() -> None:
    vit = ViTConfig(**SIZES, position="rotary").build()
    vit.blocks[0].attn.q_norm = nn.Identity()
    with pytest.raises(ValueError, match="cannot be saved"):
        describe(vit)


def test_the_gate_can_be_fitted_to_rotary_and_cosine() -> None:
    vit = ViTConfig(**SIZES, position="rotary", attention="cosine").build().double().eval()
    given = batch(vit, 8)
    with torch.inference_mode():
        before = vit(given)
    fit_gate(vit, given)
    with torch.inference_mode():
        torch.testing.assert_close(vit(given), before)


def test_a_run_takes_parts_as_model_arguments(tmp_path: Path) -> None:
    settings = {name: value for name, value in SIZES.items() if name != "num_classes"}
    outcome = train_run(
        Run(
            model="parts_vit",
            model_args={**settings, "in_chans": 1, "position": "sinusoidal", "norm": "instance"},
            method=AViTConfig(),
            data=DataConfig(workers=0),
            recipe=Recipe(epochs=1, warmup_epochs=0, batch_size=512),
            output=tmp_path / "run",
        )
    )
    assert load(outcome.file).vit.config == outcome.model.vit.config
