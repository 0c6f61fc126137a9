"""A ViT with adaptive token sampling, in Flax linen, under the names and parameters of the published port.

Letters: B images, N token slots (class token first), T = N - 1 patch slots, K draws, M slots kept, H heads, D channels,
d channels per head. Slots that hold no token repeat the class token and are masked.
Source: conceptofmind/Adaptive-Token-Sampling-Flax, a port of vit-pytorch's `ats_vit`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from adaptvit.checks import In, check_fields, quoted
from adaptvit.flax import samplers

Sampler = Literal["gumbel", "inverse_transform"]


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """Where ViTs differ in small ways; the defaults are the published port's."""

    norm_eps: Annotated[float, In("(0, inf)")] = 1e-5
    """What layer norm adds to the variance."""
    norm_bias: bool = False
    """Whether layer norm has a bias."""
    qkv_bias: bool = False
    """Whether the map to queries, keys and values has a bias."""
    exact_gelu: bool = False
    """GELU by the error function; otherwise its tanh approximation."""

    def __post_init__(self) -> None:
        check_fields(self)

    def norm(self) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=self.norm_eps, use_bias=self.norm_bias)


def take(x: Array, ids: Array) -> Array:
    """The slots `ids` (B, M) of x (B, N, ...)."""
    return x[jnp.arange(len(x))[:, None], ids]


class AdaptiveTokenSampling(nn.Module):
    """Choose the tokens that a layer keeps: the class token, and patches in proportion to their score.

    A patch's score is the class token's attention to it times the length of its value, summed over heads. Drawing is
    random with an `ats` rng; without one, the evenly spaced quantiles of the same probabilities are drawn.
    Differs: takes the class token's row of attention instead of all rows, and returns which rows to compute.
    """

    output_num_tokens: float
    """K, at least 1; need not be whole for the quantiles."""
    eps: float = 1e-6
    """Guards the probabilities and their logarithm."""
    capacity: int | None = None
    """M; None: as many slots as K draws can fill."""
    sampler: Sampler = "gumbel"
    """`inverse_transform` draws the quantiles even where there is an rng."""

    @nn.compact
    def __call__(self, class_attention: Array, value: Array, mask: Array) -> tuple[Array, Array]:
        """Args:
            class_attention: (B, H, N).
            value: (B, H, N, d).
            mask: (B, N) bool, False in padding.
        Returns:
            ids (B, M) int, positions to keep, 0 for padding; fits (B,) bool, False where tokens had to be left out.
        """
        slots, live, draws = mask.shape[1] - 1, mask[:, 1:], samplers.whole(self.output_num_tokens)
        length = self.capacity or min(slots, draws) + 1
        score = jax.lax.stop_gradient(class_attention * jnp.linalg.norm(value, axis=-1)).sum(axis=1)[:, 1:]
        if self.sampler == "gumbel" and self.has_rng("ats"):
            noise = samplers.gumbel_noise(self.make_rng("ats"), (len(mask), draws, slots))
            drawn = samplers.gumbel_draws(score, live, noise, self.eps)
        else:
            drawn = samplers.quantile_draws(score, live, self.output_num_tokens)
        ids, count = samplers.compact(drawn, slots, length)
        self.sow("intermediates", "tokens", count)
        return ids, count <= length


class FeedForward(nn.Module):
    """The two-layer perceptron of a block."""

    dim: int
    hidden_dim: int
    dropout: float = 0.0
    flavour: Flavour = Flavour()

    @nn.compact
    def __call__(self, x: Array, *, training: bool = True) -> Array:
        x = nn.gelu(nn.Dense(self.hidden_dim)(x), approximate=not self.flavour.exact_gelu)
        x = nn.Dropout(self.dropout, deterministic=not training)(x)
        return nn.Dropout(self.dropout, deterministic=not training)(nn.Dense(self.dim)(x))


class Attention(nn.Module):
    """Self-attention that returns the rows of the tokens it keeps: all of them unless `output_num_tokens` is given.

    Differs: whether a layer samples is decided by `Transformer`; rows that are not kept are not computed; slots of
    padding attend as the class token does. A row that did not fit the capacity makes its image NaN.
    """

    dim: int
    heads: int = 8
    dim_head: int = 64
    dropout: float = 0.0
    output_num_tokens: float | None = None
    capacity: int | None = None
    sampler: Sampler = "gumbel"
    flavour: Flavour = Flavour()

    @nn.compact
    def __call__(self, x: Array, *, mask: Array, training: bool = True) -> tuple[Array, Array | None]:
        """Args:
            x: (B, N, D).
            mask: (B, N) bool, False in padding.
        Returns:
            The rows kept (B, M, D), and their positions (B, M) int, 0 for padding; None where all are kept.
        """
        size = self.heads * self.dim_head
        qkv = nn.Dense(3 * size, use_bias=self.flavour.qkv_bias)(x)
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, self.heads, self.dim_head), (2, 3), (0, 2))

        def attend(q: Array) -> Array:
            logits = q @ k.swapaxes(-1, -2) * self.dim_head**-0.5
            return nn.softmax(jnp.where(mask[:, None, None], logits, jnp.finfo(logits.dtype).min))

        ids = None
        if self.output_num_tokens is not None:
            sampling = AdaptiveTokenSampling(self.output_num_tokens, capacity=self.capacity, sampler=self.sampler)
            ids, fits = sampling(attend(q[:, :, :1])[:, :, 0], v, mask)
            q = jnp.take_along_axis(q, ids[:, None, :, None], axis=2)
            v = jnp.where(fits[:, None, None, None], v, jnp.nan)
        rows = (attend(q) @ v).swapaxes(1, 2)
        out = nn.Dense(self.dim)(rows.reshape(*rows.shape[:2], size))
        return nn.Dropout(self.dropout, deterministic=not training)(out), ids


