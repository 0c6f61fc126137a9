import base64
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.colors import to_rgb
from models import METHODS as CONFIGS
from models import images, small_vit, vary

from adaptvit.methods import METHODS
from adaptvit.show.pictures import (
    cost_histogram,
    curves,
    data_uri,
    depth_maps,
    laid_over,
    mean_colours,
    merged_regions,
    one_below_another,
    sizes_over,
    token_sizes,
    tokens_per_block,
    tradeoff,
    usage_per_block,
    write_png,
)
from adaptvit.show.styles import styles
from adaptvit.usage import Usage

DICHROMATS = (
    ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
)
"""What who lacks the first or the second kind of cone sees of red, green and blue (Machado et al., 2009)."""


@pytest.fixture(scope="module")
def usage() -> Usage:
    vit = small_vit("rectangular")
    return CONFIGS["avit"].build(vit).eval()(images(vit, count=5), detailed=True).usage


def test_a_depth_map_shows_the_depth_of_every_patch(usage: Usage) -> None:
    figure = depth_maps(torch.rand(5, 3, 64, 32), usage.patch_depth, blocks=4, columns=2)
    drawn = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(drawn) == 10
    for shading, depth in zip(drawn[1::2], usage.patch_depth, strict=True):
        assert shading.get_array().tolist() == depth.tolist()
        assert shading.get_extent() == [0, 32, 64, 0]


def test_all_maps_share_a_scale_of_whole_blocks(usage: Usage) -> None:
    figure = depth_maps(torch.rand(5, 1, 64, 32), usage.patch_depth, blocks=30)
    shadings = [axes.images[0] for axes in figure.axes if axes.images][1::2]
    assert len({(shading.norm.vmin, shading.norm.vmax) for shading in shadings}) == 1
    ticks = figure.axes[-1].get_yticks().tolist()
    assert ticks[-1] == 30
    assert ticks == sorted({int(tick) for tick in ticks})


@pytest.mark.parametrize(
    ("channels", "count", "said"), [(2, 5, "1 or 3 channels, got 2"), (3, 4, "4 images and 5 maps")]
)
def test_what_cannot_be_drawn_is_refused(usage: Usage, channels: int, count: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        depth_maps(torch.rand(count, channels, 64, 32), usage.patch_depth, blocks=4)


def test_tokens_per_block_draws_the_means(usage: Usage) -> None:
    bars = tokens_per_block(usage).axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx(usage.attended.double().mean(dim=0).tolist())


def test_usage_per_block_draws_the_means() -> None:
    vit = small_vit()
    model = vary(CONFIGS["adavit"].build(vit)).eval()
    usage = model(images(vit, count=8), detailed=True).usage
    rows = usage_per_block(usage, model.heads).axes
    drawn = {axes.get_ylabel(): torch.tensor([bar.get_height() for bar in axes.patches]) for axes in rows}
    assert list(drawn) == ["patches", "heads", "attention", "MLP"]
    for block in range(model.depth):
        patches = [own[block, usage.prefix :].tolist() for own in usage.live]
        assert drawn["patches"][block] == pytest.approx(sum(map(sum, patches)) / (8 * 16))
        computed = usage.heads[usage.attention[:, block], block].sum() / (8 * model.heads[block])
        assert drawn["heads"][block] == pytest.approx(computed.item())
        assert drawn["attention"][block] == pytest.approx(usage.attention[:, block].sum().item() / 8)
        assert drawn["MLP"][block] == pytest.approx(usage.mlp[:, block].sum().item() / 8)
    assert 0 < drawn["heads"].min() < drawn["heads"].max() == 1


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("full", ["patches"]),
        ("ats", ["patches"]),
        ("avit", ["patches", "attention", "MLP"]),
        ("avit, class token stays", ["patches"]),
        ("adavit, patches", ["patches"]),
        ("adavit, heads", ["heads"]),
        ("adavit, sublayers", ["patches", "attention", "MLP"]),
    ],
)
def test_what_no_image_left_out_is_not_drawn(name: str, rows: list[str]) -> None:
    vit = small_vit()
    model = vary(CONFIGS[name].build(vit)).eval()
    axes = usage_per_block(model(images(vit, count=8), detailed=True).usage, model.heads).axes
    assert [one.get_ylabel() for one in axes] == rows


def test_whiskers_span_the_middle_of_the_images() -> None:
    live = torch.ones(11, 1, 11, dtype=torch.bool)
    for image in range(11):
        live[image, 0, 1 : 1 + image] = False  # 10 - image of ten patches are on
    on = torch.ones(11, 1, dtype=torch.long)
    usage = Usage(on, on, on, on > 0, on > 0, grid=(2, 5), prefix=1, live=live)
    (axes,) = usage_per_block(usage, heads=[1] * usage.heads.shape[1]).axes
    (whisker,) = axes.collections[0].get_segments()
    assert whisker[:, 1].tolist() == pytest.approx([0.1, 0.9])


