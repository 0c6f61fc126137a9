import pytest
import torch
from models import images, small_vit

from adaptvit import AViTConfig, Masked, Packed
from adaptvit.methods.avit_widen import NEIGHBOURHOODS, beside, soonest, stencil

SIZES = {
    "nearby": 3,
    "cross": 5,
    "diag": 5,
    "dilated": 5,
    "square": 9,
    "isotropic": 13,
    "circle": 21,
    "double_square": 25,
}


@pytest.mark.parametrize("name", NEIGHBOURHOODS)
@pytest.mark.parametrize("grid", [(6, 6), (3, 7)], ids=str)
def test_neighbours_lie_around_the_halted_patches_of_their_own_image(name: str, grid: tuple[int, int]) -> None:
    halted = torch.rand(3, *grid, generator=torch.Generator().manual_seed(0)) < 0.1
    halted[1] = False
    expected = torch.zeros_like(halted)
    for image, row, column in halted.nonzero().tolist():
        for down in range(-2, 3):
            for right in range(-2, 3):
                place = row + down, column + right
                inside = 0 <= place[0] < grid[0] and 0 <= place[1] < grid[1]
                if inside and NEIGHBOURHOODS[name](abs(down), abs(right)):
                    expected[image, *place] = True
    assert stencil(name).sum() == SIZES[name]
    assert torch.equal(beside(halted, stencil(name)), expected)


def test_the_soonest_to_halt_go_first() -> None:
    candidates = torch.tensor([[True, True, False, True, True], [False, True, False, False, False]])
    left = torch.tensor([[0.4, 0.2, 0.1, 0.3, 0.9], [0.5, 0.5, 0.5, 0.5, 0.5]])
    assert soonest(candidates, left, 0.5).tolist() == [[False, True, False, True, False], [False] * 5]
    assert torch.equal(soonest(candidates, left, 1.0), candidates)


@pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dropped", ["all", "fewer with depth"])
def test_patches_beside_a_halted_one_halt_with_it(layout: type, dropped: str) -> None:
    """The first block's depths on a rectangular grid of 8 x 2, from what plain halting keeps there."""
    vit = small_vit("rectangular").eval()
    settings = {"gate_scale": 4.0, "gate_center": 6.0}
    plain = AViTConfig(**settings).build(vit)
    wider = AViTConfig(**settings, neighbourhood="cross", neighbours_dropped=dropped).build(vit)
    batch = images(vit, 8)
    with torch.inference_mode():
        halts = plain(batch, layout, early_exit=False).usage.patch_depth == 1
        gone = wider(batch, layout, early_exit=False).usage.patch_depth == 1
    reach = beside(halts, stencil("cross"))
    assert (reach & ~halts).any()
    if dropped == "all":
        assert torch.equal(gone, reach)
    else:
        share = 0.75
        candidates = (reach & ~halts).sum(dim=(1, 2))
        assert torch.equal((gone & ~halts).sum(dim=(1, 2)), (candidates * share).floor().long())
        assert not (gone & ~reach).any()


def test_wider_halting_is_for_the_clean_mode() -> None:
    with pytest.raises(ValueError, match="neighbourhood is for mode='clean'"):
        AViTConfig(mode="official", neighbourhood="cross")
    with pytest.raises(ValueError, match=r"neighbourhood must be one of .*'circle'.*, got 'hexagon'"):
        AViTConfig(neighbourhood="hexagon")
