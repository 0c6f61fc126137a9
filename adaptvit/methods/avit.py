"""A-ViT: tokens halt once their accumulated halting score reaches 1 - epsilon.

Yin, Vahdat, Alvarez, Mallya, Kautz, Molchanov: A-ViT: Adaptive Tokens for Efficient Vision Transformer, CVPR 2022.

Letters: B images, N token slots (class token first), L blocks, D channels, R slots that the classifier reads.
Symbols of the paper: h halting score, R remainder (here 1 - total), rho ponder cost, gamma and beta of the gate.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from adaptvit.model import AdaptiveViT, Knob
from adaptvit.priors import PRIORS, halting_prior, released_target
from adaptvit.tokens import Masked, Packed, Tokens
from adaptvit.usage import Output, Usage
from adaptvit.vit import classify, depth, embed, run_block


@dataclass(frozen=True, kw_only=True)
class AViTConfig:
    """Token halting (Yin et al., CVPR 2022). Defaults are those of the released recipe for tiny.

    `mode="clean"`, the default, is the paper made well defined. Differs from `"official"`, the released code:

    - the distribution loss averages scores over patch tokens of all images, halted ones counting 0; released: over all
      tokens but of images 2..B only, halted tokens adding the scores of all-zero inputs, NaN (and skipped) at batch 1;
    - the last block's score counts as 1, as in the output; released: its raw sigmoid;
    - the target is a distribution over 1..L; released: it sums to 3.26 and exists for 12 blocks only;
    - the divergence is a sum over blocks; released: divided by L, probabilities clamped to [0.01, 0.99];
    - the ponder loss averages over patch tokens; released: over all tokens;
    - no gradient passes through halted tokens; released: straight through, by way of those spurious scores.
    """

    method: ClassVar[str] = "avit"
    knob: ClassVar[Knob | None] = Knob("gate_center", sign=1, lowest=-200.0, highest=200.0)

    gate_scale: float = 10.0
    """gamma: the halting score is sigmoid(gate_scale * t - gate_center), t being channel 0 of the token."""
    gate_center: float = 30.0
    """-beta: larger values halt later. The released small model uses 75."""
    epsilon: float = 0.01
    """A token halts once its scores add up to 1 - epsilon."""
    ponder_weight: float = 5e-4
    """alpha_p, the weight of the ponder loss."""
    prior_weight: float = 1e-3
    """alpha_d, the weight of the distribution loss; 0 switches it off."""
    prior: str = "gaussian"
    """Target distribution of the halting depth, a name in `adaptvit.priors.PRIORS`."""
    prior_depth: float | None = None
    """Where the prior peaks, in blocks, 1-based; None is three quarters of the depth, 9 of 12 as released."""
    prior_scale: float = 1.0
    """Width of the prior, in blocks."""
    divergence: Literal["target||model", "model||target"] = "target||model"
    """Direction of the KL divergence: as released, or as the paper writes it."""
    class_token: Literal["halts", "stays"] = "halts"
    """Whether the tokens that the classifier reads halt like any other (the paper), so that an image is done once they
    have, or stay to the last block and are read from there alone. Neither loss counts them."""
    mode: Literal["clean", "official"] = "clean"
    """`official` reproduces the released code's losses and gradients; logits and depths are the same in both."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("gate_scale", 0.0, float("inf")),
            ("epsilon", 0.0, 1.0),
            ("prior_scale", 0.0, float("inf")),
        ):
            value = getattr(self, name)
            if not low < value < high:
                raise ValueError(f"AViTConfig.{name} must lie in ({low:g}, {high:g}), got {value}")
        for name in ("ponder_weight", "prior_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"AViTConfig.{name} must be 0 or more, got {getattr(self, name)}")
        for name, allowed in (
            ("prior", tuple(PRIORS)),
            ("divergence", ("target||model", "model||target")),
            ("class_token", ("halts", "stays")),
            ("mode", ("clean", "official")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"AViTConfig.{name} must be one of {allowed}, got {getattr(self, name)!r}")

    def build(self, vit: VisionTransformer) -> "AViT":
        """Wrap `vit`, sharing its weights; no parameter is added.

        Raises:
            TypeError: the ViT is not one that this library reproduces.
            ValueError: `prior_depth` is not a block of the ViT, or `class_token="stays"` without a class token.
        """
        return AViT(vit, self)


class AViT(AdaptiveViT):
    """A ViT whose tokens halt."""

    def __init__(self, vit: VisionTransformer, config: AViTConfig) -> None:
        super().__init__(vit, config)
        if config.class_token == "stays" and self.read is None:
            raise ValueError("AViTConfig.class_token is 'stays', but this ViT pools all tokens: only 'halts' is allowed")
        blocks = depth(vit)
        target = 0.75 * blocks if config.prior_depth is None else config.prior_depth
        if config.mode == "official":
            self.run_block, self.terms, prior = official_block, official_terms, released_target
            target = int(target)
        else:
            self.run_block, self.terms, prior = run_block, clean_terms, halting_prior
        self.register_buffer("prior", prior(config.prior, blocks, target, config.prior_scale), persistent=False)

    def forward(self, images: Tensor, layout: type[Tokens] | None = None, early_exit: bool | None = None) -> Output:
        """Classify images.

        Args:
            images: (B, channels, height, width).
            layout: `Masked` or `Packed`; None packs, except where `official` training needs every slot.
            early_exit: an image leaves once the tokens that its logits read have halted. Exact for the logits, but its
                patches' depths end there and there are no loss terms. None: in evaluation, not in training.
        Raises:
            ValueError: official mode asked to run packed without early exit, where its losses cannot be had.
        """
        config = self.config
        early_exit = not self.training if early_exit is None else early_exit
        official = config.mode == "official" and not early_exit
        if official and layout is Packed:
            raise ValueError("AViTConfig.mode='official' needs layout=Masked or early_exit=True: its losses read dead slots")
        x, grid = embed(self.vit, images)
        tokens = (layout or (Masked if official else Packed)).of(x)
        precise = torch.promote_types(x.dtype, torch.float32)
        is_read = torch.arange(x.shape[1], device=x.device)[None] < (self.read or x.shape[1])
        total = torch.zeros(tokens.live.shape, dtype=precise, device=x.device)
        rho, output = torch.zeros_like(total), 0.0
        lives, scores, updated = [], [], []

        for block in self.vit.blocks:
            last = block is self.vit.blocks[-1]
            live = tokens.live
            if official:
                tokens = self.run_block(block, tokens)
            else:
                tokens = run_block(block, tokens, is_read if last and self.read else None)
            score = tokens.grid(self.halting_score(tokens.x.to(precise))) if not last else live.to(precise)
            ...
        raise NotImplementedError

    def halting_score(self, x: Tensor) -> Tensor:
        """h = sigmoid(gamma t + beta), t being channel 0 of the token features (..., D)."""
        return torch.sigmoid(self.config.gate_scale * x[..., 0] - self.config.gate_center)
