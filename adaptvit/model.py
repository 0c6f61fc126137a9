"""What every adaptive model has in common."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adaptvit.macs import Shape
from adaptvit.tokens import Tokens
from adaptvit.usage import Output
from adaptvit.vit import check, class_count, head_macs, input_size, prefix_tokens, read_slots, shape_of, timm_config


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


@runtime_checkable
class MethodConfig(Protocol):
    """A frozen dataclass of a method's numbers that builds its model: what a method kept elsewhere provides."""

    method: ClassVar[str]
    """Name of the method, stored in checkpoints."""

    @property
    def knob(self) -> Knob | None:
        """What steers it; None where nothing does."""
        ...

    def build(self, vit: VisionTransformer) -> "AdaptiveViT":
        """The adaptive model around `vit`, sharing its weights."""
        ...


class AdaptiveViT(nn.Module, ABC):
    """A timm ViT that decides, per image, what to compute.

    Attributes:
        vit: the timm model, whose parameters it trains.
        config: the method's numbers.
        depth, heads: blocks of the ViT, and attention heads of each of them.
        prefix: class, distillation and register tokens.
        read: leading slots that the classifier reads; None where it pools all tokens.
    """

    def __init__(self, vit: VisionTransformer, config: Any) -> None:
        """Wrap `vit`, in the mode (training or evaluation) that it is in.

        Raises:
            TypeError: the model is not a ViT that this library reproduces; the message names the part.
        """
        super().__init__()
        check(vit)
        self.vit = vit
        self.config = config
        self.prefix = prefix_tokens(vit)
        self.read = read_slots(vit)
        self._shape = shape_of(vit)
        self.depth, self.heads = self._shape.depth, self._shape.heads
        self.training = vit.training  # and no part of the ViT is asked to change its own

    @abstractmethod
    def forward(self, images: Tensor, layout: type[Tokens] | None = None) -> Output:
        """Classify (B, channels, height, width) images; `layout` None lets the method choose."""

    @property
    def shape(self) -> Shape:
        """The sizes for `adaptvit.macs`: of the ViT as it was built, and of its head as it is now."""
        head, head_per_patch = head_macs(self.vit)
        return replace(self._shape, head=head, head_per_patch=head_per_patch)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's record of the weights, with the input size of this ViT, for `timm.data.resolve_model_data_config`."""
        return timm_config(self.vit) | {"input_size": input_size(self.vit)}

    @property
    def num_classes(self) -> int:
        """Classes of the head, where timm's tools look for it."""
        return class_count(self.vit)

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers are to leave out: those that the ViT names."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    @property
    def learns_patches(self) -> bool:
        """Whether `forward` learns from a teacher's patches, its `teacher`, while it trains."""
        return False

    @property
    def logits_only(self) -> "LogitsOnly":
        """This model as an ordinary module from images to logits, for other people's evaluation and serving loops."""
        return LogitsOnly(self)


class LogitsOnly(nn.Module):
    """Images -> logits."""

    def __init__(self, model: AdaptiveViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's record of the weights."""
        return self.model.pretrained_cfg
