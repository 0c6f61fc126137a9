"""A ViT that tells the class of every pixel, made of one for images.

Letters: B images, N tokens of which p before the patches, D channels, C classes.
"""

from dataclasses import replace
from typing import Annotated, Any

from torch import Tensor, nn
from torch.nn.functional import interpolate

from adaptvit.backbones.base import (
    check,
    check_attention,
    check_images,
    checkpoint_gradients,
    input_size,
    model_name,
    patch_grid,
    prefix_tokens,
    timm_config,
)
from adaptvit.backbones.families import FAMILIES, Family, find, inside
from adaptvit.backbones.guess import guess
from adaptvit.checks import In, checked

FINER = 4
"""Logits that a patch has in each direction; between these pixels are interpolated."""


class SegmentingViT(nn.Module):
    """An image ViT, and a small head on the map of its patches: (B, channels, height, width) -> (B, C, height, width).

        vit = SegmentingViT(timm.create_model("vit_tiny_patch16_224", img_size=(352, 480)), classes=11)
        model = adaptvit.adapt(vit, images, 0.6)

    It is a ViT like any other of this library: what a method drops or merges has a vector on the map all the same, and
    a model's budget, record and divergence are those of its logits of pixels.

    Attributes:
        vit: the image ViT, without a classifier.
        head: a convolution over 3 x 3 patches, and a linear map to 4 x 4 logits of each.
        family: how it is put together, as `FAMILIES` has it.
    """

    @checked
    def __init__(
        self, vit: nn.Module, classes: Annotated[int, In("[1, 65536]")], width: Annotated[int, In("[1, 65536]")] = 128
    ) -> None:
        """Take a ViT, which loses its classifier.

        Args:
            classes: C.
            width: channels between the two maps of the head.
        Raises:
            TypeError: the ViT is not supported, or gives no tokens of patches.
        """
        super().__init__()
        check_attention(vit)
        family = FAMILIES.of(vit) or guess(vit)
        FAMILIES.keep(vit, family)
        check(vit)
        if family.frames is not None or family.pieces is not None or not hasattr(vit, "forward_features"):
            raise TypeError(f"{model_name(vit)} has no forward_features, as timm's ViTs have")
        if family.heads:
            vit.reset_classifier(0)  # type: ignore[operator]
        self.vit: Any = vit
        self.width, self.channels = width, input_size(vit)[0]
        self.num_classes = classes
        led = inside("vit", family, channels="channels", classes="num_classes", told={})
        self.family: Family = replace(led, heads=(), map_head="head")
        self._told_image = dict(family.told)
        self.prefix = prefix_tokens(self)
        self.reset_classifier(classes)
        self.train(vit.training)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every pixel."""
        check_images(self, images)
        tokens = self.vit.forward_features(images, **self._told_image)
        x = tokens[:, self.prefix :].mT.unflatten(2, patch_grid(self, images))
        return interpolate(self.head(x), size=images.shape[-2:], mode="bilinear")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give it a fresh head of so many classes."""
        like = next(self.vit.parameters())
        self.num_classes = num_classes
        self.head = nn.Sequential(
            nn.Conv2d(find(self, self.family.width), self.width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(self.width, num_classes * FINER**2, 1),
            nn.PixelShuffle(FINER),
        ).to(like)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    @property
    def global_pool(self) -> Any:
        """The image ViT's."""
        return self.vit.global_pool

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The image ViT's record."""
        return timm_config(self.vit)

    @pretrained_cfg.setter
    def pretrained_cfg(self, record: dict[str, Any]) -> None:
        self.vit.pretrained_cfg = record

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers are to leave out: those that the image ViT names."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training keep of each block its input alone, and run it again for the gradients."""
        checkpoint_gradients(self.vit, enable)
