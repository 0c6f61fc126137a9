"""What channel 0 can be made to carry, and that the ViT does not notice."""

import pytest
import timm
import torch
from models import small_vit, with_values_of_all_lengths
from torch import Tensor

from adaptvit.backbones.blocks import run_block
from adaptvit.backbones.door import Acts, Projected, attention_received
from adaptvit.backbones.fast import project
from adaptvit.backbones.forward import enter
from adaptvit.backbones.segmenting import SegmentingViT
from adaptvit.backbones.turn import set_channel
from adaptvit.methods.avit_gate import fit_gate
from adaptvit.tokens import Masked
from adaptvit.video import inflate

FLAVOURS = {
    "plain": {},
    "layer scale, q-k norm": {"init_values": 0.3, "qk_norm": True},
    "registers": {"reg_tokens": 3},
    "no qkv bias, norms with": {"qkv_bias": False},
    "averaged": {"class_token": False, "global_pool": "avg"},
}


def trained(**arguments: object) -> torch.nn.Module:
    """A small ViT in float64 whose norms and layer scales are not those of a fresh one."""
    torch.manual_seed(0)
    vit = small_vit(**arguments).double().eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit


def images(vit: torch.nn.Module, count: int = 6) -> Tensor:
    size = vit.patch_embed.img_size
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, vit.in_chans, *size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("flavour", [name for name in FLAVOURS if "bias" not in name])
def test_turning_the_stream_changes_no_logit_and_puts_the_direction_in_channel_0(flavour: str) -> None:
    vit = trained(**FLAVOURS[flavour])
    x = images(vit)
    direction = torch.randn(vit.embed_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        logits, tokens = vit(x), enter(vit, x, Masked).x
    set_channel(vit, direction)
    with torch.inference_mode():
        torch.testing.assert_close(vit(x), logits)
        turned = enter(vit, x, Masked).x
    u = direction - direction.mean()
    size = len(u)
    expected = tokens.mean(dim=-1) + (1 - 1 / size) ** 0.5 * tokens @ (u / u.norm())
    torch.testing.assert_close(turned[..., 0], expected)


@pytest.mark.parametrize("pool", ["token", "avg"])  # with a last norm before the head, and without
def test_the_stream_of_a_vit_for_pixels_or_for_clips_turns_and_neither_notices(pool: str) -> None:
    scenes = SegmentingViT(small_vit(global_pool=pool).double(), 3, width=8).eval()
    moving = inflate(small_vit(global_pool=pool).double(), frames=4).eval()
    torch.manual_seed(0)
    for vit, x in ((scenes, images(scenes.vit)), (moving, images(moving.vit, 8).unflatten(0, (2, 4))[:, :, :3])):
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        direction = torch.randn(vit.vit.embed_dim, dtype=torch.float64)
        with torch.inference_mode():
            logits, tokens = vit(x), enter(vit, x, Masked).x
            set_channel(vit, direction)
            torch.testing.assert_close(vit(x), logits)
            turned = enter(vit, x, Masked).x[..., 0]
        u, size = direction - direction.mean(), len(direction)
        torch.testing.assert_close(turned, tokens.mean(dim=-1) + (1 - 1 / size) ** 0.5 * tokens @ (u / u.norm()))


def test_what_cannot_be_turned_is_refused() -> None:
    with pytest.raises(TypeError, match="without bias"):
        set_channel(trained(qkv_bias=False), torch.arange(48.0))
    with pytest.raises(TypeError, match="RmsNorm"):
        set_channel(trained(norm_layer="rmsnorm"), torch.arange(48.0))
    with pytest.raises(TypeError, match="norm_pre"):
        set_channel(trained(pre_norm=True), torch.arange(48.0))
    vit = trained()
    with pytest.raises(ValueError, match="constant"):
        set_channel(vit, torch.ones(vit.embed_dim))


def test_the_fitted_channel_tells_what_the_class_token_reads_little_of() -> None:
    vit = with_values_of_all_lengths(trained(depth=4))
    x = images(vit, count=40)
    scale, explained = fit_gate(vit, x)
    assert 0 < explained <= 1
    told, seen = [], []
    with torch.inference_mode():
        tokens = enter(vit, x, Masked)
        for number, block in enumerate(vit.blocks):
            projected = Projected(*project(block, tokens))
            lengths = projected.v.square().sum(dim=-1).sqrt()
            seen.append((attention_received(tokens, projected, 1) * lengths).mean(dim=2)[:, 1:])
            tokens = run_block(number, tokens, Acts())
            told.append(scale * tokens.x[:, 1:, 0])
    little = -torch.stack(seen).mean(dim=0).log()
    little = (little - little.mean()) / little.std()
    told = torch.stack(told[:-1])
    error = (told - told.mean() - little).square().mean()
    assert error.item() == pytest.approx(1 - explained, abs=0.02)
    assert torch.corrcoef(torch.stack([told.mean(dim=0).flatten(), little.flatten()]))[0, 1] > 0.5


def test_a_vit_without_class_token_has_no_gate_to_fit() -> None:
    with pytest.raises(TypeError, match="class token"):
        fit_gate(trained(class_token=False, global_pool="avg"), torch.zeros(1, 3, 32, 32, dtype=torch.float64))


def test_published_flavours_can_be_turned() -> None:
    for name in ("deit3_small_patch16_224", "vit_small_patch14_dinov2", "deit_tiny_distilled_patch16_224"):
        torch.manual_seed(0)
        vit = timm.create_model(name, img_size=56, depth=2, num_classes=5).eval()
        x = torch.randn(2, 3, 56, 56)
        with torch.inference_mode():
            logits = vit(x)
            set_channel(vit, torch.randn(vit.embed_dim))
            torch.testing.assert_close(vit(x), logits, atol=1e-5, rtol=1e-4)
