"""Run-length tokens: patches of a clip that repeat are dropped before the first block. No training needed.

Choudhury, Zhu, Liu, Niinuma, Kitani, Jeni: Don't Look Twice: Faster Video Transformers with Run-Length Tokenization,
NeurIPS 2024.

Letters: B clips, F frames, S steps in time, p tokens before the patches, N = p + S x rows x columns token slots, D
channels.
"""

from collections.abc import Set
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, pad

from adaptvit.backbones.base import patch_grid
from adaptvit.backbones.forward import Source
from adaptvit.checks import In, check_fields
from adaptvit.methods.base import MethodConfig, Published, Role
from adaptvit.methods.merge import CalibratedConfig
from adaptvit.methods.merging import MergingViT
from adaptvit.model import AdaptiveViT, Knob, Left
from adaptvit.tokens import Tokens
from adaptvit.usage import Usage


@dataclass(frozen=True, kw_only=True)
class RunLengthConfig(MethodConfig):
    """Tokens of patches that change (Choudhury et al., NeurIPS 2024): a clip keeps as many as it moves.

    A patch whose pixels differ by less than a threshold, in the mean, from those at its place one step before is
    dropped at the embedding. The token that stands for the run of these, its first, may be told how long that is.

    Differs: without training a token is attended to as its whole run would be together, and pooled for all of it, so
    that of patches that are the same but for their positions in time nothing is lost. The paper tunes the network
    instead, with `lengths` and without `proportional_attention`.
    """

    method: ClassVar[str] = "runlength"
    title: ClassVar[str] = "run-length tokens"
    role: ClassVar[Role] = "clips"
    needs: ClassVar[Set[str]] = frozenset({"attention", "token norms", "steps in time"})
    knob: ClassVar[Knob | None] = Knob("threshold", sign=-1, lowest=0.0, highest=8.0, step=0.02)

    threshold: Annotated[float, In("[0, inf)")] = 0.1
    """Mean absolute difference of two patches below which the later is dropped, in normalised pixels, as the model
    takes them; 0 drops nothing."""
    proportional_attention: bool = True
    """A token is attended to as the patches of its run would be together."""
    lengths: bool = False
    """Add a learned embedding of its run's length to each token: zeros to begin with, for training."""

    def __post_init__(self) -> None:
        check_fields(self)

    def build(self, vit: nn.Module) -> "RunLengthViT":
        """Wrap `vit`, sharing its weights.

        Raises:
            TypeError: the ViT is not one that this library reproduces, or takes images.
        """
        return RunLengthViT(vit, self)


class RunLengthViT(AdaptiveViT):
    """A ViT that computes the first patch of every run.

    Attributes:
        length_embed: (S, D), added to tokens of runs of 1, 2, ... steps; None without `lengths`.
    """

    def __init__(self, vit: nn.Module, config: RunLengthConfig) -> None:
        super().__init__(vit, config)
        self.length_embed: nn.Parameter | None = None
        if config.lengths:
            like = next(vit.parameters())
            steps = patch_grid(vit)[0]
            self.length_embed = nn.Parameter(torch.zeros(steps, self.shape.dim, device=like.device, dtype=like.dtype))

    def run(self, tokens: Tokens) -> Left:
        source = tokens.source
        kept, holder, length = slots_of_runs(source, self.config.threshold, self.prefix)
        if self.length_embed is not None:
            told = self.length_embed[length[:, self.prefix :] - 1].to(tokens.x.dtype)
            tokens = tokens.with_x(tokens.x + tokens.spread(pad(told, (0, 0, self.prefix, 0))))
        tokens = tokens.keep(kept)
        bias = None
        if self.config.proportional_attention:
            bias = tokens.spread(length.to(torch.promote_types(tokens.x.dtype, torch.float32)).log())
        for number in range(self.depth):
            tokens = self.run_block(number, tokens, bias=bias)
        x = self.read_slots(tokens, tokens.x)
        if self.read is None:
            x = x.gather(1, holder[..., None].expand(-1, -1, x.shape[2]))
        usage = partial(Usage.of_depth, self.depth * kept, self.heads, source.grid, self.prefix, last_reads=self.read)
        return self.finish(x, usage, holders=lambda: [holder] * self.depth)


