"""What a forward pass returns, and the record of what it computed: losses, MACs, tables and pictures read only this.

Letters: B images, L blocks, N token slots, of which the first `prefix` are class, distillation and register tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import register_pytree_node

from adaptvit.macs import Shape, dense_macs, dense_macs_of, macs
from adaptvit.process import in_float64


@dataclass(frozen=True, eq=False)
class Bits:
    """A (B, L, N) bool tensor, eight slots to a byte."""

    packed: Tensor
    """(B, L, N / 8 rounded up) uint8; the first of eight is the lowest bit."""
    slots: int
    """N."""

    @classmethod
    def of(cls, values: Tensor) -> "Bits":
        eights = pad(values.byte(), (0, -values.shape[2] % 8)).unflatten(2, (-1, 8))
        return cls((eights << _places(values)).sum(dim=3, dtype=torch.uint8), values.shape[2])

    def unpacked(self) -> Tensor:
        """(B, L, N) bool."""
        return ((self.packed[..., None] >> _places(self.packed)) & 1).bool().flatten(2)[..., : self.slots]

    def __getitem__(self, rows: Tensor) -> "Bits":
        return replace(self, packed=self.packed[rows])

    def cpu(self) -> "Bits":
        return replace(self, packed=self.packed.cpu())


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


class _Live:
    """`Usage.live`: held as it is given, a tensor or `Bits`, and read as a tensor."""

    def __get__(self, usage: "Usage | None", kind: type) -> Tensor | None:
        held = None if usage is None else vars(usage)["live"]
        return held.unpacked() if isinstance(held, Bits) else held

    def __set__(self, usage: "Usage", live: Tensor | Bits | None) -> None:
        vars(usage)["live"] = live


@dataclass(eq=False, repr=False)
class Usage:
    """Per image and block, what was computed. Integer tensors are int64; nothing here carries gradients.

    Nobody changes one, nor an `Output`: they are not frozen for the sake of those who rebuild what a model returns, as
    Lightning does with every dataclass.
    """

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
    """Rows and columns of patches; of a video its steps in time before them. Of images of different shapes the patches
    that there was room for, (P,), of which each has the first."""
    prefix: int
    """Tokens before the first patch token."""
    live: _Live = _Live()
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
    patches: Tensor | None = None
    """(B,) patches of each image, where they differ; None where all have those of the grid."""
    shape: Shape | None = None
    """The sizes of the ViT, for `macs` and `share`; None of a record that was made by hand."""

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

    def __eq__(self, other: object) -> bool:
        """Whether another record has the same of the same images."""
        return _same(self, other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        images, blocks = self.attended.shape
        return f"Usage({images} images, {blocks} blocks, {' x '.join(map(str, self.grid))} patches)"

    @property
    def macs(self) -> Tensor:
        """(B,) int64 MACs executed for each image, deciding included.

        Raises:
            ValueError: the sizes of the ViT are not known.
        """
        return macs(self, self._sizes())

    @property
    def share(self) -> Tensor:
        """(B,) float64, MACs executed over those of timm's own forward.

        Raises:
            ValueError: the sizes of the ViT are not known.
        """
        shape, patches = self._sizes(), self.patches
        dense = dense_macs(shape, self.grid) if patches is None else dense_macs_of(shape, patches)
        return in_float64(self.macs) / dense

    def _sizes(self) -> Shape:
        if self.shape is None:
            raise ValueError("Usage.shape is None: adaptvit.macs(usage, model.shape) counts the MACs of such a record")
        return self.shape

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
        """(B, rows, columns) blocks each patch entered; of a video (B, steps, rows, columns), in pieces (B, P)."""
        return self.depth[:, self.prefix :].unflatten(1, self.grid)

    def of_images(self, rows: Tensor) -> "Usage":
        """The record of some images: (n,) their numbers, or (B,) bool."""
        return replace(self, **{name: part[rows] for name, part in self._parts().items()})

    def compact(self) -> "Usage":
        """What is kept of a data set: all but `fused` and `groups`, by far the largest; of `live` a bit for each slot.

        An image then takes some 40 bytes a block, and a bit a block and slot: 0.8 kB for ViT-B at 224 pixels in patches
        of 16, 2.8 kB for ViT-L at 384.
        """
        live = vars(self)["live"]
        return replace(self, live=Bits.of(live) if isinstance(live, Tensor) else live, fused=None, groups=None)

    def to_keep(self) -> "Usage":
        """The compact record of a batch, on the host."""
        compact = self.compact()
        return replace(compact, **{name: part.cpu() for name, part in compact._parts().items()})

    def _parts(self) -> dict[str, Any]:
        """What has a row for each image, as it is held."""
        return {name: part for name, part in vars(self).items() if isinstance(part, Tensor | Bits)}


@dataclass(eq=False, repr=False)
class Output:
    """What an adaptive model returns where all of it is asked for."""

    logits: Tensor
    """(B, classes)."""
    usage: Usage
    terms: dict[str, Tensor] = field(default_factory=dict)
    """The method's own loss terms, already weighted: the loss is the task's plus their sum."""
    means: dict[str, Tensor] = field(default_factory=dict)
    """Means over the batch, with gradients, that `model.terms` makes the loss terms of: where several processes share a
    batch, the terms of all its images follow from the means of these."""
    distilled: Tensor | None = None
    """(B, classes) of the distillation head, only in timm's distilled training; `logits` is then the class head's."""

    def __eq__(self, other: object) -> bool:
        """Whether another has the same numbers."""
        return _same(self, other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        terms = "".join(f", {name} {term.item():.4g}" for name, term in self.terms.items())
        return f"Output(logits {tuple(self.logits.shape)}, {self.usage!r}{terms})"


def _in_graphs(kind: type) -> None:
    """Let `torch.compile` return records of a kind: what holds tensors is of the graph, the rest is known with it."""
    names = [one.name for one in fields(kind)]

    def parts(record: Any) -> tuple[list[Any], tuple[Any, ...]]:
        held = [vars(record)[name] for name in names]
        inside = [isinstance(part, Tensor | dict | Usage) for part in held]
        return (
            [part if own else None for part, own in zip(held, inside, strict=True)],
            tuple(None if own else part for part, own in zip(held, inside, strict=True)),
        )

    def whole(inside: Any, known: Any) -> Any:
        return kind(*(beside if part is None else part for part, beside in zip(inside, known, strict=True)))

    register_pytree_node(kind, parts, whole, serialized_type_name=f"adaptvit.{kind.__name__}")


for _kind in (Usage, Output):
    _in_graphs(_kind)


def _same(one: Any, other: Any) -> bool:
    """Equality of what results hold: tensors by shape, precision and values, whatever holds them field by field."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        alike = one.dtype == other.dtype and one.device == other.device
        return alike and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, Usage | Output):
        return all(_same(getattr(one, part.name), getattr(other, part.name)) for part in fields(one))
    return bool(one == other)


def join(usages: list[Usage], whole: bool = False) -> Usage:
    """One record of several batches of the same model and input size, in order: a compact one, unless `whole`.

    Raises:
        ValueError: the list is empty or the patch grids differ.
    """
    if not usages:
        raise ValueError("join needs at least one Usage, got an empty list")
    if len({usage.grid for usage in usages}) > 1:
        raise ValueError(f"join needs one patch grid, got {sorted({usage.grid for usage in usages})}")
    records = usages if whole else [usage.compact() for usage in usages]
    parts: dict[str, Any] = {}
    for name in records[0]._parts():
        known = [getattr(record, name) if whole else vars(record)[name] for record in records]
        parts[name] = None if any(part is None for part in known) else _cat(known)
    return replace(records[0], **parts)


def _cat(parts: list[Any]) -> Tensor | Bits:
    if isinstance(parts[0], Bits):
        return replace(parts[0], packed=torch.cat([part.packed for part in parts]))
    return torch.cat(parts)


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
