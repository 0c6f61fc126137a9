"""A-ViT: tokens halt once their accumulated halting score reaches 1 - epsilon.

Yin, Vahdat, Alvarez, Mallya, Kautz, Molchanov: A-ViT: Adaptive Tokens for Efficient Vision Transformer, CVPR 2022.

Letters: B images, N token slots (class token first), L blocks, D channels, R slots that the classifier reads.
Symbols of the paper: h halting score, R remainder, rho ponder cost, gamma and beta of the gate.
"""

import copy
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from adaptvit.checks import In, OneOf, check_fields
from adaptvit.methods.avit_gate import fit_gate
from adaptvit.methods.base import MethodConfig, Named, Published, around_deits
from adaptvit.methods.priors import PRIORS, halting_prior, mixture
from adaptvit.model import AdaptiveViT, Knob, Left
from adaptvit.terminal import warn
from adaptvit.tokens import Slab, Tokens, fused, kernels
from adaptvit.tokens.kernels import on_host
from adaptvit.usage import Usage

LEAST_SHARE = 1e-3
"""What a block counts at least in the target's divergence from the model, which one that no patch enters would make
infinite."""
GATE = ("gate_scale", "gate_center")
"""Fields that published files keep elsewhere than in their tensors."""


def gate_in_name(name: str) -> dict[str, float]:
    """The gate in a released file's name, `<anything>-<scale>-<centre>.pth`; empty where the name has none.

    A date at the end of a name reads as a gate too: rename such a file, or pass the gate to `convert`.
    """
    found = re.search(r"-(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)\.(?:pth|pt|safetensors)$", name)
    return {"gate_scale": float(found[1]), "gate_center": float(found[2])} if found else {}


