"""What a forward pass returns, and the record of what it computed: losses, MACs, tables and pictures read only this.

Letters: B images, L blocks, N token slots, of which the first `prefix` are class, distillation and register tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Usage:
    """Per image and block, what was computed. Integer tensors are int64; nothing here carries gradients."""

    attended: Tensor
    """(B, L) tokens that were attended to: they became keys and values. 0 where attention was off."""
    updated: Tensor
    """(B, L) tokens that were updated: they were queries, or went through the MLP, or both."""
    heads: Tensor
    """(B, L) attention heads computed."""
    attention: Tensor
    """(B, L) bool, the attention sub-layer ran."""
    mlp: Tensor
    """(B, L) bool, the MLP sub-layer ran."""
    grid: tuple[int, ...]
    """Rows and columns of patches; of a video its steps in time before them."""
    prefix: int
    """Tokens before the first patch token."""
    live: Tensor | None = None
    """(B, L, N) bool, the slots whose token the block worked on: all that held one on entry to it or, where tokens that
    are passed over stay, those that were not. None where a method does not track slots."""
    executed: Tensor | None = None
    """(B, L) MACs of the block's sub-layers, where they are not what the counts above make; None where they are."""
    deciding: Tensor | None = None
    """(B, L) MACs spent on deciding what to compute; None where it takes none."""
    fused: Tensor | None = None
    """(B, L, N) bool, the slots of `live` whose token is not their patch's but a sum of dropped ones. None where a
    method makes no such tokens."""
    groups: Tensor | None = None
    """(B, L, rows x columns) the token that each patch is part of after the block, by its place among those that the
    next block gets; None where a method does not merge tokens."""

    @classmethod
    def of_live(
        cls, live: Tensor, heads: Sequence[int], grid: tuple[int, ...], prefix: int, deciding: Tensor | None = None
    ) -> "Usage":
        """The record of a method whose blocks attend to every token they get and update only those they hand on.

        Args:
            live: (B, L + 1, N) bool, the slots that held a token on entry to each block, and after the last.
            heads: attention heads of each block.
        """
        attended, updated = live[:, :-1].sum(dim=2), live[:, 1:].sum(dim=2)
        on = (attended > 0, updated > 0)
        heads_on = attended.new_tensor(heads).expand_as(attended)
        return cls(attended, updated, heads_on, *on, grid, prefix, live[:, :-1], deciding=deciding)

    @classmethod
    def of_depth(
        cls,
        depth: Tensor,
        heads: Sequence[int],
        grid: tuple[int, ...],
        prefix: int,
        last_reads: int | None = None,
    ) -> "Usage":
        """The record of a method that only drops tokens.

        Args:
            depth: (B, N) the last block, 1-based, that each slot's token entered.
            heads: attention heads of each block.
            last_reads: leading slots that are all the last block updates; None where it updates every live one.
        """
        live = depth[:, None] >= torch.arange(1, len(heads) + 1, device=depth.device)[:, None]
        attended = live.sum(dim=2)
        updated = attended
        if last_reads is not None:
            updated = attended.clone()
            updated[:, -1] = live[:, -1, :last_reads].sum(dim=1)
        heads_on = attended.new_tensor(heads).expand_as(attended)
        return cls(attended, updated, heads_on, attended > 0, updated > 0, grid, prefix, live)

    @property
    def depth(self) -> Tensor:
        """(B, N) blocks each slot's token entered: the 1-based block after which it stopped.

        Raises:
            ValueError: the method did not track slots.
        """
        if self.live is None:
            raise ValueError("Usage.live is None: this method does not track token slots, so it has no depth map")
        return self.live.sum(dim=1)

    @property
    def patch_depth(self) -> Tensor:
        """(B, rows, columns) blocks each patch entered; of a video (B, steps, rows, columns)."""
        return self.depth[:, self.prefix :].unflatten(1, self.grid)

    def of_images(self, rows: Tensor) -> "Usage":
        """The record of some images: (n,) their numbers, or (B,) bool."""
        parts: dict[str, Any] = {name: part[rows] for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **parts)

    def to_keep(self) -> "Usage":
        """What a data set's record keeps of a batch, on the host: all but `fused` and `groups`, by far the largest."""
        parts: dict[str, Any] = {name: part.cpu() for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **parts | {"fused": None, "groups": None})


@dataclass(frozen=True, eq=False)
class Output:
    """What an adaptive model returns."""

    logits: Tensor
    """(B, classes)."""
    usage: Usage
    terms: dict[str, Tensor] = field(default_factory=dict)
    """The method's own loss terms, already weighted: the loss is the task's plus their sum."""
    distilled: Tensor | None = None
    """(B, classes) of the distillation head, only in timm's distilled training; `logits` is then the class head's."""


def join(usages: list[Usage]) -> Usage:
    """One record of several batches of the same model and input size, in order.

    Raises:
        ValueError: the list is empty or the patch grids differ.
    """
    if not usages:
        raise ValueError("join needs at least one Usage, got an empty list")
    if len({usage.grid for usage in usages}) > 1:
        raise ValueError(f"join needs one patch grid, got {sorted({usage.grid for usage in usages})}")
    parts: dict[str, Tensor | None] = {
        name: torch.cat([getattr(usage, name) for usage in usages])
        for name in ("attended", "updated", "heads", "attention", "mlp")
    }
    for name in ("live", "executed", "deciding", "fused", "groups"):
        known = [part for part in (getattr(usage, name) for usage in usages) if part is not None]
        parts[name] = torch.cat(known) if len(known) == len(usages) else None
    return Usage(**parts, grid=usages[0].grid, prefix=usages[0].prefix)  # type: ignore[arg-type]


def check_finite(values: Tensor, what: str) -> None:
    """Refuse what a model made of calibration images, (B, ...), where it is not finite.

    Raises:
        ValueError: naming the image by its place, from 0; or there is none.
    """
    if not len(values):
        raise ValueError("there are no calibration images: one or more are needed")
    sound = values.flatten(1).isfinite().all(dim=1)
    if not sound.all():
        spoilt = (~sound).nonzero().flatten().tolist()
        which = "all" if len(spoilt) == len(sound) else f"{len(spoilt)} of"
        raise ValueError(
            f"the {what} of {which} {len(sound)} images are not finite, image {spoilt[0]} being the first: "
            "look at its pixels and at the weights"
        )
