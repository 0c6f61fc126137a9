"""Where merged tokens are: positions are of tokens, not of slots, and rotary tables are read between patches."""

import pytest
import timm
import torch
from torch import Tensor

from adaptvit import GridConfig, Masked, MergeConfig, MethodConfig, Packed, ToMeConfig
from adaptvit.backbones.forward import turned_at

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}


def vit_of(name: str, size: tuple[int, int]) -> torch.nn.Module:
    torch.manual_seed(0)
    vit = timm.create_model(name, **SMALL, img_size=size).double().eval()
    for parameter in vit.parameters():
        if parameter.numel() > 1 and parameter.std() == 0:
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    return vit


@pytest.mark.parametrize("grid", [(5, 7), (1, 6)])
def test_a_table_between_patches_is_the_hosts_own_function(grid: tuple[int, int]) -> None:
    rope = vit_of("vit_small_patch16_dinov3", (80, 112)).rope
    sides = torch.tensor(grid, dtype=torch.float64)
    places = torch.rand(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * (sides - 1)
    wanted = rope._get_pos_embed_from_coords(2 * (places + 0.5) / sides - 1)
    found = turned_at(*rope.get_embed(shape=grid).double().chunk(2, -1), places, grid)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)  # of tables in float32


def test_tokens_before_the_patches_are_not_turned() -> None:
    sin, cos = torch.rand(6, 4).sin(), torch.rand(6, 4).cos()
    found = turned_at(sin, cos, torch.tensor([[-1.0, -1.0]]), (2, 3))
    assert torch.equal(found[0], torch.zeros(1, 4))
    assert torch.equal(found[1], torch.ones(1, 4))


@pytest.mark.parametrize("layout", [Masked, Packed])
def test_a_merged_token_is_at_the_mean_of_its_patches(layout: type) -> None:
    tokens = layout.of(torch.randn(1, 5, 3)).at_coordinates(torch.tensor([[-1.0], [0.0], [1.0], [2.0], [3.0]]))
    place, moved = torch.tensor([[0, 1, 1, 2, 2]]), torch.tensor([[False, False, True, False, True]])
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0, 3.0]])
    merged, _ = tokens.merge(place, moved, tokens.spread(weight))
    where = merged.where.reshape(-1, 2)
    torch.testing.assert_close(where, torch.tensor([[0.0, -1.0], [1.0, 0.5], [3.0, 2.75]]))
    assert merged.at.flatten().tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    "config",
    [ToMeConfig(r=5), ToMeConfig(r=5, position="mean"), GridConfig(rate=0.8)],
    ids=["receiver", "mean", "grid"],
)
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_small_patch16_dinov3", (64, 96)),
        ("vit_small_patch16_rope_mixed_224", (64, 64)),
        ("beit_base_patch16_224", (64, 64)),
    ],
)
def test_layouts_agree_on_where_merged_tokens_are(name: str, size: tuple[int, int], config: MethodConfig) -> None:
    model = config.build(vit_of(name, size))
    images = torch.randn(3, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        packed, masked = model(images, Packed, detailed=True), model(images, Masked, detailed=True)
        one = model(images[:1])
    torch.testing.assert_close(packed.logits, masked.logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(packed.logits[:1], one, rtol=1e-10, atol=1e-12)
    assert packed.usage == masked.usage


def test_the_choice_matters_where_tokens_are_turned_and_nowhere_else() -> None:
    def apart(name: str) -> Tensor:
        vit, images = vit_of(name, (64, 64)), torch.randn(2, 3, 64, 64, dtype=torch.float64)
        ways = [MergeConfig(thresholds=-1.0, position=position).build(vit)(images) for position in ("receiver", "mean")]
        return (ways[0] - ways[1]).abs().max()

    assert apart("vit_small_patch16_dinov3") > 1e-9
    assert apart("vit_tiny_patch16_224") == 0