@dataclass(frozen=True, kw_only=True)
class RunLengthMergeConfig(CalibratedConfig):
    """Tokens of patches that change, and of these each block merges as many in every clip: run-length tokens first,
    then merging as `CalibratedConfig` does it, of even numbers.

    A token counts from the start for as many patches as its run has steps. The threshold stays; the knob is merging's.
    """

    method: ClassVar[str] = "runlength_merge"
    title: ClassVar[str] = "run-length tokens, merged"
    role: ClassVar[Role] = "clips"
    published: ClassVar[Published] = Published()
    needs: ClassVar[Set[str]] = CalibratedConfig.needs | {"steps in time"}

    threshold: Annotated[float, In("[0, inf)")] = 0.1
    """As that of `RunLengthConfig`."""

    def build(self, vit: nn.Module) -> "RunLengthMergingViT":
        """Wrap `vit`, sharing its weights; no parameter is added.

        Raises:
            TypeError: the ViT is not one that this library reproduces, or takes images.
            ValueError: numbers that do not fit the ViT's blocks.
        """
        return RunLengthMergingViT(vit, self)

    def fitted(self, vit: nn.Module, images: Tensor, target: float, **search: Any) -> AdaptiveViT:
        return self.build(vit).eval()


class RunLengthMergingViT(MergingViT):
    """A ViT that merges, of what a clip has, the first patches of its runs."""

    @property
    def even(self) -> bool:
        return False

    def alike(self, tokens: Tokens) -> bool:
        return False

    def begin(self, tokens: Tokens) -> tuple[Tokens, Tensor, Tensor | None]:
        kept, holder, length = slots_of_runs(tokens.source, self.config.threshold, self.prefix)
        place = kept.cumsum(dim=1) - 1  # without gaps, as merging takes them
        size = length.to(torch.promote_types(tokens.x.dtype, torch.float32))
        tokens = tokens.keep(kept)
        tokens, size = tokens.merge(place, torch.zeros_like(kept), tokens.spread(size))
        return tokens, place.gather(1, holder), size


def slots_of_runs(source: Source, threshold: float, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of clips, by token slots (B, N): whether it begins a run, int64 the slot of the one that does, and the steps of
    this there; tokens before the patches are runs of one."""
    starts = run_starts(source.images, source.grid, threshold)
    holder, length = runs(starts)
    first = torch.arange(prefix, device=holder.device).expand(len(holder), -1)
    holder = torch.cat([first, holder + prefix], dim=1)
    return pad(starts.flatten(1), (prefix, 0), value=True), holder, pad(length, (prefix, 0), value=1)


def run_starts(clips: Tensor, grid: tuple[int, ...], threshold: float) -> Tensor:
    """The patches that begin a run: (B, steps, rows, columns) bool, all of the first step among them.

    Args:
        clips: (B, F, channels, height, width).
        grid: steps, rows and columns.
        threshold: mean absolute difference from the patch one step before from which a patch begins one.
    """
    steps, rows, columns = grid
    tubelets = clips.to(torch.promote_types(clips.dtype, torch.float32)).unflatten(1, (steps, -1))
    moved = tubelets.diff(dim=1).abs_().mean(dim=(2, 3))
    moved = adaptive_avg_pool2d(moved, (rows, columns))
    return pad(~(moved < threshold), (0, 0, 0, 0, 1, 0), value=True)


def runs(starts: Tensor) -> tuple[Tensor, Tensor]:
    """Of patches that begin runs, or not, (B, steps, rows, columns): by slots, (B, patches) int64, the slot of the
    first of each one's run, and the steps that this has where it is the first, 1 elsewhere."""
    steps = torch.arange(starts.shape[1], device=starts.device)[:, None, None]
    first = (steps * starts).cummax(dim=1).values.flatten(2)
    each = first.shape[2]
    holder = (first * each + torch.arange(each, device=starts.device)).flatten(1)
    count = torch.zeros_like(holder).scatter_add(1, holder, torch.ones_like(holder))
    return holder, count.clamp(min=1)
