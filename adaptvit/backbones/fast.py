"""timm's plain block by its maps: the queries of some tokens only, the MLP in parts that stay in the caches.

Letters: B images, N token slots (prefix tokens first, then patches), D channels, H heads, d channels per head.
"""

from typing import Any

from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from adaptvit.backbones.door import Acts, Projected, Summed
from adaptvit.backbones.maps import is_hooked, is_plain, some_outputs
from adaptvit.backbones.parts import Mixer, TokenPart
from adaptvit.tokens import AttentionOptions, Tokens

MLP_ROWS = 1024
"""Tokens that go through an MLP at a time in evaluation on the CPU: few enough for the hidden features to stay in its
caches, enough for full matrix products. At batch 32 the MLPs of DeiT-S take 0.77 of the time, a fifth of the memory."""


def is_fast(block: nn.Module) -> bool:
    """Whether a block runs by its maps: timm's, with nothing put into what is then not called.

    Blocks with a `TokenPart` run so whatever is in their maps, which are then called whole.
    """
    if type(block).forward is not Block.forward:
        return False
    attn: Any = block.attn
    if isinstance(attn, Mixer) or has_token_part(block):
        return True
    return type(attn) is Attention and is_plain(attn.qkv) and is_plain(attn.proj) and not is_watched(block)


def has_maps(block: nn.Module) -> bool:
    """Whether a block is timm's plain one, with its own attention and whatever maps."""
    return type(block).forward is Block.forward and type(block.attn) is Attention


def is_watched(block: Any) -> bool:
    """Whether a hook is on what of a block is not called where it runs by its maps; of others, on anything in it."""
    if not has_maps(block):
        return any(map(is_hooked, block.modules()))
    attn = block.attn
    return any(map(is_hooked, (attn, attn.attn_drop, block.drop_path1, block.drop_path2)))


def has_token_part(block: nn.Module) -> bool:
    """Whether a part of timm's block goes by a token's slot or by the image's other tokens."""
    q_norm = getattr(block.attn, "q_norm", None)
    parts = (block.norm1, block.norm2, *(q_norm if isinstance(q_norm, nn.Sequential) else (q_norm,)))
    return any(isinstance(part, TokenPart) for part in parts)


def add_attention(block: Block, tokens: Tokens, acts: Acts) -> tuple[Tokens, Tensor | None]:
    """The attention sub-layer with its residual, and the second norm of it where that was over all tokens."""
    attn, chosen, look = block.attn, acts.chosen, acts.look
    if isinstance(attn, Mixer):
        return _add_mixed(block, tokens, chosen, acts.summed)
    rows = tokens
    if look is not None or chosen is None or not is_plain(attn.qkv) or isinstance(block.norm2, TokenPart):
        q, k, v = project(block, tokens)
        chosen = chosen if look is None else look(Projected(q, k, v))
        early = None if isinstance(block.norm2, TokenPart) else chosen  # that norm sees those that are dropped too
        if early is not None:
            rows, (q,) = tokens.select(early, q)
    else:  # without the queries of the others
        normed = on_tokens(block.norm1, tokens.x, tokens)
        rows, (few,) = tokens.select(chosen, normed)
        (q,) = _heads(block, few, slice(attn.attn_dim))
        k, v = _heads(block, normed, slice(attn.attn_dim, None))
        q, k = on_tokens(attn.q_norm, q, rows), on_tokens(attn.k_norm, k, tokens)
    dropout = attn.attn_drop.p if attn.training else 0.0
    if acts.attend is None:
        mixed = tokens.attend(q, k, v, rows, AttentionOptions(dropout, acts.bias))
    else:
        mixed = acts.attend(Projected(q, k, v), dropout)
    out = through(attn.norm, mixed.flatten(-2))
    if attn.gate is not None:
        out = out * attn.gate(block.norm1(rows.x)).sigmoid()
    rows = add_branch(rows, through(block.ls1, attn.proj_drop(attn.proj(out))), block.drop_path1, acts.summed)
    return _norm_all(block, rows, chosen)


def _norm_all(block: Block, tokens: Tokens, chosen: Tensor | int | None) -> tuple[Tokens, Tensor | None]:
    """The chosen tokens, and what a second norm over all tokens gave of them before the others were dropped."""
    if chosen is None or not isinstance(block.norm2, TokenPart):
        return tokens, None
    normed = block.norm2.on(tokens.x, tokens)
    rows, (normed,) = tokens.select(chosen, normed)
    return rows, normed


def _add_mixed(
    block: Block, tokens: Tokens, chosen: Tensor | int | None, summed: Summed | None
) -> tuple[Tokens, Tensor | None]:
    """`add_attention` where something else stands in its place, which runs over all slots at once."""
    mixed = through(block.ls1, block.attn.on(on_tokens(block.norm1, tokens.x, tokens), tokens))
    if chosen is not None and not isinstance(block.norm2, TokenPart):
        tokens, (mixed,) = tokens.select(chosen, mixed)
    return _norm_all(block, add_branch(tokens, mixed, block.drop_path1, summed), chosen)


def project(block: Block, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the attention sub-layer, normalised as the ViT does: features (..., H, d) each."""
    return project_normed(block, tokens, on_tokens(block.norm1, tokens.x, tokens))


def project_normed(block: Block, tokens: Tokens, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `project`, of what the block's first norm gave of `tokens`."""
    attn = block.attn
    q, k, v = _heads(block, normed, slice(None))
    return on_tokens(attn.q_norm, q, tokens), on_tokens(attn.k_norm, k, tokens), v


def _heads(block: Block, normed: Tensor, rows: slice) -> tuple[Tensor, ...]:
    """Those of queries, keys and values that stand in these rows of their common linear map, by head."""
    attn = block.attn
    out = some_outputs(attn.qkv, normed, rows)
    parts = out.shape[-1] // attn.attn_dim
    return out.reshape(*normed.shape[:-1], parts, attn.num_heads, attn.head_dim).unbind(-3)


def through(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), without the price of a call where there is nothing to do; at batch 1 those add up."""
    return x if type(module) is nn.Identity and not is_hooked(module) else module(x)


def on_tokens(part: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
    """A part of a block on token features of `tokens`."""
    if isinstance(part, TokenPart):
        return part.on(x, tokens)
    if isinstance(part, nn.Sequential):
        for step in part:
            x = on_tokens(step, x, tokens)
        return x
    if part.training and drops_paths(part):  # of whole images, which it takes the first dimension for
        return x * tokens.spread(part(x.new_ones(tokens.shape[0], 1, 1)))
    return through(part, x)


def drops_paths(part: nn.Module) -> bool:
    """Whether a module drops the branches of some images: timm's `DropPath`, and those of others that are like it."""
    return type(part).__name__.endswith("DropPath") and bool(getattr(part, "drop_prob", 0))


def add_branch(tokens: Tokens, branch: Tensor, drop_path: nn.Module, summed: Summed | None) -> Tokens:
    """The residual sum, which `summed` is shown; `drop_path` drops whole images' branches."""
    return residual(tokens, on_tokens(drop_path, branch, tokens), summed)


def residual(tokens: Tokens, branch: Tensor, summed: Summed | None) -> Tokens:
    """Tokens and what is added to them, which `summed` is shown."""
    out = tokens.x + branch
    if summed is not None:
        summed(tokens.x, branch, out)
    return tokens.with_x(out)
