"""A ViT for clips, made of one for images: patches of all frames attend to one another.

    inflate    an image ViT -> a space-time ViT with its weights

Letters: B clips, F frames, u frames of a tubelet, S = F / u steps in time, p tokens before the patches, P patches of a
step, D channels.
"""

import copy
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptvit.backbones.base import (
    check,
    check_attention,
    check_images,
    checkpoint_gradients,
    class_count,
    input_size,
    model_name,
    patch_grid,
    prefix_tokens,
    timm_config,
)
from adaptvit.backbones.families import FAMILIES, Family, find, get, inside
from adaptvit.backbones.forward import with_blocks
from adaptvit.backbones.guess import guess
from adaptvit.backbones.t2t import TokensToToken
from adaptvit.checks import In, checked

Start = Literal["mean", "centre"]
"""What a patch of a tubelet begins as: `mean`, that of the mean of its frames; `centre`, that of its middle frame."""


@checked
def inflate(
    vit: nn.Module,
    frames: Annotated[int, In("[1, 65536]")] = 16,
    tubelet: Annotated[int, In("[1, 65536]")] = 2,
    start: Start = "mean",
) -> "SpaceTimeViT":
    """A space-time ViT with a copy of an image ViT's weights, in the mode that it is in.

        clips = torch.rand(2, 16, 3, 224, 224)
        logits = adaptvit.video.inflate(vit)(clips)

    It takes (batch, frames, channels, height, width), as clips come from readers, torchvision's transforms and Hugging
    Face's models here: torchvision's own video models have channels first. The patches of all frames attend to one
    another, and so do its prefix tokens, of which there are as many as before. Positions in time are added to those in
    space, zeros to begin with. It is a ViT like any other of this library.

    Args:
        vit: of a family that is known, or that can be guessed.
        frames: of a clip.
        tubelet: frames that one patch has; 1 takes any way to cut patches, more a single convolution.
        start: what its patches begin as.
    Raises:
        TypeError: the ViT is not supported, takes videos already, or has no convolution that takes more frames.
        ValueError: `frames` are no whole number of tubelets.
    """
    made = SpaceTimeViT(copy.deepcopy(vit), frames, tubelet, start)
    with torch.no_grad():
        made.prove()
    return made


