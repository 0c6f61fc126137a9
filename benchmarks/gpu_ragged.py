"""Models and images whose tokens are as many, image by image, as those of real images.

How many tokens each of 256 images has in each block was recorded of a ViT-Tiny with real weights, under the same method
at the same share of the dense MACs. An image says in the first pixel of a patch in how many blocks its token is: a
model decides as ever, and then goes by that. What keeps as many tokens of every image has knobs found beforehand.

Letters: B images, N token slots (a class token, then P patches).
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from adaptvit import (
    AdaptiveViT,
    AdaViTConfig,
    ATSConfig,
    AViTConfig,
    DynamicViTConfig,
    EViTConfig,
    FullConfig,
    GridConfig,
    MergeConfig,
    Tokens,
    ToMeConfig,
    meet_target,
)
from adaptvit.methods.adavit import AdaViT, Policies
from adaptvit.methods.ats import ATS
from adaptvit.methods.avit import AViT
from adaptvit.methods.merging import MergingViT, Seen

COUNTS, KNOBS = (Path(__file__).with_name(name) for name in ("gpu_counts.npz", "gpu_knobs.json"))
SHARES = (0.5, 0.7)
"""Of the dense MACs, that knobs are turned to."""
EVEN = {"evit": EViTConfig(), "dynamicvit": DynamicViTConfig(), "tome": ToMeConfig(), "grid": GridConfig()}
RECORDED = {"ats": ATSConfig(), "avit": AViTConfig(class_token="stays"), "merge": MergeConfig()}
RAGGED: dict[str, Any] = RECORDED | {"adavit": AdaViTConfig(policies=("patches",), macs_target=None)}
METHODS: dict[str, Any] = {"full": FullConfig()} | EVEN | RAGGED


def marks(tokens: Tokens) -> Tensor:
    """(B, P), the blocks that the token of each patch is in, as the images say."""
    images, (rows, columns) = tokens.source.images, tokens.source.grid
    return images[:, 0, :: images.shape[2] // rows, :: images.shape[3] // columns].flatten(1)


class RaggedATS(ATS):
    """Samples, and then keeps as many patches as were recorded."""

    def decide(self, tokens: Tokens, live: Tensor, block: int, *others: Any) -> tuple[Tensor, Tensor]:
        chosen, finite = super().decide(tokens, live, block, *others)
        recorded = torch.cat([live[:, : self.prefix], marks(tokens) > block + 1], dim=1)
        return recorded | (chosen & ~live), finite  # of what was chosen nothing is dead, which no compiler knows


class RaggedAViT(AViT):
    """Halts where channel 0, which carries the marks, says so."""

    def halting_score(self, x: Tensor, dtype: torch.dtype, lost: Tensor | None = None) -> Tensor:
        return 0.995 / (x[..., 0].to(dtype) - 0.5)


class RaggedMerge(MergingViT):
    """Merges of what is most alike as many as were recorded."""

    def places(self, tokens: Tokens, size: Tensor, block: int, seen: Seen) -> tuple[Tensor, Tensor]:
        self.recorded = (marks(tokens) == block + 1).sum(dim=1, keepdim=True)
        return super().places(tokens, size, block, seen)

    def choose(self, score: Tensor, patches: int | Tensor, block: int) -> Tensor:
        least = score.sort(dim=1, descending=True).values.gather(1, self.recorded.clamp(1, score.shape[1]) - 1)
        return (score >= least) & (score > -torch.inf) & (self.recorded > 0)


class RaggedAdaViT(AdaViT):
    """Decides, and then switches on as many patches as were recorded of ATS; heads and sub-layers are all on."""

    def decide(self, block: int, tokens: Tokens) -> tuple[Policies, Tensor | None]:
        policies, normed = super().decide(block, tokens)
        recorded = (marks(tokens) > block).to(policies.patches.dtype)
        return replace(policies, patches=recorded, attended=None, updated=None), normed


def build(method: str, vit: nn.Module, model: str, share: float) -> AdaptiveViT:
    """A method's model at a share of the dense MACs."""
    config = METHODS[method]
    if method in EVEN:
        config = replace(config, **{config.knob.field: json.loads(KNOBS.read_text())[model][method][f"{share}"]})
    ragged: dict[str, Any] = {"ats": RaggedATS, "avit": RaggedAViT, "merge": RaggedMerge, "adavit": RaggedAdaViT}
    return (ragged[method](vit, config) if method in ragged else config.build(vit)).eval()


