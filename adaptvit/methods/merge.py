"""Merging whose numbers are found on calibration images: as many in every image, or as are alike in each. No training.

Beside ToMe's, what is alike, and what a merged token counts as a key, are as they keep predictions nearest to the dense
model's: `docs/lab/off_the_shelf.md` has what was tried.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from adaptvit.backbones.base import patch_grid
from adaptvit.budget import OutOfReach, in_batches, meet_target
from adaptvit.checks import In
from adaptvit.methods.base import DEITS, Published, Role, around_deits
from adaptvit.methods.full import FullConfig
from adaptvit.methods.losses import divergence
from adaptvit.methods.merging import Compared, MergingConfig, MergingViT, Rule, Weighing
from adaptvit.methods.tome import ToMeConfig
from adaptvit.model import AdaptiveViT, Knob
from adaptvit.usage import check_finite

COMPARED: Compared = "keys"
PROTECTION = 0.1
POWER = 0.85
SIZE_COST = 0.03
WEIGHING: Weighing = "importance"


@dataclass(frozen=True, kw_only=True)
class MergeConfig(MergingConfig):
    """Token merging in each image as far as its tokens are alike: a threshold on similarity in the place of ToMe's r.

    The matching and the mean are ToMe's. A token of A scores by its cosine with its best match,
    less `relative` times the mean of these in the image: with 0 images whose patches are all alike lose too many, with
    1 all images lose about as many.
    """

    method: ClassVar[str] = "merge"
    title: ClassVar[str] = "merging by similarity"
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
    compared: Compared = COMPARED
    protection: Annotated[float, In("[0, 1]")] = PROTECTION
    power: Annotated[float, In("[0, 2]")] = POWER
    size_cost: Annotated[float, In("[0, 1]")] = SIZE_COST
    weighing: Weighing = WEIGHING
    keeps_length: bool = True

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
        return self.schedule(depth)[block] < 1

    def choose(self, score: Tensor, patches: int | Tensor, block: int, depth: int) -> Tensor:
        return self.score(score) >= self.schedule(depth)[block]

    def rule(self, patches: int, block: int, depth: int) -> Rule:
        return Rule(least=self.schedule(depth)[block], relative=self.relative)

    def score(self, cosine: Tensor) -> Tensor:
        """What the thresholds are for: (B, |A|), -inf for dead tokens, from the cosines of `match`."""
        live = cosine > -torch.inf
        mean = cosine.where(live, 0).sum(dim=1, keepdim=True) / live.sum(dim=1, keepdim=True).clamp(min=1)
        return cosine - self.relative * mean

    def fitted(self, vit: nn.Module, images: Tensor, target: float, **search: Any) -> AdaptiveViT:
        """The model with the thresholds at which images merge, on average, what ToMe would at the target.

        It is that of the schedule at which `nearest` finds predictions nearest to the dense model's.

        Raises:
            OutOfReach: no number of merged tokens meets the target.
            ValueError: logits that are not finite.
        """
        self.build(vit)  # which says what it lacks
        return nearest(self, partial(fit_thresholds, self, vit, images), vit, images, target, **search)


@dataclass(frozen=True, kw_only=True)
class CalibratedConfig(ToMeConfig):
    """Merging of as many tokens in every image, in the blocks where calibration images say that it harms least.

    ToMe's matching and means, with another similarity and schedule.
    """

    method: ClassVar[str] = "calibrated"
    title: ClassVar[str] = "calibrated merging"
    role: ClassVar[Role] = "method"
    published: ClassVar[Published] = Published(
        names=around_deits("calibrated", dict.fromkeys(DEITS, " whose blocks merge as many tokens of every image."))
    )

    compared: Compared = COMPARED
    protection: Annotated[float, In("[0, 1]")] = PROTECTION
    power: Annotated[float, In("[0, 2]")] = POWER
    size_cost: Annotated[float, In("[0, 1]")] = SIZE_COST
    weighing: Weighing = WEIGHING
    keeps_length: bool = True

    def fitted(self, vit: nn.Module, images: Tensor, target: float, **search: Any) -> AdaptiveViT:
        """The model with the numbers r at which `nearest` finds predictions nearest to the dense model's.

        Raises:
            OutOfReach: no number of merged tokens meets the target.
            ValueError: logits that are not finite.
        """

        def merging(schedule: ToMeConfig) -> MergingViT:
            return replace(self, r=schedule.r, inflection=0.0, rate=1.0).build(vit).eval()

        return nearest(self, merging, vit, images, target, **search)

    def fit(self, vit: nn.Module, images: Tensor, target: float, **search: Any) -> AdaptiveViT:
        return MergingConfig.fit(self, vit, images, target, **search)


SLOPES = (
    *((0.5, 0.0), (0.0, 1 / 6), (0.5, 1 / 6), (-0.5, 1 / 6)),
    *((0.0, 1 / 4), (-0.5, 1 / 4), (0.0, 1 / 3), (0.5, 1 / 3)),
)
"""Schedules that are tried beside an even one: how much r rises with depth, 1 being from nothing, or falls, and what
share of the blocks merges nothing before."""
REACH = 0.5
"""Share of the dense MACs to which a model can be steered later, whatever block it begins to merge in."""


def nearest(
    config: MergingConfig,
    merging: Callable[[ToMeConfig], MergingViT],
    vit: nn.Module,
    images: Tensor,
    target: float,
    **search: Any,
) -> MergingViT:
    """Of models that merge by ToMe's schedules at a budget the one whose predictions are nearest to the dense model's.

    Nearest is by the mean KL divergence for `images`, or by the cosine of what a ViT without classes gives, so that no
    labels are needed. Tried are an even schedule and those of `SLOPES`.

    Args:
        config: what is compared, and how it is merged.
        merging: makes a model of a schedule, of which r alone counts.
        target, search: as of `MethodConfig.fit`.
    Raises:
        OutOfReach: no number of merged tokens meets the target.
        ValueError: logits that are not finite.
    """
    how = {name: value for name, value in search.items() if name in ("unit", "tolerance")}
    some = images if how.get("unit") == "images_per_s" else images[:1]  # all cost the same
    plain = FullConfig().build(vit).eval()
    dense, depth = _logits(plain, images), plain.depth
    shared: dict[str, Any] = {one.name: getattr(config, one.name) for one in fields(MergingConfig)}
    check_finite(dense, "logits")

    def tried(rise: float, delay: float) -> tuple[float, MergingViT]:
        late = round(delay * depth)
        slopes = [1 - rise + 2 * rise * block / max(1, depth - late - 1) for block in range(depth - late)]
        r = [*[0] * late, *[round(STEPS * slope) for slope in slopes]]
        like = ToMeConfig(r=r, rate=8 / STEPS, **shared).build(vit).eval()
        if late:
            meet_target(like, images[:1], REACH)  # or it is not tried
        merged = meet_target(like, some, target, **how).schedule(depth)
        model = merging(ToMeConfig(r=[r if block < late else max(1, r) for block, r in enumerate(merged)]))
        return divergence(_logits(model, images), dense, headless=plain.num_classes == 0).item(), model

    found = [tried(0.0, 0.0)]
    for rise, delay in SLOPES:
        with suppress(OutOfReach):  # the later tokens merge, the less is saved at most
            found.append(tried(rise, delay))
    return min(found, key=lambda trial: trial[0])[1]


STEPS = 100
"""Numbers of a slope that are told apart."""
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
    return torch.cat([model(batch).float() for batch in in_batches(images, "fitting")])
