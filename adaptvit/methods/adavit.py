"""AdaViT: each image decides, block by block, which patches, attention heads and sub-layers it uses.

Meng, Li, Chen, Lan, Wu, Jiang, Lim: AdaViT: Adaptive Vision Transformers for Efficient Image Recognition, CVPR 2022.

Letters: B images, N token slots (class token first), P patches, L blocks, D channels, H heads.
Symbols of the paper: m decision, tau temperature of the gates.
"""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import linear

from adaptvit.checks import In, OneOf, check_fields
from adaptvit.gated import Gates, Takes, check_gated, gated_macs, has_plain_mlp, run_gated
from adaptvit.gates import entropy, gate, gumbel_difference, log_odds, probability
from adaptvit.losses import mean_over_processes
from adaptvit.macs import dense_macs, macs
from adaptvit.methods import adavit_official
from adaptvit.model import AdaptiveViT, Knob
from adaptvit.tokens import Masked, Packed, Tokens
from adaptvit.usage import Output, Usage
from adaptvit.vit import attention_norm, classify, embed, like_norm, model_name, patch_grid

KINDS = ("patches", "heads", "sublayers")


@dataclass(frozen=True, kw_only=True)
class AdaViTConfig:
    """Policies over patches, heads and sub-layers (Meng et al., CVPR 2022). Defaults are those of the released models.

    `mode="clean"`, the default, differs from `"official"`, the released code, while it trains:

    - the temperature shapes the gradient alone; released: it also divides the logits before they are compared with the
      threshold, so that training keeps fewer patches than evaluation does with the same logits;
    - a patch that is off attends to the patches that are on, so that its gate learns what it would have gained;
      released: to itself alone;
    - usage losses are squares of what is over or under the target, patches counted without the class token; released:
      absolute values for heads and sub-layers, sub-layers that are off left out of the count of heads;
    - a budget on executed MACs, which the released code has not;
    - stochastic depth acts in every block; released: not in one with a sub-layer policy;
    - `heads_take="identity"` trains beside patch policies; released: without effect there.
    """

    method: ClassVar[str] = "adavit"
    knob: ClassVar[Knob | None] = Knob("lean", sign=1, lowest=-30.0, highest=30.0, step=0.25)

    policies: Annotated[tuple[str, ...], OneOf(KINDS)] = KINDS
    """What is decided: any of patches, heads and sublayers."""
    first_block: Annotated[int, In("[0, inf)")] = 1
    """First block, from 0, with policies over heads and sub-layers."""
    first_patch_block: Annotated[int, In("[0, inf)")] = 0
    """First block with a policy over patches."""
    patches_skip: Literal["attention and mlp", "attention"] = "attention and mlp"
    """The sub-layers that a patch which is off is left out of."""
    heads_take: Takes = "input"
    """What an off head switches off beside its attention: its channels of the MLP's input; "hidden", its share of the
    MLP's hidden channels (released as head_v2); "identity", nothing: its attention becomes the identity (head_attn)."""
    norm_policies: bool = False
    """The policies over heads and sub-layers read a normalised token, by a layer norm of their own."""
    patch_threshold: Annotated[float, In("(0, 1)")] = 0.6
    """A patch is on where the sigmoid of its logit is above this."""
    threshold: Annotated[float, In("(0, 1)")] = 0.5
    """The same for heads and sub-layers."""
    temperature: Annotated[float, In("[0.001, 1e6]")] = 5.0
    """tau of the Gumbel gates."""
    noise: Annotated[float, In("[0, 1000]")] = 1.0
    """Scale of the Gumbel noise in training; 0 decides as evaluation does, which leaves pretrained features whole."""
    initial_bias: Annotated[float, In("[-1000, 1000]")] = 0.0
    """Of the policies' maps before they are trained; 3 leaves nearly everything on, so that pretrained features are not
    wrecked at the first step."""
    lean: Annotated[float, In("[-1000, 1000]")] = 0.0
    """Added to every logit: steers a trained model to other budgets."""
    random: bool = False
    """Draw every decision anew, each on with probability sigmoid(`lean`), 0.5 at 0, whatever the thresholds are:
    the control."""
    macs_target: Annotated[float | None, In("(0, 1]", "the share of the dense MACs")] = 0.5
    """Share of the dense MACs to train for; None trains without that loss."""
    macs_weight: Annotated[float, In("[0, inf)")] = 4.0
    """Weight of the squared distance from it."""
    usage_targets: Annotated[tuple[float, float, float], In("(0, 1]")] = (0.5, 0.5, 0.5)
    """Shares of patches, heads and sub-layers that the usage losses want on."""
    usage_weight: Annotated[float, In("[0, inf)")] = 0.0
    """Weight of the usage losses, 2 as released."""
    diversity_weight: Annotated[float, In("[0, inf)")] = 0.0
    """Within them, of each head's and sub-layer's own distance from the target."""
    entropy_weight: Annotated[float, In("[0, inf)")] = 0.0
    """Within them, of the entropy of the decisions over heads and sub-layers, which is rewarded."""
    minimums: Annotated[tuple[float, float, float], In("[0, 1]")] = (0.0, 0.0, 0.0)
    """Shares of an image's patches, of each head and of each sub-layer below which a penalty sets in."""
    minimum_weights: Annotated[tuple[float, float, float], In("[0, inf)")] = (0.0, 0.0, 0.0)
    """Within the usage losses, of those penalties."""
    attention_mask: Literal["keys", "keys with gradient", "after softmax"] = "keys"
    """`official` training: patches that are off are hidden before the softmax, with or without a gradient through the
    mask, or after it. Evaluation hides them before."""
    mlp_gradient: bool = True
    """`official` training: the gates of patches learn from the MLP too."""
    mode: Literal["clean", "official"] = "clean"
    """`official` reproduces the released code's training; evaluation is the same in both."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.policies or len(set(self.policies)) < len(self.policies):
            raise ValueError(
                f"AdaViTConfig.policies must be some of {', '.join(KINDS)}, each once, got {self.policies}"
            )
        if not self.usage_weight and (self.diversity_weight or self.entropy_weight or any(self.minimum_weights)):
            raise ValueError(
                "AdaViTConfig.usage_weight is 0, so that no other usage loss has an effect: set it above 0"
            )
        if self.mode == "official" and self.macs_target is not None:
            raise ValueError(
                "AdaViTConfig.mode='official' has no loss on MACs: set macs_target=None, in AdaViTConfig itself, "
                "since timm.create_model leaves out arguments that are None"
            )
        if self.mode == "clean" and (self.attention_mask != "keys" or not self.mlp_gradient):
            raise ValueError("AdaViTConfig.attention_mask and mlp_gradient are for mode='official'")

    def build(self, vit: VisionTransformer) -> "AdaViT":
        """Wrap `vit`, sharing its weights, with policies that have yet to be trained.

        Raises:
            TypeError: the ViT is not one that this library reproduces, or its heads cannot be switched off this way.
            ValueError: a policy starts at a block that the ViT lacks, or `macs_target` is below what it costs to
                leave out everything that can be.
        """
        return AdaViT(vit, self)


@dataclass(frozen=True, eq=False)
class Policies:
    """Decisions of all blocks: 0 or 1, with gradients in training; 1 where a block decides nothing."""

    patches: Tensor
    """(B, L, P)."""
    heads: Tensor
    """(B, L, H)."""
    sublayers: Tensor
    """(B, L, 2): attention, MLP."""
    head_logits: Tensor | None = None
    """(B, L', H) of the blocks that decide."""
    sublayer_logits: Tensor | None = None
    """(B, L', 2) of the blocks that decide."""


class AdaViT(AdaptiveViT):
    """A ViT with policies.

    Attributes:
        patch_policy, head_policy, sublayer_policy: the linear maps that decide, by block number.
    """

    def __init__(self, vit: VisionTransformer, config: AdaViTConfig) -> None:
        super().__init__(vit, config)
        size, dim = self.depth, self.shape.dim
        for name, kinds in (("first_block", {"heads", "sublayers"}), ("first_patch_block", {"patches"})):
            first = getattr(config, name)
            if first >= size and kinds & set(config.policies):
                raise ValueError(
                    f"AdaViTConfig.{name} is block {first}, but {model_name(vit)} has blocks 0..{size - 1}"
                )
        check_gated(vit, config.heads_take if "heads" in config.policies else None)
        self.plain_mlp = has_plain_mlp(vit)
        later, bias = range(config.first_block, size), config.initial_bias
        patched = range(config.first_patch_block, size)
        self.patch_policy = _maps(patched if "patches" in config.policies else (), dim, 1, bias)
        self.head_policy = _maps(later if "heads" in config.policies else (), dim, self.heads[0], bias)
        self.sublayer_policy = _maps(later if "sublayers" in config.policies else (), dim, 2, bias)
        normed = config.norm_policies and bool(self.head_policy or self.sublayer_policy)
        self.policy_norm = nn.ModuleDict({str(block): like_norm(vit) for block in later if normed})
        for part in (self.patch_policy, self.head_policy, self.sublayer_policy, self.policy_norm):
            part.to(next(vit.parameters())).train(vit.training)
        if config.macs_target is not None:
            self._check_target(config.macs_target)

    def forward(self, images: Tensor, layout: type[Tokens] | None = None) -> Output:
        """Classify images.

        Args:
            images: (B, channels, height, width).
            layout: None is `Masked` in training, whose gates pass gradients, and `Packed` in evaluation, which computes
                only what is on and carries no gradients.
        Raises:
            ValueError: `Packed` in training.
        """
        layout = layout or (Masked if self.training else Packed)
        with torch.no_grad() if layout is Packed else nullcontext():
            tokens, policies, grid = self.run(images, layout)
            logits, distilled = classify(self.vit, tokens.first(tokens.x, self.read or tokens.shape[1]))
        return Output(logits, self.usage(policies, grid), self.terms(policies, grid), distilled)

    def run(self, images: Tensor, layout: type[Tokens]) -> tuple[Tokens, Policies, tuple[int, ...]]:
        """The blocks: what they leave, what they decided, and the patch grid; arguments as of `forward`."""
        if self.training and layout is Packed:
            raise ValueError("AdaViT trains with layout=Masked: its gates learn from what they leave out")
        x, grid = embed(self.vit, images)
        tokens: Tokens = layout.of(x)
        del x
        decided = []
        for number, block in enumerate(self.vit.blocks):
            policies, normed = self.decide(number, tokens)
            read = self.read if number == self.depth - 1 else None
            official = adavit_official.training(self.config, number) if self.training else {}
            gates = self.gates(policies)
            tokens = run_gated(block, tokens, gates, self.config.heads_take, normed, read, **official)
            decided.append(policies)
        return tokens, _stack(decided), grid

    def decide(self, block: int, tokens: Tokens) -> tuple[Policies, Tensor | None]:
        """One block's decisions from its input, and what its first norm gave, where that was needed."""
        key, masked = str(block), isinstance(tokens, Masked)
        count, patches = tokens.shape[0], tokens.shape[1] - self.prefix
        state = self.state(tokens)
        if key in self.policy_norm:
            state = self.policy_norm[key](state)
        wide = torch.promote_types(state.dtype, torch.float32)
        on = torch.ones((), dtype=wide if masked else torch.bool, device=state.device)
        sublayers, sublayer_logits = on.expand(count, 2), None
        heads, head_logits = on.expand(count, self.heads[0]), None
        chosen, normed = on.expand(count, patches), None
        if key in self.sublayer_policy:
            sublayer_logits = _score(self.sublayer_policy[key], state)
            sublayers = self.gate(sublayer_logits, self.config.threshold, masked)
        if key in self.head_policy:
            head_logits = _score(self.head_policy[key], state)
            heads = self.gate(head_logits, self.config.threshold, masked)
        if key in self.patch_policy and (masked or sublayers.any()):
            normed = attention_norm(self.vit, block, tokens.x)
            logits = tokens.grid(_score(self.patch_policy[key], normed))[:, self.prefix :, 0]
            chosen = self.gate(logits, self.config.patch_threshold, masked)
        return Policies(chosen, heads, sublayers, head_logits, sublayer_logits), normed

    def state(self, tokens: Tokens) -> Tensor:
        """What the policies over heads and sub-layers read: (B, D), the class token or else the mean of all tokens."""
        if self.read is not None:
            return tokens.first(tokens.x, 1)[:, 0]
        return tokens.grid(tokens.x).mean(dim=1)

    def gate(self, logits: Tensor, threshold: float, masked: bool) -> Tensor:
        """m: 0 or 1 for every logit; float with the gradient of a soft decision where `masked`, else bool."""
        config = self.config
        logits = logits.nan_to_num(torch.inf, torch.inf, -torch.inf)  # NaN leaves nothing out: it shows in every layout
        if config.random:
            drawn = torch.rand_like(logits) < probability(config.lean)
            return drawn.to(logits.dtype) + 0 * logits if masked else drawn  # every parameter stays in the graph
        if not masked:
            return logits > log_odds(threshold) - config.lean
        official = config.mode == "official"  # whose temperature acts without noise too
        noise = config.noise * gumbel_difference(logits) if self.training and (config.noise or official) else None
        of = adavit_official.gate if official else gate
        return of(logits + config.lean, threshold, config.temperature, noise)

    def gates(self, policies: Policies) -> Gates:
        """One block's decisions as its gates; what is not decided at all is None."""
        on = self.config.policies
        tokens = None
        if "patches" in on:
            tokens = torch.cat([torch.ones_like(policies.patches[:, :1]).expand(-1, self.prefix), policies.patches], 1)
        mlp_tokens = tokens if self.config.patches_skip == "attention and mlp" else None
        if mlp_tokens is not None and not self.config.mlp_gradient:
            mlp_tokens = mlp_tokens.detach()
        return Gates(
            attention=policies.sublayers[:, 0] if "sublayers" in on else None,
            mlp=policies.sublayers[:, 1] if "sublayers" in on else None,
            heads=policies.heads if "heads" in on else None,
            attention_tokens=tokens,
            mlp_tokens=mlp_tokens,
        )

    def block_macs(self, policies: Policies) -> tuple[Tensor, Tensor]:
        """MACs of the sub-layers and of deciding, (B, L) each: with the policies' gradients, or int64 of bool ones."""
        exact = policies.heads.dtype == torch.bool
        patches, heads, sublayers = (
            t.long() if exact else t for t in (policies.patches, policies.heads, policies.sublayers)
        )
        keys = patches.sum(dim=2) + self.prefix
        all_tokens = torch.full_like(keys, patches.shape[2] + self.prefix)
        through_mlp = keys if self.config.patches_skip == "attention and mlp" else all_tokens
        if self.read is not None:  # of the last block only these are read
            read = keys.new_full((len(keys), 1), self.read)
            queries, through_mlp = (torch.cat([t[:, :-1], read], dim=1) for t in (keys, through_mlp))
        else:
            queries = keys
        attention, mlp = sublayers.unbind(dim=2)
        executed = gated_macs(
            self.shape,
            self.config.heads_take,
            self.plain_mlp,
            attention,
            mlp,
            heads.sum(dim=2),
            keys,
            queries,
            through_mlp,
        )
        return executed, self._deciding(sublayers.detach().sum(dim=2) > 0, patches.shape[2])

    def _deciding(self, active: Tensor, patches: int) -> Tensor:
        """MACs of the policies' linear maps; a block that is off in both sub-layers does not score patches.

        In a batch with an image that it is not off for it does, which is 0.02 % of the MACs and is not counted.
        """
        blocks = range(self.depth)
        always = [2 * (str(b) in self.sublayer_policy) + self.heads[0] * (str(b) in self.head_policy) for b in blocks]
        scoring = [(patches + self.prefix) * (str(b) in self.patch_policy) for b in blocks]
        fixed, scored = torch.tensor([always, scoring], device=active.device)
        return (fixed + active * scored) * self.shape.dim

    def usage(self, policies: Policies, grid: tuple[int, ...]) -> Usage:
        """The record of what these decisions execute."""
        on = Policies(*(t.detach() > 0 for t in (policies.patches, policies.heads, policies.sublayers)))
        attention, mlp = on.sublayers.unbind(dim=2)
        active = attention | mlp
        prefix = active[..., None].expand(-1, -1, self.prefix)
        live = torch.cat([prefix, on.patches & active[..., None]], dim=2)
        tokens = live.sum(dim=2)
        updated = tokens
        if self.config.patches_skip == "attention":
            updated = torch.where(mlp, live.shape[2], tokens)
        if self.read is not None:
            updated = torch.cat([updated[:, :-1], self.read * active[:, -1:].long()], dim=1)
        executed, deciding = self.block_macs(on)
        heads = on.heads.sum(dim=2)
        return Usage(tokens * attention, updated, heads, attention, mlp, grid, self.prefix, live, executed, deciding)

    def terms(self, policies: Policies, grid: tuple[int, ...]) -> dict[str, Tensor]:
        """Loss terms of the decisions, weighted; none in evaluation."""
        config = self.config
        terms: dict[str, Tensor] = {}
        if not self.training:
            return terms
        if config.macs_target is not None:
            share = self.share(policies, grid)
            terms["macs"] = config.macs_weight * (mean_over_processes(share) - config.macs_target) ** 2
        if config.usage_weight:
            of = adavit_official.usage_terms if config.mode == "official" else usage_terms
            first = (config.first_patch_block, config.first_block, config.first_block)
            terms |= {name: config.usage_weight * term for name, term in of(policies, config, first).items()}
        return terms

    def share(self, policies: Policies, grid: tuple[int, ...]) -> Tensor:
        """Executed over dense MACs, mean over the batch, with the gradients of the gates."""
        executed, deciding = self.block_macs(policies)
        blocks = (executed + deciding).sum(dim=1)
        return ((blocks + self._fixed_macs(grid)) / dense_macs(self.shape, grid)).mean()

    def _fixed_macs(self, grid: tuple[int, ...]) -> int:
        """MACs of stem and head, which no policy saves."""
        nothing = torch.zeros(1, 0, dtype=torch.long)
        return int(macs(Usage(nothing, nothing, nothing, nothing, nothing, grid, self.prefix), self.shape))

    def _check_target(self, target: float) -> None:
        grid = patch_grid(self.vit)
        decided = {"patches": self.patch_policy, "heads": self.head_policy, "sublayers": self.sublayer_policy}
        sizes = {"patches": math.prod(grid), "heads": self.heads[0], "sublayers": 2}
        off = {
            kind: torch.tensor([str(block) not in maps for block in range(self.depth)])[None, :, None].expand(
                1, -1, sizes[kind]
            )
            for kind, maps in decided.items()
        }
        least = self.share(Policies(**off), grid).item()
        if target < least:
            raise ValueError(
                f"AdaViTConfig.macs_target is {target:g}, but what these policies cannot leave out of "
                f"{model_name(self.vit)} takes {least:.3g} of its MACs"
            )


def usage_terms(policies: Policies, config: AdaViTConfig, first: tuple[int, int, int]) -> dict[str, Tensor]:
    """Usage losses of the kinds that are decided, not weighted.

    Args:
        first: the first block that decides, for patches, heads and sub-layers.
    Source: the paper's usage loss. Differs: the optional terms are those of the released code.
    """
    decisions = {"patches": policies.patches, "heads": policies.heads, "sublayers": policies.sublayers}
    logits = {"heads": policies.head_logits, "sublayers": policies.sublayer_logits}
    terms = {}
    for place, kind in enumerate(KINDS):
        if kind not in config.policies:
            continue
        m, target, least = decisions[kind][:, first[place] :], config.usage_targets[place], config.minimums[place]
        loss = (mean_over_processes(m.mean()) - target) ** 2
        own = m.mean(dim=2) if kind == "patches" else mean_over_processes(m.mean(dim=0))
        if kind != "patches":
            loss = loss + config.diversity_weight * ((own - target) ** 2).mean()
        loss = loss + config.minimum_weights[place] * (least - own).clamp(min=0).mean()
        decided = logits.get(kind)
        if config.entropy_weight and decided is not None:
            loss = loss - config.entropy_weight * entropy(decided)
        terms[kind] = loss
    return terms


def _maps(blocks: Iterable[int], dim: int, out: int, bias: float) -> nn.ModuleDict:
    return nn.ModuleDict({str(block): _linear(dim, out, bias) for block in blocks})


def _linear(dim: int, out: int, bias: float) -> nn.Linear:
    policy = nn.Linear(dim, out)
    nn.init.trunc_normal_(policy.weight, std=0.02)
    nn.init.constant_(policy.bias, bias)
    return policy


def _score(policy: nn.Module, x: Tensor) -> Tensor:
    """Logits in float32 or wider, whatever the features."""
    assert isinstance(policy, nn.Linear)
    if x.dtype == policy.weight.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(
        x.device.type
    ):
        return policy(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.to(wide), policy.weight.to(wide), policy.bias.to(wide))


def _stack(blocks: list[Policies]) -> Policies:
    head_logits = [block.head_logits for block in blocks if block.head_logits is not None]
    sublayer_logits = [block.sublayer_logits for block in blocks if block.sublayer_logits is not None]
    return Policies(
        patches=torch.stack([block.patches for block in blocks], dim=1),
        heads=torch.stack([block.heads for block in blocks], dim=1),
        sublayers=torch.stack([block.sublayers for block in blocks], dim=1),
        head_logits=torch.stack(head_logits, dim=1) if head_logits else None,
        sublayer_logits=torch.stack(sublayer_logits, dim=1) if sublayer_logits else None,
    )