class SpaceTimeViT(nn.Module):
    """An image ViT's own forward, in which the tokens of all steps of a clip go through the blocks together.

    Attributes:
        vit: the image ViT, whose first convolution takes the frames of a tubelet as channels.
        family: how it is put together, as `FAMILIES` has it.
        time_embed: (S, D), added to the patches of each step.
    """

    def __init__(self, vit: nn.Module, frames: int, tubelet: int, start: Start = "mean") -> None:
        """Take a ViT, which is changed; `inflate` says what the rest is."""
        super().__init__()
        if frames % tubelet:
            raise ValueError(f"frames is {frames}, which is no whole number of tubelets of {tubelet} frames")
        check_attention(vit)
        family = FAMILIES.of(vit) or guess(vit)
        FAMILIES.keep(vit, family)
        check(vit)
        if family.frames is not None:
            raise TypeError(f"{model_name(vit)} takes videos already: it needs no inflation")
        if isinstance(find(vit, family.stem), TokensToToken) and get(vit, str(family.stem)).tokens_type != "performer":
            raise TypeError(f"{model_name(vit)} has a stem whose patches attend to one another, which is not inflated")
        self.vit: Any = vit
        self.frames, self.tubelet, self.start = frames, tubelet, start
        self.channels = input_size(vit)[0]
        self.family: Family = inside(
            "vit", family, channels="channels", frames="frames", tubelet="tubelet", pieces=None, told={}
        )
        self._told_image = dict(family.told)
        if tubelet > 1:
            _widen(vit, family, tubelet, start)
        self.prefix = prefix_tokens(self)
        like = next(vit.parameters())
        width = get(self, self.family.width)
        self.time_embed = nn.Parameter(torch.zeros(self.steps, width, device=like.device, dtype=like.dtype))
        self.train(vit.training)

    @property
    def steps(self) -> int:
        """Steps in time of a clip's patches."""
        return self.frames // self.tubelet

    def forward(self, clips: Tensor) -> Any:
        """(B, F, channels, height, width) -> what the image ViT gives of an image."""
        check_images(self, clips)
        blocks = get(self, self.family.blocks)
        checkpoints = self.training and torch.is_grad_enabled() and find(self, self.family.checkpointing) is True

        def go_on(x: Tensor, calls: list[Any]) -> Tensor:
            x = self.together(x)
            patches = x.shape[1] - self.prefix
            for block, (args, kwargs) in zip(blocks, calls, strict=True):
                args, kwargs = self._told(args, patches), self._told(kwargs, patches)
                if checkpoints:
                    out = checkpoint(block, x, *args, use_reentrant=False, **kwargs)
                else:
                    out = block(x, *args, **kwargs)
                x = out[0] if self.family.tuples else out
            return x

        tubelets = clips.unflatten(1, (self.steps, self.tubelet)).flatten(0, 1).flatten(1, 2)
        return with_blocks(self, self.family, go_on).vit(tubelets, **self._told_image)

    def together(self, x: Tensor) -> Tensor:
        """(B S, p + P, D), the tokens of each step -> (B, p + S P, D), with positions in time; prefix of the first."""
        steps = x.unflatten(0, (-1, self.steps))
        patches = steps[:, :, self.prefix :] + self.time_embed[:, None]
        return torch.cat([steps[:, 0, : self.prefix], patches.flatten(1, 2)], dim=1)

    def _told(self, given: Any, patches: int) -> Any:
        """What an image ViT tells its blocks, with tables of positions repeated for every step."""
        if isinstance(given, dict):
            return {name: self._told(value, patches) for name, value in given.items()}
        if isinstance(given, list | tuple):
            return type(given)(self._told(value, patches) for value in given)
        if not isinstance(given, Tensor) or given.ndim < 2:
            return given
        rows, each = given.shape[-2], patches // self.steps
        if rows == each:
            return torch.cat([given] * self.steps, dim=-2)
        if rows == self.prefix + each:
            prefix, of_patches = given.split([self.prefix, each], dim=-2)
            return torch.cat([prefix, *[of_patches] * self.steps], dim=-2)
        return given

    def prove(self) -> None:
        """Refuse a ViT whose blocks do not take the tokens of a clip.

        Raises:
            TypeError: it is one.
        """
        like = next(self.parameters())

        def first(x: Tensor, calls: list[Any]) -> Tensor:
            x = self.together(x)
            args, kwargs = calls[0]
            get(self, self.family.blocks)[0](x, *self._told(args, self.patches), **self._told(kwargs, self.patches))
            return x

        clips = torch.zeros(self.steps, self.tubelet * self.channels, *input_size(self)[1:], device=like.device)
        stood = with_blocks(self, self.family, first)
        try:
            stood.vit(clips.to(like.dtype), **self._told_image)
        except Exception as error:  # whatever a block raises of more tokens than it is made for
            raise TypeError(f"{model_name(self)} cannot be inflated: its blocks go by the grid of one image") from error

    @property
    def patches(self) -> int:
        """Patches of a clip of the ViT's own size."""
        steps, rows, columns = patch_grid(self)
        return steps * rows * columns

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The image ViT's record."""
        return timm_config(self.vit)

    @pretrained_cfg.setter
    def pretrained_cfg(self, record: dict[str, Any]) -> None:
        self.vit.pretrained_cfg = record

    @property
    def num_classes(self) -> int:
        """Classes of the head."""
        return class_count(self.vit)

    @property
    def global_pool(self) -> Any:
        """The image ViT's."""
        return self.vit.global_pool

    @property
    def head_hidden_size(self) -> int:
        """The image ViT's."""
        return self.vit.head_hidden_size

    def get_classifier(self) -> nn.Module:
        """The image ViT's."""
        return self.vit.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the image ViT a fresh classifier of so many classes."""
        self.vit.reset_classifier(num_classes, global_pool)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The image ViT's, of normalised tokens (B, N, D)."""
        return self.vit.forward_head(x, pre_logits=pre_logits)

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers are to leave out: those that the image ViT names, and positions in time."""
        return {"time_embed", *(f"vit.{name}" for name in self.vit.no_weight_decay())}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training keep of each block its input alone, and run it again for the gradients."""
        checkpoint_gradients(self.vit, enable)


def _widen(vit: nn.Module, family: Family, tubelet: int, start: Start) -> None:
    """Have the convolution that cuts patches take the frames of a tubelet, one after the other, as channels.

    Raises:
        TypeError: there is not one such convolution.
    """
    stem: Any = find(vit, family.stem)
    found = [
        (name, part)
        for name, part in (stem.named_modules() if stem is not None else ())
        if isinstance(part, nn.Conv2d) and tuple(part.kernel_size) == tuple(part.stride) and part.groups == 1
    ]
    if len(found) != 1 or len([part for part in stem.modules() if isinstance(part, nn.Conv2d | nn.Linear)]) > 1:
        raise TypeError(
            f"{model_name(vit)} does not cut patches by one convolution, which could take the {tubelet} frames of a "
            "tubelet: inflate it with tubelet=1"
        )
    (name, conv), path = found[0], str(family.stem)
    path = f"{path}.{name}" if name else path
    weight = conv.weight.detach()
    if start == "mean":
        weight = (weight / tubelet).repeat(1, tubelet, 1, 1)
    else:
        centre = torch.zeros_like(weight).repeat(1, tubelet, 1, 1)
        middle = tubelet // 2 * weight.shape[1]
        centre[:, middle : middle + weight.shape[1]] = weight
        weight = centre
    conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    conv.in_channels *= tubelet
    outer, _, _ = path.rpartition(".")
    holder: Any = get(vit, outer) if outer else vit
    if isinstance(getattr(holder, "num_channels", None), int):  # by which transformers' check their images
        holder.num_channels = conv.in_channels
