"""A ViT from interchangeable parts: how it knows positions, normalises, attends, and what its blocks are.

`ViTConfig(position="rotary", norm="rms").build()` makes one, and once adaptvit is imported so does
`timm.create_model("parts_vit", position="rotary", norm="rms")`: timm's `VisionTransformer` with parts exchanged, whose
own `forward` knows nothing of this library. Where the parts are DeiT's, so are the names of its tensors.

A part joins by one row in `POSITIONS`, `NORMS`, `ATTENTIONS` or `BLOCKS`. One that treats a token by itself is any
module; one whose result depends on the token's slot or on other tokens is a `TokenPart`.

Letters: B images, N token slots (class token first), n patches, D channels, H heads, d channels per head.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    Attention,
    LayerNorm,
    Mlp,
    RmsNorm,
    apply_rot_embed_cat,
    build_rotary_pos_embed,
    build_sincos2d_pos_embed,
    to_2tuple,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn.functional import normalize

from adaptvit.backbones.t2t import linear_macs, sinusoid
from adaptvit.checks import In, OneOf, check_fields
from adaptvit.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Names of parts, and sizes. The defaults are DeiT-tiny."""

    position: Annotated[str, OneOf(lambda: POSITIONS)] = "learned"
    """How a token's place is known, a name in `POSITIONS`."""
    norm: Annotated[str, OneOf(lambda: NORMS)] = "layer"
    """What is normalised before each sub-layer, a name in `NORMS`."""
    attention: Annotated[str, OneOf(lambda: ATTENTIONS)] = "dot"
    """How a query and a key are compared, a name in `ATTENTIONS`."""
    block: Annotated[str, OneOf(lambda: BLOCKS)] = "attention"
    """How tokens reach one another, a name in `BLOCKS`; a channel MLP follows in each."""
    img_size: Annotated[int | tuple[int, int], In("[1, 65536]")] = 224
    """Pixels of a side, or height and width."""
    patch_size: Annotated[int | tuple[int, int], In("[1, 65536]")] = 16
    """Pixels of a patch's side, or its height and width."""
    in_chans: Annotated[int, In("[1, 65536]")] = 3
    """Channels of the images."""
    num_classes: Annotated[int, In("[0, 1048576]")] = 1000
    """Classes of the head; 0 leaves it out."""
    global_pool: Literal["token", "avg"] = "token"
    """What is classified: `token`, a class token; `avg`, the mean of the patches, without a class token."""
    embed_dim: Annotated[int, In("[1, 65536]")] = 192
    """D, channels of a token."""
    depth: Annotated[int, In("[1, 1024]")] = 12
    """Blocks."""
    num_heads: Annotated[int, In("[1, 65536]")] = 3
    """H, which blocks without attention do not have."""
    mlp_ratio: Annotated[float, In("(0, 1024]")] = 4.0
    """Hidden channels of the MLP, over D."""
    drop_path_rate: Annotated[float, In("[0, 1)")] = 0.0
    """Stochastic depth at the last block; it grows from 0 at the first."""

    def __post_init__(self) -> None:
        check_fields(self)
        image, patch = to_2tuple(self.img_size), to_2tuple(self.patch_size)
        for name, sides in (("img_size", image), ("patch_size", patch)):
            object.__setattr__(self, name, sides)
        if image[0] % patch[0] or image[1] % patch[1]:
            raise ValueError(f"ViTConfig.patch_size {patch} does not divide img_size {image}: choose one that does")
        if self.block == "attention" and self.embed_dim % self.num_heads:
            raise ValueError(
                f"ViTConfig.num_heads is {self.num_heads}, which does not divide embed_dim {self.embed_dim}"
            )
        if self.block == "mixer":
            _check_mixer(self)
        if self.position == "rotary" and self.embed_dim // self.num_heads % 4:
            raise ValueError(
                "ViTConfig.position='rotary' turns pairs of channels by two coordinates, so that embed_dim over "
                f"num_heads must be divisible by 4, got {self.embed_dim} / {self.num_heads}"
            )
        if self.position == "sinusoidal" and self.embed_dim % 4:
            raise ValueError(
                "ViTConfig.position='sinusoidal' has a sine and a cosine of two coordinates, so that embed_dim must be "
                f"divisible by 4, got {self.embed_dim}"
            )

    def build(self) -> "PartsViT":
        """The ViT, with fresh weights, in training mode like any new module."""
        return PartsViT(self)


