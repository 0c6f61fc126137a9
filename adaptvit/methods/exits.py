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
from adaptvit.budget import in_batches
from adaptvit.checks import Ascending, In, check_fields
from adaptvit.methods.base import DEITS, MethodConfig, Published, around_deits, turned
from adaptvit.methods.full import FullConfig
from adaptvit.model import AdaptiveViT, Knob, Left
from adaptvit.process import in_float64
from adaptvit.tokens import Masked, Tokens
from adaptvit.usage import Usage, check_finite

RIDGE = 0.2
"""Of the variance of each feature, times features over images."""
HELD = 4
"""One image of so many turns the knob, and no exit is fitted to it: of the others exits are too sure."""


@dataclass(frozen=True, kw_only=True)
class ExitConfig(MethodConfig):
    """Images leave after the block at which their class is clear (BranchyNet), told by linear maps of its tokens.

    An exit sees the tokens that the classifier reads and the mean of the patches. One map of these tells the logits, by
    whose entropy an image leaves; another what the last block would leave of those tokens (the tuned lens), which the
    ViT's own norm and head then classify. Both are ridge regressions on the ViT's own logits and features, so that no
    labels are needed, but images: two thousand or more, and many for each class.

    Differs from the papers: nothing is trained, the threshold is one for all exits, and a lens sees the patches too.
    """

    method: ClassVar[str] = "exit"
    title: ClassVar[str] = "early exit"
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
        if search.get("labels") is not None:
            search["labels"] = search["labels"][held]
        return turned(self.fitted(vit, images[~held], target), images[held], target, **search)


class ExitViT(AdaptiveViT):
    """A ViT with exits.

    Attributes:
        exits: the blocks that there is one behind.
        readouts: of each, what the exit sees -> logits.
        lenses: of each, what it sees -> the tokens that the classifier reads, as the last block would leave them.
    """

    def __init__(self, vit: nn.Module, config: ExitConfig) -> None:
        super().__init__(vit, config)
        self.exits = tuple(range(self.depth - 1)) if config.blocks is None else tuple(config.blocks)
        name, classes, own = model_name(vit), class_count(vit), type(config).__name__
        if classes < 2:
            raise ValueError(f"{name} has {classes} classes, but images leave by how clear their class is")
        if beyond := [block for block in self.exits if block >= self.depth - 1]:
            raise ValueError(
                f"{own}.blocks names block {beyond[0]}, but {name} has blocks 0..{self.depth - 2} to leave"
            )
        assert self.read is not None
        seen, left, like = (self.read + 1) * self.shape.dim, self.read * self.shape.dim, next(vit.parameters())
        self.readouts = nn.ModuleList(nn.Linear(seen, classes) for _ in self.exits)
        self.lenses = nn.ModuleList(nn.Linear(seen, left) for _ in self.exits)
        for part in (*self.readouts, *self.lenses):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
        self.readouts.to(like).train(vit.training)
        self.lenses.to(like).train(vit.training)

    def run(self, tokens: Tokens) -> Left:
        """The blocks.

        Raises:
            RuntimeError: gradients are wanted, of exits that are fitted to the ViT as it is.
        """
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "early exits are fitted to a ViT as it is, not trained with it: train the plain ViT, and fit exits to "
                "it with adaptvit.adapt"
            )
        assert self.read is not None
        depth, grid = self.deepest(tokens), tokens.source.grid
        present = torch.ones(tokens.shape[0], dtype=torch.bool, device=tokens.x.device)
        out = tokens.x.new_zeros(tokens.shape[0], self.read, tokens.x.shape[-1])
        asked = torch.zeros(tokens.shape[0], self.depth, dtype=torch.long, device=tokens.x.device)
        for number in range(self.depth):
            tokens = self.run_block(number, tokens)
            if number not in self.exits:
                continue
            place = self.exits.index(number)
            asked[:, number] = present * self.readout_macs
            features = self.summary(tokens)
            leaves = present & (self.entropy(features, place) < self.config.threshold)
            lens = self.lenses[place](features).unflatten(1, (self.read, -1)).to(out.dtype)
            out = torch.where(leaves[:, None, None], lens, out)
            asked[:, number] += leaves * self.lens_macs
            present = present & ~leaves
            live = tokens.live
            tokens = tokens.keep(live & present[:, None])
            depth = depth.masked_fill(live & ~tokens.live, number + 1)
            if not tokens.x.numel():
                break
        else:
            out = torch.where(present[:, None, None], self.read_slots(tokens, tokens.x), out)
        usage = partial(self.usage, depth, asked, grid)
        return self.finish(out, usage)

    def usage(self, depth: Tensor, asked: Tensor, grid: tuple[int, ...]) -> Usage:
        """The record, from the last block that each token entered, and the MACs of exits, (B, L)."""
        usage = Usage.of_depth(depth, self.heads, grid, self.prefix, last_reads=self.read)
        return replace(usage, deciding=asked)

    def summary(self, tokens: Tokens) -> Tensor:
        """What an exit sees, (B, (R + 1) D): slots that are read and the mean of the patches; 0 of images that left."""
        read, patches = self.read_slots(tokens, tokens.x), tokens.grid(tokens.x)[:, self.prefix :]
        count = tokens.live[:, self.prefix :].sum(dim=1, keepdim=True).clamp(min=1)
        return torch.cat([read.flatten(1), (patches.sum(dim=1) / count).to(read.dtype)], dim=1)

    def entropy(self, features: Tensor, place: int) -> Tensor:
        """Of the prediction of an exit, (B,) in [0, 1], over that of all classes being alike."""
        logits = self.readouts[place](features)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1) / math.log(logits.shape[-1])

    @property
    def readout_macs(self) -> int:
        """Of what an exit says of one image."""
        return self.readouts[0].weight.numel()  # type: ignore[operator]

    @property
    def lens_macs(self) -> int:
        """Of what it leaves of one that leaves."""
        return self.lenses[0].weight.numel()  # type: ignore[operator]


