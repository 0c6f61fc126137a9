"""A forward in parts, by a timm ViT's own submodules on `Tokens`: embed, blocks and what is in them, classify.

Letters: B images, N token slots (prefix tokens first, then patches), D channels, H heads, d channels per head.
"""

import copy

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from adaptvit.backbones.base import check_images, patch_grid
from adaptvit.backbones.maps import is_hooked, is_plain, some_outputs
from adaptvit.backbones.parts import Mixer, TokenPart
from adaptvit.tokens import Tokens

MLP_ROWS = 1024
"""Tokens that go through an MLP at a time in evaluation on the CPU: few enough for the hidden features to stay in its
caches, enough for full matrix products. At batch 32 the MLPs of DeiT-S take 0.77 of the time, a fifth of the memory."""
Projected = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values."""


def embed(vit: VisionTransformer, images: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Images -> tokens (B, N, D) as the first block receives them, and the patch grid (rows, columns).

    An image that is not finite has no finite token, so that whatever a method leaves out of it, its logits are NaN.

    Raises:
        ValueError: the images' shape or device does not fit the model.
        TypeError: the images are not floating point, or of another precision than the weights.
    """
    check_images(vit, images)
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    spoilt = 0 * x.sum(dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))  # 0, or NaN
    return x + spoilt.to(x.dtype), patch_grid(vit, images)


def attention_norm(vit: VisionTransformer, block: int, x: Tensor) -> Tensor:
    """What the attention sub-layer of a block reads of features (..., D)."""
    return vit.blocks[block].norm1(x)


def like_norm(vit: VisionTransformer) -> nn.Module:
    """A fresh norm of the kind and size that the blocks have."""
    norm = copy.deepcopy(vit.blocks[0].norm1)
    norm.reset_parameters()
    return norm.requires_grad_(True)


def run_block(
    block: Block,
    tokens: Tokens,
    chosen: Tensor | None = None,
    projected: Projected | None = None,
    bias: Tensor | None = None,
) -> Tokens:
    """One transformer block.

    Args:
        chosen: (B, N) or (1, N) bool, the slots to update; the others are attended to and then dropped. None: all.
        projected: what `project` gave, where it was needed to choose.
        bias: token features (...,), added to the attention logits of each token as a key.
    """
    if chosen is None or not isinstance(block.norm2, TokenPart):
        return add_mlp(block, add_attention(block, tokens, chosen, projected, bias))
    tokens = add_attention(block, tokens, None, projected, bias)  # a norm over tokens sees those that are dropped too
    normed = block.norm2.on(tokens.x, tokens)
    rows, (normed,) = tokens.filter(tokens.spread(chosen.expand(tokens.shape)), normed)
    return add_mlp(block, rows, normed)


def add_attention(
    block: Block,
    tokens: Tokens,
    chosen: Tensor | None = None,
    projected: Projected | None = None,
    bias: Tensor | None = None,
) -> Tokens:
    """The attention sub-layer with its residual; `chosen`, `projected` and `bias` as in `run_block`."""
    attn = block.attn
    if isinstance(attn, Mixer):
        return _add_mixed(block, tokens, chosen)
    rows = tokens
    if chosen is None:
        q, k, v = projected or project(block, tokens)
    elif projected is not None or not is_plain(attn.qkv):
        q, k, v = projected or project(block, tokens)
        rows, (q,) = tokens.filter(tokens.spread(chosen.expand(tokens.shape)), q)
    else:  # without the queries of the others
        normed = on_tokens(block.norm1, tokens.x, tokens)
        rows, (few,) = tokens.filter(tokens.spread(chosen.expand(tokens.shape)), normed)
        (q,) = _heads(block, few, slice(attn.attn_dim))
        k, v = _heads(block, normed, slice(attn.attn_dim, None))
        q, k = on_tokens(attn.q_norm, q, rows), on_tokens(attn.k_norm, k, tokens)
    mixed = tokens.attend(q, k, v, rows, attn.attn_drop.p if attn.training else 0.0, bias)
    out = through(attn.norm, mixed.flatten(-2))
    if attn.gate is not None:
        out = out * attn.gate(block.norm1(rows.x)).sigmoid()
    return add_branch(rows, through(block.ls1, attn.proj_drop(attn.proj(out))), block.drop_path1)


def _add_mixed(block: Block, tokens: Tokens, chosen: Tensor | None) -> Tokens:
    """`add_attention` where something else stands in its place, which runs over all slots at once."""
    mixed = through(block.ls1, block.attn.on(on_tokens(block.norm1, tokens.x, tokens), tokens))
    if chosen is not None:
        tokens, (mixed,) = tokens.filter(tokens.spread(chosen.expand(tokens.shape)), mixed)
    return add_branch(tokens, mixed, block.drop_path1)


