"""A block's parts by their names, on features of tokens; its attention is called as it is.

Letters: B images, N token slots, D channels.
"""

from typing import Any, NoReturn

from torch import Tensor, nn

from adaptvit.backbones.door import Acts, Door
from adaptvit.backbones.families import Parts, get
from adaptvit.backbones.fast import on_tokens
from adaptvit.backbones.forward import Source, argument_names
from adaptvit.backbones.standin import stand_in, with_parts
from adaptvit.tokens import Tokens


def attention(
    block: nn.Module, parts: Parts, tokens: Tokens, read: Tensor, acts: Acts, number: int
) -> tuple[Tensor, Tensor | int | None]:
    """What a block's attention gives of what it reads, token features, and the slots that are to be updated."""
    if not read.numel() and acts.look is None and acts.attend is None:  # not every ViT's attention can make heads of it
        return read, acts.chosen
    batch = tokens.with_x(read).batch
    attn, told = _told(block, parts, tokens, batch, number)
    with Door(tokens, acts) as door:
        out = attn(batch, **told)
    door.check_passed(attn)
    return tokens.of_batch(first(out)), door.chosen


def first(out: Any) -> Any:
    """What a module gives, of those that give more beside."""
    return out[0] if isinstance(out, tuple) else out


def chain(block: nn.Module, names: tuple[str, ...], x: Tensor, tokens: Tokens) -> Tensor:
    """Parts of a block, one after the other, on features of `tokens`."""
    for name in names:
        part = get(block, name)
        if isinstance(part, nn.Module):
            x = on_tokens(part, x, tokens)
        elif part is not None:
            x = part * x
    return x


def _told(
    block: nn.Module, parts: Parts, tokens: Tokens, read: Tensor, number: int
) -> tuple[nn.Module, dict[str, Any]]:
    """A block's attention, and what the ViT tells it of these tokens beside what it reads, as their `batch`."""
    source: Source = tokens.source
    attn = get(block, parts.attention)
    given = source.told(number)
    if parts.asked:
        given = _asked(block, parts, read, given)
    accepted = argument_names(type(attn).forward)
    given = {name: value for name, value in given.items() if name in accepted}
    tables = source.tables(given, tokens)
    if tables and parts.unturned is not None:  # they have rows for those tokens too
        attn = stand_in(attn, **{parts.unturned: 0})
    return attn, given | tables


class _Told(Exception):
    """A block told its attention this."""


def _asked(block: nn.Module, parts: Parts, read: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """What the block's own forward calls its attention with beside what it reads, by name."""

    def attention(_: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise _Told(args, kwargs)

    attn = get(block, parts.attention)
    passed = {name: stand_in(get(block, name), lambda _, x: x) for name in parts.into_attention}
    asked = with_parts(block, passed | {parts.attention: stand_in(attn, attention)})
    try:
        type(block).forward(asked, read, **given)
    except _Told as told:
        args, kwargs = told.args
    return dict(zip(argument_names(type(attn).forward)[1:], args, strict=False)) | kwargs
