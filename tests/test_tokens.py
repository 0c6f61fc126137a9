from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel, varlen
from torch.nn.functional import scaled_dot_product_attention

from adaptvit import Masked, Packed, Slab
from adaptvit.tokens import AttentionOptions, kernels

HEADS, HEAD_DIM = 2, 4
LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)


@st.composite
def live_slots(draw: st.DrawFn) -> Tensor:
    """(B, N) bool with some slots of some images live, at times none of an image or all of every one."""
    images, slots = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    rows = st.lists(st.booleans(), min_size=slots, max_size=slots)
    return torch.tensor(draw(st.lists(rows, min_size=images, max_size=images)))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(live_slots())
def test_packed_holds_what_masked_shows(live: Tensor) -> None:
    x = random(*live.shape, 3)
    masked, packed = Masked.of(x).keep(live), Packed.of(x).keep(live)
    assert torch.equal(packed.live, live)
    assert torch.equal(masked.live, live)
    assert torch.equal(packed.x, x[live])
    assert torch.equal(packed.grid(packed.x), masked.grid(masked.x))
    assert packed.lengths == live.sum(dim=1).tolist()
    assert packed.offsets.tolist() == [0, *live.sum(dim=1).cumsum(dim=0).tolist()]


@given(live_slots())
def test_grid_undoes_spread(live: Tensor) -> None:
    values = random(*live.shape, 2)
    packed = Packed.of(random(*live.shape, 3)).keep(live)
    assert torch.equal(packed.grid(packed.spread(values)), values * live[..., None])
    per_image = random(len(live), 1, 1)
    assert torch.equal(packed.grid(packed.spread(per_image)), per_image * live[..., None])


@given(live_slots(), st.integers(1, 7))
def test_first_reads_leading_slots(live: Tensor, count: int) -> None:
    x = random(*live.shape, 3)
    count = min(count, live.shape[1])
    expected = (x * live[..., None])[:, :count]
    for layout in (Masked, Packed):
        laid = layout.of(x).keep(live)
        assert torch.equal(laid.first(laid.x, count), expected)
        assert torch.equal(laid.first(laid.x[..., 0], count), expected[..., 0])


@given(live_slots())
def test_filter_takes_other_features_along(live: Tensor) -> None:
    x, state = random(*live.shape, 3), random(*live.shape)
    for layout in (Masked, Packed):
        laid = layout.of(x)
        kept, (carried,) = laid.filter(laid.spread(live), laid.spread(state))
        assert torch.equal(kept.live, live)
        assert torch.equal(kept.grid(carried), state * live)


@given(live_slots())
def test_stamp_writes_into_live_slots(live: Tensor) -> None:
    for layout in (Masked, Packed):
        depth = torch.zeros(live.shape, dtype=torch.long)
        layout.of(random(*live.shape, 3)).keep(live).stamp(depth, 7)
        assert torch.equal(depth, 7 * live)


@given(live_slots(), st.data())
def test_keeping_twice_is_keeping_both(live: Tensor, data: st.DataObject) -> None:
    again = torch.tensor(data.draw(st.lists(st.booleans(), min_size=live.numel(), max_size=live.numel()))).view_as(live)
    x = random(*live.shape, 3)
    for layout in (Masked, Packed):
        twice, once = layout.of(x).keep(live).keep(again), layout.of(x).keep(live & again)
        assert torch.equal(twice.live, once.live)
        assert torch.equal(twice.grid(twice.x), once.grid(once.x))


@given(live_slots(), st.data())
def test_put_undoes_filter_where_nothing_was_dropped(live: Tensor, data: st.DataObject) -> None:
    again = torch.tensor(data.draw(st.lists(st.booleans(), min_size=live.numel(), max_size=live.numel()))).view_as(live)
    x, other = random(*live.shape, 3), random(*live.shape, 2)
    for layout in (Masked, Packed):
        laid = layout.of(x).keep(live)
        some, (kept,) = laid.filter(laid.spread(again), laid.spread(other))
        assert torch.equal(laid.grid(laid.put(some, kept)), other * (live & again)[..., None])


