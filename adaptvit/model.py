"""What every adaptive model has in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from adaptvit.backbones.base import (
    check,
    check_attention,
    check_offers,
    checkpoint_gradients,
    class_count,
    class_names,
    clip_frames,
    family_of,
    input_size,
    model_name,
    name_classes,
    patch_grid,
    prefix_tokens,
    read_slots,
    timm_config,
)
from adaptvit.backbones.blocks import Body, run_block, run_body
from adaptvit.backbones.door import Acts, Attend, Between, Look, Summed
from adaptvit.backbones.families import FAMILIES, find
from adaptvit.backbones.forward import Canvas, Source, embedded, enter, final_norm, run, scores
from adaptvit.backbones.guess import guess
from adaptvit.backbones.sizes import head_macs, shape_of
from adaptvit.checks import In, valid
from adaptvit.macs import Shape, block_macs
from adaptvit.tokens import Dense, Masked, Packed, Plan, Slab, Tokens, choose_layout
from adaptvit.usage import Output, Usage

T = TypeVar("T")


@dataclass(frozen=True)
class Knob:
    """The one number of a method's config that trades compute for fidelity, steered by `adaptvit.budget`."""

    field: str
    """Name of the config field."""
    sign: int
    """+1 where a larger value computes more, -1 where it computes less."""
    lowest: float
    """Smallest value worth trying."""
    highest: float
    """Largest value worth trying."""
    step: float
    """A small move, with which a search begins."""


@dataclass(frozen=True)
class Dial:
    """What a model costs at several values of its knob, as measured on images: `adaptvit.budget.measure_dial`."""

    knobs: tuple[float, ...]
    """Values of the knob, from the one that computes least."""
    shares: tuple[float, ...]
    """Executed MACs over the dense ones at each, rising; between them costs are taken to run straight."""

    def __post_init__(self) -> None:
        lists = (self.knobs, self.shares)
        if any(not isinstance(value, (int, float)) or not np.isfinite(value) for values in lists for value in values):
            raise ValueError("Dial.knobs and shares must be finite numbers")
        steps = np.diff(self.knobs)
        if len(self.knobs) != len(self.shares) or not self.knobs or not (np.diff(self.shares) > 0).all():
            raise ValueError("Dial.knobs and shares must be as many, one or more, and shares must rise")
        if not ((steps > 0).all() or (steps < 0).all()):
            raise ValueError("Dial.knobs must rise or fall throughout")

    def knob_at(self, share: float) -> float:
        """The knob's value that costs a share of the dense MACs.

        Raises:
            ValueError: no value does.
        """
        least, most = self.shares[0], self.shares[-1]
        if not least <= share <= most:
            raise ValueError(
                f"compute must lie in [{least:.3g}, {most:.3g}], what the dial was measured for, got {share}"
            )
        return float(np.interp(share, self.shares, self.knobs))

    def share_at(self, knob: float) -> float:
        """What a value of the knob costs; beyond the values measured as much as the nearest of them."""
        order = 1 if self.knobs[0] <= self.knobs[-1] else -1
        return float(np.interp(knob, self.knobs[::order], self.shares[::order]))


class Left(NamedTuple):
    """What a method leaves for the ViT to classify, and its record; `AdaptiveViT.finish` says what these are."""

    x: Tensor
    usage: Usage | Callable[[], Usage]
    live: Tensor | None
    means: dict[str, Tensor]
    sound: Tensor | None
    terms: dict[str, Tensor] | None = None
    """The loss terms, where they do not follow from `means`."""
    patches: Tensor | None = None
    """(B,) of each image, where they differ; the model knows."""
    dropped: Sequence[tuple[Tensor, int]] = ()
    """What `Slab` left whenever it dropped tokens: where they are, and the rows there were; the model knows."""
    holders: Callable[[], Sequence[Tensor]] | None = None
    """Of each block (B, N) int64, the slot whose token each slot's is part of behind it; None where `Usage.groups` says
    it, or a token is part of no other."""


def once(decide: Callable[..., T]) -> Callable[..., T]:
    """A decision that is made when it is first asked for, without gradients, and kept for whenever it is asked again.

    A block may be run again, on the way back.
    """
    made: list[T] = []

    def decided(*of: Any) -> T:
        if not made:
            with torch.no_grad():
                made.append(decide(*of))
        return made[0]

    return decided


