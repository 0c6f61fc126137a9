"""ToMe: alike patches merged, a fixed number in each block, or in each image as many as are alike. No training needed.

Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman: Token Merging: Your ViT But Faster, ICLR 2023.

Letters: B images, N token slots (p prefix tokens first, then patches), L blocks, H heads, d channels per head.
Symbols of the paper: A and B the two sets of tokens, r the tokens merged in a block, s the patches in a token.

Slots are in the order in which a block has its tokens, which merging changes; `Usage.groups` says where patches are.
"""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from adaptvit.backbones.base import patch_grid
from adaptvit.backbones.door import Projected
from adaptvit.budget import BATCH, OutOfReach, meet_target
from adaptvit.checks import In, check_fields
from adaptvit.macs import sublayer_macs
from adaptvit.methods.base import DEITS, MethodConfig, Published, Role, around_deits
from adaptvit.methods.full import FullConfig
from adaptvit.methods.losses import distillation
from adaptvit.model import AdaptiveViT, Knob, Left, once
from adaptvit.tokens import Tokens
from adaptvit.usage import Usage, check_finite

Position = Literal["receiver", "mean"]
"""`receiver`: where the token was that others were merged into; `mean`: at the mean of its patches' coordinates, which
rotary tables are computed for. A relative bias has no rows between patches, nor have blocks that are told numbers of
patches: there it is as `receiver`. Images of different shapes have no `mean`."""
NEEDS = frozenset({"attention", "token norms"})


