"""A-ViT: tokens halt once their accumulated halting score reaches 1 - epsilon.

Yin, Vahdat, Alvarez, Mallya, Kautz, Molchanov: A-ViT: Adaptive Tokens for Efficient Vision Transformer, CVPR 2022.

Letters: B images, N token slots (class token first), L blocks, D channels, R slots that the classifier reads.
Symbols of the paper: h halting score, R remainder, rho ponder cost, gamma and beta of the gate.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from adaptvit.checks import In, OneOf, check_fields
from adaptvit.losses import mean_over_processes
from adaptvit.methods import avit_official
from adaptvit.model import AdaptiveViT, Knob
from adaptvit.priors import PRIORS, halting_prior, mixture
from adaptvit.terminal import warn
from adaptvit.tokens import Masked, Packed, Tokens
from adaptvit.usage import Output, Usage
from adaptvit.vit import check_attention, check_norms, classify, embed, run_block

LEAST_SHARE = 1e-3
"""What a block counts at least in the target's divergence from the model, which one that no patch enters would make
infinite."""


@dataclass(frozen=True, kw_only=True)
class AViTConfig:
    """Token halting (Yin et al., CVPR 2022). Defaults are those of the released recipe for tiny.

    `mode="clean"`, the default, is the paper made well defined. Differs from `"official"`, the released code:

    - the distribution loss averages scores over patch tokens of all images, halted ones counting 0; released: over all
      tokens but of images 2..B only, halted tokens adding the scores of all-zero inputs, NaN (and skipped) at batch 1;
    - the last block's score counts as 1, as in the output; released: its raw sigmoid;
    - the target is a distribution over 1..L; released: it sums to 3.26 and exists for 12 blocks only;
    - the divergence is a sum over blocks, a block's share being 0.001 or more; released: divided by L, probabilities
      clamped to [0.01, 0.99];
    - the ponder loss averages over patch tokens; released: over all tokens;
    - no gradient passes through halted tokens; released: straight through, by way of those spurious scores.
    """

    method: ClassVar[str] = "avit"
    knob: ClassVar[Knob | None] = Knob("gate_center", sign=1, lowest=-1000.0, highest=1000.0, step=0.5)

    gate_scale: Annotated[float, In("(0, 1e6]")] = 10.0
    """gamma: the halting score is sigmoid(gate_scale * t - gate_center), t being channel 0 of the token."""
    gate_center: Annotated[float, In("[-1e9, 1e9]")] = 30.0
    """-beta: larger values halt later. The released small model uses 75."""
    epsilon: Annotated[float, In("(0, 1)")] = 0.01
    """A token halts once its scores add up to 1 - epsilon."""
    ponder_weight: Annotated[float, In("[0, inf)")] = 5e-4
    """alpha_p, the weight of the ponder loss."""
    prior_weight: Annotated[float, In("[0, inf)")] = 1e-3
    """alpha_d, the weight of the distribution loss; 0 switches it off."""
    prior: Annotated[tuple[str, ...] | str, OneOf(PRIORS)] = "gaussian"
    """Target distribution of the halting depth, a name in `adaptvit.priors.PRIORS`."""
    prior_depth: Annotated[tuple[float, ...] | float | None, In("[1, inf)")] = None
    """Where the prior peaks, in blocks, 1-based; None is three quarters of the depth, 9 of 12 as released."""
    prior_scale: Annotated[tuple[float, ...] | float, In("[0.001, 1000]")] = 1.0
    """Width of the prior, in blocks."""
    prior_weights: Annotated[tuple[float, ...] | None, In("(0, 1e6]")] = None
    """With two numbers the prior is a mixture of two, which have these shares, and `prior`, `prior_depth` and
    `prior_scale` may hold one value for both or one for each; with more, of more. None is no mixture."""
    divergence: Literal["target||model", "model||target"] = "target||model"
    """Direction of the KL divergence: as released, or as the paper writes it."""
    class_token: Literal["halts", "stays"] = "halts"
    """Whether the tokens that the classifier reads halt like any other (the paper), so that an image is done once they
    have, or stay to the last block and are read from there alone. Neither loss counts them."""
    mode: Literal["clean", "official"] = "clean"
    """`official` reproduces the released code's losses and gradients; logits and depths are the same in both."""

    def __post_init__(self) -> None:
        check_fields(self)
        parts = len(self.prior_weights or ())
        for name in ("prior", "prior_depth", "prior_scale"):
            value = getattr(self, name)
            if isinstance(value, tuple) and (len(value) != parts or not parts):
                raise ValueError(
                    f"AViTConfig.{name} has {len(value)} values, but prior_weights has {parts}: a mixture takes one "
                    "weight for each"
                )
        for depth in _each(self.prior_depth) if self.mode == "official" else ():
            if depth < 2 or depth % 1:
                raise ValueError(
                    f"AViTConfig.prior_depth must be a whole block from the second on in mode='official', got {depth}"
                )

    def build(self, vit: VisionTransformer) -> "AViT":
        """Wrap `vit`, sharing its weights; no parameter is added.

        Raises:
            TypeError: the ViT is not one that this library reproduces, or `mode="official"` with blocks or norms that
                the released code has not.
            ValueError: `prior_depth` is not a block of the ViT, or `class_token="stays"` without a class token.
        """
        return AViT(vit, self)


