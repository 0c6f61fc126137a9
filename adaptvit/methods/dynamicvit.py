"""DynamicViT: small predictors drop patches in a few stages, learned with straight-through masks.

Rao, Zhao, Liu, Lu, Zhou, Hsieh: DynamicViT: Efficient Vision Transformers with Dynamic Token
Sparsification, NeurIPS 2021.

Letters: B images, N token slots (prefix tokens first, then P patches), L blocks, S stages, D channels, H heads.
Symbols of the paper: pi probability of keeping a patch, rho keep ratio.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, kl_div, log_softmax, logsigmoid

from adaptvit.backbones.base import model_name
from adaptvit.backbones.door import Projected
from adaptvit.backbones.forward import final_norm
from adaptvit.budget import BATCH, meet_target
from adaptvit.checks import Ascending, In, check_fields
from adaptvit.methods.base import MethodConfig, Named, Published, around_deits
from adaptvit.methods.gates import gumbel_difference, log_odds, straight_through
from adaptvit.methods.regression import SPREAD, Regression, importance, read_by_block
from adaptvit.model import AdaptiveViT, Knob, Left
from adaptvit.process import in_float64
from adaptvit.tokens import Dense, Masked, Packed, Slab, Tokens, fused, kernels
from adaptvit.usage import Usage, check_finite

FAR, HALVINGS = 40.0, 32
"""How far from its log-odds the number lies, at most, that an image's are less, and in how many steps it is found;
as far under them lies a threshold of 0."""
ABOUT = " with predictors: published with weights."
NAMES = around_deits("dynamicvit", dict.fromkeys(("small", "base"), ABOUT)) | {
    "dynamicvit_256_patch16_224": Named(
        inside="deit_tiny_patch16_224",
        about=f"DeiT-256 (256 channels, 12 blocks, 4 heads){ABOUT}",
        arguments={"embed_dim": 256, "num_heads": 4},
    )
}


def our_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released file's tensors, among which the predictors are named as ours."""
    return {f"method.{key}" if key.startswith("score_predictor.") else key: value for key, value in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class DynamicViTConfig(MethodConfig):
    """Dynamic token sparsification (Rao et al., NeurIPS 2021). Defaults are those of the released DeiT-S.

    Differs from the released code in evaluation: counts follow the number of patches, 196 or not; at least one patch is
    kept; and `select="threshold"` is ours. In training `top-k` draws as many patches as are asked for, on average, from
    the first step (`levelled`), where the published ratio loss takes many epochs to, and `threshold` draws by its
    threshold, which a training steers; of the task a predictor learns which patches to keep, not how many. How that
    code trains is `adaptvit.methods.released.ReleasedDynamicViTConfig`, which lists what differs.
    """

    method: ClassVar[str] = "dynamicvit"
    title: ClassVar[str] = "DynamicViT"
    needs: ClassVar[Set[str]] = frozenset({"attention", "token norms"})
    published: ClassVar[Published] = Published(names=NAMES, untold=("keep_rate",), our_tensors=our_tensors)

    blocks: Annotated[Sequence[int] | None, Ascending()] = None
    """The blocks that patches are dropped before, 0-based; None is one after each quarter of the depth, as released: 3,
    6 and 9 of 12."""
    keep_rate: Annotated[float | Sequence[float], In("(0, 1]")] = 0.7
    """rho, in (0, 1]: stage s, counted from 1, keeps the share rho ** s of all patches. Several: the share of all
    patches that each stage keeps, not growing; they are steered by `rate`."""
    select: Literal["top-k", "threshold"] = "top-k"
    """`top-k`: in evaluation every image keeps as many patches, those of the largest pi; in training each is asked for
    its share. `threshold`: each keeps those whose pi is above `threshold`; in training the batch is asked for the
    share, so that images may differ (the released code's `dynamic`)."""
    threshold: Annotated[float, In("[0, 1)")] = 0.5
    """pi above which a patch is kept, in [0, 1), with `select="threshold"`; in training, with noise. The patch of an
    image that has the largest pi always is. The ratio loss asks for the shares of `keep_rate` at this threshold."""
    rate: Annotated[float, In("[0, 1e9]")] = 1.0
    """The shares asked for are taken times this, up to all patches: the one number by which a list of them is steered
    to a budget."""
    ratio_weight: Annotated[float, In("[0, inf)")] = 2.0
    """Weight of the squared distance of the share kept from the share asked for, a mean over stages; 5 for DeiT-B."""
    token_weight: Annotated[float, In("[0, inf)")] = 0.5
    """Weight of the distance to a teacher's patches, where there is a teacher; 0 leaves them out."""
    token_loss: Literal["mse", "kl"] = "mse"
    """That distance: `mse` as released for DeiT, `kl` of the softmax over channels as for LV-ViT."""

    @property
    def knob(self) -> Knob:
        """`threshold` where it decides, else `keep_rate`, or `rate` where that is several."""
        if self.select == "threshold":
            return Knob("threshold", sign=-1, lowest=0.0, highest=0.9999, step=0.05)
        if isinstance(self.keep_rate, Sequence):
            return Knob("rate", sign=1, lowest=0.0, highest=min(1e9, 1 / min(self.keep_rate)), step=0.05)
        return Knob("keep_rate", sign=1, lowest=0.01, highest=1.0, step=0.05)

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.keep_rate, Sequence) and any(b > a for a, b in pairwise(self.keep_rate)):
            raise ValueError(f"{type(self).__name__}.keep_rate must not grow from stage to stage, got {self.keep_rate}")

    def build(self, vit: nn.Module) -> "DynamicViT":
        """Wrap `vit`, sharing its weights, with predictors that have yet to be trained.

        Raises:
            TypeError: the ViT is not one that this library reproduces.
            ValueError: `blocks` names a block that the ViT lacks, `keep_rate` has another length, or the channels are
                no multiple of 4.
        """
        return DynamicViT(vit, self)

    def fitted(self, vit: nn.Module, images: Tensor, target: float, **search: Any) -> AdaptiveViT:
        """The model with predictors that are fitted to the weights, at keep rates that meet the target.

        Raises:
            ValueError: what `fit_predictors` raises.
        """
        counted = replace(self, select="top-k").build(vit).eval()
        meet_target(counted, images, target, **{**search, "tell": None})  # by numbers kept, whichever they are
        fit_predictors(counted, images)
        if self.select == "top-k":
            return counted
        model = replace(counted.config, select=self.select).build(vit).eval()
        model.score_predictor.load_state_dict(counted.score_predictor.state_dict())
        return model


