"""Triton's kernels, interpreted on this CPU, give what torch's arithmetic gives."""

import os
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor

from adaptvit.tokens.fused import PLAIN

pytest.importorskip("triton", reason="needs triton")
LENGTHS = [[7, 0, 12, 1], [13], [5, 13, 13]]
N = 13


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """The kernels of a Triton that interprets, beside the one that may be loaded."""
    own = "adaptvit.tokens.triton_kernels"

    def taken() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.split(".")[0] == "triton" and not name.startswith("triton._C")]
        return {name: sys.modules.pop(name) for name in [*names, *([own] if own in sys.modules else [])]}

    before, told = taken(), os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield import_module(own)
    finally:
        taken()
        sys.modules.update(before)
        os.environ.pop("TRITON_INTERPRET") if told is None else os.environ.update(TRITON_INTERPRET=told)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def slots_of(lengths: list[int], rows: int) -> Tensor:
    """Random slots of images of such lengths, in so many rows."""
    order = torch.Generator().manual_seed(len(lengths))
    parts = [
        image * N + torch.randperm(N, generator=order)[:length].sort().values for image, length in enumerate(lengths)
    ]
    parts.append(torch.full((rows - sum(lengths),), len(lengths) * N))
    return torch.cat(parts)


@pytest.mark.parametrize(("lengths", "count"), [(LENGTHS[0], 3), (LENGTHS[0], 40), (LENGTHS[1], 3), (LENGTHS[2], 40)])
def test_compact(interpreted: ModuleType, lengths: list[int], count: int) -> None:
    rows, total = sum(lengths) + 5, len(lengths) * N
    slots = slots_of(lengths, rows)
    for by_slot in (False, True):
        given = (drawn(total if by_slot else rows) > 0, slots, offsets_of(lengths), drawn(rows, 6), drawn(rows, 2, 3))
        found, wanted = (one.compact(*given, count, total, by_slot) for one in (interpreted, PLAIN))
        for one, other in zip(found[:3], wanted[:3], strict=True):
            assert torch.equal(one, other)
        held = wanted[2] < total
        for one, other in zip(found[3:], wanted[3:], strict=True):
            assert torch.equal(one[held], other[held])
        assert all(t.isfinite().all() for t in found[4:])


@pytest.mark.parametrize(("lengths", "stays"), list(zip(LENGTHS, (False, True, False), strict=True)))
def test_halt(interpreted: ModuleType, lengths: list[int], stays: bool) -> None:
    rows = sum(lengths) + 5
    slots, remainder = slots_of(lengths, rows), drawn(rows).sigmoid()
    given = (drawn(rows, 6), drawn(rows), remainder, drawn(len(lengths), 2, 6), slots, offsets_of(lengths))
    found, wanted = (one.halt(*given, N, stays, 2.0, 0.5, 0.2) for one in (interpreted, PLAIN))
    real = slots < len(lengths) * N
    torch.testing.assert_close(found[0], wanted[0])
    assert torch.equal(found[1][real], wanted[1][real])
    torch.testing.assert_close(found[2][real], wanted[2][real])


@pytest.mark.parametrize("lengths", LENGTHS)
def test_received(interpreted: ModuleType, lengths: list[int]) -> None:
    rows, total = sum(lengths) + 5, sum(lengths)
    qkv, slots = drawn(rows, 3, 2, 5), slots_of(lengths, rows)
    for read in (1, 4):  # of images of a slot or two that are read, or of none
        given = (qkv[:, 0], qkv[:, 1], slots, offsets_of(lengths), N, read)
        found, wanted = (one.received(*given)[:total] for one in (interpreted, PLAIN))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("lengths", "prefix"), list(zip(LENGTHS, (0, 1, 2), strict=True)))
def test_attended(interpreted: ModuleType, lengths: list[int], prefix: int) -> None:
    rows, total = sum(lengths) + 5, sum(lengths)
    q, k, _ = drawn(rows, 3, 3, 5).unbind(1)
    slots, offsets = slots_of(lengths, rows), offsets_of(lengths)
    for held, read in ((slots, 4), (slots, 0), (None, 2)):
        for over in (None, prefix):
            given = (q, k, held, offsets, N, read, over)
            found, wanted = (one.attended(*given)[:total] for one in (interpreted, PLAIN))
            torch.testing.assert_close(found, wanted)
    mean = PLAIN.received(q, k, slots, offsets, N, 4).mean(dim=1)
    torch.testing.assert_close(PLAIN.attended(q, k, slots, offsets, N, 4, None), mean)


