"""EViT: blocks keep the patches that the class token attends to most and fuse the others into one token.

Liang, Ge, Tong, Song, Wang, Xie: Not All Patches are What You Need: Expediting Vision Transformers via Token
Reorganizations, ICLR 2022.

Letters: B images, N token slots (prefix tokens first, then P patches), L blocks, H heads, D channels.
Symbols of the paper: kappa keep rate, k patches kept.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from adaptvit.backbones.base import model_name
from adaptvit.backbones.door import Projected, mean_attention_received
from adaptvit.checks import Ascending, In, check_fields, valid
from adaptvit.macs import sublayer_macs
from adaptvit.methods.base import MethodConfig, Published, around_deits
from adaptvit.model import AdaptiveViT, Knob, Left, once
from adaptvit.tokens import Dense, Tokens, kernels
from adaptvit.usage import Usage

KeepRate = Annotated[float | Sequence[float], In("(0, 1]")]
ABOUT = " whose blocks 3, 6 and 9 keep 0.7: published with weights."


@dataclass(frozen=True, kw_only=True)
class EViTConfig(MethodConfig):
    """Token reorganisation (Liang et al., ICLR 2022). Defaults are those of the released models.

    A block that reduces scores its patches by the attention that the class token pays them, keeps the share of highest
    score between its attention and its MLP, and puts the sum of the others, weighted by their scores, into one token.
    All images of one shape keep as many, so that they run as a dense batch.
    """

    method: ClassVar[str] = "evit"
    title: ClassVar[str] = "EViT"
    knob: ClassVar[Knob | None] = Knob("rate", sign=1, lowest=0.0, highest=8.0, step=0.05)
    published: ClassVar[Published] = Published(
        names=around_deits("evit", dict.fromkeys(("small", "base"), ABOUT)), untold=("keep_rate", "fuse")
    )

    blocks: Annotated[Sequence[int] | None, Ascending()] = None
    """The blocks that reduce, 0-based; None is one after each quarter of the depth, 3, 6 and 9 of 12 as released."""
    keep_rate: KeepRate = 0.7
    """kappa, in (0, 1]: a number for all these blocks, or one for each. Of n tokens beside the prefix, a fused one
    included, a block keeps kappa x n, rounded up; with 1 it leaves its tokens alone."""
    tokens: Annotated[int | Sequence[int] | None, In("[1, inf)", hint="keep_rate=0.5 keeps half of them")] = None
    """Patches to keep instead, the fused token not counted: a number for all these blocks, or one for each, not
    growing but for the fused one, with which a block keeps all it gets."""
    fuse: bool = True
    """Fuse what is dropped into one token; False drops it for good."""
    rate: Annotated[float, In("[0, 1e9]")] = 1.0
    """Keep rates and token counts are taken times this: the one number by which a model is steered to a budget."""

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.tokens, Sequence) and any(b > a + self.fuse for a, b in pairwise(self.tokens)):
            raise ValueError(f"EViTConfig.tokens must not grow from block to block, got {self.tokens}")

    @property
    def needs(self) -> Set[str]:
        return frozenset({"attention", "token norms"})

    def build(self, vit: nn.Module) -> "EViT":
        """Wrap `vit`, sharing its weights; no parameter is added.

        Raises:
            TypeError: the ViT is not one that this library reproduces, or lacks what the method needs.
            ValueError: `blocks` names a block that the ViT lacks, or `keep_rate` or `tokens` has another length.
        """
        return EViT(vit, self)


class EViT(AdaptiveViT):
    """A ViT whose blocks reduce their tokens.

    Attributes:
        reducing: the blocks that may reduce. Nothing reads what the last block of a ViT keeps whose classifier reads a
            class token: there it is left out.
    """

    def __init__(self, vit: nn.Module, config: EViTConfig) -> None:
        super().__init__(vit, config)
        quarters = {self.depth * quarter // 4 for quarter in (1, 2, 3)} - {0}
        self.reducing = tuple(sorted(quarters)) if config.blocks is None else tuple(config.blocks)
        beyond = [block for block in self.reducing if block >= self.depth]
        if beyond:
            name = model_name(vit)
            raise ValueError(f"EViTConfig.blocks names block {beyond[0]}, but {name} has blocks 0..{self.depth - 1}")
        for field in ("keep_rate", "tokens"):
            self._of_each(f"EViTConfig.{field}", getattr(config, field))
        if self.read is not None and self.reducing == (self.depth - 1,):
            raise ValueError(
                f"EViTConfig.blocks={self.reducing} is the last block only, of which just the class token is read"
            )

    @property
    def even(self) -> bool:
        return True

    def run(self, tokens: Tokens, keep_rate: float | Sequence[float] | None = None) -> Left:
        """The blocks.

        Args:
            keep_rate: in (0, 1], in place of the config's, for all blocks or for each; a block whose own is 1 still
                leaves its tokens alone, and the config's `tokens` stand. None is the config's.
        Raises:
            ValueError: keep rates out of range or of another number than the blocks.
        """
        own = tokens.source.own
        kept = self.kept(tokens.shape[1] - self.prefix, keep_rate) if own is None else self.kept_of_each(own, keep_rate)
        seen = [tokens.bare]
        places: dict[int, Callable[[], Tensor]] = {}
        for number in range(self.depth):
            if number in kept:
                tokens, places[number] = self.run_reducing(number, tokens, kept[number])
            else:
                tokens = self.run_block(number, tokens)
            seen.append(tokens.bare)
        usage = partial(self.usage, seen, places, kept, tokens.source.grid)
        holders = partial(self.holders, seen, places) if self.config.fuse else None
        live = None if self.even and tokens.at_first is None and self.read is not None else tokens.live
        return self.finish(self.read_slots(tokens, tokens.x), usage, live, holders=holders)

    def holders(self, seen: list[Tokens], places: Mapping[int, Callable[[], Tensor]]) -> list[Tensor]:
        """Of each block (B, N), the slot of the fused token that each slot's token is part of behind it, or its own.

        Args:
            seen: the tokens on entry to each block, and after the last.
            places: of the blocks that dropped some, the slot of the token of these: (B, N) bool.
        """
        lives = [tokens.live for tokens in seen]
        holder = torch.arange(lives[0].shape[1], device=lives[0].device).expand(lives[0].shape)
        found = []
        for number in range(self.depth):
            if number in places:
                gone = (lives[number] & ~lives[number + 1]).gather(1, holder)
                holder = torch.where(gone, places[number]().byte().argmax(dim=1, keepdim=True), holder)
            found.append(holder)
        return found

    def run_reducing(self, number: int, tokens: Tokens, count: int | Tensor) -> tuple[Tokens, Callable[[], Tensor]]:
        """A block that keeps `count` patches: what it leaves, and the slots of the fused token, (B, N) bool.

        Args:
            count: (B, 1) where images have different numbers of them.
        """
        scores, places = list[Tensor](), list[Callable[[], Tensor]]()
        best = once(partial(self.best, tokens, count))

        def look(projected: Projected) -> None:
            scores[:] = [self.score(tokens, projected)]

        def reduce(tokens: Tokens) -> Tokens:
            reduced: Tokens
            if isinstance(count, Tensor):
                patches = scores[0][:, self.prefix :]
                reduced, slot = self.reduce_each(tokens, patches, best(patches), count)
                places[:] = [lambda: slot]
            else:
                fuse, last = self.config.fuse, None
                if isinstance(tokens, Dense) and kernels.fuses(tokens.x, scores[0]):
                    reduced, lowest, _ = tokens.best(scores[0], count + fuse, self.prefix, fuse)
                    last = lowest if fuse else None
                else:
                    patches = scores[0][:, self.prefix :]
                    reduced, last = self.reduce(tokens, patches, best(patches))
                places[:] = [partial(self.place, tokens.bare, last)]
            return reduced

        after = self.run_block(number, tokens, look=look, between=reduce)  # `look` reads `tokens` again on the way back
        return after, places[0]

    def kept(self, patches: int, keep_rate: float | Sequence[float] | None = None) -> dict[int, int]:
        """k of the blocks that drop something, by block number, for images of so many patches."""
        config, kept = self.config, {}
        if keep_rate is not None:
            keep_rate = valid("keep_rate", keep_rate, KeepRate)
        for place, block in enumerate(self.reducing):
            if self.read is not None and block == self.depth - 1:
                break
            configured = self._of_each("EViTConfig.keep_rate", config.keep_rate)[place]
            if config.tokens is not None:
                wanted = config.rate * self._of_each("EViTConfig.tokens", config.tokens)[place]
            elif configured == 1:
                wanted = patches
            elif keep_rate is not None:
                wanted = self._of_each("keep_rate", keep_rate)[place] * patches
            else:
                wanted = config.rate * configured * patches
            k = max(1, math.ceil(wanted))
            if k < patches:
                kept[block] = k
                patches = k + config.fuse
        return kept

    def kept_of_each(self, patches: Tensor, keep_rate: float | Sequence[float] | None = None) -> dict[int, Tensor]:
        """The same of images with so many patches each, (B, 1): k of each, and more than it has where it drops none."""
        counts = patches.flatten().tolist()
        each = [self.kept(count, keep_rate) for count in counts]
        return {
            block: patches.new_tensor([kept.get(block, max(counts) + 1) for kept in each])[:, None]
            for block in sorted({block for kept in each for block in kept})
        }

    def _of_each(self, name: str, value: float | Sequence[float] | None) -> Sequence[float]:
        """One number for each block that reduces."""
        if not isinstance(value, Iterable):
            return (value or 0,) * len(self.reducing)
        if len(value) != len(self.reducing):
            raise ValueError(f"{name} has {len(value)} numbers for {len(self.reducing)} blocks: {self.reducing}")
        return value

    def score(self, tokens: Tokens, projected: Projected) -> Tensor:
        """c of the patches, and what has no meaning before them: `rows`, (B, R), in float32 or wider.

        Source: EViT, section 3.2: attention of the class token, mean over heads. The queries are the tokens that the
        classifier reads, their mean where a distillation token is another; of a ViT that pools its tokens they are all.
        """
        return tokens.rows(mean_attention_received(tokens, projected, self.read))

    def best(self, tokens: Tokens, count: int | Tensor, score: Tensor) -> Tensor:
        """The `count` patches of highest score, and the one of the next highest where the rest are fused: (B, k).

        Where images have different counts all their patches, in falling order of score.
        """
        if not isinstance(tokens, Dense):  # whose rows all hold a token
            score = score.masked_fill(~tokens.rows(tokens.spread(tokens.live))[:, self.prefix :], -torch.inf)
        if isinstance(count, Tensor):
            return score.argsort(dim=1, descending=True)
        return score.topk(count + self.config.fuse, dim=1).indices

    def reduce(self, tokens: Tokens, score: Tensor, best: Tensor) -> tuple[Tokens, Tensor | None]:
        """The prefix, the `best` patches and the fused token, and the place of that among the rows: (B, 1).

        It takes the slot of the first patch to be dropped, the one of the next highest score.
        """
        prefix = torch.arange(self.prefix, device=score.device).expand(score.shape[0], -1)
        kept = torch.cat([prefix, best.sort(dim=1).values + self.prefix], dim=1)
        if not self.config.fuse:
            return tokens.take(kept), None
        x, last = tokens.rows(tokens.x), best[:, -1:] + self.prefix
        token = fuse(x[:, self.prefix :], score, best[:, :-1])
        x = x.scatter(1, last[..., None].expand(-1, -1, x.shape[2]), token[:, None].to(x.dtype))
        return tokens.with_x(tokens.of_rows(x)).take(kept), last

    def place(self, tokens: Tokens, last: Tensor | None) -> Tensor:
        """The slot of a fused token: (B, N) bool, from its place among the rows, if there is one."""
        fused = tokens.rows(torch.zeros(tokens.x.shape[:-1], dtype=torch.bool, device=tokens.x.device))
        return tokens.grid(tokens.of_rows(fused if last is None else fused.scatter(1, last, True)))

    def reduce_each(self, tokens: Tokens, score: Tensor, order: Tensor, count: Tensor) -> tuple[Tokens, Tensor]:
        """The same where an image keeps `count` of its patches, (B, 1), `order` being all of them as `best` has it."""
        live, rank = tokens.live, order.argsort(dim=1)
        kept, next_best = rank < count, (rank == count) & live[:, self.prefix :]
        fused = torch.cat([torch.zeros_like(live[:, : self.prefix]), next_best & self.config.fuse], dim=1)
        if self.config.fuse:
            x = tokens.grid(tokens.x)
            token = score.masked_fill(kept, 0.0)[:, None].to(x.dtype) @ x[:, self.prefix :]
            tokens = tokens.with_x(torch.where(tokens.spread(fused)[..., None], tokens.spread(token), tokens.x))
        return tokens.keep(torch.cat([live[:, : self.prefix], kept], dim=1) | fused), fused

    def usage(
        self,
        seen: list[Tokens],
        places: Mapping[int, Callable[[], Tensor]],
        kept: Mapping[int, int | Tensor],
        grid: tuple[int, ...],
    ) -> Usage:
        """The record.

        Args:
            seen: the tokens on entry to each block, and after the last.
            places: of the blocks that dropped some, the slot of the token of these: (B, N) bool.
            kept: of the blocks that dropped some, whose attention updates all tokens so that they can be fused.
        """
        shape, lives = self.shape, [tokens.live for tokens in seen]
        fuseds = [torch.zeros_like(lives[0])]
        for number in range(self.depth - 1):
            held = fuseds[-1] | places[number]() if number in places else fuseds[-1]
            fuseds.append(held & lives[number + 1])
        live, fused = torch.stack(lives, dim=1), torch.stack(fuseds, dim=1)
        held = live.sum(dim=2)
        before, after = held[:, :-1], held[:, 1:]
        reduces = torch.tensor([block in kept for block in range(self.depth)], device=live.device)
        if any(isinstance(count, Tensor) for count in kept.values()):  # not of every image
            reduces = reduces & (after < before)
        updated = torch.where(reduces, before, after)
        heads = before.new_tensor(self.heads).expand_as(before)
        attention, mlp = sublayer_macs(shape, heads, before, updated, after)
        scoring = (before if self.read is None else self.read) * before * shape.each("attention_width", live)
        fusing = (before - self.prefix) * shape.dim * self.config.fuse
        deciding = reduces * (scoring + fusing)
        usage = Usage.of_live(live, self.heads, grid, self.prefix, deciding)
        return replace(usage, updated=updated, executed=attention + mlp, fused=fused)


def fuse(x: Tensor, score: Tensor, kept: Tensor) -> Tensor:
    """The sum of the patches that are not kept, weighted by their scores, which do not add up to 1: (B, D).

    Args:
        x: (B, R, D) patches.
        score: (B, R), 0 where dead.
        kept: (B, k) places of the patches to leave out.
    Source: EViT, section 3.3, as released: the weights are the attention as it is.
    """
    return (score.scatter(1, kept, 0.0)[:, None].to(x.dtype) @ x)[:, 0]


def keep_rate_at(
    update: int, updates: int, keep_rate: float, start: int = 10, end: int = 110, highest: float = 1.0
) -> float:
    """The keep rate to train with, on its way from `highest` to `keep_rate` along a cosine.

        model(images, keep_rate=keep_rate_at(update, updates, 0.7))

    Args:
        update: counted from 0 over the training.
        updates: of an epoch.
        start, end: epochs, counted from 0, at which it leaves 1 and has arrived. Released: 10 and 110 of 300 from
            scratch; 0 and 0 to fine-tune.
        highest: where it comes down from, once it has started.
    """
    epoch = update // updates
    if epoch < start:
        return 1.0
    if epoch >= end:
        return keep_rate
    progress = (update - start * updates) / (updates * (end - start))
    return keep_rate + (highest - keep_rate) * (1 + math.cos(math.pi * progress)) / 2