def _check_mixer(config: ViTConfig) -> None:
    """Refuse what is for queries and keys, where a block has none."""
    if config.position == "rotary" or config.attention != "dot":
        odd = f"position={config.position!r}" if config.position == "rotary" else f"attention={config.attention!r}"
        raise ValueError(
            f"ViTConfig.block={config.block!r} has no queries and keys, which {odd} is for: change one of them"
        )


class TokenPart(nn.Module):
    """A part whose result for a token depends on its slot or on the image's other tokens.

    `forward` is what timm calls, on all tokens of every image; `on` is what `adaptvit.backbones.fast` calls, on
    those that are live. With every token live they are the same.
    """

    def on(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Token features of `tokens` -> token features; dead slots have no part in what live ones get."""
        raise NotImplementedError


class Mixer(TokenPart):
    """What a block may have in the place of attention: `mix` for all tokens, `on` for those that are live."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D), called as timm calls attention.

        Raises:
            ValueError: a mask, which is for attention.
        """
        if attn_mask is not None or is_causal:
            raise ValueError(f"{type(self).__name__} stands in the place of attention and takes no attention mask")
        return self.mix(x)

    def mix(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        raise NotImplementedError

    @property
    def macs(self) -> int:
        """MACs for an image, however many of its tokens are live; none for one without."""
        raise NotImplementedError


class InstanceNorm(TokenPart):
    """Each channel normalised over the tokens of its image, then scaled and shifted by learned numbers."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale by 1, shift by 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dim=1, correction=0, keepdim=True)
        return ((wide - mean) * (variance + self.eps).rsqrt()).to(x.dtype) * self.weight + self.bias

    def on(self, x: Tensor, tokens: Tokens) -> Tensor:
        return tokens.standardise(x, self.eps) * self.weight + self.bias

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class Rotary(TokenPart):
    """Queries or keys turned by their patch's row and column; tokens before the patches stay as they are.

    The first half of a head's channels goes by the row, the second by the column. Neighbouring channels are a pair,
    turned by the coordinate times a frequency, from 1 down to nearly 1 / 10000; so the product of a query and a key
    depends on where one lies from the other, not on where both lie.
    Source: Su et al., RoFormer, 2021; by two axes as in EVA-02 (Fang et al., 2023).
    """

    table: Tensor

    def __init__(self, head_dim: int, grid: tuple[int, int], prefix: int) -> None:
        super().__init__()
        sine, cosine = build_rotary_pos_embed(list(grid), dim=head_dim, in_pixels=False)
        sine = torch.cat([sine.new_zeros(prefix, head_dim), sine])
        cosine = torch.cat([cosine.new_ones(prefix, head_dim), cosine])
        self.register_buffer("table", torch.cat([sine, cosine], dim=1), persistent=False)  # (N, 2d)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, N, d) -> (B, H, N, d)."""
        return apply_rot_embed_cat(x, self.table)

    def on(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Token features (..., H, d)."""
        at = tokens.at
        places = self.table.index_select(0, at.flatten()).view(*at.shape, -1)
        return apply_rot_embed_cat(x, places.unsqueeze(-2))

    def extra_repr(self) -> str:
        slots, size = self.table.shape
        return f"slots={slots}, head_dim={size // 2}"


class UnitLength(nn.Module):
    """Queries or keys (..., d) brought to length 1, so that their product is the cosine between them."""

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, dim=-1, eps=1e-6)


class Temperature(nn.Module):
    """Queries (..., d) brought to the length by which attention's logits are cosines over a learned temperature.

    One for a block, 0.1 at first and not below 0.01, as in Swin V2 (Liu et al., 2022), which has one for each head.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), math.log(10)))  # logarithm of 1 / temperature
        self.unit = UnitLength()
        self.undo = head_dim**0.5  # dot-product attention divides by it

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(x) * (self.scale.clamp(max=math.log(100)).exp() * self.undo)


