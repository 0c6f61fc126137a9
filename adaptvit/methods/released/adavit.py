"""AdaViT as its released code trains it, and what its tables have.

ReleasedAdaViTConfig            its decisions in training, its losses and gradients
published_gmacs                 the MACs that its tables count
distillation                    losses towards a teacher that it has
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, normalize

from adaptvit.backbones.gated import Gates
from adaptvit.checks import In
from adaptvit.methods.adavit import AdaViT, AdaViTConfig, Policies
from adaptvit.methods.base import Role
from adaptvit.methods.gates import entropy, gumbel_difference, straight_through
from adaptvit.process import in_float64


@dataclass(frozen=True, kw_only=True)
class ReleasedAdaViTConfig(AdaViTConfig):
    """Policies over patches, heads and sub-layers (Meng et al., CVPR 2022) as the released code trains them.

    Differs from `AdaViTConfig`, whose evaluation it has:

    - the temperature also divides the logits before they are compared with the threshold, so that training keeps fewer
      patches than evaluation does with the same logits; there: it shapes the gradient alone;
    - a patch that is off attends to itself alone; there: to the patches that are on, so that its gate learns what it
      would have gained;
    - usage losses are absolute values for heads and sub-layers, sub-layers that are off left out of the count of heads;
      there: squares of what is over or under the target, patches counted without the class token;
    - there is no loss on executed MACs;
    - stochastic depth does not act in a block with a sub-layer policy; there: in every block;
    - `heads_take="identity"` has no effect beside patch policies in training.
    """

    method: ClassVar[str] = "adavit_released"
    title: ClassVar[str] = "AdaViT as released"
    role: ClassVar[Role] = "released"

    macs_target: Annotated[float | None, In("(0, 1]", "the share of the dense MACs")] = None
    """None: there is no such loss."""
    attention_mask: Literal["keys", "keys with gradient", "after softmax"] = "keys"
    """In training patches that are off are hidden before the softmax, with or without a gradient through the mask, or
    after it. Evaluation hides them before."""
    mlp_gradient: bool = True
    """The gates of patches learn from the MLP too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.macs_target is not None:
            raise ValueError(
                f"ReleasedAdaViTConfig.macs_target must be None, got {self.macs_target}: it has no such loss"
            )

    def build(self, vit: nn.Module) -> "ReleasedAdaViT":
        """Wrap `vit`, sharing its weights, with policies that have yet to be trained."""
        return ReleasedAdaViT(vit, self)


class ReleasedAdaViT(AdaViT):
    """A ViT with policies that are trained as the released code does."""

    def trains_otherwise(self, block: int) -> dict[str, Any]:
        decides = "sublayers" in self.config.policies and block >= self.config.first_block
        return {"attend": partial(attend, self.config), "drop_path": not decides}

    def decision(self, logits: Tensor, threshold: float) -> Tensor:
        # without noise the temperature acts all the same
        noise = self.config.noise * gumbel_difference(logits) if self.training else None
        return gate(logits, threshold, self.config.temperature, noise)

    def gates(self, policies: Policies) -> Gates:
        gates = super().gates(policies)
        if gates.mlp_tokens is None or self.config.mlp_gradient:
            return gates
        return replace(gates, mlp_tokens=gates.mlp_tokens.detach())

    def usage_means(self, policies: Policies, first: tuple[int, int, int]) -> dict[str, Tensor]:
        return usage_terms(policies, self.config, first)

    def usage_terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        return means


def gate(logits: Tensor, threshold: float, temperature: float, noise: Tensor | None) -> Tensor:
    """The released gate: the temperature divides what is compared with the threshold, in training alone."""
    soft = torch.sigmoid(logits if noise is None else (logits + noise) / temperature)
    return straight_through(soft > threshold, soft)


def attend(config: ReleasedAdaViTConfig, q: Tensor, k: Tensor, v: Tensor, gates: Gates, drop: float) -> Tensor:
    """The released attention in training: a patch that is off attends to itself alone."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    tokens, identity = gates.attention_tokens, torch.eye(q.shape[-2], dtype=q.dtype, device=q.device)
    weights = logits.softmax(dim=-1)
    if config.heads_take == "identity" and gates.heads is not None:
        heads = gates.heads[:, :, None, None]
        weights = heads * weights + (1 - heads) * identity
    if tokens is not None:
        pairs = (tokens[:, :, None] * tokens[:, None, :])[:, None]
        if config.attention_mask != "keys with gradient":
            pairs = pairs.detach()
        if config.attention_mask == "after softmax":
            weights = normalize(weights * pairs, p=1.0, dim=-1)
        else:
            hidden = (pairs == 0) & (identity == 0)
            weights = (logits * pairs).masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return (dropout(weights, drop) @ v).transpose(1, 2)


def usage_terms(policies: Policies, config: ReleasedAdaViTConfig, first: tuple[int, int, int]) -> dict[str, Tensor]:
    """The released usage losses, not weighted; arguments as the clean ones take."""
    patches, heads, sublayers = (
        t[:, start:] for t, start in zip((policies.patches, policies.heads, policies.sublayers), first, strict=True)
    )
    wanted_patches, wanted_heads, wanted_sublayers = config.usage_targets
    least_patches, least_heads, least_sublayers = config.minimums
    weigh_patches, weigh_heads, weigh_sublayers = config.minimum_weights
    extra = (config.diversity_weight, config.entropy_weight)
    terms = {}
    if "patches" in config.policies:
        classes = torch.ones_like(patches[..., :1])
        terms["patches"] = token_loss(torch.cat([classes, patches], 2), wanted_patches, least_patches, weigh_patches)
    if "heads" in config.policies:
        on = sublayers if "sublayers" in config.policies else torch.ones_like(sublayers)
        assert policies.head_logits is not None
        terms["heads"] = head_loss(heads, on, policies.head_logits, wanted_heads, *extra, least_heads, weigh_heads)
    if "sublayers" in config.policies:
        assert policies.sublayer_logits is not None
        terms["sublayers"] = layer_loss(
            sublayers, policies.sublayer_logits, wanted_sublayers, *extra, least_sublayers, weigh_sublayers
        )
    return terms


def token_loss(tokens: Tensor, target: float, least: float, weight: float) -> Tensor:
    """Of decisions over tokens (B, L, N), the class token's included."""
    own = tokens.mean(dim=2)
    return (tokens.mean() - target) ** 2 + weight * (least - own).clamp(min=0).sum()


