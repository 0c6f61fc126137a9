"""T2T-ViT (Yuan et al., ICCV 2021): the tokens-to-token stem for timm's `VisionTransformer`, and the models on it.

Once adaptvit is imported, `timm.create_model("t2t_vit_14")` makes one: a plain `VisionTransformer` on this stem.
The stem cuts the image into overlapping windows, lets them attend to one another, lays them out as an image again, and
does so twice more. Module names are those of the published weights, which have the stem under `tokens_to_token`.

Letters: B images, n tokens of a stage, a channels that it receives, e those of its tokens, m random features,
D channels of the ViT.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Format, LayerNorm, Mlp, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from adaptvit.checks import In, checked

SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
"""Kernel, stride and padding of the three soft splits."""
PATCH = 16
"""Pixels from one final token to the next: the product of the strides."""
DROPOUT = 0.1
"""In the performer, in training, whatever dropout the ViT has."""

TokensType = Literal["performer", "transformer"]


class TokensToToken(nn.Module):
    """Images (B, channels, height, width) -> tokens (B, n, D), where timm's ViT has its patch embedding."""

    @checked
    def __init__(
        self,
        img_size: Annotated[int | tuple[int, int], In("[1, 65536]")] = 224,
        patch_size: int | tuple[int, int] = PATCH,
        in_chans: Annotated[int, In("[1, 65536]")] = 3,
        embed_dim: Annotated[int, In("[1, 65536]")] = 768,
        bias: bool = True,
        strict_img_size: bool = True,
        output_fmt: str | None = None,
        dynamic_img_pad: bool = False,
        tokens_type: TokensType = "performer",
        token_dim: Annotated[int, In("[1, 65536]")] = 64,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Take timm's arguments of a patch embedding, and two more.

        Args:
            strict_img_size: False takes images of any size in whole steps of 16 pixels.
            output_fmt: timm's `NHWC` returns the tokens on their grid; None in a row.
            tokens_type: how tokens attend to one another: performer, linear in their number, or transformer.
            token_dim: channels of a token inside the stem.
        Raises:
            ValueError: a setting or a size of images that the stem does not have.
        """
        super().__init__()
        if dynamic_img_pad:
            raise ValueError("dynamic_img_pad is True, but the tokens-to-token stem pads by itself: leave it off")
        if output_fmt not in (None, "NHWC"):
            raise ValueError(f"output_fmt must be None or 'NHWC' for the tokens-to-token stem, got {output_fmt!r}")
        self.patch_size = (PATCH, PATCH)
        self.strict_img_size, self.dynamic_img_pad = strict_img_size, dynamic_img_pad
        self.flatten, self.output_fmt = output_fmt is None, Format(output_fmt or "NCHW")
        self.tokens_type, self.token_dim = tokens_type, token_dim
        self.set_input_size(img_size, patch_size)
        where = {"device": device, "dtype": dtype}
        windows = [kernel * kernel for kernel, _, _ in SPLITS]
        attention = ATTENTION[tokens_type]
        self.attention1 = attention(in_chans * windows[0], token_dim, **where)
        self.attention2 = attention(token_dim * windows[1], token_dim, **where)
        self.project = nn.Linear(token_dim * windows[2], embed_dim, bias=bias, **where)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if self.strict_img_size and (height, width) != self.img_size:
            wanted = " x ".join(map(str, self.img_size))
            raise ValueError(f"images are {height} x {width} pixels, but the tokens-to-token stem takes {wanted}")
        first, second, last = self.grids(height, width)

        def tokens(images: Tensor) -> Tensor:
            x = self.attention1(soft_split(images.permute(0, 2, 3, 1), *SPLITS[0]))
            x = self.attention2(soft_split(x.unflatten(1, first), *SPLITS[1]))
            return self.project(soft_split(x.unflatten(1, second), *SPLITS[2]))

        if torch.is_grad_enabled() or self.training or images.device.type != "cpu":
            x = tokens(images)
        else:  # one image stays in the caches: at batch 32 this takes 0.6 of the time
            x = torch.cat([tokens(image) for image in images.split(1)])
        return x if self.flatten else x.unflatten(1, last)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Take images of another size.

        Raises:
            ValueError: the stem does not take this size, or the patch size is not its own.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f"patch_size is {patch_size}, but the strides of the tokens-to-token stem make it {PATCH}")
        size = self.img_size if img_size is None else to_2tuple(img_size)
        self.img_size: tuple[int, int] = size
        self.grid_size = self.dynamic_feat_size(size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens for images of `img_size`."""
        return self.grids(*img_size)[-1]

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of tokens after each soft split.

        Raises:
            ValueError: the first window does not fit into the padded image, or a dynamic size is no multiple of 16.
        """
        if min(height, width) < 3:
            raise ValueError(f"images are {height} x {width} pixels, but the tokens-to-token stem needs at least 3 x 3")
        if not self.strict_img_size and (height % PATCH or width % PATCH):
            raise ValueError(
                f"images are {height} x {width} pixels, but with dynamic_img_size=True the tokens-to-token stem takes "
                f"multiples of {PATCH}"
            )
        found = []
        for kernel, stride, padding in SPLITS:
            height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
            found.append((height, width))
        return found

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels from one token to the next."""
        return PATCH if as_scalar else self.patch_size

    def macs(self, height: int, width: int) -> int:
        """MACs for one image, as `torch.utils.flop_counter` counts them."""
        first, second, last = (rows * columns for rows, columns in self.grids(height, width))
        return self.attention1.macs(first) + self.attention2.macs(second) + last * self.project.weight.numel()


class Performer(nn.Module):
    """Attention by random features, linear in the number of tokens: (B, n, a) -> (B, n, e).

    The skip connection is the values, as the input has another width.
    """

    def __init__(self, channels: int, size: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(channels, **where)
        self.kqv = nn.Linear(channels, 3 * size, **where)
        self.proj = nn.Linear(size, size, **where)
        self.drop = nn.Dropout(DROPOUT)
        self.norm2 = nn.LayerNorm(size, **where)
        layers = nn.Linear(size, size, **where), nn.GELU(), nn.Linear(size, size, **where), nn.Dropout(DROPOUT)
        self.mlp = nn.Sequential(*layers)
        self.w = nn.Parameter(torch.empty(size // 2, size, **where), requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the random features: orthogonal rows of length sqrt(m)."""
        rows = torch.empty(self.w.shape, device=self.w.device)  # the decomposition needs float32
        with torch.no_grad():
            self.w.copy_(nn.init.orthogonal_(rows, gain=len(rows) ** 0.5))

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        x = v + self.drop(self.proj(self.attend(k, q, v)))
        return x + self.mlp(self.norm2(x))

    def attend(self, k: Tensor, q: Tensor, v: Tensor) -> Tensor:
        """Softmax attention as the random features approximate it; float32 at least, also under autocast."""
        precise = torch.promote_types(v.dtype, torch.float32)
        with torch.autocast(v.device.type, enabled=False):
            k, q = self.features(k.to(precise)), self.features(q.to(precise))  # (B, n, m)
            summed = v.to(precise).mT @ k  # (B, e, m)
            weight = q @ k.sum(dim=1).unsqueeze(-1)  # (B, n, 1)
            return (q @ summed.mT / (weight + 1e-8)).to(v.dtype)

    def features(self, u: Tensor) -> Tensor:
        """exp(u w^T - |u|^2 / 2) / sqrt(m): (B, n, e) -> (B, n, m), positive."""
        w = self.w.to(u.dtype)
        return torch.exp(u @ w.mT - u.square().sum(dim=-1, keepdim=True) / 2) / len(w) ** 0.5

    def macs(self, count: int) -> int:
        """MACs for one image of `count` tokens."""
        features, size = self.w.shape
        return count * (linear_macs(self) + 4 * features * size + features)


class Transformer(nn.Module):
    """Softmax attention with one head, quadratic in the number of tokens: (B, n, a) -> (B, n, e)."""

    def __init__(self, channels: int, size: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(channels, **where)
        self.attn = SkipToValues(channels, size, **where)
        self.norm2 = nn.LayerNorm(size, **where)
        self.mlp = Mlp(size, size, **where)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def macs(self, count: int) -> int:
        """MACs for one image of `count` tokens."""
        size = self.attn.proj.in_features
        return count * (linear_macs(self) + 2 * count * size)


class SkipToValues(nn.Module):
    """Self-attention whose skip connection is the values, as the input has another width."""

    def __init__(self, channels: int, size: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.scale = channels**-0.5  # of the input's width, as published
        self.qkv = nn.Linear(channels, 3 * size, bias=False, device=device, dtype=dtype)
        self.proj = nn.Linear(size, size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)  # (B, one head, n, e)
        return (v + self.proj(scaled_dot_product_attention(q, k, v, scale=self.scale))).squeeze(1)


ATTENTION: dict[str, type[Performer] | type[Transformer]] = {"performer": Performer, "transformer": Transformer}


def linear_macs(module: nn.Module) -> int:
    """MACs of every linear map inside, applied once each to one token."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def soft_split(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Overlapping windows of (B, height, width, C) as tokens (B, n, C * kernel^2), in the channel order of `F.unfold`.

    Two copies, the first of long runs, take a third of `F.unfold`'s time, and the tokens come out contiguous.
    """
    windows = pad(x, (0, 0, padding, padding, padding, padding)).unfold(1, kernel, stride).unfold(2, kernel, stride)
    windows = windows.permute(0, 1, 2, 4, 5, 3).contiguous()  # (B, rows, columns, ky, kx, C)
    return windows.movedim(-1, 3).flatten(3).flatten(1, 2)


def sinusoid(count: int, channels: int) -> Tensor:
    """Position table (1, count, channels): sines in even channels, cosines in odd ones, wavelengths from 2 pi up.

    Positions count tokens in a row, whatever their grid; the class token is the first.
    """
    channel = torch.arange(channels, dtype=torch.float64)
    turns = torch.arange(count, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / channels)
    return torch.where(channel % 2 == 0, turns.sin(), turns.cos())[None].float()


def t2t_vit(tokens_type: TokensType = "performer", token_dim: int = 64, **settings: Any) -> VisionTransformer:
    """timm's ViT on the tokens-to-token stem, with the T2T-ViT's norms and fixed positions.

    Args:
        tokens_type, token_dim: as `TokensToToken` takes them.
        settings: as timm's `VisionTransformer` takes them.
    """
    stem = partial(TokensToToken, tokens_type=tokens_type, token_dim=token_dim)
    vit = VisionTransformer(
        **{"embed_layer": stem, "qkv_bias": False, "norm_layer": partial(LayerNorm, eps=1e-5), **settings}
    )
    if vit.pos_embed is not None:
        vit.pos_embed.requires_grad_(False).copy_(sinusoid(*vit.pos_embed.shape[1:]))
    return vit


def published_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the stem where timm's ViT has it; one of another model comes back as it is."""
    return {re.sub(r"^tokens_to_token\.", "patch_embed.", key): value for key, value in tensors.items()}


MODELS: dict[str, dict[str, Any]] = {
    "t2t_vit_7": {"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0},
    "t2t_vit_10": {"embed_dim": 256, "depth": 10, "num_heads": 4, "mlp_ratio": 2.0},
    "t2t_vit_12": {"embed_dim": 256, "depth": 12, "num_heads": 4, "mlp_ratio": 2.0},
    "t2t_vit_14": {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0},
    "t2t_vit_19": {"embed_dim": 448, "depth": 19, "num_heads": 7, "mlp_ratio": 3.0},
    "t2t_vit_24": {"embed_dim": 512, "depth": 24, "num_heads": 8, "mlp_ratio": 3.0},
}
MODELS |= {
    name.replace("vit", "vit_t"): {**MODELS[name], "tokens_type": "transformer"}
    for name in ("t2t_vit_14", "t2t_vit_19", "t2t_vit_24")
}
"""Published sizes. The stems are performers, but for those of the names with a t."""

default_cfgs = generate_default_cfgs(  # timm looks for this name in the module of a registered function
    {
        name: {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "classifier": "head",
        }
        for name in MODELS
    }
)


def create(name: str, options: dict[str, Any]) -> VisionTransformer:
    """A model of `MODELS`.

    Args:
        options: what `timm.create_model` was called with; they win over the published sizes.
    Raises:
        ValueError: pretrained weights are wanted, and `options` do not say where they are.
    """
    overlay = options.get("pretrained_cfg_overlay") or {}
    source = resolve_pretrained_cfg(name, options.get("pretrained_cfg"), overlay)
    if options.get("pretrained") and not (source.has_weights or source.state_dict):
        raise ValueError(
            f"{name} has no weights to download: get its authors' file, then adaptvit.convert(file, target, {name!r})"
        )
    return build_model_with_cfg(
        t2t_vit,
        name,
        pretrained_filter_fn=lambda tensors, vit: checkpoint_filter_fn(published_names(tensors), vit),
        feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
        **{"pretrained": False, **MODELS[name], **options},
    )


@register_model
def t2t_vit_7(**options: Any) -> VisionTransformer:
    """T2T-ViT-7: 256 channels, 7 blocks, 4 heads."""
    return create("t2t_vit_7", options)


@register_model
def t2t_vit_10(**options: Any) -> VisionTransformer:
    """T2T-ViT-10: 256 channels, 10 blocks, 4 heads."""
    return create("t2t_vit_10", options)


@register_model
def t2t_vit_12(**options: Any) -> VisionTransformer:
    """T2T-ViT-12: 256 channels, 12 blocks, 4 heads."""
    return create("t2t_vit_12", options)


@register_model
def t2t_vit_14(**options: Any) -> VisionTransformer:
    """T2T-ViT-14: 384 channels, 14 blocks, 6 heads."""
    return create("t2t_vit_14", options)


@register_model
def t2t_vit_19(**options: Any) -> VisionTransformer:
    """T2T-ViT-19: 448 channels, 19 blocks, 7 heads."""
    return create("t2t_vit_19", options)


@register_model
def t2t_vit_24(**options: Any) -> VisionTransformer:
    """T2T-ViT-24: 512 channels, 24 blocks, 8 heads."""
    return create("t2t_vit_24", options)


@register_model
def t2t_vit_t_14(**options: Any) -> VisionTransformer:
    """T2T-ViT-14 whose stem has softmax attention."""
    return create("t2t_vit_t_14", options)


@register_model
def t2t_vit_t_19(**options: Any) -> VisionTransformer:
    """T2T-ViT-19 whose stem has softmax attention."""
    return create("t2t_vit_t_19", options)


@register_model
def t2t_vit_t_24(**options: Any) -> VisionTransformer:
    """T2T-ViT-24 whose stem has softmax attention."""
    return create("t2t_vit_t_24", options)