@given(live_slots(), st.booleans())
def test_a_batch_is_one_of_equal_images_or_all_in_one(live: Tensor, taken: bool) -> None:
    laid = Packed.of(random(*live.shape, 3))
    assert torch.equal(laid.batch, laid.grid(laid.x))
    if taken:
        some = laid.take(torch.arange(live.shape[1])[None, ::2].expand(len(live), -1))
        assert torch.equal(some.batch, laid.grid(laid.x)[:, ::2])
    else:
        some = laid.keep(live)
        assert torch.equal(some.batch, laid.batch if live.all() else laid.grid(laid.x)[live][None])
    assert torch.equal(some.of_batch(some.batch), some.x)
    masked = Masked.of(laid.grid(laid.x)).keep(live)
    assert torch.equal(masked.of_batch(masked.batch), masked.x)


def by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    live: Tensor,
    asked: Tensor,
    pairs: Tensor | None = None,
    at: Tensor | None = None,
    scale: float = HEAD_DIM**-0.5,
) -> Tensor:
    """Attention in loops: image by image, head by head, over the live tokens only; `pairs` are added by places `at`."""
    out = torch.zeros_like(q)
    for image in range(len(q)):
        keys = live[image].nonzero().flatten()
        for head in range(HEADS):
            for query in (live & asked)[image].nonzero().flatten():
                logits = (k[image, keys, head] @ q[image, query, head]) * scale
                if pairs is not None:
                    logits = (
                        logits + pairs[image % len(pairs), head % pairs.shape[1], at[image, query], at[image, keys]]
                    )
                out[image, query, head] = logits.softmax(dim=0) @ v[image, keys, head]
    return out


@settings(deadline=None)
@given(live_slots(), st.booleans())
def test_attention_is_within_the_live_tokens_of_an_image(live: Tensor, only_first: bool) -> None:
    asked = torch.zeros_like(live)
    asked[:, : 1 if only_first else None] = True
    q, k, v = (random(*live.shape, HEADS, HEAD_DIM, seed=seed) for seed in (1, 2, 3))
    expected = by_hand(q, k, v, live, asked)
    for layout in (Masked, Packed):
        laid = layout.of(random(*live.shape, 3)).keep(live)
        queries = laid.keep(asked)
        ours = [t if layout is Masked else t[live] for t in (k, v)]
        rows = q if layout is Masked else q[live & asked]
        out = laid.attend(rows, *ours, queries)
        torch.testing.assert_close(queries.grid(out), expected)


@settings(deadline=None)
@given(live_slots(), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_what_is_added_for_pairs_goes_by_where_both_were(
    live: Tensor, only_first: bool, moved: bool, own: bool, seed: int
) -> None:
    """One table for all images and heads, or one for each; tokens in the slots they were embedded in, or in others."""
    generator = torch.Generator().manual_seed(seed)
    count, slots = live.shape
    tables = (count, HEADS) if own else (1, 1)
    pairs = torch.randn(*tables, slots, slots, dtype=torch.float64, generator=generator)
    asked = torch.zeros_like(live)
    asked[:, : 1 if only_first else None] = True
    at = torch.arange(slots).expand(count, -1)
    if moved:
        at = torch.rand(count, slots, generator=generator).argsort(dim=1)
    q, k, v = (random(count, slots, HEADS, HEAD_DIM, seed=seed) for seed in (1, 2, 3))
    expected = by_hand(q, k, v, live, asked, pairs, at, 0.3)
    keys = (k.transpose(1, 2) * HEAD_DIM**-0.5).mT
    for layout in (Masked, Packed):
        laid = layout.of(random(count, slots, 3))
        if moved:
            place = at.argsort(dim=1)
            laid, _ = laid.merge(place, torch.zeros_like(live), laid.spread(torch.ones_like(q[..., 0, 0])))
            assert torch.equal(laid.grid(laid.at), at)
        laid = laid.keep(live)
        queries = laid.keep(asked)
        out = laid.attend(
            queries.spread(q), laid.spread(k), laid.spread(v), queries, AttentionOptions(pairs=pairs, scale=0.3)
        )
        torch.testing.assert_close(queries.grid(out), expected)
        if live[:, 0].all():
            number = 1 if only_first else None
            received = laid.grid(
                laid.received(
                    laid.first(laid.spread(q), 1) if number else laid.rows(laid.spread(q)), laid.spread(k), pairs
                )
            )
            for image, alive in enumerate(live):
                here = at[image, alive]
                logits = (q.transpose(1, 2) @ keys)[image][:, alive][:, :, alive]
                logits = logits + pairs[image % len(pairs)][:, here[:, None], here]
                wanted = logits.softmax(dim=-1)[:, :number].mean(dim=1)
                torch.testing.assert_close(received[image, alive].T, wanted)


def ragged() -> tuple[Packed, Packed, list[Tensor]]:
    live = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    live[3] = False
    packed = Packed.of(random(5, 9, 3)).keep(live)
    queries = packed.keep(torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) < 0.7)
    q = random(len(queries.x), HEADS, HEAD_DIM, seed=1)
    k, v = (random(len(packed.x), HEADS, HEAD_DIM, seed=seed) for seed in (2, 3))
    return packed, queries, [q, k, v]