def head_loss(
    heads: Tensor,
    sublayers: Tensor,
    logits: Tensor,
    target: float,
    diversity: float,
    entropy_weight: float,
    least: float,
    weight: float,
) -> Tensor:
    """Of decisions over heads (B, L, H), counted where a sub-layer of (B, L, 2) is on."""
    active = (sublayers.detach().sum(dim=2, keepdim=True) > 0).to(heads.dtype).expand_as(heads)
    own = (heads * active).sum(dim=0) / (active.sum(dim=0) + 1e-6)
    used = (heads * active).sum() / (active.sum() + 1e-6)
    loss = (used - target).abs() + diversity * (own - target).abs().mean()
    return loss - entropy_weight * entropy(logits) + weight * (least - own).clamp(min=0).sum()


def layer_loss(
    sublayers: Tensor,
    logits: Tensor,
    target: float,
    diversity: float,
    entropy_weight: float,
    least: float,
    weight: float,
) -> Tensor:
    """Of decisions over sub-layers (B, L, 2)."""
    spread = (sublayers.mean(dim=(0, 2)) - target).abs().mean()
    loss = (sublayers.mean() - target).abs() + diversity * spread
    return loss - entropy_weight * entropy(logits) + weight * (least - sublayers.mean(dim=0)).clamp(min=0).sum()


def distillation(
    attention: tuple[Tensor, Tensor],
    hidden: tuple[Tensor, Tensor],
    logits: tuple[Tensor, Tensor],
    policies: Policies,
    temperature: float = 5.0,
) -> dict[str, Tensor]:
    """Losses towards a teacher, not weighted. Nothing in the released code reaches them; adaptvit has `Recipe.teacher`.

    Args:
        attention, hidden, logits: the student's and the teacher's: weights (B, L, H, N, N), of which the class token's
            row counts; tokens after each block (B, L, N, D), of which the class token counts; (B, classes).
        policies: the student's. What is off counts nothing.
        temperature: divides both logits.
    """
    attending, mlp = policies.sublayers.unbind(dim=2)
    rows, classes = ((student - teacher)[..., 0, :] for student, teacher in (attention, hidden))
    moved = rows.abs().sum(dim=-1) * policies.heads * attending[..., None]  # (B, L, H)
    student, teacher = (t / temperature for t in logits)
    return {
        "attention": moved.mean(dim=(0, 2)).sum(),
        "hidden": (classes.square() * mlp[..., None]).mean(dim=(0, 2)).sum(),
        "prediction": cross_entropy(student, teacher.softmax(dim=-1)),
    }


def published_gmacs(policies: Policies, dim: int, mlp_ratio: float, base: float) -> Tensor:
    """GMACs an image by the tables that the released code counts with, (B,): for comparison with the paper alone.

    They are for 197 tokens and heads of 64 channels; others are counted by the same rule. Beside what any count leaves
    out they leave out the policies and a part of the attention's output projection, take a block without heads as free,
    and count 5 for each element that layer norm reads.

    Args:
        policies: decisions on the patches, 196 of them in the tables.
        base: GMACs of stem, head and final norm: 0.06 for DeiT, 0.33 for T2T-ViT.
    """
    slots, heads = policies.patches.shape[2] + 1, policies.heads.shape[2]
    tokens = in_float64(policies.patches.sum(dim=2) + 1)
    kept = in_float64((tokens.float() / slots * slots).trunc())  # the rounding is the table's
    width = float(dim // heads) * policies.heads.sum(dim=2)
    attention, mlp = in_float64(policies.sublayers).unbind(dim=2)
    norm, hidden = 5.0 * slots * dim, dim * mlp_ratio
    products = 3 * kept * dim * width + 2 * kept**2 * width + kept * width**2
    blocks = norm + attention * (norm + products) + mlp * kept * (width * hidden + hidden * dim)
    return base + (blocks * (width > 0) * (tokens > 0)).sum(dim=1) / 1e9