class TokenMLP(Mixer):
    """A two-layer MLP over the token slots, the same for every channel, as MLP-Mixer (Tolstikhin et al., 2021) has it.

    Its maps have a weight for each slot, so a dead one counts 0 and the MLP runs over all of them.
    """

    def __init__(self, slots: int, channels: int) -> None:
        super().__init__()
        self.mlp = Mlp(slots, channels // 2)
        self.channels = channels

    @property
    def macs(self) -> int:
        return self.channels * linear_macs(self.mlp)

    def mix(self, x: Tensor) -> Tensor:
        return self.mlp(x.mT).mT

    def on(self, x: Tensor, tokens: Tokens) -> Tensor:
        dense, running = tokens.grid(x), tokens.live.any(dim=1)
        mixed = self.mix(dense[running])
        out = mixed.new_zeros(dense.shape)
        out[running] = mixed
        return tokens.spread(out)


class PartsViT(VisionTransformer):
    """timm's ViT with parts exchanged.

    Attributes:
        config: which ones.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(
            img_size=config.img_size,
            patch_size=config.patch_size,
            in_chans=config.in_chans,
            num_classes=config.num_classes,
            global_pool=config.global_pool,
            class_token=config.global_pool == "token",
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=1,  # of attention that is put in below
            mlp_ratio=config.mlp_ratio,
            drop_path_rate=config.drop_path_rate,
            norm_layer=lambda channels, **_: NORMS[config.norm](channels),  # timm adds a device and a precision
        )
        self.config = config
        for name in ("norm", "fc_norm"):
            if isinstance(getattr(self, name), TokenPart):  # it stands before the head, which reads one token
                setattr(self, name, LayerNorm(config.embed_dim))
        for block in self.blocks:
            block.attn = BLOCKS[config.block](self)
            if isinstance(block.attn, Mixer):
                _check_mixer(config)
            elif isinstance(block.attn, Attention):
                block.attn.q_norm, block.attn.k_norm = ATTENTIONS[config.attention](block.attn.head_dim)
        self.init_weights(needs_reset=False)
        POSITIONS[config.position](self)

    def set_input_size(self, *_: Any, **__: Any) -> None:
        """Refuse: tables of positions and maps over slots belong to one size.

        Raises:
            ValueError: always.
        """
        size = " x ".join(map(str, self.patch_embed.img_size))
        raise ValueError(f"the parts of this ViT are made for {size} pixels: build another with img_size=...")


class RepresentationHead(nn.Module):
    """Linear, tanh, linear, where a ViT has its head: what timm's had up to 0.5 with `representation_size`."""

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        fc = nn.Linear(channels, size)
        self.pre_logits = nn.Sequential(OrderedDict(fc=fc, act=nn.Tanh()))
        self.fc = nn.Linear(size, num_classes)
        for part in (fc, self.fc):
            nn.init.trunc_normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pre_logits(x))


def add_representation(vit: VisionTransformer, size: int) -> None:
    """Give a ViT, in place, a head with a representation layer of so many channels, with fresh weights.

    Raises:
        ValueError: it is distilled, or has no head; timm has had no such layer there.
    """
    if isinstance(vit, VisionTransformerDistilled) or not isinstance(vit.head, nn.Linear):
        raise ValueError("a representation layer stands before the one head of a ViT, which this one does not have")
    vit.head = RepresentationHead(vit.head.in_features, size, vit.num_classes).to(vit.head.weight)


def set_head_dim(vit: VisionTransformer, head_dim: int) -> None:
    """Give a ViT, in place, attention whose heads have so many channels, whatever its own width, with fresh weights.

    Raises:
        TypeError: its attention is not timm's plain one.
    """
    for block in vit.blocks:
        old = block.attn
        extras = (old.q_norm, old.k_norm, old.norm, old.gate) if type(old) is Attention else (old,)
        if any(not isinstance(extra, nn.Identity | None) for extra in extras):
            raise TypeError("heads of another width are for timm's attention without norms and gate inside")
        biases = {"qkv_bias": old.qkv.bias is not None, "proj_bias": old.proj.bias is not None}
        drops = {"attn_drop": old.attn_drop.p, "proj_drop": old.proj_drop.p}
        dim, heads = old.qkv.in_features, old.num_heads
        block.attn = Attention(dim, heads, attn_head_dim=head_dim, **biases, **drops).to(old.qkv.weight)