class Predictor(nn.Module):
    """Features of patches -> logits of keeping and of dropping each."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)

    def forward(self, tokens: Tokens, prefix: int, kept: Tensor | None = None) -> Tensor:
        """Log-odds of keeping each token, the logits' difference: token features, in float32 or wider.

        Args:
            prefix: leading slots that are no patches; what they get has no meaning.
            kept: (B, P) mask of the patches, with gradients; None is those that are live.
        """
        keep, drop = self.logits(tokens, prefix, kept).unbind(dim=-1)
        return keep.to(torch.promote_types(keep.dtype, torch.float32)) - drop

    def logits(self, tokens: Tokens, prefix: int, kept: Tensor | None = None) -> Tensor:
        """Those of keeping and dropping each token, features (..., 2), as `forward` takes them."""
        seen: Tensor = self.in_conv(tokens.x)
        if kept is None and isinstance(tokens, Dense | Slab) and kernels.fuses(seen):
            return self.out_conv(tokens.with_mean(seen, prefix))
        local, shared = seen.chunk(2, dim=-1)
        patches = tokens.rows(shared)[:, prefix:]
        if kept is not None:
            mean = (patches * kept[..., None]).sum(dim=1) / kept.sum(dim=1, keepdim=True)
        elif isinstance(tokens, Dense):  # whose rows all hold a token
            mean = patches.sum(dim=1) / patches.shape[1]
        else:
            mean = patches.sum(dim=1) / tokens.live[:, prefix:].sum(dim=1, keepdim=True)
        return self.out_conv(torch.cat([local, tokens.spread(mean[:, None]).expand_as(local)], dim=-1).to(local.dtype))

    @torch.no_grad()
    def begin_with(self, weights: Tensor, constant: Tensor) -> None:
        """Make the log-odds a linear map of normed features, (D,), by two units a layer: GELU(z) - GELU(-z) = z.

        The other units stay as they are, and add nothing until the last layer learns to read them.
        """
        sign = weights.new_tensor([1.0, -1.0])
        first, *between, last = (part for part in self.modules() if isinstance(part, nn.Linear))
        first.weight[:2], first.bias[:2] = sign[:, None] * weights, sign * constant
        for part in between:
            part.weight[:2], part.bias[:2] = 0, 0
            part.weight[:2, :2] = sign[:, None] * sign
        last.weight[:], last.bias[:] = 0, 0
        last.weight[:, :2] = sign[:, None] * sign / 2

    @staticmethod
    def macs(dim: int) -> int:
        """MACs for one token."""
        return dim * dim + dim * (dim // 2) + (dim // 2) * (dim // 4) + (dim // 4) * 2


class DynamicViT(AdaptiveViT):
    """A ViT with predictors.

    Attributes:
        stages: the blocks that patches are dropped before.
        score_predictor: a predictor for each, under the released names.
    """

    epsilon: ClassVar[float] = 0.0
    """Added to every weight of the masked softmax, in all blocks, while training."""

    def __init__(self, vit: nn.Module, config: DynamicViTConfig) -> None:
        super().__init__(vit, config)
        quarters = {self.depth * quarter // 4 for quarter in (1, 2, 3)} - {0}
        self.stages = tuple(sorted(quarters)) if config.blocks is None else tuple(config.blocks)
        name, dim = model_name(vit), self.shape.dim
        beyond = [block for block in self.stages if block >= self.depth]
        if beyond:
            raise ValueError(
                f"{type(config).__name__}.blocks names block {beyond[0]}, but {name} has blocks 0..{self.depth - 1}"
            )
        if not self.stages:
            raise ValueError(
                f"{name} has {self.depth} block, too few for a stage after a quarter: set DynamicViTConfig.blocks"
            )
        rates = config.keep_rate
        if isinstance(rates, Sequence) and len(rates) != len(self.stages):
            stages = f"{len(self.stages)} stages, before blocks {self.stages}"
            raise ValueError(f"{type(config).__name__}.keep_rate has {len(rates)} numbers, but {name} has {stages}")
        if dim % 4:
            raise ValueError(f"{name} has {dim} channels, but DynamicViT's predictors need a multiple of 4")
        self.score_predictor = nn.ModuleList(Predictor(dim) for _ in self.stages).to(next(vit.parameters()))
        self.score_predictor.train(vit.training)

    @property
    def learns_patches(self) -> bool:
        return self.config.token_weight > 0

    @property
    def even(self) -> bool:
        return self.config.select == "top-k" and not self.training

    def usual_layout(self, **options: Any) -> type[Tokens]:
        """`Masked` in training, whose masks pass gradients, and `Packed` in evaluation."""
        return Masked if self.training else Packed

    def run(self, tokens: Tokens, teacher: Tensor | None = None) -> Left:
        """The blocks.

        Args:
            teacher: in training, a teacher's patches for the same images, (B, P, D), after its last norm.
        Raises:
            ValueError: another layout than `Masked` in training, a teacher in evaluation or of another shape.
        """
        if self.training:
            if not isinstance(tokens, Masked):
                raise ValueError("DynamicViT trains with layout=Masked: its masks learn from the patches they drop")
            return self._train(tokens, teacher)
        if teacher is not None:
            raise ValueError("DynamicViT takes a teacher's patches in training only: call train() first")
        grid = tokens.source.grid
        stages, sums = {0: tokens.bare}, list[Tensor]()
        for number in range(self.depth):
            if number in self.stages:
                stage = self.stages.index(number)
                predictor: Any = self.score_predictor[stage]
                if self._is_fused(tokens):
                    tokens, total = self.drop_fused(tokens, predictor.logits(tokens, self.prefix), stage)
                else:
                    score = predictor(tokens, self.prefix)
                    total = tokens.rows(score).sum(dim=1, keepdim=True)
                    tokens = self.drop(tokens, score, stage)
                sums.append(total)
                stages[number] = tokens.bare
            tokens = self.run_block(number, tokens)
        # the patches of an image may not be finite, and so not to be told apart
        sound = torch.cat(sums, dim=1).isfinite().all(dim=1, keepdim=True)
        usage = partial(self.usage_of, stages, grid, tokens.source.own)
        live = None if isinstance(tokens, Dense) and self.read is not None else tokens.live
        return self.finish(self.read_slots(tokens, tokens.x), usage, live, sound=sound)

    def usage_of(self, stages: dict[int, Tokens], grid: tuple[int, ...], own: Tensor | None) -> Usage:
        """The record, from the tokens that entered the first block and those before which some were dropped."""
        depth = torch.zeros(stages[0].shape, dtype=torch.long, device=stages[0].x.device)
        for tokens, until in zip(stages.values(), [*list(stages)[1:], self.depth], strict=True):
            tokens.stamp(depth, until)
        return self.usage(depth, grid, own)

    def drop(self, tokens: Tokens, score: Tensor, stage: int) -> Tokens:
        """What a stage keeps in evaluation, by the log-odds of its predictor, token features."""
        config, prefix = self.config, self.prefix
        if config.select == "top-k":
            if tokens.source.own is not None:
                return self.drop_of_each(tokens, score, tokens.source.own, stage)
            rows = tokens.rows(score)
            if not isinstance(tokens, Dense):  # whose rows all hold a token
                rows = rows.masked_fill(~tokens.rows(tokens.spread(tokens.live)), -torch.inf)
            rows, count = rows[:, prefix:], self.count(stage, tokens.shape[1] - prefix)
            if count >= rows.shape[1]:
                return tokens
            best = rows.topk(count, dim=1).indices.sort(dim=1).values + prefix
            first = torch.arange(prefix, device=score.device).expand(best.shape[0], -1)
            return tokens.take(torch.cat([first, best], dim=1))
        live, score = tokens.live[:, prefix:], tokens.grid(score)[:, prefix:]
        chosen = above(score, config.threshold, live)
        return tokens.keep(torch.cat([torch.ones_like(tokens.live[:, :prefix]), chosen], dim=1))

    def _is_fused(self, tokens: Tokens) -> TypeGuard[Dense | Slab]:
        """Whether a device decides in a kernel."""
        fits = isinstance(tokens, Dense if self.config.select == "top-k" else Slab)
        return fits and tokens.source.own is None and kernels.fuses(tokens.x)

    def drop_fused(self, tokens: Dense | Slab, logits: Tensor, stage: int) -> tuple[Tokens, Tensor]:
        """`drop` in a kernel or two, by what `Predictor.logits` gave, and the sum of each image's log-odds, (B, 1)."""
        if isinstance(tokens, Dense):
            count = self.count(stage, tokens.shape[1] - self.prefix)
            kept, _, total = tokens.best(logits, min(count, tokens.x.shape[1] - self.prefix), self.prefix, False)
            return kept, total
        chosen, total = fused.above(
            logits, tokens.slots, tokens.offsets, tokens.shape[1], self.prefix, _logarithm(self.config.threshold)
        )
        return tokens.keep(chosen), total

    def drop_of_each(self, tokens: Tokens, score: Tensor, patches: Tensor, stage: int) -> Tokens:
        """What a stage keeps of images with so many patches at first, (B, 1): of each the share that is asked for."""
        live, score = tokens.live, tokens.grid(score)
        rank = score.masked_fill(~live, -torch.inf)[:, self.prefix :].argsort(dim=1, descending=True).argsort(dim=1)
        counts = [[self.count(stage, count)] for count in patches.flatten().tolist()]
        chosen = rank < torch.tensor(counts, device=rank.device)
        return tokens.keep(torch.cat([live[:, : self.prefix], chosen], dim=1))

    def count(self, stage: int, patches: int) -> int:
        """Patches that a stage keeps, of so many at first."""
        return max(1, int(patches * self.shares[stage]))

    @property
    def shares(self) -> tuple[float, ...]:
        """Of all patches, what each stage is asked to keep."""
        rho, rate = self.config.keep_rate, self.config.rate
        several = rho if isinstance(rho, Sequence) else [rho ** (stage + 1) for stage in range(len(self.stages))]
        return tuple(min(1.0, rate * share) for share in several)

    def usage(self, depth: Tensor, grid: tuple[int, ...], own: Tensor | None = None) -> Usage:
        """The record, from the last block, 1-based, that each slot's token entered: (B, N).

        Args:
            own: (B, 1), patches of each image; None is all slots.
        """
        usage = Usage.of_depth(depth, self.heads, grid, self.prefix, self.read)
        before = usage.attended.roll(1, dims=1)  # what a predictor reads is what the block before left
        before[:, 0] = depth.shape[1] if own is None else own[:, 0] + self.prefix
        scoring = torch.tensor([block in self.stages for block in range(self.depth)], device=depth.device)
        return replace(usage, deciding=scoring * before * Predictor.macs(self.shape.dim))

    def _train(self, tokens: Tokens, teacher: Tensor | None) -> Left:
        """Every token through every block, those dropped hidden from the others."""
        grid = tokens.source.grid
        if self.epsilon:
            tokens.source.check_alike("DynamicViT, trained as released,")
        ones = torch.ones_like(tokens.x[..., 0], dtype=torch.promote_types(tokens.x.dtype, torch.float32))
        prefix, kept = ones.split([self.prefix, tokens.shape[1] - self.prefix], dim=1)
        if tokens.at_first is not None:
            kept = kept * tokens.at_first[:, self.prefix :]
        counted = kept  # the same, with the gradients of how many are kept
        decided: list[Tensor] = []
        policy = None
        depth = self.deepest(tokens)
        for number in range(self.depth):
            if number in self.stages:
                predictor, before = self.score_predictor[len(decided)], kept > 0
                score = predictor(tokens, self.prefix, kept)[:, self.prefix :]
                score = self.as_asked(score, before, len(decided), tokens.source.own)
                noise = gumbel_difference(score)
                on = self.kept_of(score + noise, before)
                kept = kept * straight_through(on, (self.compared(score, before) + noise).sigmoid())
                counted = counted * straight_through(on, (score + noise).sigmoid())
                depth[:, self.prefix :].masked_fill_(before & ~on, number)
                decided.append(counted)
                policy = torch.cat([prefix, kept], dim=1)
            if policy is None and not self.epsilon:
                tokens = self.run_block(number, tokens, every=True)
            else:
                seen = torch.cat([prefix, kept], dim=1) if policy is None else policy
                attend = partial(_attend, seen, self.epsilon)
                tokens = self.run_block(number, tokens, every=True, attend=attend, live=seen > 0)
        alive = torch.cat([prefix, kept], dim=1) > 0
        means = self.shares_kept(decided, tokens.source.own)
        if teacher is not None:
            student = final_norm(self.vit, tokens.x)[:, self.prefix :]
            if teacher.shape != student.shape:
                raise ValueError(
                    f"the teacher's patches have shape {tuple(teacher.shape)}, but the student's "
                    f"{tuple(student.shape)}: with token_weight=0 it learns its logits alone"
                )
            means["tokens"] = token_loss(student, teacher, kept, self.config.token_loss)
        usage = partial(self.usage, depth, grid, tokens.source.own)
        return self.finish(self.read_slots(tokens, tokens.x), usage, alive, means)

    def as_asked(self, score: Tensor, live: Tensor, stage: int, patches: Tensor | None) -> Tensor:
        """Log-odds by which a stage draws in training, from those of its predictor, (B, P).

        Args:
            patches: (B, 1), how many each image has; None is P.
        """
        if self.config.select == "threshold":
            threshold = self.config.threshold
            return score - (log_odds(threshold) if threshold else -FAR)
        return levelled(score, live, self.shares[stage] * (score.shape[1] if patches is None else patches))

    def compared(self, score: Tensor, live: Tensor) -> Tensor:
        """The same log-odds, by which patches are hidden: how many are kept is for the ratio loss and the knob alone,
        and attention's gradients, for which all patches would be kept, tell only which."""
        return unmoved(score, live, dim=(0, 1)) if self.config.select == "threshold" else score

    def kept_of(self, drawn: Tensor, live: Tensor) -> Tensor:
        """The patches that are kept in training, (B, P) bool, by log-odds with noise, of those that are live."""
        return above(drawn, 0.5, live)

    def shares_kept(self, decided: list[Tensor], patches: Tensor | None = None) -> dict[str, Tensor]:
        """What the ratio loss is made of: `ratio`, squared distances, where each image is asked for its share;
        `shares`, (S,), those kept by each stage, where the batch is.

        Args:
            decided: (B, P) 0 or 1 of each stage, with gradients.
            patches: (B, 1), how many each image has; None is P.
        """
        shares = torch.stack([kept.mean(dim=1) for kept in decided], dim=1)
        if patches is not None:
            shares = shares * (decided[0].shape[1] / patches)
        return {"ratio": self.distance(shares)} if self.config.select == "top-k" else {"shares": shares.mean(dim=0)}

    def distance(self, shares: Tensor) -> Tensor:
        """Squared distance of shares kept, (..., S), from those asked for, mean over stages."""
        asked = torch.tensor(self.shares[: shares.shape[-1]], dtype=shares.dtype, device=shares.device)
        return (shares - asked).square().mean()

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """The ratio loss, and the distance to a teacher's patches where there is one, weighted; none in evaluation."""
        if not means:
            return {}
        ratio = means["ratio"] if "ratio" in means else self.distance(means["shares"])
        terms = {"ratio": self.config.ratio_weight * ratio}
        if "tokens" in means:
            terms["tokens"] = self.config.token_weight * means["tokens"]
        return terms


