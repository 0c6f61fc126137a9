"""Alike patches merged between attention and MLP, in pairs of two sets: what ToMe and merging by similarity share.

Letters: B images, N token slots (p prefix tokens first, then patches), L blocks, H heads, d channels per head, D
channels. A and B are the two sets of tokens, after ToMe (Bolya et al., ICLR 2023).

Slots are in the order in which a block has its tokens, which merging changes; `Usage.groups` says where patches are.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import guard_or_true
from torch.nn.functional import normalize

from adaptvit.backbones.door import Projected, mean_attention_received
from adaptvit.checks import In, check_fields
from adaptvit.macs import sublayer_macs
from adaptvit.methods.base import MethodConfig
from adaptvit.model import AdaptiveViT, Left, once
from adaptvit.tokens import Dense, Slab, Tokens, fused, kernels
from adaptvit.tokens.fused import LEAST
from adaptvit.usage import Usage

Position = Literal["receiver", "mean"]
"""`receiver`: where the token was that others were merged into; `mean`: at the mean of its patches' coordinates, which
rotary tables are computed for. A relative bias has no rows between patches, nor have blocks that are told numbers of
patches: there it is as `receiver`. Images of different shapes have no `mean`."""
Compared = Literal["mean key", "keys"]
"""What is alike: by `mean key` the cosine of keys averaged over heads, as ToMe has it; by `keys` the mean over heads of
the cosine of theirs."""
Weighing = Literal["patches", "importance"]
"""What a token counts by in the mean that it is merged into: its `patches`, as ToMe has it, or their number times its
`importance` (the weights of SAD-TM, CVPR 2026, here times the patches)."""
NEEDS = frozenset({"attention", "token norms"})
TINY = 1e-12
"""Length of a key that it is taken to have at least, as in torch's `normalize`."""


class Rule(NamedTuple):
    """Which tokens of A are merged, in numbers that a kernel goes by."""

    most: int | None = None
    """So many of every image, those that score highest; None goes by a threshold."""
    least: float = 0.0
    """Those that score this or more, less `relative` times the image's mean."""
    relative: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MergingConfig(MethodConfig):
    """What is compared, and how it is merged; a method adds how many.

    The importance of a token is the attention that it receives from the tokens that the classifier reads, mean over
    them and over heads, or, of a ViT that pools its tokens, from their mean query; as if it were one patch, and over
    the image's mean.
    """

    needs: ClassVar[Set[str]] = NEEDS

    compared: Compared = "mean key"
    """What a block compares."""
    protection: Annotated[float, In("[0, 1]")] = 0.0
    """Taken off the similarity of two tokens, times the root of the product of their importances, so that what matters
    is not averaged away. Source: the weights of SAD-TM (CVPR 2026), here as a cost."""
    proportional_attention: bool = True
    """A token is attended to as the patches it holds would be together. Off, as released, for MAE weights."""
    power: Annotated[float, In("[0, 2]")] = 1.0
    """Then a token of n patches is attended to as n to this power of them: 1 is ToMe's."""
    size_cost: Annotated[float, In("[0, 1]")] = 0.0
    """Taken off the similarity of two tokens of n and m patches, times log n + log m: the more a token stands for, the
    more is lost with it. After ATM (arXiv 2505.15160), which matches small ones first in its late blocks."""
    weighing: Weighing = "patches"
    """What a token counts by in the mean."""
    keeps_length: bool = False
    """A merged token x is as long as its parts are in their mean, x * mean(|x_i|) / |x|. The mean of vectors is shorter
    than they are, so that what later blocks add to it would count for more."""
    position: Position = "receiver"
    """Where a merged token is, of a ViT whose blocks are told positions."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def by_importance(self) -> bool:
        """Whether it goes by the importance of tokens."""
        return bool(self.protection) or self.weighing == "importance"

    @abstractmethod
    def schedule(self, depth: int) -> tuple[float, ...]:
        """One number for each of `depth` blocks.

        Raises:
            ValueError: there are fewer or more blocks.
        """

    @abstractmethod
    def merges(self, block: int, depth: int) -> bool:
        """Whether block number `block` of `depth` compares its tokens."""

    @abstractmethod
    def choose(self, score: Tensor, patches: int | Tensor, block: int, depth: int) -> Tensor:
        """The tokens of A that are merged: (B, |A|) bool.

        Args:
            score: what `match` gave.
            patches: of every image, or of each, (B, 1).
        """

    def rule(self, patches: int, block: int, depth: int) -> Rule | None:
        """What `choose` goes by, of images that have so many patches; None where numbers do not say it."""
        return None

    def merged(self, patches: int, block: int, depth: int) -> int | None:
        """Tokens that a block merges in every image that has so many patches; None where images differ."""
        return None

    def build(self, vit: nn.Module) -> "MergingViT":
        """Wrap `vit`, sharing its weights; no parameter is added.

        Raises:
            TypeError: the ViT is not one that this library reproduces.
            ValueError: a schedule that does not fit the ViT's blocks.
        """
        return MergingViT(vit, self)


class Seen(NamedTuple):
    """What attention showed of the tokens of a block, as token features in float32 or wider."""

    keys: Tensor
    """(..., d or H d) of unit length; for a device's kernel as they are, (..., H, d)."""
    importance: Tensor | None
    """(...,), where the method goes by it."""