@pytest.mark.parametrize(("gmacs", "right"), [([1.0, 2.0, 2.0], 3.0), ([1.0, 2.0, 4.0], 4.0)], ids=["below", "beyond"])
def test_the_histogram_counts_every_image(gmacs: list[float], right: float) -> None:
    (axes,) = cost_histogram(torch.tensor(gmacs), dense=3.0).axes
    assert sum(bar.get_height() for bar in axes.patches) == 3
    assert axes.get_xlim() == pytest.approx((0, 1.04 * right))
    assert list(axes.lines[0].get_xdata()) == [3.0, 3.0]
    for bar in axes.patches:
        inside = [cost for cost in gmacs if bar.get_x() - 1e-9 <= cost <= bar.get_x() + bar.get_width() + 1e-9]
        assert len(inside) >= bar.get_height()


def test_a_patch_that_no_block_worked_on_is_black() -> None:
    depth = torch.tensor([[[0, 1]]])
    black, dark = laid_over(torch.zeros(1, 1, 1, 2), depth, blocks=4, opacity=1.0)[0, :, 0].T
    assert black.tolist() == [0, 0, 0]
    assert dark.tolist() == pytest.approx(matplotlib.colormaps["viridis"](0)[:3])
    ends = [depth_maps(torch.zeros(1, 1, 1, 2), own, blocks=4).axes[-1]._colorbar.extend for own in (depth, depth + 1)]
    assert ends == ["min", "neither"]


def test_runs_follow_one_another_along_the_epochs() -> None:
    lines = curves({"first": [0.1, 0.2], "second": [0.3]}, "accuracy", percent=True).axes[0].lines
    assert [list(line.get_xdata()) for line in lines] == [[1, 2], [3]]


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_picture_encodes_the_same_way_twice(kind: str, start: bytes) -> None:
    one, two = (data_uri(cost_histogram(torch.tensor([1.0, 2.0]), dense=3.0), kind) for _ in range(2))
    assert one == two
    assert base64.b64decode(one.split(",")[1]).startswith(start)


@pytest.mark.parametrize("grid", [(2, 2), (4, 1), (2, 8)], ids=str)
def test_the_combined_picture_has_each_depth_where_its_patch_is(grid: tuple[int, int]) -> None:
    rows, columns = grid
    depth = torch.ones(1, *grid, dtype=torch.long)
    depth[0, 1, 0] = 4
    combined = laid_over(torch.zeros(1, 1, 32, 16), depth, blocks=4, opacity=1.0)[0]
    shallow, deep = (torch.tensor(matplotlib.colormaps["viridis"](end)[:3]) for end in (0, 255))
    for y in range(32):
        for x in range(16):
            there = (y * rows // 32, x * columns // 16) == (1, 0)
            torch.testing.assert_close(combined[:, y, x], (deep if there else shallow).float())


def test_the_image_shows_through_grey() -> None:
    images = torch.rand(2, 3, 8, 8)
    depth = torch.randint(1, 5, (2, 2, 2))
    bare, covered, half = (laid_over(images, depth, 4, opacity) for opacity in (0.0, 1.0, 0.5))
    assert torch.equal(bare[:, 0], bare[:, 1])
    torch.testing.assert_close(bare[:, 0], 0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2])
    torch.testing.assert_close(half, (bare + covered) / 2)


def test_the_third_panel_is_the_combined_picture(usage: Usage) -> None:
    images = torch.rand(5, 3, 64, 32)
    figure = depth_maps(images, usage.patch_depth, blocks=4, columns=2, combined=True)
    drawn = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(drawn) == 15
    for third, expected in zip(drawn[2::3], laid_over(images, usage.patch_depth, blocks=4), strict=True):
        assert torch.equal(torch.as_tensor(third), expected.permute(1, 2, 0))


def test_long_captions_do_not_move_the_panels() -> None:
    drawn = []
    for caption in ("a\nb", "a very long name of a file, and a sum: $1\nb"):
        figure = depth_maps(torch.rand(2, 3, 32, 32), torch.ones(2, 4, 4), 4, captions=[caption] * 2, combined=True)
        figure.draw_without_rendering()
        drawn.append([axes.get_position().bounds for axes in figure.axes])
        words = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
        assert max(box.y1 for box in words) <= figure.bbox.y1
    assert drawn[0] == drawn[1]


