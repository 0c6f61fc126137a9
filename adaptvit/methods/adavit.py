"""AdaViT: each image decides, block by block, which patches, attention heads and sub-layers it uses.

Meng, Li, Chen, Lan, Wu, Jiang, Lim: AdaViT: Adaptive Vision Transformers for Efficient Image Recognition, CVPR 2022.

Letters: B images, N token slots (class token first), P patches, L blocks, D channels, H heads.
Symbols of the paper: m decision, tau temperature of the gates.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from adaptvit.backbones.base import cores, model_name, patch_grid
from adaptvit.backbones.blocks import attention_reads, is_sharded
from adaptvit.backbones.gated import HEADS_NEED, NEEDS, Gates, Takes, check_gated, gated_macs, has_plain_mlp, run_gated
from adaptvit.backbones.maps import is_plain
from adaptvit.backbones.standin import stand_in
from adaptvit.budget import BATCH, OutOfReach
from adaptvit.checks import In, OneOf, check_fields
from adaptvit.macs import dense_macs, dense_macs_of, macs
from adaptvit.methods.adavit_files import PUBLISHED
from adaptvit.methods.base import MethodConfig, Published
from adaptvit.methods.gates import entropy, gate, gumbel_difference, log_odds, probability
from adaptvit.methods.regression import SPREAD, Regression, importance, read_by_block
from adaptvit.model import AdaptiveViT, Knob, Left
from adaptvit.process import in_float64
from adaptvit.tokens import Masked, Packed, Slab, Tokens, fused, kernels
from adaptvit.usage import Usage, check_finite

KINDS = ("patches", "heads", "sublayers")


@dataclass(frozen=True, kw_only=True)
class AdaViTConfig(MethodConfig):
    """Policies over patches, heads and sub-layers (Meng et al., CVPR 2022). Defaults are those of the released models.

    How the released code trains is `adaptvit.methods.released.ReleasedAdaViTConfig`, which lists what differs.
    """

    method: ClassVar[str] = "adavit"
    title: ClassVar[str] = "AdaViT"
    trained: ClassVar[bool] = True
    published: ClassVar[Published] = PUBLISHED
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

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.policies or len(set(self.policies)) < len(self.policies):
            raise ValueError(
                f"{type(self).__name__}.policies must be some of {', '.join(KINDS)}, each once, got {self.policies}"
            )
        if not self.usage_weight and (self.diversity_weight or self.entropy_weight or any(self.minimum_weights)):
            raise ValueError(
                f"{type(self).__name__}.usage_weight is 0, so that no other usage loss has an effect: set it above 0"
            )

    def build(self, vit: nn.Module) -> "AdaViT":
        """Wrap `vit`, sharing its weights, with policies that have yet to be trained.

        Raises:
            TypeError: the ViT is not one that this library reproduces, or its heads cannot be switched off this way.
            ValueError: a policy starts at a block that the ViT lacks, or `macs_target` is below what it costs to
                leave out everything that can be.
        """
        return AdaViT(vit, self)

    def fitted(self, vit: nn.Module, images: Tensor, target: float, **search: Any) -> AdaptiveViT:
        """The model with policies over patches that are fitted to the weights: `fit_policies`.

        Policies over heads and sub-layers, which nothing is fitted to, are left as they begin.

        Raises:
            ValueError: the target is in images per second, or what `fit_policies` raises.
        """
        model, unit = self.build(vit).eval(), search.get("unit", "share")
        if unit == "images_per_s":
            raise ValueError("AdaViT's policies are fitted to a share of the MACs: give the target in share or gmacs")
        grid = patch_grid(vit, images)
        fit_policies(model, images, target if unit == "share" else target * 1e9 / dense_macs(model.shape, grid))
        return model

    @property
    def needs(self) -> Set[str]:
        return NEEDS | (HEADS_NEED if "heads" in self.policies else frozenset())

    @property
    def aim(self) -> float | None:
        return self.macs_target


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
    attended: Tensor | None = None
    """Of one block, (B, N) bool, the tokens that its attention updates, where a device's kernel said so."""
    updated: Tensor | None = None
    """Those that its MLP does."""


