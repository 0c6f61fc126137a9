"""Early exit: an image leaves after the block that its class is clear at. Fitted in closed form, without training.

Teerapittayanon, McDanel, Kung: BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks, ICPR 2016.
Belrose et al.: Eliciting Latent Predictions from Transformers with the Tuned Lens, 2023, arXiv:2303.08112.

Letters: B images, N token slots, R slots that the classifier reads, L blocks, D channels, C classes.
"""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from adaptvit.backbones.base import class_count, model_name
from adaptvit.backbones.forward import Source, run, scores
from adaptvit.budget import in_batches
from adaptvit.checks import Ascending, In, check_fields
from adaptvit.methods.base import DEITS, MethodConfig, Published, Role, around_deits, turned
from adaptvit.methods.merge import CalibratedConfig
from adaptvit.methods.merging import Merged, MergingViT, held_after
from adaptvit.model import AdaptiveViT, Knob, Left
from adaptvit.process import in_float64
from adaptvit.terminal import warn
from adaptvit.tokens import Dense, Masked, Packed, Slab, Tokens, kernels
from adaptvit.usage import Usage, check_finite

RIDGE = 0.2
"""Of the variance of each feature, times features over images."""
ENOUGH = 4
"""Images for each feature that an exit sees, of fewer than which it is said that they are few."""
MERGED = 256
"""Images that merging is fitted to, at most twice as many."""
HALF = 0.5
"""Share of the dense MACs that merging and exits are fitted at where a speed is asked for."""
HELD = 4
"""One image of so many turns the knob, and no exit is fitted to it: of the others exits are too sure."""


@dataclass(frozen=True, kw_only=True)
class ExitConfig(MethodConfig):
    """Images leave after the block at which their class is clear (BranchyNet), told by linear maps of its tokens.

    An exit sees the tokens that the classifier reads and the mean of the patches. Its lens tells of these what the last
    block would leave of the tokens that are read (the tuned lens), which the ViT's own norm and head then classify.
    Whether the class is clear is the entropy of logits that one linear map tells of that. Lenses and map are ridge
    regressions on what the ViT says of images: no labels, but two thousand images or more, and many of each class.

    Differs from the papers: exits are fitted in closed form, the threshold is one for all, and lenses see the patches
    too. In training no image leaves, and the lenses learn what the last block leaves, not labels.
    """

    method: ClassVar[str] = "exit"
    title: ClassVar[str] = "early exit"
    role: ClassVar[Role] = "many"
    needs: ClassVar[Set[str]] = frozenset({"a class token"})
    knob: ClassVar[Knob | None] = Knob("threshold", sign=-1, lowest=0.0, highest=1.0, step=0.02)
    published: ClassVar[Published] = Published(
        names=around_deits("exit", dict.fromkeys(DEITS, " whose images leave after the block at which they are clear."))
    )

    blocks: Annotated[Sequence[int] | None, Ascending()] = None
    """The blocks that there is an exit behind, 0-based; None is all but the last."""
    threshold: Annotated[float, In("[0, 1]")] = 0.2
    """Entropy of an exit's prediction below which an image leaves, over that of all classes being alike; 0 lets none
    leave."""
    lens_weight: Annotated[float, In("[0, inf)")] = 1.0
    """In training the weight of the lenses' squared error, over the mean square of what they are to tell, a mean over
    exits."""

    def __post_init__(self) -> None:
        check_fields(self)

    def build(self, vit: nn.Module) -> "ExitViT":
        """Wrap `vit`, sharing its weights, with exits that nobody leaves by before they are fitted.

        Raises:
            TypeError: the ViT is not one that this library reproduces, or has no class token.
            ValueError: it has fewer than two classes, or `blocks` names its last block or one that it lacks.
        """
        return ExitViT(vit, self)

    def fitted(self, vit: nn.Module, images: Tensor, target: float, **search: Any) -> "ExitViT":
        """The model with the exits that are nearest, on images, to what the ViT itself says of them.

        Raises:
            ValueError: logits that are not finite.
        """
        model = self.build(vit).eval()
        fit_exits(model, images)
        return model

    def fit(self, vit: nn.Module, images: Tensor, target: float, **search: Any) -> AdaptiveViT:
        """The model at a budget: exits fitted to three quarters of the images, the knob turned on the others.

        Raises:
            TypeError, ValueError: as `MethodConfig.fit`; there are fewer than four images.
        """
        if len(images) < HELD:
            raise ValueError(f"exits are fitted to {HELD} images or more, got {len(images)}")
        held = torch.arange(len(images), device=images.device) % HELD == HELD - 1
        fitted = self.fitted(vit, images[~held], target, **search)
        features = fitted.seen
        if (few := len(images) - int(held.sum())) < ENOUGH * features:
            warn(
                f"early exits are fitted to {few} images, and see {features} numbers of each: with fewer than "
                f"{ENOUGH * features} they are too sure of what they say; give more images, labels are not needed",
                stacklevel=3,
            )
        if search.get("labels") is not None:
            search["labels"] = search["labels"][held]
        return turned(fitted, images[held], target, **search)