def _each(value: Any, parts: int = 1) -> tuple[Any, ...]:
    """A field's values for the parts of a mixture; None has none."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,) * parts


class AViT(AdaptiveViT):
    """A ViT whose tokens halt."""

    prior: Tensor

    def __init__(self, vit: VisionTransformer, config: AViTConfig) -> None:
        super().__init__(vit, config)
        if config.class_token == "stays" and self.read is None:
            raise ValueError("AViTConfig.class_token='stays' needs a class token, but this ViT pools all its tokens")
        blocks = self.depth
        target = max(1.0, 0.75 * blocks) if config.prior_depth is None else config.prior_depth
        official = config.mode == "official"
        if official:
            check_attention(vit, "AViTConfig.mode='official'")
            check_norms(vit, "AViTConfig.mode='official'")
        prior = avit_official.target if official else halting_prior
        weights = config.prior_weights or (1.0,)
        each = [_each(value, len(weights)) for value in (config.prior, target, config.prior_scale)]
        for depth in _each(config.prior_depth):
            if not 1 <= depth <= blocks:
                raise ValueError(
                    f"AViTConfig.prior_depth must lie in 1..{blocks}, the blocks of this ViT, got {depth:g}"
                )
        parts = [prior(name, blocks, peak, scale) for name, peak, scale in zip(*each, strict=True)]
        self.register_buffer("prior", mixture(parts, weights).float(), persistent=False)

    def forward(self, images: Tensor, layout: type[Tokens] | None = None, early_exit: bool | None = None) -> Output:
        """Classify images.

        Args:
            images: (B, channels, height, width).
            layout: None packs, except for `official` losses, which read dead slots and so need `Masked`.
            early_exit: an image leaves once the tokens that its logits read have halted. Exact for the logits, but its
                patches' depths end there and there are no loss terms. None: in evaluation, not in training.
        Raises:
            ValueError: `official` losses asked of `Packed`.
        """
        early_exit = not self.training if early_exit is None else early_exit
        if self.config.mode == "official" and not early_exit:
            return avit_official.forward(self, images, layout or Masked)

        x, grid = embed(self.vit, images)
        tokens = (layout or Packed).of(x)
        del x  # or it would stay to the end
        slots = torch.arange(tokens.shape[1], device=images.device)
        reading = (slots < (self.read or len(slots)))[None]
        depth = torch.zeros(tokens.shape, dtype=torch.long, device=images.device)
        remainder = torch.ones_like(tokens.x[..., 0], dtype=torch.promote_types(tokens.x.dtype, torch.float32))
        output = remainder.new_zeros(())
        scores = []
        *blocks, last_block = self.vit.blocks
        for number, block in enumerate(blocks, start=1):
            tokens.stamp(depth, number)
            tokens = run_block(block, tokens)
            score = self.halting_score(tokens.x, remainder.dtype)
            if self.config.class_token == "stays":
                score = score.masked_fill(tokens.spread(reading.expand(tokens.shape)), 0)
            weight, going, remainder = halt(score, remainder, self.config.epsilon)
            output = output + self.read_out(tokens, weight)
            if number == 1:
                warn_if_all_halted(going, self.config.gate_center)
            if early_exit:
                going = going & tokens.spread(self.read_slots(tokens, going).any(dim=1, keepdim=True))
            else:
                scores.append(tokens.grid(score))
            tokens, (remainder,) = tokens.filter(going, remainder)
            if early_exit and tokens.x.shape[0] == 0:
                break
        else:
            tokens.stamp(depth, self.depth)
            weight = self.read_slots(tokens, remainder)
            tokens = run_block(last_block, tokens, None if self.read is None else reading)
            output = output + weight[..., None] * self.read_slots(tokens, tokens.x)

        logits, distilled = classify(self.vit, output.to(tokens.x.dtype))
        usage = Usage.of_depth(depth, self.heads, grid, self.prefix, last_reads=self.read)
        terms = {} if early_exit else self.terms(scores, depth)
        return Output(logits, usage, terms, distilled)

    def halting_score(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """h = sigmoid(gamma t + beta), t being channel 0 of (..., D) tokens after the block."""
        return torch.sigmoid(self.config.gate_scale * x[..., 0].to(dtype) - self.config.gate_center)

    def read_slots(self, tokens: Tokens, t: Tensor) -> Tensor:
        """Token features -> those of the slots that the classifier reads: (B, R, ...)."""
        return tokens.first(t, self.read or tokens.shape[1])

    def read_out(self, tokens: Tokens, weight: Tensor) -> Tensor:
        """This block's share in the mean-field output: (B, R, D) from weights, token features."""
        return self.read_slots(tokens, weight)[..., None] * self.read_slots(tokens, tokens.x)

    def terms(self, scores: list[Tensor], depth: Tensor) -> dict[str, Tensor]:
        """Ponder and distribution loss of the patch tokens, weighted.

        Args:
            scores: (B, N) halting scores of each block but the last, 0 where dead.
            depth: (B, N) the last block that each token entered.
        """
        depth = depth[:, self.prefix :]
        last = (depth == self.depth).to(self.prior.dtype)  # scores 1
        h = torch.stack([*(score[:, self.prefix :] for score in scores), last], dim=1)
        going = depth[:, None] > torch.arange(1, self.depth + 1, device=h.device)[:, None]
        remainder = 1 - (h * going).sum(dim=1)
        rho = depth + remainder
        mean_scores = mean_over_processes(h.mean(dim=(0, 2)))
        model = mean_scores / mean_scores.sum()
        if self.config.divergence == "target||model":
            model = model.clamp_min(LEAST_SHARE)
            model = model / model.sum()
        divergence = kl_divergence(model, self.prior.to(h.dtype), self.config.divergence)
        return {"ponder": self.config.ponder_weight * rho.mean(), "prior": self.config.prior_weight * divergence}