@torch.inference_mode()
def fit_predictors(model: DynamicViT, images: Tensor) -> float:
    """Set a `top-k` model's predictors, in place, from what the ViT does with calibration images.

    Predictors that start at random drop patches at random, and what the ViT unlearns meanwhile a short training does
    not win back. So stage by stage, on what the stages before it keep, a predictor begins with the linear map of a
    patch's features that tells best, by linear regression, how much the class token of the dense ViT reads of the patch
    from there on. Log-odds of 0 are where the stage keeps its share of all images' patches.

    Args:
        model: in evaluation mode, its keep rates those that it is to run with.
        images: (B, channels, height, width), as the model takes them; a few hundred will do.
    Returns:
        The share of the squares of the patches' importance that the maps explain, mean over stages.
    Raises:
        ValueError: attention that is not finite or tells no patch from another.
    """
    batches = [model.enter(batch, Masked) for batch in images.split(BATCH)]
    read = torch.cat([read_by_block(model, tokens) for tokens in batches])
    check_finite(read, "attention weights")
    explained = list[Tensor]()
    for number in range(model.stages[-1] + 1):
        if number in model.stages:
            stage = len(explained)
            wanted = importance(in_float64(read[:, number:]).mean(dim=1)).split(BATCH)
            predictor: nn.Module = model.score_predictor[stage]
            assert isinstance(predictor, Predictor)
            explained.append(_fit(predictor, model.prefix, batches, wanted, model.shares[stage]))
            batches = [model.drop(tokens, predictor(tokens, model.prefix), stage) for tokens in batches]
        batches = [model.run_block(number, tokens) for tokens in batches]
    return torch.stack(explained).mean().item()