class Places(NamedTuple):
    """For each slot, where its token goes, (B, N) int64, and whether it is merged into another there, bool."""

    place: Tensor
    moved: Tensor
    lengths: Tensor | None = None
    """(B,) int32, the tokens that are left of each image, where a device's kernel decided."""


class Pairs(NamedTuple):
    """Which tokens of A join one of B, of images that merge as many: places in the order that tokens have."""

    stay: Tensor
    """(B, p + |A| - r) the prefix and those of A that join none, in the order that they will have, before B."""
    go: Tensor
    """(B, r) those that do."""
    into: Tensor
    """(B, r) numbers in B of what they join."""

    def placed(self, slots: int, prefix: int) -> Tensor:
        """The slot that the token in each of so many slots goes to, (B, N) int64."""
        images, before = self.stay.shape
        place = torch.arange(slots, device=self.go.device).repeat(images, 1)
        others = place[:, _halves(prefix)[1]]
        after = place[:, : before + others.shape[1]]
        place = place.scatter(1, torch.cat([self.stay, others], dim=1), after)
        return place.scatter(1, self.go, before + self.into)


Decided = Places | Pairs


@dataclass(eq=False)
class Merged:
    """What is known of merged tokens on the way through the blocks."""

    holder: Tensor
    """(B, N) int64, the slot that each input token is in before the first."""
    size: Tensor
    """Token features (...,), the patches that each token has now."""
    bias: Tensor | None
    """What these add to the logits of the next block."""
    went: list[Callable[[], Tensor] | None] = field(default_factory=list)
    """Of each block until now, what says where each slot's token went; None is nowhere else."""

    @property
    def features(self) -> list[Tensor]:
        """Those of the token features that there are: who drops tokens drops theirs."""
        return [self.size] if self.bias is None else [self.size, self.bias]

    @features.setter
    def features(self, features: list[Tensor]) -> None:
        self.size, *bias = features
        self.bias = bias[0] if bias else None

    @property
    def compared(self) -> list[bool]:
        """The blocks until now that looked for tokens to merge."""
        return [place is not None for place in self.went]