def trained_gate(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What training arguments say of a gate."""
    return {name: arguments[name] for name in GATE if name in arguments}


def _lent(size: str, of: str, **gate: float) -> dict[str, Named]:
    """A model with a distillation token."""
    about = f"DeiT-{size} with a distillation token. Nobody has published a gate for it: this is {of}."
    inside = f"deit_{size}_distilled_patch16_224"
    return {f"avit_{size}_distilled_patch16_224": Named(inside=inside, about=about, fields=gate)}


TINY = {"gate_scale": 10.0, "gate_center": 30.0}
SMALL = {"gate_scale": 10.0, "gate_center": 75.0}
"""Gates of the released weights."""
NAMES = (
    around_deits("avit", {"tiny": " with the gate of the released weights, 10 / 30."}, **TINY)
    | around_deits("avit", {"small": " with the gate of the released weights, 10 / 75."}, **SMALL)
    | around_deits("avit", {"base": ". Nobody has published a gate for it: this is small's, 10 / 75."}, **SMALL)
    | _lent("tiny", "tiny's, 10 / 30", **TINY)
    | _lent("small", "small's, 10 / 75", **SMALL)
)


@dataclass(frozen=True, kw_only=True)
class AViTConfig(MethodConfig):
    """Token halting (Yin et al., CVPR 2022), the paper made well defined. Defaults are those of the released tiny.

    How the released code trains is `adaptvit.methods.released.ReleasedAViTConfig`, which lists what differs.
    """

    method: ClassVar[str] = "avit"
    title: ClassVar[str] = "A-ViT"
    knob: ClassVar[Knob | None] = Knob("gate_center", sign=1, lowest=-1000.0, highest=1000.0, step=0.5)
    published: ClassVar[Published] = Published(
        names=NAMES, untold=GATE, by_arguments=trained_gate, by_file_name=gate_in_name, fitted="gate"
    )

    sharpness: Annotated[float, In("(0, 1e6]")] = 16.0
    """Of `fitted`: how far the logits of the scores spread. At 1 patches halt at similar depths, at 16 some at once and
    some never."""
    gate_scale: Annotated[float, In("(0, 1e6]")] = 10.0
    """gamma: the halting score is sigmoid(gate_scale * t - gate_center), t being channel 0 of the token."""
    gate_center: Annotated[float, In("[-1e9, 1e9]")] = 30.0
    """-beta: larger values halt later. The released small model uses 75."""
    epsilon: Annotated[float, In("(0, 1)")] = 0.01
    """A token halts once its scores add up to 1 - epsilon."""
    ponder_weight: Annotated[float, In("[0, inf)")] = 5e-4
    """alpha_p, the weight of the ponder loss."""
    prior_weight: Annotated[float, In("[0, inf)")] = 1e-3
    """alpha_d, the weight of the distribution loss; 0 switches it off."""
    prior: Annotated[tuple[str, ...] | str, OneOf(PRIORS)] = "gaussian"
    """Target distribution of the halting depth, a name in `adaptvit.methods.priors.PRIORS`."""
    prior_depth: Annotated[tuple[float, ...] | float | None, In("[1, inf)")] = None
    """Where the prior peaks, in blocks, 1-based; None is three quarters of the depth, 9 of 12 as released."""
    prior_scale: Annotated[tuple[float, ...] | float, In("[0.001, 1000]")] = 1.0
    """Width of the prior, in blocks."""
    prior_weights: Annotated[tuple[float, ...] | None, In("(0, 1e6]")] = None
    """With two numbers the prior is a mixture of two, which have these shares, and `prior`, `prior_depth` and
    `prior_scale` may hold one value for both or one for each; with more, of more. None is no mixture."""
    divergence: Literal["target||model", "model||target"] = "target||model"
    """Direction of the KL divergence: as released, or as the paper writes it."""
    class_token: Literal["halts", "stays"] = "halts"
    """Whether the tokens that the classifier reads halt like any other (the paper), so that an image is done once they
    have, or stay to the last block and are read from there alone. Neither loss counts them."""

    def __post_init__(self) -> None:
        check_fields(self)
        parts, own = len(self.prior_weights or ()), type(self).__name__
        for name in ("prior", "prior_depth", "prior_scale"):
            value = getattr(self, name)
            if isinstance(value, tuple) and (len(value) != parts or not parts):
                raise ValueError(
                    f"{own}.{name} has {len(value)} values, but prior_weights has {parts}: a mixture takes one "
                    "weight for each"
                )

    @property
    def needs(self) -> Set[str]:
        return {"a class token"} if self.class_token == "stays" else set()

    def build(self, vit: nn.Module) -> "AViT":
        """Wrap `vit`, sharing its weights; no parameter is added.

        Raises:
            TypeError: the ViT is not one that this library reproduces, or `class_token="stays"` without a class token.
            ValueError: `prior_depth` is not a block of the ViT.
        """
        return AViT(vit, self)

    def fitted(self, vit: nn.Module, images: Tensor, target: float, **search: Any) -> AdaptiveViT:
        """The model on a copy of `vit` whose channel 0 tells the patches that matter little: `fit_gate`.

        What the classifier reads stays to the last block, since the gate is fitted to patches alone.

        Raises:
            TypeError: the ViT's residual stream cannot be turned, or it has no class token.
            ValueError: what `fit_gate` raises.
        """
        turned, scale = _with_gate(vit, images)
        return replace(self, gate_scale=self.sharpness * scale, class_token="stays").build(turned)

    def prepared(self, vit: nn.Module, images: Tensor) -> nn.Module:
        return _with_gate(vit, images)[0]


def _with_gate(vit: nn.Module, images: Tensor) -> tuple[nn.Module, float]:
    """A copy of `vit` that carries the gate fitted to images, and the scale of that gate."""
    vit = copy.deepcopy(vit).eval()
    return vit, fit_gate(vit, images)[0]


def each(value: Any, parts: int = 1) -> tuple[Any, ...]:
    """A field's values for the parts of a mixture; None has none."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,) * parts


class AViT(AdaptiveViT):
    """A ViT whose tokens halt."""

    traces = True
    stays = MappingProxyType({"early_exit": False})

    _prior: Tensor

    def __init__(self, vit: nn.Module, config: AViTConfig) -> None:
        super().__init__(vit, config)
        blocks = self.depth
        target = max(1.0, 0.75 * blocks) if config.prior_depth is None else config.prior_depth
        weights = config.prior_weights or (1.0,)
        settings = [each(value, len(weights)) for value in (config.prior, target, config.prior_scale)]
        for depth in each(config.prior_depth):
            if not 1 <= depth <= blocks:
                raise ValueError(
                    f"{type(config).__name__}.prior_depth must lie in 1..{blocks}, the blocks of this ViT, got "
                    f"{depth:g}"
                )
        parts = [self.target(name, peak, scale) for name, peak, scale in zip(*settings, strict=True)]
        self.register_buffer("_prior", mixture(parts, weights).float().view(torch.int32), persistent=False)

    @property
    def prior(self) -> Tensor:
        """What halting depths are drawn to, (L,): in float32, whatever type the weights are turned to."""
        return self._prior.view(torch.float32)

    def target(self, name: str, peak: float, scale: float) -> Tensor:
        """What halting scores are drawn to: (L,) over the blocks."""
        return halting_prior(name, self.depth, peak, scale)

    def run(self, tokens: Tokens, early_exit: bool | None = None) -> Left:
        """The blocks.

        Args:
            early_exit: an image leaves once the tokens that its logits read have halted. Exact for the logits, but its
                patches' depths end there and there are no loss terms. None: in evaluation, not in training.
        """
        early_exit = not self.training if early_exit is None else early_exit
        grid = tokens.source.grid
        slots = torch.arange(tokens.shape[1], device=tokens.x.device)
        reading = (slots < (self.read or len(slots)))[None]
        remainder = torch.ones_like(tokens.x[..., 0], dtype=torch.promote_types(tokens.x.dtype, torch.float32))
        output = remainder.new_zeros(())
        entered, scores = list[Tokens](), list[Tensor]()
        kept = None if tokens.x.dtype == remainder.dtype else _Rounding(torch.zeros_like(remainder))
        for number in range(1, self.depth):
            entered.append(tokens.bare)
            tokens = self.run_block(number - 1, tokens, bias=self.presence(remainder), summed=kept)
            lost = None if kept is None else kept.lost
            if early_exit and self.read and isinstance(tokens, Slab) and kernels.fuses(tokens.x):
                output, going, remainder = self.fused_halt(tokens, remainder, output, lost)
                tokens, (remainder, *rest) = tokens.filter(going, remainder, *([] if kept is None else [kept.lost]))
                if kept is not None:
                    (kept.lost,) = rest
                continue
            score = self.halting_score(tokens.x, remainder.dtype, lost)
            if self.config.class_token == "stays":
                score = score.masked_fill(tokens.spread(reading.expand(tokens.shape)), 0)
            weight, going, remainder = halt(score, remainder, self.config.epsilon)
            output = output + self.read_out(tokens, weight)
            if number == 1:
                warn_if_all_halted(going, self.config.gate_center)
            if early_exit:
                going = going & tokens.spread(self.read_slots(tokens, going).any(dim=1, keepdim=True))
            else:
                scores.append(tokens.grid(score))
            if kept is None:
                tokens, (remainder,) = tokens.filter(going, remainder)
            else:
                tokens, (remainder, kept.lost) = tokens.filter(going, remainder, kept.lost)
            if early_exit and tokens.x.shape[0] == 0:
                break
        else:
            entered.append(tokens.bare)
            weight = self.read_slots(tokens, remainder)
            tokens = self.run_block(self.depth - 1, tokens, bias=self.presence(remainder))
            output = output + weight[..., None] * self.read_slots(tokens, tokens.x)

        means = {} if early_exit else self.means(scores, _depth(entered), tokens.at_first)
        return self.finish(output.to(tokens.x.dtype), partial(self.usage, entered, grid), means=means)

    def fused_halt(
        self, tokens: Slab, remainder: Tensor, output: Tensor, lost: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A halting step where images leave early, in a kernel: the output so far, who goes on, and R for these."""
        assert self.read is not None
        state, config = tokens.x[..., 0].to(remainder.dtype), self.config
        if not output.ndim:
            output = remainder.new_zeros(tokens.shape[0], self.read, tokens.x.shape[1])
        numbers = (config.class_token == "stays", config.gate_scale, config.gate_center, config.epsilon)
        slots, offsets, count = tokens.slots, tokens.offsets, tokens.shape[1]
        state = state if lost is None else state + lost
        found: tuple[Tensor, Tensor, Tensor] = fused.halt(
            tokens.x, state, remainder, output, slots, offsets, count, *numbers
        )
        return found

    def usage(self, entered: list[Tokens], grid: tuple[int, ...]) -> Usage:
        """The record, from the tokens that entered each block."""
        return Usage.of_depth(_depth(entered), self.heads, grid, self.prefix, last_reads=self.read)

    def halting_score(self, x: Tensor, dtype: torch.dtype, lost: Tensor | None = None) -> Tensor:
        """h = sigmoid(gamma t + beta), t being channel 0 of (..., D) tokens after the block.

        Args:
            dtype: of the score.
            lost: what rounding took of t; None is nothing.
        """
        t = x[..., 0].to(dtype)
        return torch.sigmoid(self.config.gate_scale * (t if lost is None else t + lost) - self.config.gate_center)

    def presence(self, remainder: Tensor) -> Tensor | None:
        """What training adds to a token's logits as a key: 0, with the gradient of what its weights left to 1.

        So the task reaches scores of tokens that its output does not read: one that would be missed halts later.

        Differs: in the paper scores of patches learn from ponder and distribution loss alone.
        """
        return remainder - remainder.detach() if self.training and remainder.requires_grad else None

    def read_out(self, tokens: Tokens, weight: Tensor) -> Tensor:
        """This block's share in the mean-field output: (B, R, D) from weights, token features."""
        return self.read_slots(tokens, weight)[..., None] * self.read_slots(tokens, tokens.x)

    def means(self, scores: list[Tensor], depth: Tensor, live: Tensor | None = None) -> dict[str, Tensor]:
        """Of the patch tokens: the ponder cost rho, and the halting scores of each block, (L,).

        Args:
            scores: (B, N) halting scores of each block but the last, 0 where dead.
            depth: (B, N) the last block that each token entered.
            live: (B, N) bool, slots that held a token at first, where not all did: an image counts as any other.
        """
        depth = depth[:, self.prefix :]
        last = (depth == self.depth).to(self.prior.dtype)  # scores 1
        h = torch.stack([*(score[:, self.prefix :] for score in scores), last], dim=1)
        going = depth[:, None] > torch.arange(1, self.depth + 1, device=h.device)[:, None]
        remainder = 1 - (h * going).sum(dim=1)
        if live is None:
            return {"ponder": (depth + remainder).mean(), "scores": h.mean(dim=(0, 2))}
        live = live[:, self.prefix :]
        share = live / live.sum(dim=1, keepdim=True)
        return {
            "ponder": ((depth + remainder) * share).sum(dim=1).mean(),
            "scores": (h * share[:, None]).sum(dim=2).mean(dim=0),
        }

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Ponder and distribution loss, weighted; none where an image may have left early."""
        if not means:
            return {}
        model = means["scores"] / means["scores"].sum()
        if self.config.divergence == "target||model":
            model = model.clamp_min(LEAST_SHARE)
            model = model / model.sum()
        divergence = kl_divergence(model, self.prior.to(model.dtype), self.config.divergence)
        ponder, prior = self.config.ponder_weight * means["ponder"], self.config.prior_weight * divergence
        return {"ponder": ponder, "prior": prior}


class _Rounding:
    """What the residual sums of half precision lose of channel 0, where gates read steps of 1/64 between 2 and 4."""

    def __init__(self, lost: Tensor) -> None:
        """
        Args:
            lost: token features (...,), in float32.
        """
        self.lost = lost

    def __call__(self, x: Tensor, branch: Tensor, out: Tensor) -> None:
        x, branch, out = (t[..., 0].float() for t in (x, branch, out))
        self.lost = self.lost + (x + branch - out)


def _depth(entered: list[Tokens]) -> Tensor:
    """(B, N) int64, the last block, 1-based, that each slot's token entered."""
    depth = torch.zeros(entered[0].shape, dtype=torch.long, device=entered[0].x.device)
    for number, tokens in enumerate(entered, 1):
        tokens.stamp(depth, number)
    return depth


def halt(score: Tensor, remainder: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """One halting step: what each token adds to its output now, and who goes on.

    Args:
        score: halting score h of this block, in [0, 1].
        remainder: R, what the token's weights of the blocks before left to 1; 0 where it has halted.
    Returns:
        weight: h where a token goes on, R where it halts. Over the blocks a token's weights sum to 1.
        going: bool, who goes on; never a token that has halted.
        left: R for the block after this, where a token goes on.
    Source: A-ViT, Algorithm 1. Differs: scores that add up to exactly 1 - epsilon halt; the released code loses them.
    """
    left = remainder - score
    going = ~(left <= epsilon)  # so does NaN, until it has spoilt the logits in every layout
    return torch.where(going, score, remainder), going, left


def kl_divergence(model: Tensor, target: Tensor, direction: str) -> Tensor:
    """KL divergence of two distributions over (L,) blocks, in nats, in the direction "target||model" or its reverse."""
    least = torch.finfo(model.dtype).tiny
    ratio = target.clamp_min(least).log() - model.clamp_min(least).log()
    return (target * ratio).sum() if direction == "target||model" else (-model * ratio).sum()


def warn_if_all_halted(going: Tensor, gate_center: float) -> None:
    """Say so when the gate leaves nothing after the first block; a device is not waited for, nor a graph broken."""
    if on_host(going.device) and not torch.compiler.is_compiling() and going.numel() and not going.any():
        warn(
            f"AViTConfig.gate_center={gate_center:g} halts every token after block 1: raise it, or find a gate "
            "with adaptvit.meet_target",
            stacklevel=3,
        )
