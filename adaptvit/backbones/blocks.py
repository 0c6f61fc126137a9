"""A ViT's block on tokens. It is called as a module, once, with its hooks and what is wrapped around it.

    whole    the block's own forward: what a method does inside of it is done when it is through
    split    its parts by their names, its attention called as it is: methods act between attention and MLP
    fast     timm's plain block by its maps (`fast.py`), as long as nothing is put into what that passes over

Letters: B images, N token slots, P patches, D channels, H heads, d channels per head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptvit.backbones import fast
from adaptvit.backbones.base import Placed, blocks_of
from adaptvit.backbones.door import Acts, Door, Summed
from adaptvit.backbones.families import Parts, get
from adaptvit.backbones.fast import MLP_ROWS, drops_paths, is_fast, residual
from adaptvit.backbones.maps import is_hooked
from adaptvit.backbones.parts import TokenPart
from adaptvit.backbones.split import attention, chain, first
from adaptvit.backbones.standin import stand_in, with_parts
from adaptvit.tokens import Packed, Slab, Tokens
from adaptvit.tokens.kernels import on_host

PLAIN = Parts()
"""Of timm's plain block."""
Body = Callable[[Any, Tokens], Tokens]
"""Stands for a block's forward: the block, tokens -> what it leaves of them."""


def run_block(number: int, tokens: Tokens, acts: Acts, checkpointing: bool = False) -> Tokens:
    """Block `number` of the ViT, from 0, that `adaptvit.backbones.forward` made the tokens with.

    Args:
        checkpointing: keep nothing of it for the backward pass but its input, and run it again there.
    """
    block: Placed = tokens.source.blocks[number]
    parts = block.parts
    if is_fast(block.core):
        return run_body(number, tokens, lambda block, tokens: _fast(block, tokens, acts), checkpointing)
    if parts is None:
        return _whole(block.called, number, tokens, acts, checkpointing)
    return run_body(number, tokens, lambda block, tokens: _split(block, parts, tokens, acts, number), checkpointing)


def run_body(number: int, tokens: Tokens, body: Body, checkpointing: bool = False) -> Tokens:
    """The call of block `number`, with all that is on it and around it, with `body` in the place of its forward."""
    (block, path, core, _), batch = tokens.source.blocks[number], tokens.batch
    left: list[tuple[Tokens, Tensor]] = []

    def forward(core: nn.Module, x: Tensor, *_: Any, **__: Any) -> Any:
        # what is not `batch` somebody has changed
        after = body(core, tokens if x is batch else tokens.with_x(tokens.of_batch(x)))
        out = after.batch
        left[:] = [(after, out)]
        return (out, None) if tokens.source.family.tuples else out

    stand = stand_in(core, forward)
    args, kwargs = tokens.source.calls[number]
    out = first(_call(with_parts(block, {path: stand}) if path else stand, batch, args, kwargs, checkpointing))
    after, given = left[0]
    if out is given and not torch.is_grad_enabled():
        return after
    return after.with_x(after.of_batch(out))  # what hooks on the way back are on


def _call(block: Callable[..., Any], batch: Tensor, args: Any, kwargs: Any, checkpointing: bool) -> Any:
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, batch, *args, use_reentrant=False, **kwargs)
    return block(batch, *args, **kwargs)


def _fast(block: Any, tokens: Tokens, acts: Acts) -> Tokens:
    tokens, normed = fast.add_attention(block, tokens, acts)
    if acts.between is not None:
        tokens, normed = acts.between(tokens), None
    return _add_mlp(block, PLAIN, tokens, acts.summed, normed)


def _split(block: nn.Module, parts: Parts, tokens: Tokens, acts: Acts, number: int) -> Tokens:
    branch, chosen = attention(block, parts, tokens, chain(block, parts.into_attention, tokens.x, tokens), acts, number)
    rows = tokens
    if chosen is not None:
        rows, (branch,) = tokens.select(chosen, branch)
    rows = residual(rows, chain(block, parts.out_of_attention, branch, rows), acts.summed)
    if acts.between is not None:
        rows = acts.between(rows)
    return _add_mlp(block, parts, rows, acts.summed)


def _add_mlp(block: Any, parts: Parts, tokens: Tokens, summed: Summed | None, normed: Tensor | None = None) -> Tokens:
    """The MLP sub-layer with its residual; in evaluation on the CPU a part of the tokens at a time.

    Args:
        normed: what the block's second norm gives of `tokens`, where it is known.
    """
    x = tokens.x
    into = () if normed is not None else parts.into_mlp
    if into and isinstance(get(block, into[0]), TokenPart):
        normed, into = chain(block, into, x, tokens), ()
    read, names = x if normed is None else normed, (*into, *parts.mlp, *parts.out_of_mlp)
    whole = torch.compiler.is_compiling() or x.shape[:-1].numel() <= MLP_ROWS or summed is not None
    if whole or not _in_parts(block, names, x):
        return residual(tokens, chain(block, names, read, tokens), summed)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    streams = (out.view(-1, x.shape[-1]), x.flatten(0, -2), read.flatten(0, -2))
    for place, rows, some in zip(*(stream.split(MLP_ROWS) for stream in streams), strict=True):
        torch.add(rows, chain(block, names, some, tokens), out=place)
    return tokens.with_x(out)


def _in_parts(block: nn.Module, names: tuple[str, ...], x: Tensor) -> bool:
    """Whether these parts may be called more than once, on some tokens each."""
    if torch.is_grad_enabled() or block.training or not on_host(x.device):
        return False
    parts = (get(block, name) for name in names)
    return not any(is_hooked(inner) for part in parts if isinstance(part, nn.Module) for inner in part.modules())


def is_sharded(vit: nn.Module, number: int) -> bool:
    """Whether the weights of block `number` are together only while it is called, as `fully_shard` has them."""
    return hasattr(blocks_of(vit)[number], "unshard")


def attention_reads(number: int, tokens: Tokens) -> Tensor:
    """What the attention of block `number`, whose parts have names, reads of tokens: token features."""
    block: Placed = tokens.source.blocks[number]
    assert block.parts is not None
    return chain(block.core, block.parts.into_attention, tokens.x, tokens)


def called_with(number: int, tokens: Tokens) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What block `number` is called with beside the features of these tokens."""
    args, kwargs = tokens.source.calls[number]
    given = tokens.source.told(number)
    tables = tokens.source.tables(given, tokens)
    return ((), given | tables) if tables else (args, kwargs)


def _whole(block: Any, number: int, tokens: Tokens, acts: Acts, checkpointing: bool) -> Tokens:
    """A block whose parts have no names: methods see what attention attends with, and act when the block is through."""
    ragged = isinstance(tokens, Slab) or (isinstance(tokens, Packed) and tokens.even is None)
    if ragged and block.training and any(map(drops_paths, block.modules())):
        raise NotImplementedError(
            f"{type(block).__name__} drops the paths of whole images, which packed tokens of different numbers are "
            "not: train with layout=Masked"
        )
    args, kwargs = called_with(number, tokens)
    doors: list[Door] = []

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with Door(tokens, acts, whole=True) as door:
            doors.append(door)
            return block(x, *args, **kwargs)

    out, door = _call(forward, tokens.batch, args, kwargs, checkpointing), doors[0]
    door.check_passed(block)
    tokens = tokens.with_x(tokens.of_batch(first(out)))
    if door.chosen is not None:
        tokens = tokens.keep(door.chosen)
    return tokens if acts.between is None else acts.between(tokens)