class PreNorm(nn.Module):
    """Layer norm before `fn`."""

    fn: Callable[..., Any]
    flavour: Flavour = Flavour()

    @nn.compact
    def __call__(self, x: Array, **arguments: Any) -> Any:
        return self.fn(self.flavour.norm()(x), **arguments)


class Transformer(nn.Module):
    """Blocks of attention and perceptron; the fields are `ViT`'s."""

    dim: int
    depth: int
    max_tokens_per_depth: tuple[float, ...]
    heads: int
    dim_head: int
    mlp_dim: int
    dropout: float = 0.0
    capacities: tuple[int | None, ...] = ()
    """Slots after each layer that samples, None for the others; empty: no layer samples."""
    sampler: Sampler = "gumbel"
    flavour: Flavour = Flavour()

    @nn.compact
    def __call__(self, x: Array, *, training: bool = True) -> tuple[Array, Array]:
        """Args:
            x: (B, N, D).
        Returns:
            The tokens left (B, M, D), and their positions in `x` (B, M) int, 0 for padding.
        """
        ids = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        for count, capacity in zip(self.max_tokens_per_depth, self.capacities or (None,) * self.depth, strict=True):
            attention = Attention(
                self.dim,
                self.heads,
                self.dim_head,
                self.dropout,
                output_num_tokens=count if capacity else None,
                capacity=capacity,
                sampler=self.sampler,
                flavour=self.flavour,
            )
            mask = (ids > 0).at[:, 0].set(True)
            out, kept = PreNorm(attention, self.flavour)(x, mask=mask, training=training)
            if kept is not None:
                x, ids = take(x, kept), take(ids, kept)
            x = x + out
            feed_forward = FeedForward(self.dim, self.mlp_dim, self.dropout, self.flavour)
            x = x + PreNorm(feed_forward, self.flavour)(x, training=training)
        return x, ids


