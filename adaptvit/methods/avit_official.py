"""What the released A-ViT code does differently while it trains; imported by `avit.py` for `mode="official"` alone.

Kept to reproduce its losses and gradients. Logits and halting depths are those of the clean mode.
"""

from typing import TYPE_CHECKING

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, xlogy
from torch.nn.functional import scaled_dot_product_attention

from adaptvit.priors import released_target
from adaptvit.tokens import Masked, Tokens
from adaptvit.usage import Output, Usage
from adaptvit.vit import classify, embed

if TYPE_CHECKING:
    from adaptvit.methods.avit import AViT

HIDDEN = -1000.0
"""Added to the attention logits of halted keys."""


def target(name: str, blocks: int, peak: float, scale: float) -> Tensor:
    """The released, unnormalised target; its peak lies on a whole block."""
    return released_target(name, blocks, int(peak), scale)


def forward(model: "AViT", images: Tensor, layout: type[Tokens]) -> Output:
    """The full pass, every slot in every block, with the released losses.

    Raises:
        ValueError: the layout is not `Masked`.
    """
    if layout is not Masked:
        raise ValueError(
            "AViTConfig.mode='official' reads dead slots in its losses: use layout=Masked or early_exit=True"
        )
    x, grid = embed(model.vit, images)
    live = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    total = torch.zeros(live.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    rho, output = total, total.new_zeros(())
    reading = torch.arange(live.shape[1], device=x.device) < (model.read or live.shape[1])
    lives, scores = [], []
    for block in model.vit.blocks:
        last = block is model.vit.blocks[-1]
        x = run_block(block, x, live)
        tokens = Masked(x, live)
        raw = torch.sigmoid(model.config.gate_scale * x[..., 0].to(total.dtype) - model.config.gate_center)
        score = torch.ones_like(raw) if last else raw
        if model.config.class_token == "stays" and not last:
            score = score.masked_fill(reading, 0)
        reached = live & (total + score > 1 - model.config.epsilon)
        going = live & (total + score < 1 - model.config.epsilon)
        remainder = (1 - total) * reached
        output = output + model.read_out(tokens, remainder + score * going)
        rho = rho + live + remainder
        total = total + score
        lives.append(live)
        scores.append(raw)
        live = going
    logits, distilled = classify(model.vit, output.to(x.dtype))
    depth = torch.stack(lives).sum(dim=0)
    usage = Usage.of_depth(depth, model.heads, grid, model.prefix)
    return Output(logits, usage, terms(model, torch.stack(scores), rho), distilled)


def run_block(block: Block, x: Tensor, live: Tensor) -> Tensor:
    """One block on (B, N, D) with halted tokens set to 0, in value only: their gradient passes straight through."""
    alive = live[..., None].to(x.dtype)
    x = x + (alive * x - x).detach()
    attn = block.attn
    normed = alive * block.norm1(alive * x)
    q, k, v = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    mask = HIDDEN * (1 - alive).transpose(1, 2)[:, None]
    dropout = attn.attn_drop.p if attn.training else 0.0
    mixed = scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v, attn_mask=mask, dropout_p=dropout)
    out = attn.norm(mixed.transpose(1, 2).flatten(-2))
    if attn.gate is not None:
        out = out * attn.gate(normed).sigmoid()
    x = x + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(out))))
    return x + block.drop_path2(block.ls2(block.mlp(alive * block.norm2(alive * x))))


def terms(model: "AViT", scores: Tensor, rho: Tensor) -> dict[str, Tensor]:
    """Ponder loss over all tokens; distribution loss over images 2..B, left out where it is NaN or not positive."""
    ponder = {"ponder": model.config.ponder_weight * rho.mean()}
    mean_scores = scores[:, 1:].flatten(1).mean(dim=1)
    model_distribution = (mean_scores / mean_scores.sum()).clamp(0.01, 0.99)
    goal = model.prior.to(scores.dtype)
    prior = model.config.prior_weight * (xlogy(goal, goal) - goal * model_distribution.log()).mean()
    return ponder | {"prior": prior} if prior > 0 else ponder