def varlen_reference(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, longest_q: int, longest_k: int, scale: float | None
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` is documented to do, for a machine without its CUDA kernel."""
    assert q_ends.dtype == k_ends.dtype == torch.int32
    assert q_ends.diff().max() <= longest_q
    assert k_ends.diff().max() <= longest_k
    out = torch.empty_like(q)
    for (q0, q1), (k0, k1) in zip(q_ends.unfold(0, 2, 1).tolist(), k_ends.unfold(0, 2, 1).tolist(), strict=True):
        heads_first = (t.transpose(0, 1) for t in (q[q0:q1], k[k0:k1], v[k0:k1]))
        out[q0:q1] = scaled_dot_product_attention(*heads_first, scale=scale).transpose(0, 1)
    return out


def varlen_without_scale(*given: Any) -> Tensor:
    """That of older torch."""
    return varlen_reference(*given, scale=None)


@pytest.mark.parametrize("flash", [varlen_reference, varlen_without_scale])
def test_accelerator_kernels_agree_with_the_host_one(flash: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, queries, qkv = ragged()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    for scale in (None, 0.3):
        how = AttentionOptions(scale=scale)
        expected = packed.attend(*qkv, queries, how)
        for kernel in (kernels.attend_varlen, kernels.attend_padded, kernels.attend_each):
            torch.testing.assert_close(kernel(*qkv, packed, queries, how), expected)
    bias = random(len(packed.x), seed=4)
    how = AttentionOptions(bias=bias, scale=0.3)
    torch.testing.assert_close(kernels.attend_varlen(*qkv, packed, queries, how), packed.attend(*qkv, queries, how))
    for pairs in (None, random(1, HEADS, 9, 9, seed=5), random(5, 1, 9, 9, seed=6)):
        how = AttentionOptions(bias=bias, pairs=pairs, scale=0.3)
        expected = packed.attend(*qkv, queries, how)
        found = kernels.attend_padded(*qkv, packed, queries, how)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(kernels.attend_each(*qkv, packed, queries, how), expected)


def test_attention_in_products_is_that_of_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, queries, qkv = ragged()
    bias, pairs = random(len(packed.x), seed=4), random(5, HEADS, 9, 9, seed=5)
    for how in (AttentionOptions(), AttentionOptions(bias=bias, scale=0.3), AttentionOptions(bias=bias, pairs=pairs)):
        monkeypatch.setattr(kernels, "SHORT", 1 << 20)
        found = kernels.attend_each(*qkv, packed, queries, how)
        monkeypatch.setattr(kernels, "SHORT", 0)
        torch.testing.assert_close(found, kernels.attend_each(*qkv, packed, queries, how))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_bias_in_channels_of_its_own_is_more_precise_than_a_mask(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes as merging has them; all that is not the bias's is computed in float64."""

    def wide(q: Tensor, k: Tensor, v: Tensor, *others: Any, **more: Any) -> Tensor:
        assert {q.dtype, k.dtype, v.dtype} == {dtype}
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 72
        return varlen_reference(q.double(), k.double(), v.double(), *others, **more)

    monkeypatch.setattr(varlen, "varlen_attn", wide)
    generator = torch.Generator().manual_seed(0)
    packed = Packed.of(random(4, 50, 3)).keep(torch.rand(4, 50, generator=generator) < 0.8)
    qkv = [random(len(packed.x), HEADS, 64, seed=seed).to(dtype) for seed in range(3)]
    bias = torch.randint(1, 40, (len(packed.x),), generator=generator).float().log()
    for scale in (None, 0.3):
        how = AttentionOptions(bias=bias, scale=scale)
        exact = kernels.attend_each(*(t.double() for t in qkv), packed, packed, how)
        mask = how._replace(bias=bias.to(dtype))
        masked = (kernels.attend_each(*(t.double() for t in qkv), packed, packed, mask) - exact).abs().max()
        folded = (kernels.attend_varlen(*qkv, packed, packed, how) - exact).abs().max()
        assert folded < (1e-6 if dtype is torch.float32 else masked / 20)


def test_flash_is_preferred_while_it_runs_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, queries, qkv = ragged()
    order, chosen = lambda: _cur_sdpa_kernel_backends(with_priority=True), []

    def noted(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, longest: int, *_: int, scale: float):
        chosen.append(varlen._select_backend(q, k, v, q_ends, k_ends, longest, [-1, -1]))
        return q

    monkeypatch.setattr(varlen, "varlen_attn", noted)
    monkeypatch.setattr(varlen, "_cudnn_rejection_reasons", lambda *_: [])  # as on Hopper, which prefers cuDNN
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        before = order()
        kernels.attend_varlen(*qkv, packed, queries, kernels.PLAIN)
        assert order() == before
    assert chosen == [SDPBackend.FLASH_ATTENTION.value]


A100 = kernels.Facts(
    "cuda", (8, 0), torch.bfloat16, 64, dropout=False, biased=False, pairs=False, counted=False, learns=False
)


@pytest.mark.parametrize(
    ("facts", "kernel"),
    [
        ({}, "attend_varlen"),
        ({"dtype": torch.float16, "capability": (9, 0), "head_dim": 256}, "attend_varlen"),
        ({"dtype": torch.float32}, "attend_padded"),
        ({"capability": (7, 5)}, "attend_padded"),
        ({"head_dim": 60}, "attend_padded"),
        ({"head_dim": 264}, "attend_padded"),
        ({"dropout": True}, "attend_padded"),
        ({"biased": True}, "attend_varlen"),
        ({"biased": True, "head_dim": 252}, "attend_varlen"),
        ({"biased": True, "head_dim": 256}, "attend_padded"),
        ({"pairs": True}, "attend_padded"),
        ({"device": "mps", "capability": (0, 0)}, "attend_padded"),
        ({"device": "cpu", "capability": (0, 0)}, "attend_padded"),
        ({"device": "cpu", "capability": (0, 0), "counted": True, "dropout": True, "biased": True}, "attend_each"),
        ({"device": "cpu", "capability": (0, 0), "counted": True, "learns": True}, "attend_padded"),
        ({"device": "cpu", "dtype": torch.float32, "counted": True, "learns": True}, "attend_each"),
    ],
    ids=str,
)
def test_the_kernel_follows_what_it_has_to_do(facts: dict, kernel: str) -> None:
    assert kernels.choose(A100._replace(**facts)) is getattr(kernels, kernel)


@pytest.mark.parametrize("layout", [Packed, Slab], ids=lambda layout: layout.__name__)
def test_somebody_elses_kernel_comes_first_where_it_applies(layout: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "KERNELS", [*kernels.KERNELS])
    live = ragged()[0].live
    laid = layout.of(random(*live.shape, HEADS * HEAD_DIM)).keep(live)
    seen, q = [], laid.x.unflatten(-1, (HEADS, HEAD_DIM))

    def kernel(q: Tensor, k: Tensor, v: Tensor, keys: Packed, queries: Packed, how: AttentionOptions) -> Tensor:
        assert keys is queries is laid
        assert how.scale == 0.5
        return -v

    kernels.register(kernel, lambda facts: bool(seen.append(facts) or not facts.dropout))
    assert torch.equal(laid.attend(q, q, q, laid, AttentionOptions(scale=0.5)), -q)
    others = laid.attend(q, q, q, laid, AttentionOptions(dropout=0.5, scale=0.5))
    assert not torch.equal(others, -q)
    facts = kernels.Facts(
        "cpu", (0, 0), torch.float64, HEAD_DIM, False, False, False, counted=layout is Packed, learns=False
    )
    assert seen == [facts, facts._replace(dropout=True)]


def test_equal_lengths_take_one_dense_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    dense = kernels.attend_dense
    monkeypatch.setattr(
        "adaptvit.tokens.packed.attend_dense", lambda *args, **kwargs: calls.append(1) or dense(*args, **kwargs)
    )
    live = torch.ones(3, 6, dtype=torch.bool)
    live[0, :2], live[1, 4:], live[2] = False, False, False
    packed = Packed.of(random(3, 6, 3)).keep(live)
    q, k, v = (random(len(packed.x), HEADS, HEAD_DIM, seed=seed) for seed in (1, 2, 3))
    out = packed.grid(packed.attend(q, k, v, packed))
    torch.testing.assert_close(out, by_hand(*(packed.grid(t) for t in (q, k, v)), live, live))
    assert calls


@LAYOUTS
def test_gradients_flow_through_keep_attend_and_grid(layout: type) -> None:
    live = torch.tensor([[True, True, False, True], [True, False, False, True]])
    base = random(2, 4, HEADS * HEAD_DIM)

    def run(x: Tensor) -> Tensor:
        laid = layout.of(x).keep(live)
        heads = laid.x.unflatten(-1, (HEADS, HEAD_DIM))
        queries = laid.keep(live & torch.tensor([True, True, False, False]))
        mixed = laid.attend(queries.x.unflatten(-1, (HEADS, HEAD_DIM)), heads, heads, queries)
        return queries.grid(mixed.flatten(-2)).square().sum() + laid.first(laid.x, 2).square().sum()

    assert torch.autograd.gradcheck(run, base.requires_grad_())


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_the_host(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    packed, queries, qkv = ragged()
    expected = packed.attend(*qkv, queries)
    on_device = Packed(packed.x.cuda(), packed.shape, packed.slots.cuda())
    asked = on_device.keep(queries.live.cuda())
    padded = [torch.nn.functional.pad(t, (0, 4)).to("cuda", dtype) for t in qkv]  # flash wants heads of 8 or more
    padded[0] = padded[0] * 2**0.5
    out = on_device.attend(*padded, asked)[..., :HEAD_DIM]
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(out.cpu().double(), expected, atol=tolerance, rtol=tolerance)


@given(live_slots(), st.integers(0, 1000))
def test_merge_is_the_weighted_mean_of_those_that_go_to_one_place(live: Tensor, seed: int) -> None:
    x, weight, generator = (
        random(*live.shape, 3),
        random(*live.shape, seed=1).abs(),
        torch.Generator().manual_seed(seed),
    )
    place, moved, expected = torch.zeros(live.shape, dtype=torch.long), torch.zeros_like(live), {}
    for image, alive in enumerate(live):
        slots = alive.nonzero().flatten()[torch.randperm(int(alive.sum()), generator=generator)]
        for slot in slots.tolist():
            places = [at for at in range(live.shape[1]) if (image, at) in expected]
            joins = bool(places) and seed % 3 > 0 and torch.rand(1, generator=generator).item() < 0.5
            at = int(torch.randint(len(places), (1,), generator=generator)) if joins else len(places)
            place[image, slot], moved[image, slot] = at, joins
            expected.setdefault((image, at), []).append(slot)
    if not live.any():
        return
    for layout in (Masked, Packed):
        laid = layout.of(x).keep(live)
        merged, total = laid.merge(place, moved, laid.spread(weight))
        assert merged.shape == (len(live), 1 + max(at for _, at in expected))
        assert {*map(tuple, merged.live.nonzero().tolist())} == {*expected}
        features, sums, where = merged.grid(merged.x), merged.grid(total), merged.grid(merged.at)
        for (image, at), slots in expected.items():
            assert where[image, at] == slots[0]  # the one that did not move
            share = weight[image, slots]
            torch.testing.assert_close(sums[image, at], share.sum())
            torch.testing.assert_close(features[image, at], share @ x[image, slots] / share.sum())


def test_sums_on_a_device_are_float32s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "on_host", lambda _: False)
    into, ones = torch.arange(602) % 2, torch.ones(602, 3, dtype=torch.bfloat16)
    sums = kernels.add_rows(torch.ones(3, 3, dtype=torch.bfloat16), into, ones)
    assert sums.dtype == torch.bfloat16
    assert sums[:, 0].tolist() == [302.0, 302.0, 1.0]  # in bfloat16 256 + 1 is 256


@given(live_slots())
def test_a_key_with_the_bias_log_n_counts_n_times(live: Tensor) -> None:
    q, k, v = (random(*live.shape, HEADS, HEAD_DIM, seed=seed) for seed in range(3))
    counts = torch.randint(1, 4, live.shape, generator=torch.Generator().manual_seed(3))
    for layout in (Masked, Packed):
        laid = layout.of(q.flatten(2)).keep(live)
        mixed = laid.grid(
            laid.attend(*map(laid.spread, (q, k, v)), laid, AttentionOptions(bias=laid.spread(counts.double().log())))
        )
        for image, alive in enumerate(live):
            if alive.any():
                often = counts[image, alive]
                keys, values = (t[image, alive].repeat_interleave(often, dim=0).transpose(0, 1) for t in (k, v))
                expected = scaled_dot_product_attention(q[image, alive].transpose(0, 1), keys, values).transpose(0, 1)
                torch.testing.assert_close(mixed[image, alive], expected, atol=1e-10, rtol=0)