class MergingViT(AdaptiveViT):
    """A ViT whose blocks merge tokens between attention and MLP; its config chooses which."""

    def __init__(self, vit: nn.Module, config: MergingConfig) -> None:
        super().__init__(vit, config)
        config.schedule(self.depth)  # refuses a wrong length

    @property
    def even(self) -> bool:
        return self.config.merged(0, 0, self.depth) is not None

    def run(self, tokens: Tokens) -> Left:
        grid = tokens.source.grid
        tokens, merged = self.start(tokens)
        for number in range(self.depth):
            tokens = self.step(number, tokens, merged)
        x, held = self.read_slots(tokens, tokens.x), once(partial(held_after, merged.holder, merged.went))
        if self.read is None:
            x = x.gather(1, held()[-1][..., None].expand(-1, -1, x.shape[2]))  # pooled by size, whatever the pool
        return self.finish(x, lambda: self.usage(held(), merged.compared, grid))

    def start(self, tokens: Tokens) -> tuple[Tokens, Merged]:
        """The tokens of the first block, and what is known of merged ones before it."""
        if self.config.position == "mean":
            tokens = tokens.at_coordinates(tokens.source.coordinates(tokens.x.new_zeros((), dtype=_wide(tokens.x))))
        tokens, holder, size = self.begin(tokens)
        bias = self.bias(size)
        size = torch.ones_like(tokens.x[..., 0], dtype=_wide(tokens.x)) if size is None else size
        return tokens, Merged(holder, size, bias)

    def step(self, number: int, tokens: Tokens, merged: Merged) -> Tokens:
        """A block, which merges tokens or not: what it leaves; what is known of these is kept in `merged`."""
        place = None
        if self.compares(number, tokens.shape[1] - self.prefix):
            tokens, place, merged.size, merged.bias = self.run_merging(number, tokens, merged.bias, merged.size)
        else:
            tokens = self.run_block(number, tokens, bias=merged.bias)
        merged.went.append(place)
        return tokens

    def begin(self, tokens: Tokens) -> tuple[Tokens, Tensor, Tensor | None]:
        """The tokens of the first block, as the first slots of each image, (B, N) int64 the slot that each input token
        is in, and how many patches each token has; None where that is one."""
        holder = torch.arange(tokens.shape[1], device=tokens.x.device).expand(tokens.shape)
        if tokens.at_first is not None:
            holder = holder * tokens.at_first  # slots that never held a token go with the first
        return tokens, holder, None

    def bias(self, size: Tensor | None) -> Tensor | None:
        """What is added to the logits of tokens of so many patches."""
        if size is None or not self.config.proportional_attention:
            return None
        return size.log() if self.config.power == 1 else self.config.power * size.log()

    def usage(self, held: list[Tensor], compared: list[bool], grid: tuple[int, ...]) -> Usage:
        """The record, as `usage_of` makes it; `compared` are the blocks that looked for tokens to merge."""
        usage = usage_of(self, held, grid)
        patches, looked = usage.attended - self.prefix, held[0].new_tensor(compared)
        widths = self.shape.each("key_dim" if self.config.compared == "mean key" else "attention_width", held[0])
        deciding = patches // 2 * (patches - patches // 2) * widths
        if self.config.by_importance:
            queries = 1 if self.read is None else self.read
            deciding = deciding + queries * usage.attended * self.shape.each("attention_width", held[0])
        return replace(usage, deciding=deciding * looked)

    def run_merging(
        self, number: int, tokens: Tokens, bias: Tensor | None, size: Tensor
    ) -> tuple[Tokens, Callable[[], Tensor], Tensor, Tensor | None]:
        """A block that merges tokens: what it leaves, what says where each slot's token went, the patches in each, and
        what these add to the logits of the block after."""
        slots, sizes, seen = tokens.shape[1], list[tuple[Tensor, Tensor | None]](), list[Seen]()
        see = once(partial(self.see, tokens))
        decide: Callable[..., Decided] = self.places
        if isinstance(tokens, Dense) and tokens.slots is None and not self._is_fused(tokens, tokens.x):
            decide = self.pairs
        decided = once(partial(decide, tokens, size, number))
        count = self.config.merged(slots - self.prefix, number, self.depth) if self.alike(tokens) else None
        left = None if count is None else slots - count

        def look(projected: Projected) -> None:
            seen[:] = [see(projected)]

        def merge(tokens: Tokens) -> Tokens:
            merged, total, added = self.join(tokens, decided(seen[0]), size, seen[0].importance, left)
            sizes[:] = [(total, added)]
            return merged

        after = self.run_block(number, tokens, bias=bias, look=look, between=merge)

        def place() -> Tensor:
            found = decided()
            return found.placed(slots, self.prefix) if isinstance(found, Pairs) else found.place

        return after, place, *sizes[0]

    def join(
        self, tokens: Tokens, decided: Decided, size: Tensor, importance: Tensor | None, left: int | None
    ) -> tuple[Tokens, Tensor, Tensor | None]:
        """Tokens merged into those that they were matched with, `left` of each image, the patches in each, and what
        these add to the logits."""
        merged: Tokens
        weight, by_importance = size, self.config.weighing == "importance"
        lengths = decided.lengths if isinstance(decided, Places) and self.config.position != "mean" else None
        if isinstance(decided, Places) and lengths is not None and self._is_fused(tokens, tokens.x):
            counted = importance if by_importance else None
            numbers = self.config.keeps_length, left, self.config.power
            merged, total, bias = tokens.join(decided.place, decided.moved, lengths, size, counted, *numbers)
            return merged, total, bias if self.config.proportional_attention else None
        if by_importance:
            assert importance is not None
            counted = importance.detach()
            weight = size * counted.where(counted > LEAST, LEAST)  # also where it is nan
        if self.config.keeps_length:
            tokens = tokens.with_x(torch.cat([tokens.x, _length(tokens.x).to(tokens.x.dtype)], dim=-1))
        if isinstance(decided, Pairs):
            assert isinstance(tokens, Dense)
            others = _halves(self.prefix)[1]
            stay, go, into = decided
            merged, totals = tokens.join_pairs(stay, others, go, into, weight, *([size] * by_importance))
            total = totals[-1]
        else:
            merged, total = tokens.merge(decided.place, decided.moved, weight, left)
            if by_importance:
                grid = tokens.grid(size)
                sizes = torch.zeros_like(grid).scatter_add(1, decided.place, grid)
                total = merged.spread(sizes[:, : merged.shape[1]])
        if self.config.keeps_length:
            x, length = merged.x[..., :-1], merged.x[..., -1:]
            merged = merged.with_x((normalize(x.to(_wide(x)), dim=-1) * length).to(x.dtype))
        return merged, total, self.bias(total)

    def alike(self, tokens: Tokens) -> bool:
        """Whether all images began with as many tokens."""
        return tokens.at_first is None

    def compares(self, block: int, patches: int) -> bool:
        """Whether a block looks for tokens to merge, where it has at most so many patches."""
        return not self.reads_few(block) and guard_or_true(patches > 1) and self.merges(block)

    def merges(self, block: int) -> bool:
        """Whether a block is to merge anything."""
        return self.config.merges(block, self.depth)

    def choose(self, score: Tensor, patches: int | Tensor, block: int) -> Tensor:
        """The tokens of A that are merged: (B, |A|) bool; `score` is that of `match`, `patches` may be (B, 1)."""
        return self.config.choose(score, patches, block, self.depth)

    def see(self, tokens: Tokens, projected: Projected) -> Seen:
        """What attention shows of the tokens of a block."""
        keys = projected.k
        if not self._is_fused(tokens, keys):
            if self.config.compared == "mean key":
                keys = normalize(keys.mean(dim=-2, dtype=_wide(keys)), dim=-1)
            else:
                keys = (keys / (_length(keys).clamp(min=TINY) * keys.shape[-2] ** 0.5)).flatten(-2)
        return Seen(keys, self.importance(tokens, projected) if self.config.by_importance else None)

    def importance(self, tokens: Tokens, projected: Projected) -> Tensor:
        """The importance of each token, token features (...,)."""
        q, k, read = projected.q, projected.k, self.read
        few = read is None or (read <= fused.QUERIES and projected.pairs is None)
        if few and self._is_fused(tokens, k):
            return tokens.attended_from(q, k, read or 0, self.prefix)
        if read is not None:
            received = mean_attention_received(tokens, projected, read)
        else:
            q = tokens.grid(q)
            count = tokens.live.sum(dim=1).view(-1, 1, 1, 1)
            received = tokens.received((q.sum(dim=1, keepdim=True) / count).to(q.dtype), k).mean(dim=-1)
        patches = tokens.grid(received)[:, self.prefix :]
        count = tokens.live[:, self.prefix :].sum(dim=1, keepdim=True)
        return received / tokens.spread(patches.sum(dim=1, keepdim=True) / count)

    def places(self, tokens: Tokens, size: Tensor, block: int, seen: Seen) -> Places:
        """Where tokens go."""
        if self._is_fused(tokens, seen.keys):
            return self._fused_places(tokens, size, block, seen)
        live = tokens.live
        score, target = match(tokens.grid(seen.keys), live, self.prefix, *self.costs(tokens, size, seen))
        patches = (tokens.shape[1] if self.alike(tokens) else live.sum(dim=1, keepdim=True)) - self.prefix
        chosen = self.choose(score, patches, block)
        return Places(*arrange(chosen, score, target, live, self.prefix))

    def pairs(self, tokens: Dense, size: Tensor, block: int, seen: Seen) -> Pairs:
        """The same of images that have as many tokens, in their first slots, and merge as many: who joins whom."""
        score, target = match(seen.keys, None, self.prefix, *self.costs(tokens, size, seen))
        patches = tokens.shape[1] - self.prefix
        count = self.config.merged(patches, block, self.depth)
        if count is None:  # of one image
            chosen = self.choose(score, patches, block)
            go, stay = (of.nonzero()[None, :, 1] for of in (chosen, ~chosen))
            if not self.prefix:
                stay = stay.gather(1, score.gather(1, stay).argsort(dim=1, descending=True))
        else:
            order = score.argsort(dim=1, descending=True)
            go, stay = order[:, :count], order[:, count:]
            if self.prefix:
                stay = stay.sort(dim=1).values
        start = _halves(self.prefix)[0].start
        first = torch.arange(self.prefix, device=stay.device).expand(stay.shape[0], -1)
        return Pairs(torch.cat([first, 2 * stay + start], dim=1), 2 * go + start, target.gather(1, go))

    def costs(self, tokens: Tokens, size: Tensor, seen: Seen) -> tuple[Tensor | None, Tensor | None]:
        """What is taken off the similarity of two tokens: (B, N) whose product is, and whose sum is."""
        product, total = None, None
        if self.config.protection:
            assert seen.importance is not None
            product = tokens.grid((self.config.protection * seen.importance).sqrt())
        if self.config.size_cost:
            total = self.config.size_cost * tokens.grid(size).clamp(min=1).log()
        return product, total

    def _is_fused(self, tokens: Tokens, keys: Tensor) -> TypeGuard[Dense | Slab]:
        """Whether a device matches these in a kernel."""
        fits = isinstance(tokens, Slab) or (isinstance(tokens, Dense) and tokens.slots is None)
        return fits and self.alike(tokens) and kernels.fuses(keys)

    def _fused_places(self, tokens: Dense | Slab, size: Tensor, block: int, seen: Seen) -> Places:
        slots, patches, config = tokens.shape[1], tokens.shape[1] - self.prefix, self.config
        offsets = tokens.offsets if isinstance(tokens, Slab) else None
        importance = seen.importance.flatten() if config.protection and seen.importance is not None else None
        score, target = fused.match(
            seen.keys.flatten(0, -3),
            importance,
            size.flatten(),
            offsets,
            slots,
            self.prefix,
            config.protection,
            config.size_cost,
            config.compared == "mean key",
        )
        chosen, rule = None, None
        if type(self).choose is MergingViT.choose:
            rule = config.rule(patches, block, self.depth)
        if rule is None:
            chosen, rule = self.choose(score, patches, block), Rule()
        return Places(*fused.arrange(chosen, score, target, offsets, slots, self.prefix, *rule))