def test_a_png_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = cost_histogram(torch.tensor([1.0, 2.0]), dense=3.0)
    write_png(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().endswith(b"IEND\xaeB`\x82")

    def stopped(path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_png(figure, tmp_path / "b.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_groups_of_patches_are_shown_in_their_mean_colour() -> None:
    image = torch.zeros(1, 3, 4, 8)
    image[0, 0, :2, :4] = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).repeat(1, 2)
    image[0, 0, 2:, :4], image[0, 1, 2:, 4:] = 1.0, 0.5
    shown = mean_colours(image, torch.tensor([[[7, 2], [7, 9]]]))
    assert shown.shape == image.shape
    assert (shown[0, 0, :, :4] == 0.75).all()
    assert not shown[0, :, :2, 4:].any()
    assert (shown[0, 1, 2:, 4:] == 0.5).all()


def test_merged_regions_are_outlined_in_their_mean_colour() -> None:
    image = torch.zeros(1, 3, 2, 4)
    image[0, 0, :, :2] = torch.tensor([[0.2, 1.0], [0.4, 0.4]])
    groups = torch.tensor([[[0, 0, 1, 2], [0, 3, 1, 2]]])
    assert token_sizes(groups).tolist() == [[[3, 3, 2, 2], [3, 1, 2, 2]]]
    shown = merged_regions(image, groups)
    side = shown.shape[2] // 2
    assert shown.shape == (1, 3, 2 * side, 4 * side)
    inside = shown[0, :, 2::side, 2::side]  # a pixel of each patch, away from the lines
    torch.testing.assert_close(inside, mean_colours(image, groups)[0])
    edge = (shown != mean_colours(image, groups).repeat_interleave(side, 2).repeat_interleave(side, 3)).any(dim=1)[0]
    assert edge[:, 2 * side].all()  # between 0 or 3 and 1
    assert edge[side, side : 2 * side].all()  # between 0 and 3
    assert not edge[:side, : 2 * side].any()  # within 0


def test_a_map_of_merged_tokens_has_sizes_and_regions() -> None:
    images, groups = torch.rand(2, 3, 16, 16), torch.arange(16).view(1, 4, 4).repeat(2, 1, 1) // 3
    figure = depth_maps(images, torch.full((2, 4, 4), 6), 6, combined=True, groups=groups)
    *panels, bar = (axes for axes in figure.axes if axes.images or axes.get_ylabel())
    assert bar.get_ylabel() == "patches in the token"
    assert panels[1].get_images()[0].get_array().max() == 3
    assert sizes_over(images, groups).shape == images.shape


def test_a_method_looks_alike_in_every_plot() -> None:
    looks = styles([*METHODS, "tome, tuned", "mine", "yours"])
    assert len({look.marker for name, look in looks.items() if name != "tome, tuned"}) == len(looks) - 1
    assert looks["tome"] == looks["tome, tuned"] == styles(["mine", "tome"])["tome"]
    for sight in DICHROMATS:  # told apart by who lacks a kind of cone, but for what has a marker of its own beside it
        seen = torch.tensor([to_rgb(look.colour) for look in looks.values()]).double() @ torch.tensor(sight).double().T
        assert len(seen.round(decimals=1).unique(dim=0)) >= len(looks) - 3


def test_versions_of_images_stand_one_below_another() -> None:
    image, other = torch.rand(2, 3, 8, 8), torch.rand(2, 1, 4, 8)
    figure = one_below_another([("image", image, ["", ""]), ("other", other, ["1 GMACs", "2 GMACs"])], blocks=4)
    *panels, bar = figure.axes
    assert [axes.get_ylabel() for axes in panels] == ["image", "", "other", ""]
    assert [axes.get_xlabel() for axes in panels] == ["", "", "1 GMACs", "2 GMACs"]
    assert torch.equal(torch.tensor(panels[1].get_images()[0].get_array()), image[1].permute(1, 2, 0))
    assert torch.equal(torch.tensor(panels[2].get_images()[0].get_array()), other[0, 0])
    assert bar.get_ylabel() == "blocks that worked on the patch"


def test_a_tradeoff_has_a_line_a_name_from_left_to_right_and_a_star() -> None:
    lines = {"a": [(2.0, 0.5, 0.1), (1.0, 0.4)], "b": [(1.5, 0.3)]}
    figure = tradeoff(lines, (3.0, 0.6), "share", dotted=("b",), title="mine", dense_gmacs=2.0)
    axes = figure.axes[0]
    a, b, star = (line for line in axes.get_lines() if line.get_label() in ("a", "b", "dense"))
    assert axes.get_title(loc="left") == "mine"
    (whiskers,) = axes.collections
    assert whiskers.get_segments()[1].tolist() == [[2.0, 0.4], [2.0, 0.6]]
    (above,) = axes.child_axes
    assert above.get_xlabel() == "GMACs an image"
    assert [(*line.get_xdata(),) for line in (a, b, star)] == [(1.0, 2.0), (1.5,), (3.0,)]
    assert [(*line.get_ydata(),) for line in (a, b, star)] == [(0.4, 0.5), (0.3,), (0.6,)]
    assert (a.get_linestyle(), b.get_linestyle(), star.get_marker()) == ("-", ":", "*")


@pytest.mark.parametrize(
    ("better", "expected"), [("less", [(1.0, 0.4), (1.5, 0.45), (3.0, 0.6)]), ("more", [(3.0, 0.6)])]
)
def test_the_frontier_has_the_points_that_no_other_beats(better: str, expected: list[tuple[float, float]]) -> None:
    lines = {"a": [(2.0, 0.45), (1.0, 0.4)], "b": [(1.5, 0.45), (1.5, 0.3)]}
    frontier = tradeoff(lines, (3.0, 0.6), "", better=better).axes[0].get_lines()[0]
    assert [*zip(frontier.get_xdata(), frontier.get_ydata(), strict=True)] == expected