class _Sums:
    """Of what an exit saw, and of what it is to tell, for a ridge regression on more images than memory holds."""

    def __init__(self) -> None:
        self.gram = self.moment = torch.zeros(())

    def add(self, seen: Tensor, wanted: Tensor) -> None:
        """Of some images, (b, features) and (b, values)."""
        x, y = (torch.cat([in_float64(t), in_float64(torch.ones_like(t[:, :1]))], dim=1) for t in (seen, wanted))
        self.gram, self.moment = self.gram + x.mT @ x, self.moment + x.mT @ y

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weights (values, features) and constants (values,)."""
        count, total, wanted = self.gram[-1, -1], self.gram[-1, :-1], self.moment[-1, :-1]
        gram = self.gram[:-1, :-1] - torch.outer(total, total) / count
        moment = self.moment[:-1, :-1] - torch.outer(total, wanted) / count
        variance = gram.diagonal()
        ridge = (RIDGE * len(gram) / count * variance).clamp(min=torch.finfo(torch.float32).tiny)
        weight = torch.linalg.solve(gram + ridge.diag(), moment).mT
        return weight, (wanted - weight @ total) / count


def fit_exits(model: ExitViT, images: Tensor) -> None:
    """Fit every exit to what the ViT says of images, in place.

    Args:
        images: (B, channels, height, width), as the model takes them.
    Raises:
        ValueError: logits that are not finite.
    """
    plain = FullConfig().build(model.vit).eval()
    assert model.read is not None
    sums = [_Sums() for _ in model.exits]
    with torch.inference_mode():
        for batch in in_batches(images, "fitting"):
            logits = plain(batch)
            check_finite(logits, "logits")
            tokens, seen = plain.enter(batch, Masked), list[Tensor]()
            for number in range(plain.depth):
                tokens = plain.run_block(number, tokens, every=True)
                if number in model.exits:
                    seen.append(model.summary(tokens))
            wanted = torch.cat([logits, tokens.x[:, : model.read].flatten(1)], dim=1)
            for one, features in zip(sums, seen, strict=True):
                one.add(features, wanted)
    classes = class_count(model.vit)
    with torch.no_grad():
        for one, readout, lens in zip(sums, model.readouts, model.lenses, strict=True):
            weight, bias = one.solve()
            for part, rows in ((readout, slice(None, classes)), (lens, slice(classes, None))):
                part.weight.copy_(weight[rows])  # type: ignore[operator]
                part.bias.copy_(bias[rows])  # type: ignore[operator]