def held_after(
    holder: Tensor, went: Sequence[Callable[[], Tensor] | None], depth: Tensor | None = None
) -> list[Tensor]:
    """(B, N) int64, the slots of the input tokens before each block, and after the last.

    Args:
        holder: those before the first.
        went: of each block, where each slot's token went, of all images or of those that ran it; None is nowhere else.
        depth: (B,) the last block that each image ran, behind which its tokens stay where they are; None is the last.
    """
    held = [holder]
    for number, place in enumerate(went):
        held.append(held[-1] if place is None else _moved(held[-1], place(), None if depth is None else depth > number))
    return held


def _moved(held: Tensor, place: Tensor, ran: Tensor | None) -> Tensor:
    """Slots of the input tokens after a block, which some images ran."""
    if ran is None:
        return place.gather(1, held)
    if len(place) < len(ran):
        place = place.new_zeros(len(ran), place.shape[1]).index_copy(0, ran.nonzero().squeeze(1), place)
    after = place.gather(1, held.clamp(max=place.shape[1] - 1))
    return torch.where(ran[:, None], after, held)


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


def match(
    metric: Tensor, live: Tensor | None, prefix: int, product: Tensor | None = None, total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best match of each patch token of A among those of B.

    A are the tokens in even slots, B those in odd ones; prefix tokens are in neither.

    Args:
        metric: (B, N, d), of unit length.
        live: (B, N) bool, the first so many slots of each image; None is all.
        product: (B, N), whose product is taken off the similarity of two tokens.
        total: (B, N), whose sum is.
    Returns:
        (B, |A|) the similarity, -inf for a dead token of A, and int64 the number of the match in B.
    """
    even, odd = _halves(prefix)
    with torch.autocast(metric.device.type, enabled=False):
        similarity = metric[:, even] @ metric[:, odd].mT
    if product is not None:
        similarity.addcmul_(product[:, even, None], product[:, None, odd], value=-1)
    if total is not None:
        similarity.sub_(total[:, None, odd])
    if live is not None:
        similarity.masked_fill_(~live[:, None, odd], -torch.inf)
    score, target = similarity.max(dim=2)
    if total is not None:
        score = score - total[:, even]
    return score if live is None else score.masked_fill(~live[:, even], -torch.inf), target


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


def _length(x: Tensor) -> Tensor:
    """(..., 1), of token features, in float32 or wider."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x))


def _halves(prefix: int) -> tuple[slice, slice]:
    """The slots of the patches in A, which are even, and in B."""
    return slice(prefix + prefix % 2, None, 2), slice(prefix + 1 - prefix % 2, None, 2)