class AdaptiveViT(nn.Module, ABC):
    """A ViT that decides, per image, what to compute.

    Attributes:
        vit: somebody else's model, whose parameters it trains.
        depth, heads: blocks of the ViT, and attention heads of each of them.
        prefix: class, distillation and register tokens.
        read: leading slots that the classifier reads; None where it pools all tokens.
        dial: what values of the knob cost; None until `config.fit` or `measure_dial` has measured it, and again once
            the weights are trained: `model.dial = adaptvit.measure_dial(model, images)` measures it anew.
        plan: how many rows `Slab` has wherever tokens are dropped; None until `measure_plan` has counted, and again
            once the knob is turned or the weights are trained. Without it none are saved.
        terms_scale: what a loop multiplies its loss by before the gradient is taken, 1 unless it sets this: 1 / n where
            it adds up the gradients of n steps, or of n replicas of `nn.DataParallel`. Loss terms that logits carry are
            multiplied by it too.
    """

    moves: ClassVar[Set[str]] = frozenset()
    """Fields of the config that may change in a built model, beside its knob."""
    traces: ClassVar[bool] = False
    """Whether `Masked` runs the same operations for every batch, so that `torch.jit.trace` freezes nothing."""
    drops: ClassVar[bool] = True
    """Whether tokens that it leaves out are gone for good, so that `Dense` runs one image, whatever it keeps."""
    stays: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Options of `run` with which no image leaves a forward early."""
    records_last: ClassVar[bool] = False
    """Whether its record has the last block as it ran, all slots or those that are read; else the model corrects it."""

    def __init__(self, vit: nn.Module, config: Any) -> None:
        """Wrap `vit`, in the mode (training or evaluation) that it is in.

        Raises:
            TypeError: the model is not a ViT that this library reproduces, or lacks what the method needs; the message
                names the part.
        """
        super().__init__()
        if not (is_dataclass(type(config)) and isinstance(getattr(config, "method", None), str)):
            raise TypeError(
                f"{type(config).__name__} must be a frozen dataclass with the name of its method: "
                '@dataclass(frozen=True, kw_only=True), and method: ClassVar[str] = "norm"'
            )
        check_attention(vit)
        self._family = None if FAMILIES.of(vit) else guess(vit)
        check(vit)
        check_offers(vit, getattr(config, "needs", frozenset()), getattr(config, "title", config.method))
        self.vit: Any = vit
        self._config = config
        self.dial: Dial | None = None
        self.plan: Plan | None = None
        self._terms_scale = 1.0
        self._turns = 0  # how often the config or `terms_scale` was set, by which a compiled graph knows them anew
        self.prefix = prefix_tokens(vit)
        self.read = read_slots(vit)
        self._shape = shape_of(vit)
        self.depth, self.heads = self._shape.depth, self._shape.heads
        block = max(self._shape.blocks, key=lambda block: block.mlp_per_token)
        self._token_macs = 4 * self._shape.dim * block.attention_width + block.mlp_per_token
        self._reads_map = find(vit, family_of(vit).map_head) is not None
        self.training = vit.training  # and no part of the ViT is asked to change its own

    def forward(
        self, images: Tensor, layout: type[Tokens] | None = None, detailed: bool = False, **options: Any
    ) -> Any:
        """Classify images.

        While it trains, the logits carry the method's loss terms along: a loss of them whose gradient is taken has the
        gradient of loss + `terms_scale` x terms, so that a loop that knows logits alone trains the method too. Terms
        are of the batch of this process.

        Args:
            images: (B, channels, height, width); or a dict of patches, of a ViT that takes images of different shapes.
            layout: how tokens are executed; None lets the method choose, and on a device, where it would take `Packed`,
                `choose_layout`. Under `torch.compile` that is `Dense` where every image keeps as many tokens, so that
                all of it is one graph, and else `Packed`, beside the graph.
                A batch for which `Slab` planned too few rows is run again as `Packed`; inside of a graph, which cannot
                wait for that, its logits are NaN.
            detailed: return what was computed too. Then the terms are returned, and the logits carry nothing.
            options: what the method's `run` takes beside these.
        Returns:
            (B, classes) logits, and those of the distillation head where timm's distilled training is on; or `Output`.
        Raises:
            NotImplementedError: `torch.jit.trace`, and the exporters on it, would freeze what this method decides.
            ValueError: `Dense`, and more than one image, which keep different numbers of tokens; loss terms in float16,
                whose losses are scaled by a factor that cannot be known here.
            What the ViT and the method raise of images that they do not take.
        """
        if torch.compiler.is_dynamo_compiling():
            beside = layout is Packed or (layout is None and not self.even) or self._reads_map
            compiled = _beside if beside else _in_graph
            name = None if layout is None else layout.__name__
            state = (self._turns, id(self.plan), self.training, self.vit.training)
            return compiled(self, state, name, detailed, images, options)
        return self._forward(images, layout, detailed, **options)

    def _layout(self, images: Any, layout: type[Tokens] | None, options: dict[str, Any]) -> type[Tokens]:
        """The layout of a forward that is asked for this one, which must fit."""
        if layout is not None and not (isinstance(layout, type) and issubclass(layout, Tokens)):
            raise TypeError(f"layout must be adaptvit.Packed, Dense, Slab, Masked or None, got {layout!r}")
        if torch.jit.is_tracing():
            layout = self._traced(layout)
        if (self.dial is not None or self.plan is not None) and self.training and torch.is_grad_enabled():
            self.dial = self.plan = None  # they were measured on weights that are about to change
        if layout is not None:
            return layout
        usual = self.usual_layout(**options)
        if usual is not Packed or not isinstance(images, Tensor) or (self.training and not self.even):
            return usual
        like = next(self.vit.parameters())
        return choose_layout(like.device, like.dtype, self.even, self.plan, len(images), self._token_macs)

    def _forward(self, images: Tensor, layout: type[Tokens] | None, detailed: bool, **options: Any) -> Any:
        layout = self._layout(images, layout, options)
        with nullcontext() if self.differentiable(layout) else torch.no_grad():
            logits, distilled, left, terms = self._classified(images, layout, options)
            if (over := self._over(left)) is not None:
                if torch.compiler.is_compiling():
                    logits = logits.masked_fill(over, torch.nan)
                elif over:
                    return self._forward(images, Packed, detailed, **options)
            if detailed:
                usage = left.usage if isinstance(left.usage, Usage) else left.usage()
                return Output(
                    logits, replace(usage, shape=self.shape, patches=left.patches), terms, left.means, distilled
                )
        if self.training and torch.is_grad_enabled():
            carried = [term for term in terms.values() if term.requires_grad]
            if carried:
                logits = _carry(logits, carried, self.terms_scale)
        return logits if distilled is None else (logits, distilled)

    def _traced(self, layout: type[Tokens] | None) -> type[Tokens]:
        """The layout of a trace, which is `Masked` unless told.

        Raises:
            NotImplementedError: the trace would hold for the images alone that it was made with.
        """
        if self.traces and layout in (None, Masked):
            return Masked
        what = "packed tokens" if self.traces else f"what {self.config.title} decides"
        instead = "; adaptvit.export writes a file for any" if self.even else ""
        raise NotImplementedError(f"torch.jit.trace would freeze {what} as it is for these images{instead}")

    def _classified(
        self, images: Tensor, layout: type[Tokens], options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, Left, dict[str, Tensor]]:
        """The ViT's forward, with the method between its embedding and its norm: logits, what it left, and terms."""
        self._keep_family()
        left: list[Left] = []

        def inside(x: Tensor, source: Source) -> tuple[Tensor, Tensor | None]:
            if not self._reads_map:
                left.append(self._blocks(x, source, layout, options))
                return left[0].x, left[0].live
            found, (x,) = self._laid_out(x, source, [self.depth - 1], layout, {**self.stays, **options})
            left.append(found._replace(usage=partial(self._record, found, True)))
            return x, None

        logits, distilled = scores(run(self.vit, images, inside))
        sound, terms = left[0].sound, left[0].terms
        if sound is not None:
            logits = logits.masked_fill(~sound.view(-1, *[1] * (logits.ndim - 1)), torch.nan)
        return logits, distilled, left[0], self.terms(left[0].means) if terms is None else terms

    def _keep_family(self) -> None:
        if self._family is not None:
            FAMILIES.keep(self.vit, self._family)  # which may be a copy of the one that it was guessed of

    def _blocks(self, x: Tensor, source: Source, layout: type[Tokens], options: dict[str, Any]) -> Left:
        """The method on what the ViT embedded."""
        if issubclass(layout, Dense) and not self.even and (x.shape[0] != 1 or not self.drops):
            alone = "give one image at a time, or " if self.drops else ""
            raise ValueError(
                f"layout=Dense has as many tokens of every image, but {self.config.title} as it is set keeps what each "
                f"needs: {alone}choose adaptvit.Packed or adaptvit.Masked"
            )
        if self.plan is not None:
            source.plan = self.plan.rows(x.shape[0])
        left = self.run(source.laid(x, layout), **options)
        patches = None if source.own is None else source.own[:, 0]
        return left._replace(dropped=source.left, patches=patches)

    def _over(self, left: Left) -> Tensor | None:
        """Whether a plan had too few rows; None where there was none to be had to."""
        if not left.dropped or self.plan is None:
            return None
        return torch.stack([offsets[-1] > rows for offsets, rows in left.dropped]).any()

    @torch.compiler.disable
    def features(
        self,
        images: Tensor,
        layers: Sequence[int] | None = None,
        layout: type[Tokens] | None = None,
        with_prefix: bool = False,
        norm: bool = True,
        detailed: bool = False,
        **options: Any,
    ) -> Any:
        """A map of features, in which every patch has a vector, whatever became of it.

        A patch that was dropped or that halted has the last it had, one that was merged or fused its token's. The last
        block updates all tokens it has, if its map is asked for: `Usage` has what that costs, without pool and head. No
        image leaves early. While the model trains, the last map carries the loss terms, as logits do.

        Args:
            layers: the blocks behind which maps are taken, from 0, or from the end below 0; None is the last.
            layout: as `forward` has it.
            with_prefix: with each map the tokens before the patches, (B, p, D). Behind the last block those that the
                classifier reads are what it reads; of A-ViT, the mean over depth.
            norm: the ViT's last norm is on every map.
            detailed: return what was computed too.
            options: what the method's `run` takes beside these.
        Returns:
            (B, D, rows, columns), of a video (B, D, steps, rows, columns), or with the prefix a pair; for `layers` a
            list of these, in their order; and where `detailed`, of these and `Usage` a pair.
        Raises:
            ValueError: `layers` names a block that the ViT lacks.
            NotImplementedError: images of different shapes.
            What `forward` raises.
        """
        blocks = self._layers([-1] if layers is None else layers)
        given, usage = self._features(images, blocks, layout, norm, options)
        grid = patch_grid(self.vit, images)
        maps = [x[:, self.prefix :].mT.unflatten(2, grid) for x in given]
        found = [(one, x[:, : self.prefix]) for one, x in zip(maps, given, strict=True)] if with_prefix else maps
        result = found[0] if layers is None else found
        return (result, usage()) if detailed else result

    def _layers(self, layers: Sequence[int] | int | None) -> list[int]:
        """Numbers of blocks from 0, of numbers that may be below 0; or of so many at the end; None is all."""
        if isinstance(layers, int) and 1 <= layers <= self.depth:
            return list(range(self.depth - layers, self.depth))
        if layers is None:
            return list(range(self.depth))
        if isinstance(layers, int) or not layers or any(not -self.depth <= one < self.depth for one in layers):
            raise ValueError(
                f"layers must be blocks of {model_name(self.vit)}, 0..{self.depth - 1}, or -{self.depth}..-1 from the "
                f"end, one or more, got {layers}"
            )
        return [one % self.depth for one in layers]

    def _features(
        self, images: Tensor, blocks: list[int], layout: type[Tokens] | None, norm: bool, options: dict[str, Any]
    ) -> tuple[list[Tensor], Callable[[], Usage]]:
        """(B, N, D) behind each of these blocks, by the slots of the first, and what makes the record."""
        self._keep_family()
        options = {**self.stays, **options}
        layout = self._layout(images, layout, options)

        def inside(x: Tensor, source: Source) -> tuple[Left, list[Tensor]]:
            return self._laid_out(x, source, blocks, layout, options)

        with nullcontext() if self.differentiable(layout) else torch.no_grad():
            left, features = embedded(self.vit, images, inside)
            if (over := self._over(left)) is not None and over:
                return self._features(images, blocks, Packed, norm, options)
            if left.sound is not None:
                features = [x.masked_fill(~left.sound[..., None], torch.nan) for x in features]
            features = [final_norm(self.vit, x) if norm else x for x in features]
        if self.training and torch.is_grad_enabled():
            terms = self.terms(left.means) if left.terms is None else left.terms
            carried = [term for term in terms.values() if term.requires_grad]
            if carried:
                features[-1] = _carry(features[-1], carried, self.terms_scale)
        return features, partial(self._record, left, self.depth - 1 in blocks)

    def _laid_out(
        self, x: Tensor, source: Source, blocks: Sequence[int], layout: type[Tokens], options: dict[str, Any]
    ) -> tuple[Left, list[Tensor]]:
        """The method on what the ViT embedded, and (B, N, D) behind each of these blocks, a vector in every slot."""
        source.check_alike("a map of features")
        canvas = Canvas(frozenset(blocks))
        canvas.x, source.canvas = x, canvas
        left = self._blocks(x, source, layout, options)
        holders, features = self._holders(left), list[Tensor]()
        for block in blocks:
            x = canvas.after[block]
            if holders is not None:
                x = x.gather(1, holders[block][..., None].expand(-1, -1, x.shape[2]))
            if block == self.depth - 1 and self.read is not None:
                x = torch.cat([left.x[:, : self.read], x[:, self.read :]], dim=1)
            features.append(x)
        return left, features

    def _holders(self, left: Left) -> Sequence[Tensor] | None:
        """What `Left.holders` is, wherever it is to be had from; None where every token is in its own slot."""
        if left.holders is not None:
            return left.holders()
        groups = (left.usage if isinstance(left.usage, Usage) else left.usage()).groups
        if groups is None:
            return None
        prefix = torch.arange(self.prefix, device=groups.device).expand(groups.shape[0], -1)
        return [torch.cat([prefix, held], dim=1) for held in groups.unbind(1)]

    def _record(self, left: Left, whole: bool) -> Usage:
        """The record of a forward that made features and no logits.

        Args:
            whole: the last block updated all tokens it had.
        """
        usage = left.usage if isinstance(left.usage, Usage) else left.usage()
        usage = replace(usage, shape=self.shape._replace(head=0, pool=0, pool_per_patch=0, pool_per_pair=0))
        if not whole or self.read is None or self.records_last:
            return usage
        last = usage.attended[:, -1:]
        updated, mlp = torch.cat([usage.updated[:, :-1], last], dim=1), torch.cat([usage.mlp[:, :-1], last > 0], dim=1)
        whole_last = replace(usage, updated=updated, mlp=mlp, executed=None)
        if usage.executed is None:
            return whole_last
        executed = torch.cat([usage.executed[:, :-1], block_macs(whole_last, self.shape)[:, -1:]], dim=1)
        return replace(whole_last, executed=executed)

    def forward_features(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """timm's: (B, N, D), what `features` has behind the last block, prefix first.

        `forward_head` makes of it the logits of `forward`, where the classifier does not pool what was dropped.

        Raises:
            NotImplementedError: a mask, which methods have no place for.
        """
        self._check_unmasked(attn_mask, is_causal)
        return self._features(x, [self.depth - 1], None, True, {})[0][0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        attn_mask: None = None,
        is_causal: bool = False,
    ) -> Any:
        """timm's: what `features` has behind several blocks.

        Args:
            indices: blocks, from the end below 0; or so many at the end; None is all.
            return_prefix_tokens: of every block a pair, its map and the tokens before the patches.
            norm: the ViT's last norm is on every one.
            stop_early: changes nothing: a method goes to the end, where its record and its terms are made.
            output_fmt: maps or tokens, (B, D, rows, columns) or (B, P, D).
            intermediates_only: leave out what `forward_features` gives.
        Returns:
            (B, N, D) of `forward_features`, and the list; or the list.
        Raises:
            ValueError: another format, or blocks that the ViT lacks.
            NotImplementedError: a mask.
        """
        self._check_unmasked(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        blocks = sorted(set(self._layers(indices)))  # in whatever order they are named, as timm's
        wanted = blocks if intermediates_only else [*blocks, self.depth - 1]
        given, _ = self._features(x, wanted, None, False, {})
        final = final_norm(self.vit, given[-1])
        found = [final_norm(self.vit, one) if norm else one for one in given[: len(blocks)]]
        prefix, patches = zip(*((one[:, : self.prefix], one[:, self.prefix :]) for one in found), strict=True)
        if output_fmt == "NCHW":
            grid = patch_grid(self.vit, x)
            patches = tuple(one.mT.unflatten(2, grid).contiguous() for one in patches)
        listed = list(zip(patches, prefix, strict=True)) if return_prefix_tokens and self.prefix else list(patches)
        return listed if intermediates_only else (final, listed)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: None = None,
    ) -> list[Any]:
        """timm's and DINO's: `forward_intermediates` without what is last."""
        found: list[Any] = self.forward_intermediates(
            x, n, return_prefix_tokens, norm, False, "NCHW" if reshape else "NLC", True, attn_mask
        )
        return found

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """timm's: channels and pixels a patch of the map behind each block."""
        sides = zip(input_size(self.vit)[1:], patch_grid(self.vit)[-2:], strict=True)
        reduction = max(side // patches for side, patches in sides)
        name = f"vit.{family_of(self.vit).blocks}"
        return [
            {"module": f"{name}.{number}", "num_chs": self.shape.dim, "reduction": reduction}
            for number in range(self.depth)
        ]

    def _check_unmasked(self, attn_mask: Any, is_causal: bool) -> None:
        if attn_mask is not None or is_causal:
            raise NotImplementedError(
                f"{self.config.title} decides which tokens attend to which: it takes neither attn_mask nor is_causal"
            )

    def counts(self, images: Tensor) -> Tensor:
        """Tokens of each image that are left whenever `Slab` drops some: (times, B)."""
        plan, self.plan = self.plan, None
        try:
            *_, left, _ = self._classified(images, Slab, {})
        finally:
            self.plan = plan
        counts = [offsets.diff() for offsets, _ in left.dropped]
        return torch.stack(counts) if counts else torch.empty(0, images.shape[0])

    def by_plan(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits by `Slab`, and, () bool, whether `plan` had too few rows for these images: then they are NaN.

        What cannot wait for the flag, such as an exported file, hands it on.
        """
        logits, _, left, _ = self._classified(images, self._layout(images, Slab, {}), {})
        over = self._over(left)
        assert over is not None, "there is no plan"
        return logits.masked_fill(over, torch.nan), over

    def usual_layout(self, **options: Any) -> type[Tokens]:
        """How tokens are executed unless `forward`, which has these options, is told; on a device `Packed` is one of
        those that it may be instead: `choose_layout`."""
        return Packed

    @property
    def even(self) -> bool:
        """Whether every image keeps as many tokens, which Python knows, so that `Dense` runs it."""
        return False

    def differentiable(self, layout: type[Tokens]) -> bool:
        """Whether a forward has gradients."""
        return True

    @abstractmethod
    def run(self, tokens: Tokens) -> "Left":
        """The method: tokens as the first block receives them, through the blocks, to `finish`.

        `forward` begins and ends with what is the ViT's own, and hands on the options that `run` takes beside.
        """

    def deepest(self, tokens: Tokens) -> Tensor:
        """(B, N) int64, the depth of tokens that stay to the end: all blocks, and 0 where a slot never held one."""
        depth = torch.full(tokens.shape, self.depth, device=tokens.x.device)
        return depth if tokens.at_first is None else depth * tokens.at_first

    def enter(self, images: Any, layout: type[Tokens]) -> Tokens:
        """The tokens of images as the first block receives them, for who runs blocks one by one."""
        return enter(self.vit, images, layout)

    def run_block(
        self,
        number: int,
        tokens: Tokens,
        chosen: Tensor | int | None = None,
        bias: Tensor | None = None,
        look: Look | None = None,
        attend: Attend | None = None,
        between: Between | None = None,
        every: bool = False,
        live: Tensor | None = None,
        summed: Summed | None = None,
    ) -> Tokens:
        """Block `number`, from 0, on tokens; of the last one only the slots that the classifier reads, if it does so.

        Args:
            every: all slots, also of the last.
            live: (B, N) bool, the slots whose token is still there, where the layout does not know it; None is all.
            chosen, bias, look, attend, between, summed: what is done in it, as `adaptvit.backbones.door.Acts` says.
                Where gradients are checkpointed, `look` and `between` run twice: what they decide, they decide `once`.
        """
        if chosen is None and self.reads_few(number) and not (every or tokens.source.wants(number)):
            chosen = self.read
        acts = Acts(chosen, bias, look, attend, between, summed)
        return _noted(number, run_block(number, tokens, acts, self.training and self.checkpoints), live)

    def run_body(self, number: int, tokens: Tokens, body: Body) -> Tokens:
        """Block `number` called as a module, with something in the place of its forward."""
        return _noted(number, run_body(number, tokens, body, self.training and self.checkpoints))

    def reads_few(self, block: int) -> bool:
        """Whether only leading slots are read of what a block leaves: it is the last, and not all are pooled."""
        return self.read is not None and block == self.depth - 1

    def read_slots(self, tokens: Tokens, t: Tensor) -> Tensor:
        """Token features -> those of the slots that the classifier reads: (B, R, ...), 0 where dead."""
        return tokens.first(t, self.read or tokens.shape[1])

    def finish(
        self,
        x: Tensor,
        usage: Usage | Callable[[], Usage],
        live: Tensor | None = None,
        means: dict[str, Tensor] | None = None,
        sound: Tensor | None = None,
        holders: Callable[[], Sequence[Tensor]] | None = None,
    ) -> "Left":
        """How a `run` ends.

        Args:
            x: (B, R, D), the slots that the classifier reads.
            usage: the record, or what makes it, which is asked where details are.
            live: (B, R or more) bool, the slots that hold a token; None where all of R do.
            means: what `terms` makes the loss terms of.
            sound: (B, 1) bool, False of images that could not be decided on: their logits are NaN.
            holders: as `Left` has it, where tokens become part of others and `Usage.groups` does not say so.
        """
        return Left(x, usage, None if live is None else live[:, : x.shape[1]], means or {}, sound, holders=holders)

    def terms(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """The method's loss terms, weighted, from what a forward averaged over its batch; by default these averages."""
        return dict(means)

    def to_the_end(self, images: Tensor) -> Output:
        """A forward that no image leaves early, so that the depth of every token in `usage` is its own."""
        return self(images, detailed=True, **self.stays)

    @property
    def leaves_early(self) -> bool:
        """Whether images may leave a forward early, so that only `to_the_end` has the depth of every token."""
        return bool(self.stays)

    @property
    def config(self) -> Any:
        """The method's numbers. Of a built model only the knob can be set, by `model.config = replace(...)`."""
        return self._config

    @config.setter
    def config(self, config: Any) -> None:
        own, knob = self._config, self._config.knob
        if type(config) is not type(own):
            raise TypeError(
                f"this model is built from {type(own).__name__}, got {type(config).__name__}: build another"
            )
        free = self.moves | ({knob.field} if knob else set())
        changed = [one.name for one in fields(own) if getattr(own, one.name) != getattr(config, one.name)]
        if fixed := [name for name in changed if name not in free]:
            allowed = " and ".join(sorted(free)) or "nothing"
            raise ValueError(
                f"{type(own).__name__}.{fixed[0]} was read when this model was built, where {allowed} can still be "
                "set: build another around its vit"
            )
        self._config = config
        if changed:
            self._turns += 1
            self.plan = None

    @property
    def terms_scale(self) -> float:
        """What the loss terms that logits carry are multiplied by."""
        return self._terms_scale

    @terms_scale.setter
    def terms_scale(self, scale: float) -> None:
        self._turns += scale != self._terms_scale
        self._terms_scale = scale

    @property
    def compute(self) -> float | None:
        """Share of the dense MACs that images cost, by the dial, None without one; setting it moves the knob.

        Raises:
            ValueError: it is set, and there is no dial, or no value of the knob costs that share.
        """
        return None if self.dial is None else self.dial.share_at(getattr(self.config, self.config.knob.field))

    @compute.setter
    def compute(self, share: float) -> None:
        valid("compute", share, Annotated[float, In("(0, inf)")])
        if self.dial is None:
            raise ValueError(
                "compute needs a dial, measured on images: make the model with adaptvit.adapt, or give it one with "
                "model.dial = adaptvit.measure_dial(model, images)"
            )
        self.config = replace(self.config, **{self.config.knob.field: self.dial.knob_at(share)})

    @property
    def shape(self) -> Shape:
        """The sizes for `adaptvit.macs`: of the ViT as it was built, and of its head as it is now."""
        return self._shape._replace(head=head_macs(self.vit))

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's record of the weights, with the input size of this ViT, for `timm.data.resolve_model_data_config`, and
        the `frames` of a clip where it takes clips."""
        frames = clip_frames(self.vit)
        clips = {} if frames is None else {"frames": frames}
        return timm_config(self.vit) | {"input_size": input_size(self.vit)} | clips

    @property
    def num_classes(self) -> int:
        """Classes of the head, where timm's tools look for it."""
        return class_count(self.vit)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, where the ViT itself has them; files keep them.

        Raises:
            ValueError: they are set, and are not as many as the classes.
        """
        return class_names(self.vit)

    @class_names.setter
    def class_names(self, names: Sequence[str]) -> None:
        name_classes(self.vit, names)

    @property
    def default_cfg(self) -> dict[str, Any]:
        """`pretrained_cfg`, by the name that older timm code has for it."""
        return self.pretrained_cfg

    @property
    def num_features(self) -> int:
        """Channels of a token."""
        return self.shape.dim

    @property
    def head_hidden_size(self) -> int:
        """Channels of what the classifier reads."""
        return self.vit.head_hidden_size

    def get_classifier(self) -> nn.Module:
        """The ViT's classifier."""
        return self.vit.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the ViT a fresh classifier of so many classes.

        Raises:
            ValueError: another pool than the one that the model was built for.
        """
        if global_pool not in (None, self.vit.global_pool):
            raise ValueError(
                f"this model was built for global_pool={self.vit.global_pool!r}, got {global_pool!r}: reset the ViT "
                "before it is built"
            )
        self.vit.reset_classifier(num_classes)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The ViT's own `forward_head`, of normalised tokens (B, N, D)."""
        return self.vit.forward_head(x, pre_logits=pre_logits)

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers are to leave out: those that the ViT names."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of layers, as layer-wise learning rates take them; what the method adds is in the last."""

        def within(pattern: Any) -> Any:
            if isinstance(pattern, str):
                return rf"^vit\.(?:{pattern.removeprefix('^')})"
            return [(within(one), group) for one, group in pattern]

        return {name: within(pattern) for name, pattern in self.vit.group_matcher(coarse).items()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training keep of each block its input alone, and run it again for the gradients; what it decided stays."""
        checkpoint_gradients(self.vit, enable)

    @property
    def checkpoints(self) -> bool:
        """Whether gradients are checkpointed, as `set_grad_checkpointing` of the ViT or of this model says."""
        return bool(find(self.vit, family_of(self.vit).checkpointing))

    def __repr__(self) -> str:
        """The method, the ViT, the knob and what it costs, and the config; not timm's modules."""
        config = self.config
        about = f"{type(self).__name__}: {config.title} on {model_name(self.vit)}, {self.depth} blocks"
        if config.knob is not None:
            about += f", {config.knob.field}={getattr(config, config.knob.field):g}"
        if self.dial is not None:
            about += f", {self.compute:.1%} of the dense MACs"
        return f"{about}\n{config!r}"

    @property
    def learns_patches(self) -> bool:
        """Whether `forward` learns from a teacher's patches, its `teacher`, while it trains."""
        return False


def _noted(number: int, tokens: Tokens, live: Tensor | None = None) -> Tokens:
    """What block `number` left, written down if somebody wants it."""
    if tokens.source.canvas is not None:
        tokens.source.canvas.note(number, tokens, live)
    return tokens


def _compiled(
    model: AdaptiveViT,
    state: tuple[int | bool, ...],
    layout: str | None,
    detailed: bool,
    images: Tensor,
    options: dict[str, Any],
) -> Any:
    """A forward inside of `torch.compile`.

    Args:
        state: turns of the model's config, its plan, whether it and its ViT train; a graph holds for one.
    """
    named: dict[str | None, type[Tokens]] = {kind.__name__: kind for kind in (Dense, Masked, Packed, Slab)}
    return model._forward(images, named.get(layout, Dense if model.even else Packed), detailed, **options)


_in_graph = torch.compiler.nonstrict_trace(_compiled)
_beside = torch.compiler.disable(_compiled)


class _Carried(torch.autograd.Function):
    """Logits as they are, to whose gradient that of loss terms is added."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, scale: float, *terms: Tensor) -> Tensor:
        ctx.gradients = [torch.full_like(term, scale) for term in terms]
        return logits.clone()  # a view could not be changed in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None, *ctx.gradients


def _carry(logits: Tensor, terms: list[Tensor], scale: float) -> Tensor:
    """Logits that carry loss terms, as mixtures of experts attach their balance losses.

    Raises:
        ValueError: in float16.
    """
    kind = logits.device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else logits.dtype
    if precision == torch.float16:
        raise ValueError(
            "in float16 the scale of the loss cannot be known, so logits cannot carry the method's loss terms: train "
            "in bfloat16, or add them yourself, the sum of model(images, detailed=True).terms"
        )
    return _Carried.apply(logits, scale, *terms)