@dataclass(frozen=True, kw_only=True)
class MergeExitConfig(ExitConfig, CalibratedConfig):
    """Early exit of a ViT whose blocks merge tokens: merging is for what images have twice, exits for easy images.

    As `CalibratedConfig` merges and `ExitConfig` lets images leave, whose exits are fitted to what merging leaves.
    """

    method: ClassVar[str] = "merge_exit"
    title: ClassVar[str] = "merging and early exit"
    role: ClassVar[Role] = "many"
    needs: ClassVar[Set[str]] = ExitConfig.needs | CalibratedConfig.needs
    published: ClassVar[Published] = Published(
        names=around_deits("merge_exit", dict.fromkeys(DEITS, " whose blocks merge tokens and whose images leave."))
    )

    merging: Annotated[float, In("(0, 1]")] = 0.5
    """How much of the saving merging makes where it is fitted: it leaves the budget to this power of the dense MACs."""

    def __post_init__(self) -> None:
        CalibratedConfig.__post_init__(self)

    def build(self, vit: nn.Module) -> "MergingExitViT":
        """Wrap `vit`, sharing its weights, with exits that nobody leaves by before they are fitted.

        Raises:
            TypeError, ValueError: as `ExitConfig.build` and `MergingConfig.build`.
        """
        return MergingExitViT(vit, self)

    def fitted(self, vit: nn.Module, images: Tensor, target: float, **search: Any) -> "ExitViT":
        """The model whose merging is fitted to some of the images, and whose exits, behind it, are to all.

        Raises:
            OutOfReach: no number of merged tokens meets merging's part of the target.
            ValueError: logits that are not finite.
        """
        self.build(vit)  # which says what it lacks
        share = HALF if search.get("unit") == "images_per_s" else target
        some = images[:: max(1, len(images) // MERGED)]
        own = {one.name: getattr(self, one.name) for one in fields(CalibratedConfig)}
        merging = CalibratedConfig(**own).fitted(vit, some, share**self.merging).config
        return ExitConfig.fitted(
            replace(self, r=merging.r, inflection=merging.inflection, rate=merging.rate), vit, images, target
        )


class ExitViT(AdaptiveViT):
    """A ViT with exits.

    Attributes:
        exits: the blocks that there is one behind.
        seen: how many numbers each sees.
        lenses: of each, what it sees -> the tokens that the classifier reads, as the last block would leave them.
        readout: these tokens -> logits, by which it is told whether the class is clear.
    """

    def __init__(self, vit: nn.Module, config: ExitConfig) -> None:
        super().__init__(vit, config)
        self.exits = tuple(range(self.depth - 1)) if config.blocks is None else tuple(config.blocks)
        name, classes, own = model_name(vit), class_count(vit), type(config).__name__
        if classes < 2:
            raise ValueError(f"{name} has {classes} classes, but images leave by how clear their class is")
        if beyond := [block for block in self.exits if block >= self.depth - 1]:
            last = self.depth - 2
            raise ValueError(f"{own}.blocks names block {beyond[0]}, but {name} has blocks 0..{last} to leave behind")
        assert self.read is not None
        dim, like = self.shape.dim, next(vit.parameters())
        self.seen = (self.read + 1) * dim
        self.lenses = nn.ModuleList(nn.Linear(self.seen, self.read * dim) for _ in self.exits)
        self.readout = nn.Linear(self.read * dim, classes)
        for part in (*self.lenses, self.readout):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
        self.lenses.to(like).train(vit.training)
        self.readout.to(like).train(vit.training)

    @property
    def even(self) -> bool:
        return self.training

    def run(self, tokens: Tokens) -> Left:
        """The blocks; where somebody wants maps of features, every image to the end."""
        assert self.read is not None
        images, deepest, grid = tokens.shape[0], self.deepest(tokens), tokens.source.grid
        out = tokens.x.new_zeros(images, self.read, tokens.x.shape[-1])
        present = torch.ones(images, dtype=torch.bool, device=out.device)
        depth = torch.full((images,), self.depth, device=out.device)
        told = list[Tensor]()
        stay, on_host = self.training or tokens.source.canvas is not None, kernels.on_host(out.device)
        skips = not torch.compiler.is_compiling() and not isinstance(tokens, Slab)  # which counts what is dropped
        if isinstance(tokens, Packed) and tokens.full:
            tokens = Dense.of(tokens.batch).of_source(tokens.source)  # as whose images are alike, or leave
        tokens, merged = self.start(tokens)
        for number in range(self.depth):
            tokens = self.step(number, tokens, merged)
            if number not in self.exits:
                continue
            left = self.lens(tokens, number)
            if stay:
                told.append(left)
                continue
            leaves = self.entropy(left) < self.config.threshold
            if skips and on_host and not leaves.any():
                continue
            gone = present & _of_all(present, leaves)
            out = torch.where(gone[:, None, None], _of_all(present, left).to(out.dtype), out)
            depth, present = depth.masked_fill(gone, number + 1), present & ~gone
            tokens = _staying(tokens, ~leaves, merged)
            if skips and not (present.any() if on_host else tokens.x.numel()):
                break
        else:
            out = torch.where(present[:, None, None], _of_all(present, self.read_slots(tokens, tokens.x)), out)
        means = {"lens": self.error(told, out)} if told else {}
        return self.finish(out, partial(self.usage_of, depth, grid, deepest, merged), means=means)

    def start(self, tokens: Tokens) -> tuple[Tokens, Merged | None]:
        """The tokens of the first block, and what is known of those that are merged, where some are."""
        return tokens, None

    def step(self, number: int, tokens: Tokens, merged: Merged | None) -> Tokens:
        """A block."""
        return self.run_block(number, tokens)

    def usage_of(self, depth: Tensor, grid: tuple[int, ...], deepest: Tensor, merged: Merged | None) -> Usage:
        """The record.

        Args:
            depth: (B,) the last block that each image entered.
            deepest: (B, N) the last that each slot could enter.
        """
        depths = torch.minimum(deepest, depth[:, None])
        return replace(
            Usage.of_depth(depths, self.heads, grid, self.prefix, last_reads=self.read), deciding=self.asked(depth)
        )

    def asked(self, depth: Tensor) -> Tensor:
        """(B, L) MACs of the exits behind the blocks that each image entered."""
        blocks = torch.arange(self.depth, device=depth.device)
        return self.exit_macs * ((depth[:, None] > blocks) & torch.isin(blocks, blocks.new_tensor(self.exits)))

    def lens(self, tokens: Tokens, block: int) -> Tensor:
        """What the last block would leave of the slots that are read, as told behind a block: (B, R, D)."""
        lens: Tensor = self.lenses[self.exits.index(block)](self.summary(tokens))
        return lens.unflatten(1, (self.read, -1))

    def summary(self, tokens: Tokens) -> Tensor:
        """What an exit sees, (B, (R + 1) D): slots that are read and the mean of the patches; 0 of images that left."""
        if isinstance(tokens, Dense) and not tokens.filtered:
            x = tokens.x
            return torch.cat([x[:, : self.read].flatten(1), x[:, self.prefix :].mean(dim=1)], dim=1)
        read, patches = self.read_slots(tokens, tokens.x), tokens.grid(tokens.x)[:, self.prefix :]
        count = tokens.live[:, self.prefix :].sum(dim=1, keepdim=True).clamp(min=1)
        return torch.cat([read.flatten(1), (patches.sum(dim=1) / count).to(read.dtype)], dim=1)

    def entropy(self, x: Tensor) -> Tensor:
        """Of the prediction from (B, R, D), (B,) in [0, 1], over that of all classes being alike."""
        logits = self.readout(x.flatten(1))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1) / math.log(logits.shape[-1])

    def error(self, told: list[Tensor], x: Tensor) -> Tensor:
        """Squared error of what lenses told of (B, R, D), over the mean square of that."""
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        return (torch.stack(told) - x).square().mean() / x.square().mean().clamp(min=torch.finfo(x.dtype).tiny)

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """The lenses' error, weighted; none in evaluation."""
        return {"lens": self.config.lens_weight * means["lens"]} if means else {}

    @property
    def exit_macs(self) -> int:
        """Of an exit and an image."""
        assert self.read is not None
        read = self.read * self.shape.dim
        return self.seen * read + read * self.readout.out_features


def _of_all(present: Tensor, t: Tensor) -> Tensor:
    """(B, ...) of all images, from what there is of those that are `present`; or (B, ...) as it is."""
    images = present.shape[0]
    if t.shape[0] == images:
        return t
    return t.new_zeros(images, *t.shape[1:]).index_copy(0, present.nonzero().squeeze(1), t)


def _staying(tokens: Tokens, stays: Tensor, merged: Merged | None) -> Tokens:
    """The tokens of images that stay, bool by images: a batch of these alone, or, in a layout that cannot know how many
    these are, with gaps."""
    features = [] if merged is None else merged.features
    if isinstance(tokens, Packed | Dense) and not torch.compiler.is_compiling():
        tokens, features = tokens.of_images(stays, *features)
    else:
        tokens, features = tokens.select(stays[:, None].expand(tokens.shape), *features)
    if merged is not None:
        merged.features = features
    return tokens


class MergingExitViT(ExitViT, MergingViT):
    """A ViT with exits, whose blocks merge tokens."""

    config: MergeExitConfig
    drops: ClassVar[bool] = False  # for a graph: none merges the tokens of an image that left

    def start(self, tokens: Tokens) -> tuple[Tokens, Merged]:
        return MergingViT.start(self, tokens)

    def step(self, number: int, tokens: Tokens, merged: Merged | None) -> Tokens:
        assert merged is not None
        return MergingViT.step(self, number, tokens, merged)

    def alike(self, tokens: Tokens) -> bool:
        return super().alike(tokens) and (self.training or not isinstance(tokens, Masked | Slab))

    def usage_of(self, depth: Tensor, grid: tuple[int, ...], deepest: Tensor, merged: Merged | None) -> Usage:
        assert merged is not None
        idle = [None] * (self.depth - len(merged.went))
        held = held_after(merged.holder, [*merged.went, *idle], depth)
        usage = self.usage(held, [*merged.compared, *[False] * len(idle)], grid)
        assert usage.live is not None
        assert usage.deciding is not None
        ran = depth[:, None] > torch.arange(self.depth, device=depth.device)
        counts = {name: getattr(usage, name) * ran for name in ("attended", "updated", "attention", "mlp", "executed")}
        live = usage.live & ran[..., None]
        return replace(usage, **counts, live=live, deciding=usage.deciding * ran + self.asked(depth))


class _Sums:
    """Of what is seen, and of what it is to tell, for a ridge regression on more images than memory holds."""

    def __init__(self) -> None:
        self.gram = self.moment = torch.zeros(())

    def add(self, seen: Tensor, wanted: Tensor) -> None:
        """Of some images, (b, features) and (b, values)."""
        x, y = (torch.cat([in_float64(t), in_float64(torch.ones_like(t[:, :1]))], dim=1) for t in (seen, wanted))
        self.gram, self.moment = self.gram.to(x.device) + x.mT @ x, self.moment.to(x.device) + x.mT @ y

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weights (values, features) and constants (values,)."""
        count, total, wanted = self.gram[-1, -1], self.gram[-1, :-1], self.moment[-1, :-1]
        gram = self.gram[:-1, :-1] - torch.outer(total, total) / count
        moment = self.moment[:-1, :-1] - torch.outer(total, wanted) / count
        ridge = (RIDGE * len(gram) / count * gram.diagonal()).clamp(min=torch.finfo(torch.float32).tiny)
        weight = torch.linalg.solve(gram + ridge.diag(), moment).mT
        return weight, (wanted - weight @ total) / count

    def fit(self, part: nn.Linear) -> None:
        """Give a map the weights, in place."""
        with torch.no_grad():
            for parameter, value in zip((part.weight, part.bias), self.solve(), strict=True):
                parameter.copy_(value)


def fit_exits(model: ExitViT, images: Tensor) -> None:
    """Fit every exit to what the ViT says of images, in place.

    Args:
        images: (B, channels, height, width), as the model takes them.
    Raises:
        ValueError: logits that are not finite.
    """
    lenses, readout = [_Sums() for _ in model.exits], _Sums()
    seen: list[Tensor] = []

    def inside(x: Tensor, source: Source) -> tuple[Tensor, None]:
        tokens, merged = model.start(source.laid(x, Dense if source.live is None else Masked))
        seen.clear()
        for number in range(model.depth):
            tokens = model.step(number, tokens, merged)
            if number in model.exits:
                seen.append(model.summary(tokens))
        left = model.read_slots(tokens, tokens.x)
        seen.append(left.flatten(1))
        return left, None

    with torch.inference_mode():
        for batch in in_batches(images, "fitting"):
            logits, _ = scores(run(model.vit, batch, inside))
            check_finite(logits, "logits")
            *features, left = seen
            readout.add(left, logits)
            for one, x in zip(lenses, features, strict=True):
                one.add(x, left)
    for sums, part in zip((*lenses, readout), (*model.lenses, model.readout), strict=True):
        assert isinstance(part, nn.Linear)
        sums.fit(part)