class ViT(nn.Module):
    """A ViT that samples its tokens; `init` and `apply` as in the published README.

    An rng named `ats` makes `gumbel` draw at random, in training or not; without one, and always with
    `inverse_transform`, the draws are the evenly spaced quantiles, so that the same images give the same tokens.

    A layer's length is fixed when it is compiled: that of the layer before, or K + 1 where that is less, which K draws
    cannot exceed. `capacities` makes it shorter. An image that draws more gets logits of NaN, never quietly wrong ones;
    `check_capacities` says where.
    Differs: a layer samples where that fixed length, not the longest sequence of the batch, exceeds K, so an image's
    tokens do not depend on its batch. No TensorFlow; `jit`, `grad`, `vmap` and `eval_shape` work; `training=False`
    turns drop-out off; `emb_dropout` draws from its own rng, needed, as that of `dropout`, only above 0.
    """

    image_size: Annotated[int | tuple[int, int], In("[1, 65536]")]
    """Height and width in pixels."""
    patch_size: Annotated[int | tuple[int, int], In("[1, 65536]")]
    """Height and width of a patch; they divide the image's."""
    num_classes: Annotated[int, In("[1, inf)")]
    """Classes of the head."""
    dim: Annotated[int, In("[1, inf)")]
    """D."""
    depth: Annotated[int, In("[1, inf)")]
    """Layers."""
    max_tokens_per_depth: Annotated[tuple[float, ...], In("[1, inf)")]
    """K of each layer, not growing: a layer with more patches samples K times."""
    heads: Annotated[int, In("[1, inf)")]
    """H."""
    mlp_dim: Annotated[int, In("[1, inf)")]
    """Hidden channels of the perceptrons."""
    dim_head: Annotated[int, In("[1, inf)")] = 64
    """d; the published port has no way to set it."""
    dropout: Annotated[float, In("[0, 1)")] = 0.0
    """After each linear map of the perceptron and after attention."""
    emb_dropout: Annotated[float, In("[0, 1)")] = 0.0
    """On the embedded tokens."""
    blocks: Annotated[tuple[int, ...] | None, In("[0, inf)", empty=True)] = None
    """The layers that sample, 0-based, whatever their length; None: those with more patches than K."""
    capacities: Annotated[tuple[int, ...] | None, In("[2, inf)")] = None
    """Slots after each layer that samples, class token included, at most; None: as many as K draws can fill."""
    sampler: Sampler = "gumbel"
    """How tokens are drawn."""
    flavour: Flavour = Flavour()
    """Norms, biases and activation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, leave=("parent", "name"))
        counts = self.max_tokens_per_depth
        if len(counts) != self.depth or list(counts) != sorted(counts, reverse=True):
            raise ValueError(
                f"ViT.max_tokens_per_depth must be {self.depth} (depth) numbers, not growing, got {quoted(counts)}"
            )
        if self.capacities is not None and len(self.capacities) != self.depth:
            raise ValueError(f"ViT.capacities must be {self.depth} (depth) numbers, got {quoted(self.capacities)}")
        if self.blocks is not None and any(block >= self.depth for block in self.blocks):
            raise ValueError(f"ViT.blocks must lie in 0..{self.depth - 1}, got {quoted(self.blocks)}")
        height, width, rows, columns = *pair(self.image_size), *pair(self.patch_size)
        if height % rows or width % columns:
            raise ValueError(f"ViT.patch_size {self.patch_size} does not divide image_size {self.image_size}")

    @property
    def lengths(self) -> tuple[int | None, ...]:
        """Slots after each layer that samples, class token included; None for a layer that hands on all it gets."""
        (height, width), (rows, columns) = pair(self.image_size), pair(self.patch_size)
        slots, lengths = (height // rows) * (width // columns) + 1, []
        for layer, count in enumerate(self.max_tokens_per_depth):
            samples = slots - 1 > count if self.blocks is None else layer in self.blocks
            if samples:
                slots = min(slots, samplers.whole(count) + 1, self.capacities[layer] if self.capacities else slots)
            lengths.append(slots if samples else None)
        return tuple(lengths)

    @nn.compact
    def __call__(
        self, img: Array, return_sampled_token_ids: bool = False, training: bool = True
    ) -> Array | tuple[Array, Array]:
        """Args:
            img: (B, height, width, channels).
        Returns:
            logits (B, classes), and with `return_sampled_token_ids` the patches left (B, M - 1) int, in raster order
            from 0, after -1 for each slot of padding.
        Raises:
            ValueError: the images have another shape than the model is for.
        """
        (height, width), (rows, columns) = pair(self.image_size), pair(self.patch_size)
        if img.ndim != 4 or img.shape[1:3] != (height, width):
            raise ValueError(f"ViT takes images (B, {height}, {width}, channels), got {img.shape}")
        patches = img.reshape(len(img), height // rows, rows, width // columns, columns, img.shape[3])
        patches = patches.swapaxes(2, 3).reshape(len(img), -1, rows * columns * img.shape[3])
        cls = self.param("cls", nn.initializers.zeros, (1, 1, self.dim))
        x = nn.Dense(self.dim)(patches)
        x = jnp.concatenate([jnp.broadcast_to(cls, (len(img), 1, self.dim)), x], axis=1)
        x = x + self.param("pos_embedding", nn.initializers.zeros, (1, x.shape[1], self.dim))
        x = nn.Dropout(self.emb_dropout, deterministic=not training, rng_collection="emb_dropout")(x)
        transformer = Transformer(
            self.dim,
            self.depth,
            self.max_tokens_per_depth,
            self.heads,
            self.dim_head,
            self.mlp_dim,
            self.dropout,
            self.lengths,
            self.sampler,
            self.flavour,
        )
        x, ids = transformer(x, training=training)
        logits = nn.Dense(self.num_classes)(self.flavour.norm()(x[:, 0]))
        return (logits, ids[:, 1:] - 1) if return_sampled_token_ids else logits


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a size given as one number or as two."""
    return (size, size) if isinstance(size, int) else size


def check_capacities(vit: ViT, intermediates: Mapping[str, Any]) -> None:
    """Refuse images that a layer had no room for, by name; only outside `jit`.

    Args:
        intermediates: the collection of that name, from `vit.apply(..., mutable=["intermediates"])`.
    Raises:
        ValueError: an image drew more tokens than the layer has slots, so that its logits are NaN.
    """
    for layer, length in enumerate(vit.lengths):
        if length:
            (count,) = intermediates["Transformer_0"][f"Attention_{layer}"]["AdaptiveTokenSampling_0"]["tokens"]
            if count.max() > length:
                raise ValueError(
                    f"layer {layer} drew {count.max()} tokens of image {count.argmax()}, but has {length} slots: "
                    f"raise ViT.capacities[{layer}], now {vit.capacities}, or leave it out"
                )