class AdaViT(AdaptiveViT):
    """A ViT with policies.

    Attributes:
        patch_policy, head_policy, sublayer_policy: the linear maps that decide, by block number.
    """

    moves: ClassVar[Set[str]] = frozenset({"temperature"})
    traces = True
    drops = False
    records_last = True

    def __init__(self, vit: nn.Module, config: AdaViTConfig) -> None:
        super().__init__(vit, config)
        size, dim = self.depth, self.shape.dim
        for name, kinds in (("first_block", {"heads", "sublayers"}), ("first_patch_block", {"patches"})):
            first = getattr(config, name)
            if first >= size and kinds & set(config.policies):
                raise ValueError(
                    f"{type(config).__name__}.{name} is block {first}, but {model_name(vit)} has blocks 0..{size - 1}"
                )
        check_gated(vit, config.heads_take if "heads" in config.policies else None)
        self.plain_mlp = has_plain_mlp(vit)
        later, bias = range(config.first_block, size), config.initial_bias
        patched = range(config.first_patch_block, size)
        self.patch_policy = _maps(patched if "patches" in config.policies else (), dim, 1, bias)
        self.head_policy = _maps(later if "heads" in config.policies else (), dim, self.heads[0], bias)
        self.sublayer_policy = _maps(later if "sublayers" in config.policies else (), dim, 2, bias)
        normed = config.norm_policies and bool(self.head_policy or self.sublayer_policy)
        self.policy_norm = nn.ModuleDict({str(block): _fresh(cores(vit)[0].norm1) for block in later if normed})
        for part in (self.patch_policy, self.head_policy, self.sublayer_policy, self.policy_norm):
            part.to(next(vit.parameters())).train(vit.training)
        if config.macs_target is not None:
            self._check_target(config.macs_target)

    def usual_layout(self, **options: Any) -> type[Tokens]:
        """`Masked` in training, whose gates pass gradients; in evaluation what computes what is on alone."""
        return Masked if self.training else Packed

    def run(self, tokens: Tokens) -> Left:
        """The blocks.

        Raises:
            ValueError: another layout than `Masked` in training.
        """
        grid = tokens.source.grid
        if self.training:
            tokens.source.check_alike(f"{self.config.title} in training")
        if tokens.at_first is not None:  # what holds no token is a patch that is always off
            tokens = tokens.refilled()
        tokens, policies = self.decided(tokens)
        whole = tokens.source.wants(self.depth - 1)
        usage = partial(self.usage, policies, grid, tokens.source.own, whole)
        return self.finish(self.read_slots(tokens, tokens.x), usage, means=self.means(policies, grid, whole))

    def differentiable(self, layout: type[Tokens]) -> bool:
        """Only `Masked` computes what is off, by which gates learn."""
        return layout is Masked

    def decided(self, tokens: Tokens) -> tuple[Tokens, Policies]:
        """The blocks: what they leave, and what they decided."""
        if self.training and not isinstance(tokens, Masked):
            raise ValueError("AdaViT trains with layout=Masked: its gates learn from what they leave out")
        decided: dict[int, Policies] = {}
        for number in range(self.depth):
            known = None if is_sharded(self.vit, number) else self.decide(number, tokens)
            tokens = self.run_body(number, tokens, partial(self.run_decided, number, decided, known, tokens.x))
        return tokens, _stack(list(decided.values()))

    def run_decided(
        self,
        number: int,
        decided: dict[int, Policies],
        known: tuple[Policies, Tensor | None] | None,
        x: Tensor,
        block: Any,
        tokens: Tokens,
    ) -> Tokens:
        """A block under what it decides, which is noted in `decided`.

        Args:
            known: what it decides of features `x`; None where its weights are together only while it is called.
        """
        policies, normed = self.decide(number, tokens) if known is None else known
        gates = self.gates(policies)
        if tokens.at_first is not None:
            there = tokens.at_first.to(policies.patches.dtype)
            gates = replace(
                gates,
                attention_tokens=there if gates.attention_tokens is None else gates.attention_tokens,
                mlp_tokens=there if gates.mlp_tokens is None else gates.mlp_tokens,
            )
        decided[number] = policies
        if tokens.x is not x and known is not None:
            normed = None  # somebody has changed what the block is given
        read = self.read if self.reads_few(number) and not tokens.source.wants(number) else None
        otherwise = self.trains_otherwise(number) if self.training else {}
        return run_gated(block, number, tokens, gates, self.config.heads_take, normed, read, **otherwise)

    def trains_otherwise(self, block: int) -> dict[str, Any]:
        """What a block is told in training beside its gates: arguments of `run_gated`."""
        return {}

    def decide(self, block: int, tokens: Tokens) -> tuple[Policies, Tensor | None]:
        """One block's decisions from its input, and what its first norm gave, where that was needed."""
        key, masked = str(block), isinstance(tokens, Masked)
        count, patches = tokens.shape[0], tokens.shape[1] - self.prefix
        state = self.state(tokens)
        if key in self.policy_norm:
            state = self.policy_norm[key](state)
        if self._is_fused(tokens, key):
            return self.decide_fused(block, tokens, state)
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
        if key in self.patch_policy and (not isinstance(tokens, Packed) or sublayers.any()):
            normed = attention_reads(block, tokens)
            logits = tokens.grid(_score(self.patch_policy[key], normed))[:, self.prefix :, 0]
            chosen = self.gate(logits, self.config.patch_threshold, masked)
        if tokens.at_first is not None:
            chosen = chosen * tokens.at_first[:, self.prefix :]
        return Policies(chosen, heads, sublayers, head_logits, sublayer_logits), normed

    def _is_fused(self, tokens: Tokens, block: str) -> TypeGuard[Slab]:
        """Whether a device decides in a kernel."""
        if not isinstance(tokens, Slab) or tokens.at_first is not None or self.config.random:
            return False
        maps = [part[block] for part in self._policies() if block in part]
        return bool(maps) and all(map(is_plain, maps)) and kernels.fuses(tokens.x)

    def _policies(self) -> tuple[nn.ModuleDict, nn.ModuleDict, nn.ModuleDict]:
        return self.patch_policy, self.sublayer_policy, self.head_policy

    def decide_fused(self, block: int, tokens: Slab, state: Tensor) -> tuple[Policies, Tensor | None]:
        """`decide` in a kernel, from what `state` gave, normed."""
        key, config = str(block), self.config
        normed = attention_reads(block, tokens) if key in self.patch_policy else None
        maps: list[Any] = [dict(part).get(key) for part in self._policies()]
        weights = [t for policy in maps for t in ((None, None) if policy is None else (policy.weight, policy.bias))]
        least = (log_odds(threshold) - config.lean for threshold in (config.patch_threshold, config.threshold))
        both = config.patches_skip == "attention and mlp"
        patches, heads, sublayers, attended, updated = fused.gates(
            normed, state, *weights, tokens.shape[1], self.prefix, self.heads[0], *least, both
        )
        return Policies(patches, heads, sublayers, attended=attended, updated=updated), normed

    def state(self, tokens: Tokens) -> Tensor:
        """What the policies over heads and sub-layers read: (B, D), the class token or else the mean of all tokens."""
        if self.read is not None:
            return tokens.first(tokens.x, 1)[:, 0]
        x = tokens.grid(tokens.x)
        return x.mean(dim=1) if tokens.at_first is None else x.sum(dim=1) / tokens.at_first.sum(dim=1, keepdim=True)

    def gate(self, logits: Tensor, threshold: float, masked: bool) -> Tensor:
        """m: 0 or 1 for every logit; float with the gradient of a soft decision where `masked`, else bool."""
        config = self.config
        logits = logits.nan_to_num(torch.inf, torch.inf, -torch.inf)  # NaN leaves nothing out: it shows in every layout
        if config.random:
            drawn = torch.rand_like(logits) < probability(config.lean)
            return drawn.to(logits.dtype) + 0 * logits if masked else drawn  # every parameter stays in the graph
        if not masked:
            return logits > log_odds(threshold) - config.lean
        return self.decision(logits + config.lean, threshold)

    def decision(self, logits: Tensor, threshold: float) -> Tensor:
        """A gate's 0 or 1, with the gradient of a soft decision; with noise while it trains."""
        noise = self.config.noise * gumbel_difference(logits) if self.training and self.config.noise else None
        return gate(logits, threshold, self.config.temperature, noise)

    def gates(self, policies: Policies) -> Gates:
        """One block's decisions as its gates; what is not decided at all is None."""
        on, both = self.config.policies, self.config.patches_skip == "attention and mlp"
        if policies.attended is not None:
            some = "sublayers" in on
            return Gates(
                heads=policies.heads if "heads" in on else None,
                attention_tokens=policies.attended if some or "patches" in on else None,
                mlp_tokens=policies.updated if some or ("patches" in on and both) else None,
            )
        tokens = None
        if "patches" in on:
            tokens = torch.cat([torch.ones_like(policies.patches[:, :1]).expand(-1, self.prefix), policies.patches], 1)
        mlp_tokens = tokens if both else None
        return Gates(
            attention=policies.sublayers[:, 0] if "sublayers" in on else None,
            mlp=policies.sublayers[:, 1] if "sublayers" in on else None,
            heads=policies.heads if "heads" in on else None,
            attention_tokens=tokens,
            mlp_tokens=mlp_tokens,
        )

    def block_macs(self, policies: Policies, own: Tensor | None = None, whole: bool = False) -> tuple[Tensor, Tensor]:
        """MACs of the sub-layers and of deciding, (B, L) each: with the policies' gradients, or int64 of bool ones.

        Args:
            own: (B, 1), patches of each image; None is all there is room for.
            whole: the last block updates all that is on, and not what is read of it alone.
        """
        exact = policies.heads.dtype == torch.bool
        patches, heads, sublayers = (
            t.long() if exact else t for t in (policies.patches, policies.heads, policies.sublayers)
        )
        keys = patches.sum(dim=2) + self.prefix
        if own is None:
            all_tokens = torch.full_like(keys, patches.shape[2] + self.prefix)
        else:
            all_tokens = (own + self.prefix).expand_as(keys)
        through_mlp = keys if self.config.patches_skip == "attention and mlp" else all_tokens
        if self.read is not None and not whole:
            read = keys.new_full((keys.shape[0], 1), self.read)
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
        return executed, self._deciding(sublayers.detach().sum(dim=2) > 0, patches.shape[2] if own is None else own)

    def _deciding(self, active: Tensor, patches: int | Tensor) -> Tensor:
        """MACs of the policies' linear maps; a block that is off in both sub-layers does not score patches.

        In a batch with an image that it is not off for it does, and `Slab` always, which is 0.02 % of the MACs and is
        not counted.
        """
        blocks = range(self.depth)
        always = [2 * (str(b) in self.sublayer_policy) + self.heads[0] * (str(b) in self.head_policy) for b in blocks]
        slots = patches + self.prefix
        scoring = [(slots if isinstance(slots, int) else 1) * (str(b) in self.patch_policy) for b in blocks]
        fixed, scored = torch.tensor([always, scoring], device=active.device)
        scored = scored if isinstance(slots, int) else scored * slots
        return (fixed + active * scored) * self.shape.dim

    def usage(self, policies: Policies, grid: tuple[int, ...], own: Tensor | None = None, whole: bool = False) -> Usage:
        """The record of what these decisions execute; `own` and `whole` are as of `block_macs`."""
        on = Policies(*(t.detach() > 0 for t in (policies.patches, policies.heads, policies.sublayers)))
        attention, mlp = on.sublayers.unbind(dim=2)
        active = attention | mlp
        prefix = active[..., None].expand(-1, -1, self.prefix)
        live = torch.cat([prefix, on.patches & active[..., None]], dim=2)
        tokens = live.sum(dim=2)
        updated = tokens
        if self.config.patches_skip == "attention":
            updated = torch.where(mlp, live.shape[2] if own is None else own + self.prefix, tokens)
        if self.read is not None and not whole:
            updated = torch.cat([updated[:, :-1], self.read * active[:, -1:].long()], dim=1)
        executed, deciding = self.block_macs(on, own, whole)
        heads = on.heads.sum(dim=2)
        return Usage(tokens * attention, updated, heads, attention, mlp, grid, self.prefix, live, executed, deciding)

    def means(self, policies: Policies, grid: tuple[int, ...], whole: bool) -> dict[str, Tensor]:
        """What the loss terms are made of: the share of the MACs, `macs`, and what is on; nothing in evaluation."""
        config = self.config
        means: dict[str, Tensor] = {}
        if not self.training:
            return means
        if config.macs_target is not None:
            means["macs"] = self.share(policies, grid, whole)
        if config.usage_weight:
            means |= self.usage_means(policies, (config.first_patch_block, config.first_block, config.first_block))
        return means

    def usage_means(self, policies: Policies, first: tuple[int, int, int]) -> dict[str, Tensor]:
        """What the usage losses are made of; `first` is the first block that decides, for each kind."""
        return usage_means(policies, self.config, first)

    def usage_terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """The usage losses, not weighted, from these means."""
        return usage_terms(means, self.config)

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss terms of the decisions, weighted."""
        config, terms, means = self.config, dict[str, Tensor](), dict(means)
        if "macs" in means:
            terms["macs"] = config.macs_weight * (means.pop("macs") - config.macs_target) ** 2
        return terms | {name: config.usage_weight * term for name, term in self.usage_terms(means).items()}

    def share(self, policies: Policies, grid: tuple[int, ...], whole: bool = False) -> Tensor:
        """Executed over dense MACs, mean over the batch, with the gradients of the gates."""
        executed, deciding = self.block_macs(policies, whole=whole)
        blocks = (executed + deciding).sum(dim=1)
        (dense,) = dense_macs_of(self.shape, torch.tensor([math.prod(grid)]))
        return ((blocks + self._fixed_macs(grid)) / dense).mean()

    def _fixed_macs(self, grid: tuple[int, ...]) -> Tensor:
        """MACs of stem and head, which no policy saves: () int64, which a graph is not asked for."""
        nothing = torch.zeros(1, 0, dtype=torch.long)
        (fixed,) = macs(Usage(nothing, nothing, nothing, nothing, nothing, grid, self.prefix), self.shape)
        return fixed

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
                f"{type(self.config).__name__}.macs_target is {target:g}, but what these policies cannot leave out of "
                f"{model_name(self.vit)} takes {least:.3g} of its MACs"
            )


def usage_means(policies: Policies, config: AdaViTConfig, first: tuple[int, int, int]) -> dict[str, Tensor]:
    """What the usage losses are made of: of each kind that is decided, the share on, that of each gate, and more.

    Args:
        first: the first block that decides, for patches, heads and sub-layers.
    """
    decisions = {"patches": policies.patches, "heads": policies.heads, "sublayers": policies.sublayers}
    logits = {"heads": policies.head_logits, "sublayers": policies.sublayer_logits}
    means = {}
    for place, kind in enumerate(KINDS):
        if kind not in config.policies:
            continue
        m, decided = decisions[kind][:, first[place] :], logits.get(kind)
        means[kind] = m.mean()
        if kind == "patches":
            means["patches, too few"] = (config.minimums[place] - m.mean(dim=2)).clamp(min=0).mean()
        else:
            means[f"{kind}, each"] = m.mean(dim=0)
        if config.entropy_weight and decided is not None:
            means[f"{kind}, entropy"] = entropy(decided)
    return means


def usage_terms(means: dict[str, Tensor], config: AdaViTConfig) -> dict[str, Tensor]:
    """Usage losses of the kinds that are decided, not weighted, from `usage_means`.

    Source: the paper's usage loss. Differs: the optional terms are those of the released code.
    """
    terms = {}
    for place, kind in enumerate(KINDS):
        if kind not in means:
            continue
        target, least = config.usage_targets[place], config.minimums[place]
        loss = (means[kind] - target) ** 2
        if kind == "patches":
            too_few = means["patches, too few"]
        else:
            each = means[f"{kind}, each"]
            loss = loss + config.diversity_weight * ((each - target) ** 2).mean()
            too_few = (least - each).clamp(min=0).mean()
        loss = loss + config.minimum_weights[place] * too_few
        if f"{kind}, entropy" in means:
            loss = loss - config.entropy_weight * means[f"{kind}, entropy"]
        terms[kind] = loss
    return terms


def _fresh(norm: Any) -> nn.Module:
    """A norm of the same kind and size."""
    unwatched: dict[str, Any] = {"_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
    norm = copy.deepcopy(stand_in(norm, **unwatched))
    norm.reset_parameters()
    return norm.requires_grad_(True)


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


def fit_policies(model: AdaViT, images: Tensor, share: float) -> float:
    """Set the maps of the patches' policies, in place, from what the ViT does with calibration images.

    Policies that start at random wreck what the ViT knows, and a short training does not recover it. So each block's
    map is fitted, by linear regression, to how much the class token of the dense ViT reads of a patch (`see`) in this
    block and all that follow. It is fitted on what the blocks before it leave once their own policies are at work,
    since skipped patches look unlike others; and its constant is set so that it keeps just its share. From block to
    block the shares fall by equal factors. Policies over heads and sub-layers are left as they are.

    Args:
        model: with policies over patches, around a ViT with a class token.
        images: (B, channels, height, width), as the model takes them; a few hundred will do.
        share: of the dense MACs, in (0, 1), what the policies are to leave.
    Returns:
        The share of the variance of the patches' importance that the maps explain, mean over blocks.
    Raises:
        OutOfReach: a share that patches alone cannot come down to.
        ValueError: no policy over patches, no class token, or attention that is not finite or tells no patch from
            another.
    """
    if not model.patch_policy:
        raise ValueError(f"fit_policies needs policies over patches, but the model decides {model.config.policies}")
    if model.read is None:
        raise ValueError(
            "fit_policies needs a ViT that classifies by a class token, whose attention tells which patches matter"
        )
    kept = _kept(model, share)
    training = model.training
    model.eval()
    try:
        return _fit_all(model, images, kept)
    finally:
        model.train(training)


@torch.inference_mode()
def _fit_all(model: AdaViT, images: Tensor, kept: list[float]) -> float:
    """Fit block after block, so that each keeps its share; of the variance, what the maps explain, mean over blocks."""
    explained = []
    batches = [model.enter(batch, Masked) for batch in images.split(BATCH)]
    seen = [read_by_block(model, tokens) for tokens in batches]
    check_finite(torch.cat(seen), "attention weights")
    for number in range(model.depth):
        if str(number) in model.patch_policy:
            explained.append(_fit(model, number, batches, seen, kept[number]))
        batches = [_run_decided(model, number, tokens) for tokens in batches]
    return torch.stack(explained).mean().item()


def _fit(model: AdaViT, block: int, batches: list[Tokens], seen: list[Tensor], kept: float) -> Tensor:
    """Fit one block's map so that it keeps a share of these tokens; the share of the variance that it explains."""
    regression = Regression(model.shape.dim, batches[0].x.device)
    patches = [attention_reads(block, tokens)[:, model.prefix :] for tokens in batches]
    for features, read in zip(patches, seen, strict=True):
        regression.add(features, importance(in_float64(read[:, block:]).mean(dim=1)))
    weights, _, explained = regression.solve()
    logits = SPREAD * torch.cat([(in_float64(features) @ weights).flatten() for features in patches])
    policy, config = model.patch_policy[str(block)], model.config
    assert isinstance(policy, torch.nn.Linear)
    policy.weight.copy_(SPREAD * weights[None])
    policy.bias.copy_(log_odds(config.patch_threshold) - config.lean - logits.quantile(1 - kept))
    return explained


def _run_decided(model: AdaViT, block: int, tokens: Tokens) -> Tokens:
    def run(core: Any, tokens: Tokens) -> Tokens:
        policies, normed = model.decide(block, tokens)
        return run_gated(core, block, tokens, model.gates(policies), model.config.heads_take, normed)

    return model.run_body(block, tokens, run)


def _kept(model: AdaViT, share: float) -> list[float]:
    """The share of patches that each block keeps, falling by equal factors, so that MACs come to `share`."""
    grid = patch_grid(model.vit)
    blocks = torch.arange(model.depth, dtype=torch.float64)
    later = (blocks - model.config.first_patch_block + 1).clamp(min=0)

    def cost(factor: float) -> float:
        patches = (factor**later)[None, :, None].expand(1, -1, math.prod(grid))
        on = patches.new_ones(1, model.depth, 1)
        return model.share(Policies(patches, on.expand(-1, -1, model.heads[0]), on.expand(-1, -1, 2)), grid).item()

    least = cost(0.0)
    if not least < share < 1:
        raise OutOfReach(
            f"fit_policies fits to a share of the dense MACs between {least:.3g}, with no patches, and 1, got {share:g}"
        )
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) > share else (middle, high)
    return (low**later).tolist()
