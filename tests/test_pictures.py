import base64

import pytest
import torch
from models import METHODS, images, small_vit

from adaptvit.pictures import cost_histogram, curves, data_uri, depth_maps, tokens_per_block
from adaptvit.usage import Usage


@pytest.fixture(scope="module")
def usage() -> Usage:
    vit = small_vit("rectangular")
    return METHODS["avit"].build(vit).eval()(images(vit, count=5)).usage


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


def test_runs_follow_one_another_along_the_epochs() -> None:
    lines = curves({"first": [0.1, 0.2], "second": [0.3]}, "accuracy", percent=True).axes[0].lines
    assert [list(line.get_xdata()) for line in lines] == [[1, 2], [3]]


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_picture_encodes_the_same_way_twice(kind: str, start: bytes) -> None:
    one, two = (data_uri(cost_histogram(torch.tensor([1.0, 2.0]), dense=3.0), kind) for _ in range(2))
    assert one == two
    assert base64.b64decode(one.split(",")[1]).startswith(start)
