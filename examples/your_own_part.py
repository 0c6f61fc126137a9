"""Parts kept outside the package: a norm of each token by itself, and a mixer that averages an image's tokens.

Run it: python examples/your_own_part.py
"""

import torch
from torch import Tensor, nn

import adaptvit
from adaptvit import AViTConfig, ViTConfig
from adaptvit.backbones.parts import BLOCKS, NORMS, Mixer
from adaptvit.tokens import Tokens


class ScaleNorm(nn.Module):
    """A token over its length, times one learned number (Nguyen and Salazar, 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([channels**0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x / x.norm(dim=-1, keepdim=True).clamp(min=1e-5)


class Pool(Mixer):
    """The mean of the image's tokens less the token itself, as PoolFormer has it (Yu et al., 2022), over all tokens."""

    macs = 0  # no matrix product

    def mix(self, x: Tensor) -> Tensor:
        return x.mean(dim=1, keepdim=True) - x

    def on(self, x: Tensor, tokens: Tokens) -> Tensor:
        count = tokens.live.sum(dim=1).clamp(min=1)[:, None, None]
        mean = tokens.grid(x).sum(dim=1, keepdim=True) / count
        return tokens.spread(mean) - x


NORMS["scale"] = ScaleNorm
BLOCKS["pool"] = lambda vit: Pool()


def main() -> None:
    """Let tokens halt in a ViT of these parts."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    for block in ("attention", "pool"):
        vit = ViTConfig(img_size=64, patch_size=8, depth=6, norm="scale", block=block).build().eval()
        model = AViTConfig(gate_scale=4.0, gate_center=1.0).build(vit)
        adaptvit.meet_target(model, images, 0.6)
        with torch.inference_mode():
            usage = model(images, detailed=True).usage
        share = adaptvit.macs(usage, model.shape) / adaptvit.dense_macs(model.shape, usage.grid)
        print(f"scale norm, {block}: {share.mean():.0%} of dense MACs")


if __name__ == "__main__":
    main()