def test_attended_of_as_many_in_every_image(interpreted: ModuleType) -> None:
    q, k, _ = drawn(21, 3, 3, 5).bfloat16().unbind(1)
    for read, prefix in ((1, 1), (0, 0), (2, None)):
        found, wanted = (one.attended(q, k, None, None, 7, read, prefix) for one in (interpreted, PLAIN))
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(wanted, PLAIN.attended(q, k, None, offsets_of([7, 7, 7]), 7, read, prefix))
        if prefix is not None:
            torch.testing.assert_close(wanted.view(3, 7)[:, prefix:].mean(dim=1), torch.ones(3))


@pytest.mark.parametrize(("lengths", "prefix"), list(zip(LENGTHS, (0, 1, 2), strict=True)))
def test_with_mean(interpreted: ModuleType, lengths: list[int], prefix: int) -> None:
    rows = sum(lengths) + 5
    given = (drawn(rows, 2, 140)[:, 1], slots_of(lengths, rows), offsets_of(lengths), N, prefix)
    found, wanted = (one.with_mean(*given)[: sum(lengths)] for one in (interpreted, PLAIN))
    torch.testing.assert_close(found, wanted)
    even = drawn(21, 10).bfloat16()
    found, wanted = (one.with_mean(even, None, None, 7, prefix) for one in (interpreted, PLAIN))
    torch.testing.assert_close(found, wanted)
    patches = even.view(3, 7, 10)[:, prefix:, 5:].float()
    torch.testing.assert_close(wanted.view(3, 7, 10)[:, 6, 5:].float(), patches.mean(dim=1), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("lengths", "prefix"), list(zip(LENGTHS, (0, 1, 2), strict=True)))