@dataclass(frozen=True, kw_only=True)
class ToMeConfig(MethodConfig):
    """Token merging (Bolya et al., ICLR 2023): every image merges as many of its tokens as any other.

    Differs: register tokens are protected as the class token is. A classifier that pools, in whatever way, pools for
    each patch the token that the patch is part of; the released code only has the mean. Where it reads a class token
    nothing is merged in the last block, since nothing would read it.
    """

    method: ClassVar[str] = "tome"
    title: ClassVar[str] = "ToMe"
    role: ClassVar[Role] = "reference"
    needs: ClassVar[Set[str]] = NEEDS
    knob: ClassVar[Knob | None] = Knob("rate", sign=-1, lowest=0.0, highest=64.0, step=0.05)
    published: ClassVar[Published] = Published(
        names=around_deits("tome", dict.fromkeys(DEITS, " whose blocks each merge 8 tokens."))
    )

    r: Annotated[int | Sequence[int], In("[0, inf)")] = 8
    """Tokens merged in each block, at most half of the patches it has: one number for all blocks, or one for each, of
    which those left out at the end are 0."""
    inflection: Annotated[float, In("[-1, 1]")] = 0.0
    """Of one number r, in [-1, 1]: what blocks merge runs linearly from r (1 + inflection) in the last back to
    r (1 - inflection) in the first. -1 is the paper's decreasing schedule."""
    rate: Annotated[float, In("[0, 1e9]")] = 1.0
    """The numbers r are multiplied by this, rounded so that the sums up to every block are: the one number by which a
    model is steered to a budget."""
    proportional_attention: bool = True
    """A token is attended to as the patches it holds would be together. Off, as released, for MAE weights."""
    position: Position = "receiver"
    """Where a merged token is, of a ViT whose blocks are told positions."""

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.r, Sequence) and self.inflection:
            raise ValueError(f"ToMeConfig.inflection={self.inflection} is for one number r, but r is {self.r}")

    def schedule(self, depth: int) -> tuple[int, ...]:
        """r of each of `depth` blocks.

        Raises:
            ValueError: `r` has more numbers than there are blocks.
        """
        if isinstance(self.r, int):
            first = int(self.r * (1 - self.inflection))
            last = 2 * self.r - first
            numbers = [int(first + block * (last - first) / max(1, depth - 1)) for block in range(depth)]
        elif len(self.r) > depth:
            raise ValueError(f"ToMeConfig.r has {len(self.r)} numbers for {depth} blocks: {self.r}")
        else:
            numbers = [*self.r, *[0] * (depth - len(self.r))]
        sums = [round(self.rate * merged) for merged in accumulate(numbers, initial=0)]
        return tuple(after - before for before, after in pairwise(sums))

    def merges(self, block: int, depth: int) -> bool:
        """Whether block number `block` of `depth` compares its tokens."""
        return self.schedule(depth)[block] > 0

    def choose(self, score: Tensor, patches: int | Tensor, block: int, depth: int) -> Tensor:
        """The tokens of A that are merged, (B, |A|) bool, of images with so many patches; `score` is `match`'s."""
        if not isinstance(patches, Tensor):
            best = score.topk(self.merged(patches, block, depth), dim=1).indices
            return torch.zeros_like(score, dtype=torch.bool).scatter(1, best, True)
        best = score.topk(min(self.schedule(depth)[block], score.shape[1]), dim=1).indices
        merged = torch.arange(best.shape[1], device=best.device) < patches // 2
        return torch.zeros_like(score, dtype=torch.bool).scatter(1, best, merged)

    def merged(self, patches: int, block: int, depth: int) -> int:
        """Tokens that block number `block` of `depth` merges, where it has so many patches."""
        return min(self.schedule(depth)[block], patches // 2)

    def build(self, vit: nn.Module) -> "MergingViT":
        """Wrap `vit`, sharing its weights; no parameter is added.

        Raises:
            TypeError: the ViT is not one that this library reproduces.
            ValueError: `r` has more numbers than the ViT has blocks.
        """
        return MergingViT(vit, self)

    def fit(self, vit: nn.Module, images: Tensor, target: float, **search: Any) -> AdaptiveViT:
        if search.get("labels") is None and search.get("unit") != "images_per_s":
            images = images[:BATCH]  # all cost the same, and trials tell the speed of a batch
        return super().fit(vit, images, target, **search)


@dataclass(frozen=True, kw_only=True)
class MergeConfig(MethodConfig):
    """Token merging in each image as far as its tokens are alike: a threshold on similarity in the place of ToMe's r.

    The matching, the mean and proportional attention are ToMe's. A token of A scores by its cosine with its best match,
    less `relative` times the mean of these in the image: with 0 images whose patches are all alike lose too many, with
    1 all images lose about as many.
    """

    method: ClassVar[str] = "merge"
    title: ClassVar[str] = "merging by similarity"
    needs: ClassVar[Set[str]] = NEEDS
    knob: ClassVar[Knob | None] = Knob("shift", sign=1, lowest=-2.0, highest=2.0, step=0.02)
    published: ClassVar[Published] = Published(
        names=around_deits("merge", dict.fromkeys(DEITS, " whose blocks merge tokens that are alike."))
    )

    thresholds: Annotated[float | Sequence[float], In("[-1, 1]")] = 0.7
    """A token of A is merged where it scores this or more, in [-1, 1]: one number for all blocks, or one for each; at 1
    a block merges nothing. `fit_thresholds` finds those of a schedule."""
    relative: Annotated[float, In("[0, 1]")] = 0.25
    """How much of the image's mean cosine is taken off, in [0, 1]."""
    shift: Annotated[float, In("[-2, 2]")] = 0.0
    """Added to the thresholds below 1: the one number by which a model is steered to a budget."""
    proportional_attention: bool = True
    """A token is attended to as the patches it holds would be together."""
    position: Position = "receiver"
    """Where a merged token is, of a ViT whose blocks are told positions."""

    def __post_init__(self) -> None:
        check_fields(self)

    def schedule(self, depth: int) -> tuple[float, ...]:
        """The threshold of each of `depth` blocks, shifted.

        Raises:
            ValueError: `thresholds` has another length.
        """
        values = (self.thresholds,) * depth if isinstance(self.thresholds, (int, float)) else tuple(self.thresholds)
        if len(values) != depth:
            raise ValueError(f"MergeConfig.thresholds has {len(values)} numbers for {depth} blocks: {values}")
        return tuple(1.0 if value == 1 else value + self.shift for value in values)

    def merges(self, block: int, depth: int) -> bool:
        """Whether block number `block` of `depth` compares its tokens."""
        return self.schedule(depth)[block] < 1

    def choose(self, score: Tensor, patches: int | Tensor, block: int, depth: int) -> Tensor:
        """The tokens of A that are merged: (B, |A|) bool; `score` is that of `match`."""
        return self.score(score) >= self.schedule(depth)[block]

    def score(self, cosine: Tensor) -> Tensor:
        """What the thresholds are for: (B, |A|), -inf for dead tokens, from the cosines of `match`."""
        live = cosine > -torch.inf
        mean = cosine.where(live, 0).sum(dim=1, keepdim=True) / live.sum(dim=1, keepdim=True).clamp(min=1)
        return cosine - self.relative * mean

    def build(self, vit: nn.Module) -> "MergingViT":
        """Wrap `vit`, sharing its weights; no parameter is added.

        Raises:
            TypeError: the ViT is not one that this library reproduces.
            ValueError: `thresholds` has another length than the ViT has blocks.
        """
        return MergingViT(vit, self)

    def fitted(self, vit: nn.Module, images: Tensor, target: float, **search: Any) -> AdaptiveViT:
        """The model with the thresholds at which images merge, on average, what ToMe would at the target.

        Of ToMe's schedules at that budget, even and rising with depth, it is the one at which predictions for `images`
        are nearest to the dense model's, in mean KL divergence. Labels are not needed.

        Raises:
            OutOfReach: no number of merged tokens meets the target.
            ValueError: logits that are not finite.
        """
        self.build(vit)  # which says what it lacks
        how = {name: value for name, value in search.items() if name in ("unit", "tolerance")}
        some = images if how.get("unit") == "images_per_s" else images[:1]  # all cost the same
        dense = _logits(FullConfig().build(vit).eval(), images)
        check_finite(dense, "logits")
        found: list[tuple[float, MergingViT]] = []
        for inflection in INFLECTIONS:
            like = ToMeConfig(inflection=inflection).build(vit).eval()
            try:
                merged = meet_target(like, some, target, **how).schedule(like.depth)
            except OutOfReach:
                if found:
                    continue  # rising schedules do not reach as low as even ones
                raise
            schedule = ToMeConfig(r=[max(1, r) for r in merged])  # at 0 no shift would merge
            model = fit_thresholds(self, vit, images, schedule)
            found.append((distillation(_logits(model, images), dense, "soft", 1.0).item(), model))
        return min(found, key=lambda candidate: candidate[0])[1]


class MergingViT(AdaptiveViT):
    """A ViT whose blocks merge tokens between attention and MLP; its config chooses which."""

    def __init__(self, vit: nn.Module, config: ToMeConfig | MergeConfig) -> None:
        super().__init__(vit, config)
        config.schedule(self.depth)  # refuses a wrong length

    @property
    def even(self) -> bool:
        return isinstance(self.config, ToMeConfig)

    def run(self, tokens: Tokens) -> Left:
        grid = tokens.source.grid
        if self.config.position == "mean":
            tokens = tokens.at_coordinates(tokens.source.coordinates(tokens.x.new_zeros((), dtype=_wide(tokens.x))))
        holder = torch.arange(tokens.shape[1], device=tokens.x.device).expand(tokens.shape)
        if tokens.at_first is not None:
            holder = holder * tokens.at_first  # slots that never held a token go with the first
        held, compared = [holder], []  # holder: the slot that each input token is in
        bias, size = None, torch.ones_like(tokens.x[..., 0], dtype=_wide(tokens.x))  # patches in each token
        for number in range(self.depth):
            compared.append(self.compares(number, tokens.shape[1] - self.prefix))
            if compared[-1]:
                tokens, place, size = self.run_merging(number, tokens, bias, size)
                holder = place.gather(1, holder)
                bias = size.log() if self.config.proportional_attention else None
            else:
                tokens = self.run_block(number, tokens, bias=bias)
            held.append(holder)
        x = self.read_slots(tokens, tokens.x)
        if self.read is None:
            x = x.gather(1, holder[..., None].expand(-1, -1, x.shape[2]))  # pooled by size, whatever the pool
        return self.finish(x, partial(self.usage, held, compared, grid))

    def usage(self, held: list[Tensor], compared: list[bool], grid: tuple[int, ...]) -> Usage:
        """The record, as `usage_of` makes it; `compared` are the blocks that looked for tokens to merge."""
        usage = usage_of(self, held, grid)
        patches, widths = usage.attended - self.prefix, self.shape.each("key_dim", held[0])
        deciding = patches // 2 * (patches - patches // 2) * widths * held[0].new_tensor(compared)
        return replace(usage, deciding=deciding)

    def run_merging(
        self, number: int, tokens: Tokens, bias: Tensor | None, size: Tensor
    ) -> tuple[Tokens, Tensor, Tensor]:
        """A block that merges tokens: what it leaves, the slot where each token went, and the patches in each."""
        slots, sizes = tokens.shape[1], list[Tensor]()
        decided = once(partial(self.places, tokens, number))
        known = self.even and tokens.at_first is None
        left = slots - self.config.merged(slots - self.prefix, number, self.depth) if known else None

        def look(projected: Projected) -> None:
            decided(projected.k)

        def merge(tokens: Tokens) -> Tokens:
            merged, total = tokens.merge(*decided(), size, left)
            sizes[:] = [total]
            return merged

        after = self.run_block(number, tokens, bias=bias, look=look, between=merge)
        return after, decided()[0], sizes[0]

    def compares(self, block: int, patches: int) -> bool:
        """Whether a block looks for tokens to merge, where it has at most so many patches."""
        return not self.reads_few(block) and patches > 1 and self.merges(block)

    def merges(self, block: int) -> bool:
        """Whether a block is to merge anything."""
        return self.config.merges(block, self.depth)

    def choose(self, score: Tensor, patches: int | Tensor, block: int) -> Tensor:
        """The tokens of A that are merged: (B, |A|) bool; `score` is that of `match`, `patches` may be (B, 1)."""
        return self.config.choose(score, patches, block, self.depth)

    def places(self, tokens: Tokens, block: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        """For each slot, where its token goes, and whether it is merged into another there: (B, N) int64 and bool."""
        live = tokens.live
        metric = tokens.grid(keys.mean(dim=-2, dtype=_wide(keys)))
        score, target = match(normalize(metric, dim=-1), live, self.prefix)
        alike = tokens.at_first is None
        patches = (tokens.shape[1] if alike else live.sum(dim=1, keepdim=True)) - self.prefix
        chosen = self.choose(score, patches, block)
        return arrange(chosen, score, target, live, self.prefix)


def usage_of(model: AdaptiveViT, holders: list[Tensor], grid: tuple[int, ...]) -> Usage:
    """The record of a forward that merges tokens between attention and MLP, without what deciding takes.

    A token is live in the slot of its first patch.

    Args:
        holders: (B, N) int64, the slots of the input tokens before each block, and after the last.
    """
    held = torch.stack(holders, dim=1)
    inputs = torch.arange(held.shape[2], device=held.device).expand_as(held)
    first = torch.full_like(held, held.shape[2]).scatter_reduce(2, held, inputs, "amin")
    live = first.gather(2, held) == inputs
    count = live.sum(dim=2)
    attended = count[:, :-1]
    updated = attended.clone()
    if model.read is not None:
        updated[:, -1] = model.read
    on = torch.ones_like(attended, dtype=torch.bool)
    heads = attended.new_tensor(model.heads).expand_as(attended)
    merged = attended - count[:, 1:]
    attention, mlp = sublayer_macs(model.shape, heads, attended, updated, updated - merged)
    groups = held[:, 1:, model.prefix :]
    return Usage(
        attended, updated, heads, on, on, grid, model.prefix, live[:, :-1], executed=attention + mlp, groups=groups
    )


INFLECTIONS = (0.0, 0.5, 1.0)
"""ToMe's schedules that merging's thresholds are fitted to: even, and rising with depth by half or from nothing."""
NEARLY_ONE = 1 - 1e-6
"""The highest threshold that is fitted: equal tokens reach it in spite of rounding."""


class _Fitting(MergingViT):
    """Merges r tokens on average over the images of a batch, and notes at what score."""

    def __init__(self, vit: nn.Module, config: MergeConfig, schedule: ToMeConfig, patches: int) -> None:
        super().__init__(vit, config)
        self.thresholds = [1.0] * self.depth
        self.removed: list[int] = []
        for r in schedule.schedule(self.depth):
            self.removed.append(min(r, (patches - sum(self.removed)) // 2))

    def merges(self, block: int) -> bool:
        return self.removed[block] > 0

    def choose(self, score: Tensor, patches: int | Tensor, block: int) -> Tensor:
        score = self.config.score(score)
        count = min(self.removed[block] * len(score), int((score > -torch.inf).sum()))
        least = score.flatten().topk(count).values[-1].item()
        self.thresholds[block] = min(max(least, -1.0), NEARLY_ONE)
        return score >= self.thresholds[block]


def fit_thresholds(config: MergeConfig, vit: nn.Module, images: Tensor, schedule: ToMeConfig) -> "MergingViT":
    """The model of `MergeConfig` with the thresholds at which `images` merge, on average, what ToMe would.

    Args:
        config: what else the model's is to be.
        vit: put in evaluation mode.
        images: calibration images, in one batch: the more, the better the average holds on others.
        schedule: r of each block. Blocks that merge nothing get a threshold of 1.
    Raises:
        ValueError: logits that are not finite.
    """
    fitting = _Fitting(vit, config, schedule, math.prod(patch_grid(vit, images))).eval()
    with torch.inference_mode():
        check_finite(fitting(images), "logits")
    return replace(config, thresholds=tuple(fitting.thresholds), shift=0.0).build(vit).eval()


@torch.inference_mode()
def _logits(model: AdaptiveViT, images: Tensor) -> Tensor:
    return torch.cat([model(batch).float() for batch in images.split(BATCH)])


def match(metric: Tensor, live: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """The best match of each patch token of A among those of B.

    A are the tokens in even slots, B those in odd ones; prefix tokens are in neither.

    Args:
        metric: (B, N, d), of unit length.
        live: (B, N) bool, the first so many slots of each image.
    Returns:
        (B, |A|) the similarity, -inf for a dead token of A, and int64 the number of the match in B.
    """
    even, odd = _halves(prefix)
    with torch.autocast(metric.device.type, enabled=False):
        similarity = metric[:, even] @ metric[:, odd].mT
    score, target = similarity.masked_fill_(~live[:, None, odd], -torch.inf).max(dim=2)
    return score.masked_fill_(~live[:, even], -torch.inf), target


def arrange(chosen: Tensor, score: Tensor, target: Tensor, live: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Where tokens go: prefix tokens stay, those of A that are not merged follow, then those of B.

    The order decides what the next block compares. Without prefix tokens those of A are in falling order of `score`, as
    in the released code; else in the order that they have.

    Args:
        chosen: (B, |A|) bool, live tokens of A that are merged.
        score, target: what `match` gave.
        live: (B, N) bool, the first so many slots of each image.
    Returns:
        (B, N) int64, the slot that each token goes to, meaningless for dead ones, and bool, those merged.
    """
    even, odd = _halves(prefix)
    staying = live[:, even] & ~chosen
    if prefix:
        rank = staying.cumsum(dim=1) - 1
    else:
        rank = score.masked_fill(~staying, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1)
    place = torch.arange(live.shape[1], device=live.device).repeat(live.shape[0], 1)
    moved = torch.zeros_like(live)
    moved[:, even] = chosen
    followers = torch.arange(place[:, odd].shape[1], device=live.device)
    place[:, odd] = prefix + staying.sum(dim=1, keepdim=True) + followers
    place[:, even] = torch.where(chosen, place[:, odd].gather(1, target), prefix + rank)
    return place, moved


def _wide(x: Tensor) -> torch.dtype:
    """Of sizes, similarities and their thresholds: float32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)


def _halves(prefix: int) -> tuple[slice, slice]:
    """The slots of the patches in A, which are even, and in B."""
    return slice(prefix + prefix % 2, None, 2), slice(prefix + 1 - prefix % 2, None, 2)