def representation_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a ViT of timm's up to 0.5 with its representation layer where `add_representation` puts it.

    One without that layer comes back as it is.
    """
    if "pre_logits.fc.weight" not in tensors:
        return dict(tensors)
    moved = {"pre_logits": "head.pre_logits", "head": "head.fc"}
    parts = {key: key.partition(".") for key in tensors}
    return {f"{moved.get(top, top)}{dot}{rest}": tensors[key] for key, (top, dot, rest) in parts.items()}


def learned(vit: PartsViT) -> None:
    """A table that is added to the tokens once: timm's own, as in ViT and DeiT."""


def sinusoidal(vit: PartsViT) -> None:
    """A fixed table of sines and cosines of row and column; 0 for a class token, as in MAE."""
    patches = build_sincos2d_pos_embed(list(vit.patch_embed.grid_size), vit.embed_dim)
    _fix(vit, torch.cat([patches.new_zeros(vit.num_prefix_tokens, vit.embed_dim), patches]))


def sinusoidal_1d(vit: PartsViT) -> None:
    """A fixed table of sines and cosines of the slot, the class token being the first, as in T2T-ViT."""
    _fix(vit, sinusoid(*vit.pos_embed.shape[1:]))


def rotary(vit: PartsViT) -> None:
    """Queries and keys turned by row and column, in every block; nothing is added."""
    vit.pos_embed = None
    for block in vit.blocks:
        attn = block.attn
        for name in ("q_norm", "k_norm"):
            turn = Rotary(attn.head_dim, vit.patch_embed.grid_size, vit.num_prefix_tokens)
            setattr(attn, name, nn.Sequential(getattr(attn, name), turn))


def none(vit: PartsViT) -> None:
    """No positions: without a mixer the ViT sees a set of patches."""
    vit.pos_embed = None


def _fix(vit: PartsViT, table: Tensor) -> None:
    """Put a table in the place of the learned one: stored, but not trained."""
    vit.pos_embed.requires_grad_(False).copy_(table)


def dot(head_dim: int) -> tuple[nn.Module, nn.Module]:
    """Scaled dot products, as in ViT."""
    return nn.Identity(), nn.Identity()


def cosine(head_dim: int) -> tuple[nn.Module, nn.Module]:
    """Cosines over a learned temperature; 1 in its place would be generalised cosine attention."""
    return Temperature(head_dim), UnitLength()


def attention(vit: PartsViT) -> nn.Module:
    """timm's multi-head attention."""
    return Attention(vit.embed_dim, vit.config.num_heads, qkv_bias=True)


def mixer(vit: PartsViT) -> nn.Module:
    """MLP-Mixer's token mixing, over the class token too where there is one."""
    return TokenMLP(vit.num_prefix_tokens + vit.patch_embed.num_patches, vit.embed_dim)


POSITIONS: dict[str, Callable[[PartsViT], None]] = {
    "learned": learned,
    "sinusoidal": sinusoidal,
    "sinusoidal_1d": sinusoidal_1d,
    "rotary": rotary,
    "none": none,
}
"""What is done to a ViT with timm's learned table."""
NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": LayerNorm, "instance": InstanceNorm, "rms": RmsNorm}
"""Norms of so many channels."""
ATTENTIONS: dict[str, Callable[[int], tuple[nn.Module, nn.Module]]] = {"dot": dot, "cosine": cosine}
"""What queries and keys of d channels go through before their products."""
BLOCKS: dict[str, Callable[[PartsViT], nn.Module]] = {"attention": attention, "mixer": mixer}
"""What stands where a block of the ViT has its attention: timm's `Attention` or a `Mixer`."""


default_cfgs = generate_default_cfgs(  # timm looks for this name in the module of a registered function
    {
        "parts_vit": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model
def parts_vit(**options: Any) -> PartsViT:
    """A ViT of the parts and sizes that `ViTConfig` has fields for; the defaults are DeiT-tiny's."""
    if options.get("pretrained") and not (options.get("pretrained_cfg_overlay") or {}).keys() & {"file", "state_dict"}:
        raise ValueError("parts_vit has no weights to download: leave out pretrained, and load what fits its parts")
    return build_model_with_cfg(
        lambda **settings: ViTConfig(**settings).build(),
        "parts_vit",
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
        **{"pretrained": False, **options},
    )
