"""A ViT kept outside the package, whose blocks are told rotary positions, and the row that describes it.

Run it: python examples/your_own_vit.py
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import adaptvit
from adaptvit import FAMILIES, EViTConfig, Family, Parts


class Turning(nn.Module):
    """Attention, with queries and keys turned by where their patches are."""

    def __init__(self, width: int, heads: int, start: int) -> None:
        super().__init__()
        self.heads, self.start = heads, start
        self.maps, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        q, k, v = self.maps(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(self.turned(q, turns), self.turned(k, turns), v)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def turned(self, x: Tensor, turns: Tensor) -> Tensor:
        """(B, H, N, d), by sines and cosines (P, 2d) of all but the tokens at the start."""
        sin, cos = turns.chunk(2, dim=-1)
        start, patches = x[:, :, : self.start], x[:, :, self.start :]
        one, other = patches.chunk(2, dim=-1)
        return torch.cat([start, patches * cos + torch.cat([-other, one], dim=-1) * sin], dim=2)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.attending = nn.LayerNorm(width), Turning(width, heads, start=1)
        self.after = nn.LayerNorm(width)
        self.hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        x = x + self.attending(self.before(x), turns)
        return x + self.hidden(self.after(x))


class TurningViT(nn.Module):
    def __init__(self, size: int = 64, patch: int = 8, width: int = 96, depth: int = 6, classes: int = 10) -> None:
        super().__init__()
        self.image_size, self.angles = size, 8  # a head has 32 channels: 8 angles of the row, 8 of the column
        self.cut = nn.Conv2d(3, width, patch, patch)
        self.begin = nn.Parameter(torch.randn(1, 1, width))
        self.layers = nn.ModuleList(Layer(width, width // 32) for _ in range(depth))
        self.last, self.classifier = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.cut(images)
        turns = self.turns(*x.shape[-2:]).to(x)
        x = torch.cat([self.begin.expand(len(x), -1, -1), x.flatten(2).mT], dim=1)
        for layer in self.layers:
            x = layer(x, turns)
        return self.classifier(self.last(x[:, 0]))

    def turns(self, rows: int, columns: int) -> Tensor:
        speeds = 100 ** -torch.linspace(0, 1, self.angles)
        at = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))[:, :, None] * speeds
        angles = at.flatten(1).repeat(1, 2)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


FAMILIES.register(
    Family(
        models=(f"{__name__}.TurningViT",),
        blocks="layers",
        tables={"turns": "sin cos"},
        prefix=(1,),
        reads=1,
        norm="last",
        stem="cut",
        channels="cut.in_channels",
        size="image_size",
        any_size=True,
        patch="cut.kernel_size",
        width="cut.out_channels",
        classes="classifier.out_features",
        heads=("classifier",),
    ),
    {
        f"{__name__}.Layer": Parts(
            into_attention=("before",),
            attention="attending",
            out_of_attention=(),
            into_mlp=("after",),
            mlp=("hidden",),
            out_of_mlp=(),
            heads="attending.heads",
            head_dim=None,
            unturned="start",
        )
    },
)


def main() -> None:
    """Merge tokens in it, and fuse them."""
    torch.manual_seed(0)
    vit, images = TurningViT().eval(), torch.randn(8, 3, 64, 64)
    for config in (None, EViTConfig()):
        model = adaptvit.adapt(vit, images, 0.6, config)
        with torch.inference_mode():
            share = model(images, detailed=True).usage.share.mean()
        print(f"{model.config.title}: {share:.0%} of dense MACs")


if __name__ == "__main__":
    main()