def _fit(
    predictor: Predictor, prefix: int, batches: Sequence[Tokens], wanted: Sequence[Tensor], share: float
) -> Tensor:
    """Fit one predictor so that it keeps a share of all patches; the share of the squares that it explains."""
    norm, size = predictor.in_conv[0], batches[0].x.shape[-1]
    regression = Regression(size, wanted[0].device)
    lives = [tokens.live[:, prefix:] for tokens in batches]
    features = [norm(tokens.x[:, prefix:])[live] for tokens, live in zip(batches, lives, strict=True)]
    for x, matters, live in zip(features, wanted, lives, strict=True):
        regression.add(x, matters[live])
    weights, _, explained = regression.solve()
    score = SPREAD * torch.cat([in_float64(x) @ weights for x in features])
    gone = 1 - share * torch.cat(lives).numel() / len(score)  # of those that are left
    predictor.begin_with(SPREAD * weights, -score.quantile(max(0.0, gone)))
    return explained


def levelled(score: Tensor, live: Tensor, count: Tensor | float) -> Tensor:
    """Log-odds less one number an image, so that `count` of its patches are kept on average.

    The number has a gradient: what would keep more patches of an image altogether, which it undoes, is not learned.

    Args:
        score: log-odds, (B, P).
        live: bool, the patches that can be kept.
        count: of every image, or of each, (B, 1); where fewer are live, all are kept.
    """
    with torch.no_grad():
        low = torch.where(live, score, torch.inf).amin(dim=1, keepdim=True) - FAR
        high = torch.where(live, score, -torch.inf).amax(dim=1, keepdim=True) + FAR
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            many = ((score - middle).sigmoid() * live).sum(dim=1, keepdim=True) > count
            low, high = torch.where(many, middle, low), torch.where(many, high, middle)
    return unmoved(score - (low + high) / 2, live, dim=1)


