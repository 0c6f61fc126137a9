"""Early exit: an image leaves after the block that its class is clear at. Fitted in closed form, without training.

Teerapittayanon, McDanel, Kung: BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks, ICPR 2016.
Belrose et al.: Eliciting Latent Predictions from Transformers with the Tuned Lens, 2023, arXiv:2303.08112.

Letters: B images, N token slots, R slots that the classifier reads, L blocks, D channels, C classes.
"""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from adaptvit.backbones.base import class_count, model_name
from adaptvit.backbones.forward import Source, run, scores
from adaptvit.budget import in_batches
from adaptvit.checks import Ascending, In, check_fields
from adaptvit.methods.base import DEITS, MethodConfig, Published, Role, around_deits, turned
from adaptvit.methods.full import FullConfig
from adaptvit.model import AdaptiveViT, Knob, Left
from adaptvit.process import in_float64
from adaptvit.terminal import warn
from adaptvit.tokens import Masked, Tokens, kernels
from adaptvit.usage import Usage, check_finite

RIDGE = 0.2
"""Of the variance of each feature, times features over images."""
ENOUGH = 4
"""Images for each feature that an exit sees, of fewer than which it is said that they are few."""
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
        fitted = self.fitted(vit, images[~held], target)
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
        """The blocks."""
        assert self.read is not None
        depth, grid = self.deepest(tokens), tokens.source.grid
        out = tokens.x.new_zeros(tokens.shape[0], self.read, tokens.x.shape[-1])
        present = torch.ones(tokens.shape[0], dtype=torch.bool, device=out.device)
        asked = torch.zeros(tokens.shape[0], self.depth, dtype=torch.long, device=out.device)
        told = list[Tensor]()
        eager = not torch.compiler.is_compiling()
        for number in range(self.depth):
            tokens = self.run_block(number, tokens)
            if number not in self.exits:
                continue
            asked[:, number] = present * self.exit_macs
            told.append(self.lens(tokens, number))
            if self.training:
                continue
            leaves = present & (self.entropy(told[-1]) < self.config.threshold)
            if eager and kernels.on_host(out.device) and not leaves.any():
                continue
            out = torch.where(leaves[:, None, None], told[-1].to(out.dtype), out)
            present = present & ~leaves
            live = tokens.live
            tokens = tokens.keep(live & present[:, None])
            depth = depth.masked_fill(live & ~tokens.live, number + 1)
            if eager and not tokens.x.numel():
                break
        else:
            out = torch.where(present[:, None, None], self.read_slots(tokens, tokens.x), out)
        means = {"lens": self.error(told, out)} if self.training and told else {}
        return self.finish(out, partial(self.usage, depth, asked, grid), means=means)

    def usage(self, depth: Tensor, asked: Tensor, grid: tuple[int, ...]) -> Usage:
        """The record, from the last block that each token entered, and the MACs of exits, (B, L)."""
        usage = Usage.of_depth(depth, self.heads, grid, self.prefix, last_reads=self.read)
        return replace(usage, deciding=asked)

    def lens(self, tokens: Tokens, block: int) -> Tensor:
        """What the last block would leave of the slots that are read, as told behind a block: (B, R, D)."""
        lens: Tensor = self.lenses[self.exits.index(block)](self.summary(tokens))
        return lens.unflatten(1, (self.read, -1))

    def summary(self, tokens: Tokens) -> Tensor:
        """What an exit sees, (B, (R + 1) D): slots that are read and the mean of the patches; 0 of images that left."""
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
    plain = FullConfig().build(model.vit).eval()
    assert model.read is not None
    lenses, readout = [_Sums() for _ in model.exits], _Sums()
    seen: list[Tensor] = []

    def inside(x: Tensor, source: Source) -> tuple[Tensor, None]:
        tokens, seen[:] = source.laid(x, Masked), []
        for number in range(plain.depth):
            tokens = plain.run_block(number, tokens, every=True)
            if number in model.exits:
                seen.append(model.summary(tokens))
        seen.append(tokens.x[:, : model.read].flatten(1))
        return tokens.x, None

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