def test_sample_and_above(interpreted: ModuleType, lengths: list[int], prefix: int) -> None:
    rows, offsets = sum(lengths) + 5, offsets_of(lengths)
    slots, received, v = slots_of(lengths, rows), drawn(rows, 2).abs(), drawn(rows, 2, 2, 5)[:, 1]
    nothing, spoilt = received.clone(), received.clone()
    nothing[: lengths[0]], spoilt[lengths[0] // 2] = 0, torch.nan
    for weights in (received, nothing, spoilt):
        for points in (1.0, 4.5, 20.0):
            given = (weights, v, slots, offsets, N, prefix, points)
            (found, sound), (wanted, finite) = (one.sample(*given) for one in (interpreted, PLAIN))
            assert torch.equal(found, wanted)
            assert torch.equal(sound, finite)
        logits = torch.stack([weights[:, 0].log(), weights[:, 1]], dim=1)
        for least in (-1.0, -torch.inf):
            given = (logits, slots, offsets, N, prefix, least)
            (found, total), (wanted, wanted_total) = (one.above(*given) for one in (interpreted, PLAIN))
            numbers = ~wanted_total.isnan().flatten()  # else nothing of the image counts
            assert torch.equal(found[numbers], wanted[numbers])
            torch.testing.assert_close(total, wanted_total, equal_nan=True)
    assert not PLAIN.sample(spoilt, v, slots, offsets, N, prefix, 4.5)[1].all()


@pytest.mark.parametrize(("lengths", "prefix"), list(zip(LENGTHS, (0, 1, 2), strict=True)))
def test_match_arrange_and_merge(interpreted: ModuleType, lengths: list[int], prefix: int) -> None:
    lengths = [max(length, prefix) for length in lengths]
    rows, offsets = sum(lengths) + 3, offsets_of(lengths)
    keys, importance, size = drawn(rows, 3, 2, 70)[:, 1], drawn(rows).abs(), drawn(rows + 1)[1:].abs() + 1
    costs = ((importance, 0.2, 0.0, False), (None, 0.0, 0.3, True), (importance, 0.2, 0.1, False))
    for weights, *numbers in costs:
        given = (keys, weights, size, offsets, N, prefix, *numbers)
        score, target = PLAIN.match(*given)
        found = interpreted.match(*given)
        torch.testing.assert_close(found[0], score)
    compared = (score > -torch.inf) & (torch.tensor(lengths) > prefix + 1)[:, None]
    assert torch.equal(found[1][compared], target[compared])
    target = target.clamp(max=(min(length for length in lengths if length > prefix + 1) - prefix) // 2 - 1)
    chosen = compared & (score > score.where(compared, 0).mean())
    live = torch.arange(N) < torch.tensor(lengths)[:, None]
    for given in ((None, 2, 0.0, 0.0), (None, None, 0.05, 0.5), (chosen, None, 0.0, 0.0)):
        arguments = (given[0], score.where(compared, -torch.inf), target, offsets, N, prefix, *given[1:])
        found, wanted = (one.arrange(*arguments) for one in (interpreted, PLAIN))
        place, moved, left = wanted
        assert torch.equal(found[0][live], place[live])
        assert torch.equal(found[1] & live, moved & live)
        assert torch.equal(found[2], left)
        for row, count, length in zip(place, left.tolist(), lengths, strict=True):
            assert set(row[:length].tolist()) == set(range(count))
    assert torch.equal(left, offsets.diff() - chosen.sum(dim=1).int())
    given = (drawn(rows, 6), torch.arange(rows), drawn(rows).abs() + 1)
    weights = drawn(rows + 1)[1:]
    weights[1] = torch.nan
    for count, importance, keeps in ((4, None, False), (rows, None, True), (rows, weights, False), (4, weights, True)):
        arguments = (*given, importance, place, moved, offsets, left, count, 11, keeps, 0.85, torch.float32)
        found, wanted = (one.merge(*arguments) for one in (interpreted, PLAIN))
        held = torch.arange(count) < wanted[5][-1]
        if count == rows:
            torch.testing.assert_close(found[0][held], wanted[0][held])
        for number in (4, 5, 6):
            assert torch.equal(found[number], wanted[number])
        assert torch.equal(found[1][held], wanted[1][held])
        torch.testing.assert_close(found[2:4], wanted[2:4])
        torch.testing.assert_close(wanted[3], 0.85 * wanted[2].log())


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("images", [1, 3])
def test_merging_of_as_many_in_every_image(interpreted: ModuleType, images: int, prefix: int) -> None:
    x, size = drawn(images * N, 6).bfloat16(), drawn(images * N).abs() + 1
    keys = drawn(images * N, 3, 2, 5).bfloat16()[:, 1]
    keys[prefix : prefix + 6] = keys[prefix]  # which are all alike
    given = (keys, None, size, None, N, prefix, 0.0, 0.0, True)
    (score, target), found = PLAIN.match(*given), interpreted.match(*given)
    torch.testing.assert_close(found[0], score)
    torch.testing.assert_close(score, PLAIN.match(*given[:3], offsets_of([N] * images), *given[4:])[0])
    decided = [
        one.arrange(None, score.round(decimals=3), target, None, N, prefix, 3, 0.0, 0.0) for one in (interpreted, PLAIN)
    ]
    for one, other in zip(*decided, strict=True):
        assert torch.equal(one, other)
    place, moved, left = decided[1]
    assert left.tolist() == [N - 3] * images
    arguments = (size, None, place, moved, None, None, images * (N - 3), N - 3, False, 1.0, torch.bfloat16)
    found, wanted = (one.merge(x, None, *arguments) for one in (interpreted, PLAIN))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    at = torch.arange(N).repeat(images)
    for one, other in zip(PLAIN.merge(x, at, *arguments), wanted, strict=True):
        assert torch.equal(one, other)


def test_of_a_score_that_is_no_number_places_stay_an_order(interpreted: ModuleType) -> None:
    score = drawn(2, 6)
    score[0, 2] = torch.nan
    for numbers in ((3, 0.0, 0.0), (None, 0.1, 0.0)):
        place, _, left = interpreted.arrange(
            None, score, torch.zeros(2, 6, dtype=torch.int64), None, N - 1, 0, *numbers
        )
        for row, count in zip(place, left.tolist(), strict=True):
            assert set(row.tolist()) == set(range(count))


@pytest.mark.parametrize(("images", "prefix"), [(1, 0), (3, 1), (3, 2)])
def test_gates(interpreted: ModuleType, images: int, prefix: int) -> None:
    normed, state = drawn(images * N, 20), drawn(images, 4, 20)[:, 1]
    normed[5] = torch.nan
    patch, sublayer, head = drawn(1, 20), drawn(2, 20), drawn(3, 20)
    every = (patch, drawn(1), sublayer, drawn(2), head, drawn(3))
    for maps, both, dtype in (
        (every, True, torch.float32),
        ((*every[:2], None, None, None, None), False, torch.float32),
        ((None, None, *every[2:]), False, torch.float16),
    ):
        some = [None if t is None else t.to(dtype) for t in (normed, state, *maps)]
        given = (*some, N, prefix, 3, 0.4, -0.2, both)
        found, wanted = (one.gates(*given) for one in (interpreted, PLAIN))
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)
        patches, _, sublayers, attended, updated = wanted
        assert torch.equal(attended[:, prefix:], patches & sublayers[:, :1])
        assert torch.equal(
            updated[:, prefix:], patches & sublayers[:, 1:] if both else sublayers[:, 1:].expand_as(patches)
        )
    assert PLAIN.gates(*given[:2], *every, *given[8:])[0].view(-1)[5 - prefix]  # what is no number is on


@pytest.mark.parametrize("lengths", LENGTHS)
def test_gated_and_put(interpreted: ModuleType, lengths: list[int]) -> None:
    rows, heads = sum(lengths) + 5, drawn(len(lengths), 3) > 0
    given = (drawn(rows, 6), heads, offsets_of(lengths))
    assert torch.equal(*(one.gated(*given) for one in (interpreted, PLAIN)))
    places = torch.tensor([2, 0, rows, rows - 1, rows + 7])
    assert torch.equal(*(one.put(drawn(rows, 6), places, drawn(5, 6)) for one in (interpreted, PLAIN)))


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_best_and_what_they_leave(interpreted: ModuleType, prefix: int) -> None:
    n = prefix + 11
    score, x, slots = drawn(3, n), drawn(3, n, 70), 2 * torch.arange(3 * n).view(3, n)
    score[0] = 1.0  # all alike
    for count, held in ((1, None), (5, slots), (11, None)):
        found, wanted = (one.best(score, held, count, prefix) for one in (interpreted, PLAIN))
        for one, other in zip(found[:3], wanted[:3], strict=True):
            assert torch.equal(one[1:], other[1:])
        torch.testing.assert_close(found[3], wanted[3])
        assert torch.equal(found[0][0], torch.arange(prefix + count))
        index, _, last, _ = wanted
        for given in ((score.abs(), last), (None, None)):
            torch.testing.assert_close(*(one.take(x, index, *given, prefix) for one in (interpreted, PLAIN)))
    odds = drawn(3, n, 2).bfloat16()
    difference = odds[..., 0].float() - odds[..., 1].float()
    found, wanted = interpreted.best(odds, None, 4, prefix), PLAIN.best(difference, None, 4, prefix)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[3], wanted[3])
    score[1, prefix + 3] = score[1, prefix + 7] = torch.nan
    index, _, _, sums = interpreted.best(score, None, 2, prefix)
    assert {3 + prefix, 7 + prefix} <= set(index[1].tolist())
    assert sums.isfinite().flatten().tolist() == [True, False, True]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_padded_and_back(interpreted: ModuleType, lengths: list[int]) -> None:
    rows, offsets, images = sum(lengths) + 5, offsets_of(lengths), len(lengths)
    qkv, few = drawn(rows, 3, 3, 5), [min(length, 2) for length in lengths]
    for asking, bias in ((lengths, None), (few, drawn(rows)), (lengths, drawn(rows))):
        q = qkv[: sum(asking) + 1, 0].bfloat16()
        given = (q, qkv[:, 1].bfloat16(), qkv[:, 2].bfloat16(), bias, offsets_of(asking), offsets, N)
        found, wanted = (one.padded(*given) for one in (interpreted, PLAIN))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
            assert one.stride() == other.stride()
        live = torch.arange(N) < torch.tensor(lengths)[:, None]
        assert torch.equal(wanted[3].view(images, N) > -torch.inf, live | ~live.any(dim=1, keepdim=True))
        mixed = wanted[0].transpose(1, 2).contiguous().transpose(1, 2)
        for t in (wanted[0], mixed):
            back = [one.unpadded(t, offsets_of(asking), len(q)) for one in (interpreted, PLAIN)]
            assert torch.equal(*back)
        assert torch.equal(back[0], torch.cat([q[:-1], torch.zeros_like(q[:1])]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_with_bias(interpreted: ModuleType, dtype: torch.dtype) -> None:
    qkv, bias = drawn(11, 3, 3, 5).to(dtype), drawn(11).abs()
    given = (qkv[:4, 0], qkv[:, 1], qkv[:, 2], bias, 0.3)
    found, wanted = (one.with_bias(*given) for one in (interpreted, PLAIN))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    logits, plain = (torch.einsum("qhd,khd->hqk", *pair) for pair in (wanted[:2], given[:2]))
    torch.testing.assert_close(0.3 * logits, 0.3 * plain + bias.to(dtype), atol=4e-3, rtol=4e-3)


def test_rows_of_no_image_become_0(interpreted: ModuleType) -> None:
    wide, offsets = drawn(12, 3, 8), offsets_of([4, 0, 5])
    wide[9:] = torch.nan
    found, wanted = (one.unpadded(wide[None, ..., :5], offsets[::3], 12) for one in (interpreted, PLAIN))
    assert torch.equal(found, wanted)
    assert torch.equal(wanted, torch.cat([wide[:9, :, :5], torch.zeros(3, 3, 5)]))