def unmoved(score: Tensor, live: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The same log-odds, (B, P), without the gradient that would keep more of all live patches along `dim`."""
    chance = score.sigmoid() * live
    slope = (chance * (1 - chance)).sum(dim=dim, keepdim=True).detach()
    total = chance.sum(dim=dim, keepdim=True)
    return score - (total - total.detach()) / slope.clamp(min=torch.finfo(slope.dtype).tiny)


def above(score: Tensor, threshold: float, live: Tensor) -> Tensor:
    """The patches, (B, P), that are kept with a probability above `threshold`, and of each image the likeliest.

    Args:
        score: log-odds.
        live: the likeliest is one of these.
    """
    return (logsigmoid(score) > _logarithm(threshold)) | (
        score == score.masked_fill(~live, -torch.inf).amax(dim=1, keepdim=True)
    )


def _logarithm(threshold: float) -> float:
    return math.log(threshold) if threshold else -math.inf


def masked_attention(logits: Tensor, policy: Tensor, epsilon: float = 0.0) -> Tensor:
    """Softmax over the keys that a policy keeps, and oneself, with the policy's gradients.

    Args:
        logits: (B, H, N, N).
        policy: (B, N) 0 or 1.
        epsilon: is added to the sum, and to all weights alike.
    Source: DynamicViT, equation 11.
    """
    diagonal = torch.eye(policy.shape[1], dtype=policy.dtype, device=policy.device)
    seen = policy[:, None, None] * (1 - diagonal) + diagonal
    weights = (logits - logits.amax(dim=-1, keepdim=True).detach()).exp() * seen
    total = weights.sum(dim=-1, keepdim=True) + epsilon
    return (weights + epsilon / policy.shape[1]) / total.clamp(min=torch.finfo(total.dtype).tiny)


def _attend(policy: Tensor, epsilon: float, projected: Projected, drop: float) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in projected[:3])
    logits = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).to(policy.dtype)
    if projected.pairs is not None:
        logits = logits + projected.pairs
    return (dropout(masked_attention(logits, policy, epsilon), drop).to(v.dtype) @ v).transpose(1, 2)


def token_loss(student: Tensor, teacher: Tensor, kept: Tensor, kind: Literal["mse", "kl"]) -> Tensor:
    """Distance of the patches that are kept to a teacher's.

    Args:
        student, teacher: (B, P, D).
        kept: (B, P), above 0 where a patch counts.
    """
    counts = kept.detach() > 0
    if kind == "mse":
        each = (student - teacher).square().mean(dim=-1)
    else:
        given, wanted = (log_softmax(t, dim=-1) for t in (student, teacher))
        each = kl_div(given, wanted, reduction="none", log_target=True).sum(dim=-1)
    return (each * counts).sum() / counts.sum().clamp(min=1)
