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
    for held, read in ((slots, 4), (None, 2), (slots, 0)):  # of images of a slot or two that are read, or of none
        given = (qkv[:, 0], qkv[:, 1], held, offsets_of(lengths), N, read)
        found, wanted = (one.received(*given)[:total] for one in (interpreted, PLAIN))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("lengths", "prefix"), list(zip(LENGTHS, (0, 1, 2), strict=True)))
def test_mean_patch(interpreted: ModuleType, lengths: list[int], prefix: int) -> None:
    rows = sum(lengths) + 5
    given = (drawn(rows, 2, 70)[:, 1], slots_of(lengths, rows), offsets_of(lengths), N, prefix)
    found, wanted = (one.mean_patch(*given)[: sum(lengths)] for one in (interpreted, PLAIN))
    torch.testing.assert_close(found, wanted)


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
        score = weights[:, 0].log()
        for least in (-1.0, -torch.inf):
            given = (score, slots, offsets, N, prefix, least)
            (found, total), (wanted, wanted_total) = (one.above(*given) for one in (interpreted, PLAIN))
            assert torch.equal(found, wanted)
            torch.testing.assert_close(total, wanted_total, equal_nan=True)
    assert not PLAIN.sample(spoilt, v, slots, offsets, N, prefix, 4.5)[1].all()


@pytest.mark.parametrize(("lengths", "prefix"), list(zip(LENGTHS, (0, 1, 2), strict=True)))
def test_match_arrange_and_merge(interpreted: ModuleType, lengths: list[int], prefix: int) -> None:
    lengths = [max(length, prefix) for length in lengths]
    rows, offsets = sum(lengths) + 3, offsets_of(lengths)
    keys, importance, size = drawn(rows, 3, 2, 70)[:, 1], drawn(rows).abs(), drawn(rows + 1)[1:].abs() + 1
    for weights, protection, size_cost in ((importance, 0.2, 0.0), (None, 0.0, 0.3), (importance, 0.2, 0.1)):
        given = (keys, weights, size, offsets, N, prefix, protection, size_cost)
        score, target = PLAIN.match(*given)
        found = interpreted.match(*given)
        torch.testing.assert_close(found[0], score)
    compared = (score > -torch.inf) & (torch.tensor(lengths) > prefix + 1)[:, None]
    assert torch.equal(found[1][compared], target[compared])
    chosen = compared & (score > score.where(compared, 0).mean())
    place, moved = PLAIN.arrange(chosen, score, target, offsets, N, prefix)
    found_place, found_moved = interpreted.arrange(chosen, score, target, offsets, N, prefix)
    live = torch.arange(N) < torch.tensor(lengths)[:, None]
    assert torch.equal(found_place[live], place[live])
    assert torch.equal(found_moved, moved)
    given = (drawn(rows, 6), torch.arange(rows), drawn(rows).abs() + 1)
    weights = drawn(rows + 1)[1:]
    weights[1] = torch.nan
    for count, importance, keeps in ((4, None, False), (rows, None, True), (rows, weights, False), (4, weights, True)):
        arguments = (*given, importance, place, moved, offsets, count, 11, keeps)
        found, wanted = (one.merge(*arguments) for one in (interpreted, PLAIN))
        held = torch.arange(count) < wanted[4][-1]
        if count == rows:
            torch.testing.assert_close(found[0][held], wanted[0][held])
        assert torch.equal(found[4], wanted[4])
        assert torch.equal(found[5], wanted[5])
        assert torch.equal(found[3], wanted[3])
        assert torch.equal(found[1][held], wanted[1][held])
        torch.testing.assert_close(found[2], wanted[2])


def test_merge_of_as_many_in_every_image(interpreted: ModuleType) -> None:
    place = torch.tensor([[0, 1, 2, 1], [0, 1, 1, 2]])
    moved = torch.tensor([[False, False, False, True], [False, True, False, False]])
    given = (drawn(8, 6), torch.arange(8) % 4, drawn(8).abs() + 1, None, place, moved, offsets_of([4, 4]), 6, 3, False)
    found, wanted = (one.merge(*given) for one in (interpreted, PLAIN))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_gated_and_put(interpreted: ModuleType, lengths: list[int]) -> None:
    rows, heads = sum(lengths) + 5, drawn(len(lengths), 3) > 0
    given = (drawn(rows, 6), heads, offsets_of(lengths))
    assert torch.equal(*(one.gated(*given) for one in (interpreted, PLAIN)))
    places = torch.tensor([2, 0, rows, rows - 1, rows + 7])
    assert torch.equal(*(one.put(drawn(rows, 6), places, drawn(5, 6)) for one in (interpreted, PLAIN)))


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_what_is_received_over_its_mean(interpreted: ModuleType, prefix: int) -> None:
    lengths = [7, 13, 4]
    received, offsets = drawn(30, 3).abs(), offsets_of(lengths)
    found, wanted = (one.over_mean(received, offsets, N, prefix)[:24] for one in (interpreted, PLAIN))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(wanted[7 + prefix : 20].mean(), torch.tensor(1.0))


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_best_and_what_they_leave(interpreted: ModuleType, prefix: int) -> None:
    score, x = drawn(3, 11), drawn(3, prefix + 11, 70)
    score[0] = 1.0  # all alike
    for count in (1, 5, 11):
        index, last = interpreted.best(score, count, prefix)
        wanted_index, wanted_last = PLAIN.best(score, count, prefix)
        assert torch.equal(index[1:], wanted_index[1:])
        assert torch.equal(last[1:], wanted_last[1:])
        assert torch.equal(index[0], torch.arange(prefix + count))
        given = (x, score.abs(), wanted_index, wanted_last)
        torch.testing.assert_close(interpreted.take_fused(*given), PLAIN.take_fused(*given))
    score[1, 3] = score[1, 7] = torch.nan
    assert {3 + prefix, 7 + prefix} <= set(interpreted.best(score, 2, prefix)[0][1].tolist())