def project(block: Block, tokens: Tokens) -> Projected:
    """Queries, keys and values of the attention sub-layer, normalised as the ViT does: features (..., H, d) each.

    Raises:
        TypeError: the block has something else in the place of attention.
    """
    return project_normed(block, tokens, on_tokens(block.norm1, tokens.x, tokens))


def project_normed(block: Block, tokens: Tokens, normed: Tensor) -> Projected:
    """As `project`, of what the block's first norm gave of `tokens`."""
    attn = block.attn
    if isinstance(attn, Mixer):
        raise TypeError(f"the block has {type(attn).__name__} in the place of attention: no queries, keys and values")
    q, k, v = _heads(block, normed, slice(None))
    return on_tokens(attn.q_norm, q, tokens), on_tokens(attn.k_norm, k, tokens), v


def _heads(block: Block, normed: Tensor, rows: slice) -> tuple[Tensor, ...]:
    """Those of queries, keys and values that stand in these rows of their common linear map, by head."""
    attn = block.attn
    out = some_outputs(attn.qkv, normed, rows)
    parts = out.shape[-1] // attn.attn_dim
    return out.reshape(*normed.shape[:-1], parts, attn.num_heads, attn.head_dim).unbind(-3)


def attention_received(tokens: Tokens, projected: Projected, slots: int | None) -> Tensor:
    """Attention that each token receives, mean over queries, by head: features (..., H).

    Args:
        projected: what `project` gave.
        slots: the queries are those of the first so many slots; None takes all live tokens.
    """
    q, k, _ = projected
    return tokens.received(tokens.rows(q) if slots is None else tokens.first(q, slots), k)


def add_mlp(block: Block, tokens: Tokens, normed: Tensor | None = None) -> Tokens:
    """The MLP sub-layer with its residual; in evaluation on the CPU a part of the tokens at a time.

    Args:
        normed: what the block's second norm gives of `tokens`, where it is known.
    """
    x = tokens.x
    if normed is None and isinstance(block.norm2, TokenPart):
        normed = block.norm2.on(x, tokens)

    def mlp(read: Tensor) -> Tensor:
        return through(block.ls2, block.mlp(block.norm2(read) if normed is None else read))

    read = x if normed is None else normed
    whole = torch.is_grad_enabled() or block.training or x.device.type != "cpu" or is_hooked(block.mlp)
    if whole or x.shape[:-1].numel() <= MLP_ROWS:
        return add_branch(tokens, mlp(read), block.drop_path2)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    parts = (out.view(-1, x.shape[-1]), x.flatten(0, -2), read.flatten(0, -2))
    for place, rows, some in zip(*(part.split(MLP_ROWS) for part in parts), strict=True):
        torch.add(rows, mlp(some), out=place)
    return tokens.with_x(out)


def classify(vit: VisionTransformer, x: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Final norm, pooling and head.

    Args:
        x: (B, n, D), the slots that `read_slots` names, or all.
        live: (B, n) bool, the slots to pool; None pools all of `x`.
    Returns:
        logits (B, classes), and the distillation head's in timm's distilled training, else None.
    """
    x = vit.norm(x)
    if live is not None and vit.global_pool != "token":
        return vit.head(vit.head_drop(vit.fc_norm(_pool(vit, x, live)))), None
    logits = vit.forward_head(x)
    return logits if isinstance(logits, tuple) else (logits, None)


def final_norm(vit: VisionTransformer, x: Tensor) -> Tensor:
    """What the ViT makes of features (..., D) of its last block before it pools them."""
    return vit.norm(x)


def _pool(vit: VisionTransformer, x: Tensor, live: Tensor) -> Tensor:
    """timm's pooling of (B, N, D) over live slots only."""
    if vit.attn_pool is not None:
        start = 0 if vit.pool_include_prefix else vit.num_prefix_tokens
        return vit.attn_pool(x[:, start:], attn_mask=live[:, None, None, start:])
    patches = slice(0 if vit.pool_include_prefix else vit.num_prefix_tokens, None)
    alive = live[:, patches, None]
    mean = (x[:, patches] * alive).sum(dim=1, keepdim=True) / alive.sum(dim=1, keepdim=True)
    # in dead slots the mean moves neither mean nor maximum
    return vit.pool(torch.where(live[..., None], x, mean))


def through(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), without the price of a call where there is nothing to do; at batch 1 those add up."""
    return x if type(module) is nn.Identity else module(x)


def on_tokens(part: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
    """A part of a block on token features of `tokens`."""
    if isinstance(part, TokenPart):
        return part.on(x, tokens)
    if isinstance(part, nn.Sequential):
        for step in part:
            x = on_tokens(step, x, tokens)
        return x
    return through(part, x)


def add_branch(tokens: Tokens, branch: Tensor, drop_path: nn.Module) -> Tokens:
    if isinstance(drop_path, DropPath) and drop_path.training:
        branch = branch * tokens.spread(drop_path(branch.new_ones(tokens.shape[0], 1, 1)))
    return tokens.with_x(tokens.x + branch)