def carrying(vit: Any) -> Any:
    """A timm ViT in whose channel 0 the marks of patches stay as they are, and of its class token a 1."""
    with torch.no_grad():
        vit.patch_embed.proj.weight[0] = 0
        vit.patch_embed.proj.weight[0, 0, 0, 0] = 1
        vit.pos_embed[..., 0] = 0
        vit.cls_token[..., 0] = 1
        for one in (vit.patch_embed.proj.bias, *(m for b in vit.blocks for m in (b.attn.proj.bias, b.mlp.fc2.bias))):
            one[0] = 0
        for block in vit.blocks:
            block.attn.proj.weight[0] = block.mlp.fc2.weight[0] = 0
    return vit


@lru_cache(1)
def vit_of(name: str, size: int, device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        vit = timm.create_model(name, img_size=size)
    return carrying(vit).to(device, dtype).eval()


def marked(vit: Any, method: str, share: float, batch: int, seed: int, device: str = "cpu") -> Tensor:
    """Noise, (B, C, H, W), as ragged as images drawn from those recorded, whatever the patches and blocks."""
    random = np.random.default_rng(seed)
    grid, depth = vit.patch_embed.grid_size, len(vit.blocks)
    size, patch = vit.patch_embed.img_size, vit.patch_embed.patch_size
    images = torch.randn(batch, 3, *size, device=device, generator=torch.Generator(device).manual_seed(seed))
    recorded = np.load(COUNTS)[f"{method}_{share}" if method in RECORDED else f"ats_{share}"]
    kept = (recorded[random.integers(len(recorded), size=batch)] - 1.0) / (recorded.max() - 1)  # but the class token
    kept = kept[:, np.arange(depth) * recorded.shape[1] // depth]
    place = (np.arange(grid[0] * grid[1]) + 0.5) / (grid[0] * grid[1])
    blocks = (kept[:, :, None] > place).sum(axis=1)  # (B, P), falling
    order = random.permuted(np.tile(np.arange(len(place)), (batch, 1)), axis=1)
    found = torch.from_numpy(np.take_along_axis(blocks, order, axis=1)).view(batch, *grid)
    images[:, 0, :: patch[0], :: patch[1]] = found.to(images)
    return images


def record(weights: Path, images: Path) -> None:
    """How many tokens 256 images have in each block of a ViT-Tiny, its methods at the shares on 16 others."""
    from adaptvit.data import DataConfig, open_split, spread_over
    from adaptvit.weights.opening import start_from

    vit = timm.create_model("vit_tiny_patch16_224").eval()
    start_from(vit, weights)
    settings = timm.data.resolve_model_data_config(vit) | {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.9}
    pictures = spread_over(open_split(DataConfig(root=images), settings, "validation"), 272).images
    recorded = {}
    for (method, config), share in product(RECORDED.items(), SHARES):
        model = config.fitted(vit, pictures[::17], share)
        meet_target(model, pictures[::17], share, tolerance=0.02)
        others = pictures[torch.arange(272) % 17 > 0]
        with torch.inference_mode():
            counts = torch.cat([model(some, detailed=True).usage.attended for some in others.split(32)])
        recorded[f"{method}_{share}"] = counts.numpy().astype("uint8")
    np.savez_compressed(COUNTS, **recorded)


def find_knobs(models: Iterable[tuple[str, int]]) -> None:
    """Of what keeps as many tokens of every image, which a narrow ViT tells that counts MACs as the wide one."""
    knobs: dict[str, Any] = {}
    for name, size in models:
        with torch.device("meta"):
            wide = FullConfig().build(timm.create_model(name, img_size=size))
        narrow = timm.create_model(name, img_size=size, embed_dim=32, num_heads=2).eval()
        found: dict[str, dict[str, float]] = {method: {} for method in EVEN}
        for (method, config), share in product(EVEN.items(), SHARES):
            model = config.build(narrow)
            model._shape, model.heads = wide.shape, wide.heads
            meet_target(model, torch.zeros(1, 3, size, size), share)
            found[method][f"{share}"] = getattr(model.config, config.knob.field)
        knobs[f"{name}@{size}"] = found
    KNOBS.write_text(json.dumps(knobs, indent=2) + "\n")
