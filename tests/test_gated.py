from typing import Any

import pytest
import torch
from models import small_vit
from timm.layers import SwiGLU
from torch import Tensor, nn

from adaptvit import Masked, Packed, Slab
from adaptvit.backbones import gated
from adaptvit.backbones.gated import Gates, Takes, check_gated, gated_macs, run_gated
from adaptvit.backbones.sizes import shape_of

TAKES: tuple[Takes, ...] = ("input", "hidden", "identity")
FLAVOURS = ["class token", "LayerScale", "QK norm", "attention pool", "CLIP"]


def random_gates(count: int, heads: int, slots: int, seed: int = 0) -> Gates:
    """Boolean gates; the first images have everything off, everything on, no head on, and the first token alone."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < 0.6

    gates = Gates(some(count), some(count), some(count, heads), some(count, slots), some(count, slots))
    for row, value in ((0, False), (1, True)):
        for gate in (gates.attention, gates.mlp, gates.heads, gates.attention_tokens, gates.mlp_tokens):
            gate[row] = value
    gates.attention[2:4], gates.mlp[2:4], gates.heads[2], gates.heads[3] = True, True, False, True
    gates.attention_tokens[3], gates.mlp_tokens[3] = False, False
    gates.attention_tokens[:, 0] = gates.mlp_tokens[:, 0] = True
    return gates


def by_hand(block: nn.Module, x: Tensor, gates: Gates, takes: Takes) -> Tensor:
    """One image (N, D) after another: what is off is taken out of the tensors."""
    attn, mlp, done = block.attn, block.mlp, []
    for image, own in enumerate(x):
        out = own.clone()
        rows = gates.attention_tokens[image].nonzero().squeeze(1)
        heads = gates.heads[image].tolist()
        if gates.attention[image]:
            q, k, v = attn.qkv(block.norm1(own[rows])).unflatten(1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)
            q, k = attn.q_norm(q), attn.k_norm(k)
            matrices = (q @ k.mT * attn.head_dim**-0.5).softmax(dim=-1)
            identity = torch.eye(len(rows), dtype=x.dtype)
            off = identity if takes == "identity" else 0 * identity
            mixed = [(matrices[head] if on else off) @ v[head] for head, on in enumerate(heads)]
            out[rows] += block.ls1(attn.proj(torch.cat(mixed, dim=-1)))
        rows = gates.mlp_tokens[image].nonzero().squeeze(1)
        if gates.mlp[image]:
            read = block.norm2(out[rows])
            if takes == "input":
                read = read * torch.tensor(heads).repeat_interleave(read.shape[1] // len(heads))
            hidden = mlp.fc1(read)
            if takes == "hidden":
                hidden = hidden * torch.tensor(heads).repeat_interleave(hidden.shape[1] // len(heads))
            out[rows] += block.ls2(mlp.fc2(mlp.act(hidden)))
        done.append(out)
    return torch.stack(done)


def as_float(gates: Gates) -> Gates:
    return gates.like(torch.zeros(0, dtype=torch.float64))


@pytest.mark.parametrize("takes", TAKES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_gated_block_is_one_without_what_is_off(flavour: str, takes: Takes, monkeypatch: pytest.MonkeyPatch) -> None:
    block = small_vit(flavour, torch.float64).eval().blocks[1]
    x = torch.randn(8, 10, block.attn.qkv.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gates = random_gates(len(x), block.attn.num_heads, x.shape[1])
    with torch.inference_mode():
        expected = by_hand(block, x, gates, takes)
        masked = run_gated(block, 1, Masked.of(x), as_float(gates), takes)
        packed = run_gated(block, 1, Packed.of(x.clone()), gates, takes)
        slab = run_gated(block, 1, Slab.of(x), gates, takes)
        first = [run_gated(block, 1, layout.of(x.clone()), gates, takes, read=1) for layout in (Packed, Slab)]
        monkeypatch.setattr(gated, "ALONE", 0.0)  # heads that are off are not computed, however few images they are of
        apart = run_gated(block, 1, Packed.of(x.clone()), gates, takes)
        first.append(run_gated(block, 1, Packed.of(x.clone()), gates, takes, read=1))
    torch.testing.assert_close(masked.x, expected, atol=1e-12, rtol=1e-10)
    for tokens in (packed, apart, slab):
        torch.testing.assert_close(tokens.grid(tokens.x), expected, atol=1e-12, rtol=1e-10)
    for tokens in first:
        torch.testing.assert_close(tokens.first(tokens.x, 1), expected[:, :1], atol=1e-12, rtol=1e-10)
    updated = (gates.attention[:, None] & gates.attention_tokens) | (gates.mlp[:, None] & gates.mlp_tokens)
    still = ~updated
    assert still.any()
    for tokens in (masked, packed, slab):
        assert torch.equal(tokens.grid(tokens.x)[still], x[still])


@pytest.mark.parametrize("layout", [Masked, Packed, Slab], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_without_gates_a_block_is_timms(flavour: str, layout: type) -> None:
    block = small_vit(flavour, torch.float64).eval().blocks[1]
    x = torch.randn(3, 10, block.attn.qkv.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = block(x)
        tokens = run_gated(block, 1, layout.of(x.clone()), Gates(), "input")
    torch.testing.assert_close(tokens.grid(tokens.x), expected, atol=1e-12, rtol=1e-10)


def test_what_the_norm_gave_need_not_be_computed_again() -> None:
    block = small_vit(dtype=torch.float64).eval().blocks[1]
    x = torch.randn(4, 10, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gates = random_gates(4, block.attn.num_heads, 10)
    with torch.inference_mode():
        normed = block.norm1(x)
        expected = run_gated(block, 1, Masked.of(x), as_float(gates), "input").x
        block.norm1 = None
        masked = run_gated(block, 1, Masked.of(x), as_float(gates), "input", normed)
        others = [
            run_gated(block, 1, layout.of(x.clone()), gates, "input", normed.flatten(0, 1)) for layout in (Packed, Slab)
        ]
    assert torch.equal(masked.x, expected)
    for tokens in others:
        torch.testing.assert_close(tokens.grid(tokens.x), expected, atol=1e-12, rtol=1e-10)


def test_a_patch_that_is_off_learns_what_it_would_have_gained() -> None:
    block = small_vit(dtype=torch.float64).eval().blocks[1]
    x = torch.randn(1, 10, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    on = torch.ones(1, 10, dtype=torch.float64)
    on[0, 4:] = 0
    on.requires_grad_()
    updates = torch.randn(10, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (
        run_gated(block, 1, Masked.of(x), Gates(attention_tokens=on), "input", drop_path=False).x * updates
    ).sum().backward()
    mixed = on.grad.clone()

    def gained(token: int) -> float:
        """What attention to the tokens that are on would add to this one, along the direction of the loss."""
        with torch.no_grad():
            q, k, v = block.attn.qkv(block.norm1(x[0])).unflatten(1, (3, block.attn.num_heads, -1)).permute(1, 2, 0, 3)
            weights = (q[:, token].unsqueeze(1) @ k[:, :4].mT * block.attn.head_dim**-0.5).softmax(dim=-1)
            branch = block.attn.proj((weights @ v[:, :4]).flatten())
            later = torch.autograd.functional.jvp(lambda t: t + block.mlp(block.norm2(t)), x[0, token], branch)[1]
        return (later * updates[token]).sum().item()

    for token in (5, 9):
        assert mixed[0, token].item() == pytest.approx(gained(token))


def test_gates_take_on_the_precision_of_the_features() -> None:
    block = small_vit(dtype=torch.bfloat16).eval().blocks[1]
    x = torch.randn(5, 10, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    gates = random_gates(5, block.attn.num_heads, 10)
    for takes in TAKES:
        assert run_gated(block, 1, Masked.of(x), as_float(gates), takes).x.dtype == torch.bfloat16


def hand_count(takes: Takes, heads: int, keys: int, queries: int, rows: int) -> int:
    """MACs of one block of the small ViT (64 channels in 2 heads, 192 hidden) for one image, matrix by matrix."""
    width = 32 * heads
    attention = 64 * width * (2 * queries + 2 * keys) + 2 * queries * keys * width
    if takes == "identity":
        attention = 64 * (queries * width + keys * width + 64 * (keys + queries)) + 2 * queries * keys * width
    if takes == "hidden":
        return attention + rows * 2 * 64 * 96 * heads
    if takes == "input":
        return attention + (rows * (width * 192 + 192 * 64) if heads else 192 * 64)
    return attention + rows * 2 * 64 * 192


@pytest.mark.parametrize("takes", TAKES)
def test_macs_by_hand(takes: Takes) -> None:
    shape = shape_of(small_vit())
    assert (shape.dim, *shape.heads) == (64, 2, 2, 2, 2)
    assert {(block.head_dim, block.mlp_per_token) for block in shape.blocks} == {(32, 2 * 64 * 192)}
    for heads in (0, 1, 2):
        counts = torch.tensor([[heads], [10], [3], [7]])[..., None]
        one, none = torch.ones(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
        whole = gated_macs(shape, takes, True, one, one, *counts).item()
        assert whole == hand_count(takes, heads, keys=10, queries=3, rows=7)
        parts = [gated_macs(shape, takes, True, *on, *counts).item() for on in ((one, none), (none, one))]
        assert sum(parts) == whole
        assert gated_macs(shape, takes, True, none, none, *counts).item() == 0


@pytest.mark.parametrize(
    ("takes", "change", "error", "said"),
    [
        ("hidden", {"mlp_layer": SwiGLU}, TypeError, "another MLP than fc1, activation, fc2"),
        ("hidden", {"act_layer": nn.Sigmoid}, TypeError, "another MLP than fc1, activation, fc2"),
        ("hidden", {"embed_dim": 48, "num_heads": 3, "mlp_ratio": 50 / 48}, ValueError, "50 hidden channels.* 3 heads"),
    ],
)
def test_heads_that_cannot_be_switched_off_this_way_are_refused(
    takes: Takes, change: dict[str, Any], error: type[Exception], said: str
) -> None:
    vit = small_vit(**change)
    with pytest.raises(error, match=said):
        check_gated(vit, takes)
    check_gated(vit, "identity")
    check_gated(vit, "input")
