"""Records of what was computed: what is kept of many images is what was there, and takes little room."""

import dataclasses

import pytest
import torch
from models import images, small_vit
from torch import Tensor

from adaptvit import dense_macs, macs
from adaptvit.methods import METHODS
from adaptvit.usage import Bits, Usage, join


@pytest.mark.parametrize("slots", [1, 7, 8, 9, 197])
@pytest.mark.parametrize("count", [0, 3])
def test_bits_come_back_as_they_were(slots: int, count: int) -> None:
    values = torch.rand(count, 4, slots, generator=torch.Generator().manual_seed(slots)) < 0.5
    assert torch.equal(Bits.of(values).unpacked(), values)
    assert torch.equal(Bits.of(values)[torch.arange(count).flip(0)].unpacked(), values.flip(0))
    assert Bits.of(values).packed.nbytes == count * 4 * -(-slots // 8)


def kept(usage: Usage) -> int:
    """Bytes of an image."""
    parts = [part.packed if isinstance(part, Bits) else part for part in vars(usage).values()]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in tensors)
    return sum(part.nbytes for part in tensors) // len(usage.attended)


@pytest.mark.parametrize("name", ["adavit", "evit", "tome"])
@pytest.mark.parametrize(("side", "patch", "depth"), [(224, 16, 12), (384, 16, 24), (224, 8, 12), (518, 14, 12)])
def test_an_image_of_many_keeps_less_than_3_kb_and_its_figures(name: str, side: int, patch: int, depth: int) -> None:
    vit = small_vit(img_size=side, patch_size=patch, depth=depth, embed_dim=12, num_heads=3)
    model = METHODS[name]().build(vit).eval()
    with torch.inference_mode():
        usages = [model(images(vit, 1, seed=seed), detailed=True).usage for seed in range(2)]
    several, whole = join(usages), join(usages, whole=True)
    assert kept(several) <= 3000
    for field in dataclasses.fields(Usage):
        one, other = getattr(several, field.name), getattr(whole, field.name)
        if field.name in ("fused", "groups"):
            assert one is None
        elif isinstance(other, Tensor):
            assert torch.equal(one, other)
            assert torch.equal(other, torch.cat([getattr(usage, field.name) for usage in usages]))
        else:
            assert one == other
    assert torch.equal(several.patch_depth, whole.patch_depth)
    assert torch.equal(several.of_images(torch.tensor([False, True])).live, usages[1].live)
    assert torch.equal(join([several, usages[0]]).live, torch.cat([whole.live, usages[0].live]))
    if name != "adavit":
        assert (whole.groups if name == "tome" else whole.fused).shape[:2] == (2, depth)


@pytest.mark.parametrize("method", [name for name, config in METHODS.items() if config.role != "clips"])
def test_a_record_counts_its_own_macs(method: str) -> None:
    model = METHODS[method]().build(small_vit().eval())
    with torch.inference_mode():
        usages = [model(images(model.vit, count=count), detailed=True).usage for count in (2, 3)]
    for usage in [*usages, join(usages), usages[1].of_images(torch.tensor([2, 0])), usages[0].to_keep()]:
        assert torch.equal(usage.macs, macs(usage, model.shape))
        torch.testing.assert_close(usage.share, usage.macs / dense_macs(model.shape, usage.grid), check_dtype=False)
    with pytest.raises(ValueError, match=r"Usage\.shape is None"):
        _ = dataclasses.replace(usages[0], shape=None).macs
