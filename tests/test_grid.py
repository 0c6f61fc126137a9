"""Merging on the grid: rows, then columns, each giving up as many as the others."""

import itertools

import pytest
import torch
from models import images, small_vit
from test_positions import vit_of
from torch import Tensor
from torch.nn.functional import cosine_similarity

from adaptvit import GridConfig, Masked, Packed
from adaptvit.methods.grid import join, neighbours

LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)


def joined_by_hand(line: Tensor, count: int) -> tuple[list[list[int]], Tensor]:
    """Which tokens of a line are together in the end, and what they are: each second that joins joins its likest."""

    def alike(one: int, other: int) -> float:
        return cosine_similarity(line[one], line[other], dim=0).item() if other < len(line) else -2.0

    second = range(1, len(line), 2)
    likest = {n: max((n - 1, n + 1), key=lambda other, n=n: alike(n, other)) for n in second}
    leave = sorted(second, key=lambda n: -alike(n, likest[n]))[:count]
    groups = [[n, *(other for other in leave if likest[other] == n)] for n in range(len(line)) if n not in leave]
    values = [line[group].gather(0, line[group].abs().argmax(dim=0)[None])[0] for group in groups]
    return [sorted(group) for group in groups], torch.stack(values)


@pytest.mark.parametrize(("length", "count"), [(length, n) for length in (1, 2, 5, 8) for n in range(length // 2 + 1)])
def test_a_line_by_hand(length: int, count: int) -> None:
    lines = torch.randn(3, 4, length, 6, generator=torch.Generator().manual_seed(length))
    found = neighbours(lines, count)
    left = join(lines, found)
    assert left.shape == (3, 4, length - count, 6)
    for image, row in itertools.product(range(3), range(4)):
        groups, values = joined_by_hand(lines[image, row], count)
        place = found.place[image, row].tolist()
        assert [[n for n in range(length) if place[n] == slot] for slot in range(length - count)] == groups
        assert torch.equal(left[image, row], values)


@pytest.mark.parametrize(("grid", "depth"), [((14, 14), 12), ((8, 2), 4), ((1, 6), 3), ((5, 7), 2)])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.7, 5.0, 1e9])
def test_sides_fall_evenly_and_by_half_at_most(grid: tuple[int, int], depth: int, rate: float) -> None:
    sides = GridConfig(rate=rate).sides(grid, depth)
    for before, after in itertools.pairwise([grid, *sides]):
        assert all((full + 1) // 2 <= one <= full for full, one in zip(before, after, strict=True))
    if rate < 1 and depth > 2:
        assert sides[-1] == pytest.approx([side * (1 - rate) for side in grid], abs=1)


@LAYOUTS
@pytest.mark.parametrize("flavour", ["class token", "registers", "average pool, no class token", "rectangular"])
def test_what_is_left_is_a_grid_in_the_order_of_the_patches(flavour: str, layout: type) -> None:
    model = GridConfig(rate=0.9).build(small_vit(flavour)).eval()
    with torch.inference_mode():
        usage = model(images(model.vit), layout, detailed=True).usage
    sides = model.config.sides(usage.grid, model.depth)
    for number, (rows, columns) in enumerate(sides[:-1]):
        places = usage.groups[:, number].unflatten(1, usage.grid) - model.prefix
        assert (usage.attended[:, number + 1] == model.prefix + rows * columns).all()
        row, column = places // columns, places % columns
        assert (row.diff(dim=1) >= 0).all()
        assert (row[:, 0] == 0).all()
        assert (row[:, -1] == rows - 1).all()
        assert (column[:, :, 0] == 0).all()
        assert (column[:, :, -1] == columns - 1).all()
        assert (column.diff(dim=2) >= 0).all()
    assert sides[-2][0] * sides[-2][1] < usage.groups.shape[2]


@LAYOUTS
def test_tokens_are_turned_as_those_of_an_image_of_fewer_patches(layout: type) -> None:
    """What DINOv3's own table is for the grid that is left, and of a relative bias the nearest place."""
    vit = vit_of("vit_small_patch16_dinov3", (80, 112))
    model = GridConfig(rate=0.7).build(vit).eval()
    tokens = model.enter(torch.randn(2, 3, 80, 112, dtype=torch.float64), layout)
    joined = model.joined(tokens, (5, 7), (4, 5), tokens.x[..., None, :])
    merged = model.merge(tokens, (5, 7), (4, 5), *joined)
    table = tokens.source.tables({"rope": vit.rope.get_embed(shape=(5, 7)).double()}, merged)["rope"]
    wanted = vit.rope.get_embed(shape=(4, 5)).double()
    for image in table.expand(2, *table.shape[1:]):
        torch.testing.assert_close(image[0, model.prefix :], wanted, rtol=0, atol=1e-6)
    at = merged.at.reshape(2, -1)[0, model.prefix :] - model.prefix
    assert at.unflatten(0, (4, 5))[:, 0].tolist() == [0, 7, 21, 28]
    assert at.unflatten(0, (4, 5))[0].tolist() == [0, 2, 3, 4, 6]
