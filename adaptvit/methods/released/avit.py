"""A-ViT as its released code trains it: its losses and gradients, which the paper's algorithm does not have."""

from collections.abc import Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn, xlogy
from torch.nn.functional import scaled_dot_product_attention

from adaptvit.backbones.door import Acts, Projected
from adaptvit.backbones.families import FAMILIES
from adaptvit.backbones.split import attention, chain
from adaptvit.methods.avit import AViT, AViTConfig, each
from adaptvit.methods.base import Role
from adaptvit.methods.priors import released_target
from adaptvit.model import Left
from adaptvit.tokens import Masked, Packed, Tokens
from adaptvit.usage import Usage

HIDDEN = -1000.0
"""Added to the attention logits of halted keys."""


@dataclass(frozen=True, kw_only=True)
class ReleasedAViTConfig(AViTConfig):
    """A-ViT (Yin et al., CVPR 2022) as its released code trains it; logits and halting depths are `AViTConfig`'s.

    Differs from it:

    - the distribution loss averages scores over all tokens of images 2..B only, halted tokens adding the scores of
      all-zero inputs, NaN (and skipped) at batch 1; there: over patch tokens of all images, halted ones counting 0;
    - the last block's score is its raw sigmoid; there: it counts as 1, as in the output;
    - the target sums to 3.26 and exists for 12 blocks only; there: it is a distribution over 1..L;
    - the divergence is divided by L, probabilities clamped to [0.01, 0.99]; there: it is a sum over blocks, a block's
      share being 0.001 or more;
    - the ponder loss averages over all tokens; there: over patch tokens;
    - gradients pass straight through halted tokens, by way of those spurious scores; there: none does.
    """

    method: ClassVar[str] = "avit_released"
    title: ClassVar[str] = "A-ViT as released"
    role: ClassVar[Role] = "released"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence != AViTConfig.divergence:
            raise ValueError(
                f"ReleasedAViTConfig.divergence is the released one, got {self.divergence!r}: leave it out"
            )
        for depth in each(self.prior_depth):
            if depth < 2 or depth % 1:
                raise ValueError(
                    f"ReleasedAViTConfig.prior_depth must be a whole block from the second on, got {depth}"
                )

    @property
    def needs(self) -> Set[str]:
        return super().needs | {"attention", "token norms", "named parts"}

    def build(self, vit: nn.Module) -> "ReleasedAViT":
        """Wrap `vit`, sharing its weights; no parameter is added."""
        return ReleasedAViT(vit, self)


class ReleasedAViT(AViT):
    """A ViT whose tokens halt, with the released losses and gradients."""

    def target(self, name: str, peak: float, scale: float) -> Tensor:
        return released_target(name, self.depth, int(peak), scale)

    def usual_layout(self, early_exit: bool | None = None, **options: Any) -> type[Tokens]:
        """`Packed` where images may leave early; else `Masked`, since the losses read dead slots."""
        return Packed if (not self.training if early_exit is None else early_exit) else Masked

    def run(self, tokens: Tokens, early_exit: bool | None = None) -> Left:
        """As `AViT` where images may leave early; else every slot in every block, with the released losses.

        Raises:
            ValueError: the losses asked of `Packed`.
        """
        early_exit = not self.training if early_exit is None else early_exit
        if early_exit:
            return super().run(tokens, early_exit)
        if not isinstance(tokens, Masked):
            raise ValueError("ReleasedAViTConfig reads dead slots in its losses: use layout=Masked or early_exit=True")
        tokens.source.check_alike("A-ViT's released pass")
        return released_pass(self, tokens)


def released_pass(model: ReleasedAViT, tokens: Masked) -> Left:
    """The full pass, every slot in every block, with the released losses."""
    x = tokens.x
    live = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    total = torch.zeros(live.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    rho, output = total, total.new_zeros(())
    reading = torch.arange(live.shape[1], device=x.device) < (model.read or live.shape[1])
    lives, scores = [], []
    for number in range(model.depth):
        last = number == model.depth - 1
        x = model.run_body(number, replace(tokens, x=x, mask=live), partial(run_block, number)).x
        tokens = replace(tokens, x=x, mask=live)
        raw = model.halting_score(x, total.dtype)
        score = torch.ones_like(raw) if last else raw
        if model.config.class_token == "stays" and not last:
            score = score.masked_fill(reading, 0)
        reached = live & (total + score > 1 - model.config.epsilon)
        going = live & (total + score < 1 - model.config.epsilon)
        remainder = (1 - total) * reached
        output = output + model.read_out(tokens, remainder + score * going)
        rho = rho + live + remainder
        total = total + score
        lives.append(live)
        scores.append(raw)
        live = going
    depth = torch.stack(lives).sum(dim=0)
    usage = Usage.of_depth(depth, model.heads, tokens.source.grid, model.prefix)
    done = model.finish(output.to(x.dtype), usage)
    return done._replace(terms=terms(model, torch.stack(scores), rho))


def run_block(number: int, block: Any, tokens: Tokens) -> Tokens:
    """One block with halted tokens set to 0, in value only: their gradient passes straight through."""
    parts = FAMILIES.parts_of(block)
    assert parts is not None
    x = tokens.x
    alive = tokens.live[..., None].to(x.dtype)
    x = x + (alive * x - x).detach()
    normed = alive * chain(block, parts.into_attention, alive * x, tokens)
    branch, _ = attention(block, parts, tokens, normed, Acts(attend=partial(_attend, alive)), number)
    x = x + chain(block, parts.out_of_attention, branch, tokens)
    read = alive * chain(block, parts.into_mlp, alive * x, tokens)
    return tokens.with_x(x + chain(block, (*parts.mlp, *parts.out_of_mlp), read, tokens))


def _attend(alive: Tensor, projected: Projected, dropout: float) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in projected[:3])
    mask = HIDDEN * (1 - alive).transpose(1, 2)[:, None]
    if projected.pairs is not None:
        mask = mask + projected.pairs
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2)


def terms(model: ReleasedAViT, scores: Tensor, rho: Tensor) -> dict[str, Tensor]:
    """Ponder loss over all tokens; distribution loss over images 2..B, left out where it is NaN or not positive."""
    ponder = {"ponder": model.config.ponder_weight * rho.mean()}
    mean_scores = scores[:, 1:].flatten(1).mean(dim=1)
    model_distribution = (mean_scores / mean_scores.sum()).clamp(0.01, 0.99)
    goal = model.prior.to(scores.dtype)
    prior = model.config.prior_weight * (xlogy(goal, goal) - goal * model_distribution.log()).mean()
    return ponder | {"prior": prior} if prior > 0 else ponder