def halt(score: Tensor, remainder: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """One halting step: what each token adds to its output now, and who goes on.

    Args:
        score: halting score h of this block, in [0, 1].
        remainder: R, what the token's weights of the blocks before left to 1; 0 where it has halted.
    Returns:
        weight: h where a token goes on, R where it halts. Over the blocks a token's weights sum to 1.
        going: bool, who goes on; never a token that has halted.
        left: R for the block after this, where a token goes on.
    Source: A-ViT, Algorithm 1. Differs: scores that add up to exactly 1 - epsilon halt; the released code loses them.
    """
    left = remainder - score
    going = ~(left <= epsilon)  # so does NaN, until it has spoilt the logits in every layout
    return torch.where(going, score, remainder), going, left


def kl_divergence(model: Tensor, target: Tensor, direction: str) -> Tensor:
    """KL divergence of two distributions over (L,) blocks, in nats, in the direction "target||model" or its reverse."""
    least = torch.finfo(model.dtype).tiny
    ratio = target.clamp_min(least).log() - model.clamp_min(least).log()
    return (target * ratio).sum() if direction == "target||model" else (-model * ratio).sum()


def warn_if_all_halted(going: Tensor, gate_center: float) -> None:
    """Say so when the gate leaves nothing after the first block."""
    if going.numel() and not going.any():
        warn(
            f"AViTConfig.gate_center={gate_center:g} halts every token after block 1: raise it, or find a gate "
            "with adaptvit.meet_target",
            stacklevel=3,
        )
