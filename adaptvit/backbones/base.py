"""What a host is: a ViT of a family that is known, what it offers to methods, and what its parts say of it.

No module reads a ViT's parts but those of this folder, `adaptvit.flax.convert`, and A-ViT's released pass, whose
gradients no block of timm's has.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from math import prod
from typing import Any, NamedTuple

import torch
from timm.layers import Attention, to_2tuple
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from adaptvit.backbones.door import ATTENTION, offer_attention
from adaptvit.backbones.families import (
    FAMILIES,
    POOLS,
    Family,
    Parts,
    Pieces,
    Reads,
    find,
    get,
    qualified,
    value_of,
)
from adaptvit.backbones.parts import Mixer, TokenPart
from adaptvit.backbones.processors import prepared_by
from adaptvit.checks import quoted

SIDE = 12
"""Patches in a row and column of images, where neither a model nor its record says how large these are."""


def family_of(vit: Any) -> Family:
    """The family of a ViT.

    Raises:
        TypeError: it is of none that is known.
    """
    family = FAMILIES.of(vit)
    if family is None:
        known = ", ".join(sorted(name.rpartition(".")[2] for one in FAMILIES for name in one.models))
        raise TypeError(f"{model_name(vit)} is a {type(vit).__name__}; known are {known}")
    return family


def blocks_of(vit: nn.Module) -> Any:
    """The list of a ViT's blocks, as it has them."""
    return get(vit, family_of(vit).blocks)


class Placed(NamedTuple):
    """A block where its ViT has it."""

    called: nn.Module
    """What is called: the block, or what is wrapped around it."""
    path: str
    """The block's dotted name in that; empty where nothing is wrapped around it."""
    core: Any
    """The block itself."""
    parts: Parts | None
    """Names of its parts, where they are known."""


def placed(called: nn.Module) -> Placed:
    """The block that something may be wrapped around."""
    names, core = list[str](), called
    while (parts := FAMILIES.parts_of(core)) is None:
        children = list(core.named_children())
        if len(children) != 1:
            return Placed(called, "", called, None)
        name, core = children[0]
        names.append(name)
    return Placed(called, ".".join(names), core, parts)


def check(vit: Any) -> None:
    """Refuse a model that would not be reproduced.

    Raises:
        TypeError: naming the part that is not supported and what is.
    """
    family = family_of(vit)
    name = model_name(vit)
    for one in family.refused:
        found = find(vit, one.name)
        if found == one.value or (one.value is True and found not in (None, False)):
            raise TypeError(f"{name} is not supported: {one.why}")
    pool = find(vit, family.pool)
    if pool is not None and qualified(type(pool)) not in POOLS:
        allowed = ", ".join(one.rpartition(".")[2] for one in POOLS)
        raise TypeError(f"{name}.{family.pool} is a {type(pool).__name__}, which is not supported; allowed: {allowed}")
    for block in blocks_of(vit):
        attn = getattr(placed(block).core, "attn", None)
        if getattr(attn, "fused_attn", True) is False:
            raise TypeError(
                f"{type(attn).__name__} in {name} does not call scaled_dot_product_attention, by which tokens are "
                "attended to: create it with timm.layers.set_fused_attn(True)"
            )
        if isinstance(getattr(block, "norm1", None), TokenPart) and getattr(attn, "gate", None):
            raise TypeError(f"{name} has gated attention after a norm over tokens, which is not supported")
    if (rate := getattr(getattr(vit, "patch_drop", None), "prob", 0)) > 0:
        raise TypeError(
            f"{name} has patch_drop_rate={rate:g}, which takes patches out of their slots in training and is not "
            "supported: create it with patch_drop_rate=0"
        )


def check_attention(vit: Any) -> None:
    """Refuse a model of transformers that attends by another way than SDPA, and give it one that any of them takes.

    Raises:
        TypeError: naming the way, and what to call.
    """
    way = find(vit, "config._attn_implementation")
    if way is not None:
        offer_attention()
    if way not in (None, "sdpa", ATTENTION):
        raise TypeError(
            f"{model_name(vit)} attends by {way!r}, but tokens are attended to by scaled_dot_product_attention: "
            f'vit.set_attn_implementation("{ATTENTION}")'
        )


def cores(vit: nn.Module) -> list[Any]:
    """A ViT's blocks, without what may be wrapped around them."""
    return [placed(block).core for block in blocks_of(vit)]


def _attentions(vit: nn.Module) -> list[Any]:
    return [getattr(block, "attn", None) for block in cores(vit)]


def _in_place_of_attention(vit: nn.Module) -> str | None:
    kinds = {type(attn).__name__ for attn in _attentions(vit) if isinstance(attn, Mixer)}
    return f"the blocks of {model_name(vit)} have {kinds.pop()} in its place" if kinds else None


def _norms_over_tokens(vit: nn.Module) -> str | None:
    norms = [getattr(block, name, None) for block in cores(vit) for name in ("norm1", "norm2")]
    kinds = {type(norm).__name__ for norm in norms if isinstance(norm, TokenPart)}
    return f"{model_name(vit)} has {kinds.pop()}, over all tokens of an image" if kinds else None


def _pools(vit: nn.Module) -> str | None:
    return f"{model_name(vit)} pools all its tokens" if read_slots(vit) is None else None


def _unequal_heads(vit: nn.Module) -> str | None:
    counts = sorted({attn.num_heads for attn in _attentions(vit) if hasattr(attn, "num_heads")})
    return f"the blocks of {model_name(vit)} have {' or '.join(map(str, counts))}" if len(counts) > 1 else None


def _other_blocks(vit: nn.Module) -> str | None:
    kinds = {type(block).__name__ for block in cores(vit) if type(block).forward is not Block.forward}
    kinds = kinds or {type(attn).__name__ for attn in _attentions(vit) if not isinstance(attn, Attention | Mixer)}
    return f"{model_name(vit)} has {kinds.pop()}" if kinds else None


def _unnamed_parts(vit: nn.Module) -> str | None:
    kinds = {type(block).__name__ for block in cores(vit) if FAMILIES.parts_of(block) is None}
    return f"{model_name(vit)} has {kinds.pop()}, which is called whole" if kinds else None


def _takes_images(vit: nn.Module) -> str | None:
    if clip_frames(vit) is not None:
        return None
    return f"{model_name(vit)} takes images; adaptvit.video.inflate makes one that takes clips of it"


OFFERS: dict[str, Callable[[nn.Module], str | None]] = {
    "attention": _in_place_of_attention,
    "token norms": _norms_over_tokens,
    "a class token": _pools,
    "equal heads": _unequal_heads,
    "named parts": _unnamed_parts,
    "timm's plain blocks": _other_blocks,
    "steps in time": _takes_images,
}
"""What a method may need of a ViT, and what a ViT that does not offer it has instead; None where it does.

    attention               in every block
    token norms             of each token by itself
    a class token           which the classifier reads, rather than pool all tokens
    equal heads             as many in every block
    named parts             attention and MLP, of which one can run without the other
    timm's plain blocks     whose maps can be run in part
    steps in time           of patches, in clips
"""


def check_offers(vit: nn.Module, needs: Set[str], who: str) -> None:
    """Refuse a ViT that does not offer what `who` needs, names in `OFFERS`.

    Raises:
        TypeError: naming the need, and what the ViT has instead.
    """
    for need in OFFERS:
        if need in needs and (instead := OFFERS[need](vit)):
            raise TypeError(f"{who} needs {need}, but {instead}")


def model_name(vit: nn.Module) -> str:
    """timm's name of the architecture, or the class name of a model built by hand."""
    return timm_config(vit).get("architecture") or type(vit).__name__


def timm_config(vit: nn.Module) -> dict[str, Any]:
    """timm's record of the weights and of the images they were trained on; for others than timm's, of the images."""
    if recorded := getattr(vit, "pretrained_cfg", None):
        return recorded
    family = FAMILIES.of(vit)
    folder = find(vit, "config._name_or_path")
    return {} if family is None else dict(family.prepared) | (prepared_by(folder) if folder else {})


def class_names(vit: nn.Module) -> tuple[str, ...]:
    """Names of the classes, where the model itself has them: by timm's record, or Hugging Face's config."""
    count = class_count(vit)
    recorded = (getattr(vit, "pretrained_cfg", None) or {}).get("label_names")
    if isinstance(recorded, list | tuple) and len(recorded) == count > 0:
        return tuple(recorded)
    names = find(vit, "config.id2label") if count else None
    if not names or all(name == f"LABEL_{number}" for number, name in names.items()):
        return ()
    return tuple(names[number] for number in sorted(names))


def name_classes(vit: Any, names: Sequence[str]) -> None:
    """Give the classes names, where `class_names` finds them.

    Raises:
        ValueError: they are not as many as the classes, or not text.
    """
    count = class_count(vit)
    if isinstance(names, str) or len(names) != count or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names must be as many texts as the model has classes, {count}, got {quoted(names)}")
    if find(vit, "config.id2label") is not None:
        vit.config.id2label = dict(enumerate(names))
        vit.config.label2id = {name: number for number, name in enumerate(names)}
    else:
        vit.pretrained_cfg = {**(getattr(vit, "pretrained_cfg", None) or {}), "label_names": tuple(names)}


def input_size(vit: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images; timm's own record keeps those of the pretrained weights."""
    family = family_of(vit)
    channels = get(vit, family.channels)
    if family.size is not None:
        return channels, *to_2tuple(get(vit, family.size))
    recorded = timm_config(vit).get("input_size")
    return channels, *(recorded[1:] if recorded else (SIDE * side for side in to_2tuple(get(vit, family.patch))))


def clip_frames(vit: nn.Module) -> int | None:
    """Frames of a clip; None of a ViT that takes images."""
    return find(vit, family_of(vit).frames)


def class_count(vit: nn.Module) -> int:
    """Classes of the head; 0 without one."""
    return int(value_of(vit, family_of(vit).classes))


def prefix_tokens(vit: nn.Module) -> int:
    """Class, distillation and register tokens: the slots before the first patch."""
    return sum(value_of(vit, part) for part in family_of(vit).prefix)


def position_rows(vit: nn.Module) -> int:
    """Rows of timm's position table before those of the patches; DeiT III and ViTs with registers may have none."""
    return 0 if vit.no_embed_class else prefix_tokens(vit)


def read_slots(vit: nn.Module) -> int | None:
    """How many leading slots the classifier reads: 1 with a class token, 2 when distilled, None where it pools all."""
    reads: Any = family_of(vit).reads
    while isinstance(reads, Reads):
        reads = reads.cases.get(get(vit, reads.name), reads.other)
    return reads


def pieces_of(vit: nn.Module, images: Any) -> Pieces | None:
    """How these images name what they are cut into; None of images that are not cut yet."""
    pieces = family_of(vit).pieces
    return pieces if pieces is not None and (pieces.alone or isinstance(images, Mapping)) else None


def check_images(vit: nn.Module, images: Any) -> None:
    """Refuse images that the ViT does not take.

    Raises:
        TypeError: they are of another precision.
        ValueError: they are of another shape, or on another device.
    """
    if (pieces := pieces_of(vit, images)) is not None:
        _check_pieces(vit, pieces, images)
        return
    name = model_name(vit)
    channels, *size = input_size(vit)
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images are a {type(images).__name__}, but {name} takes a tensor (batch, {channels}, height, width) here"
        )
    wanted: tuple[int | str, ...] = (channels, "height", "width")
    if (frames := clip_frames(vit)) is not None:
        wanted = (frames, *wanted)
        if images.ndim == 5 and tuple(images.shape[1:3]) == (channels, frames) and channels != frames:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, channels before frames, but {name} takes (batch, {frames}, "
                f"{channels}, height, width): give it clips.transpose(1, 2)"
            )
    known = [(side, length) for side, length in zip(wanted, images.shape[1:], strict=False) if isinstance(side, int)]
    if images.ndim != len(wanted) + 1 or any(side != length for side, length in known):
        raise ValueError(
            f"images have shape {tuple(images.shape)}, but {name} takes (batch, {', '.join(map(str, wanted))})"
        )
    _check_like_weights(vit, images)
    any_size = family_of(vit).any_size
    if isinstance(any_size, str):
        any_size = bool(find(vit, any_size))
    if not any_size and list(images.shape[-2:]) != size:
        raise ValueError(
            f"images are {images.shape[-2]} x {images.shape[-1]} pixels, but {name} takes {size[0]} x {size[1]}; "
            "create it with img_size=... or dynamic_img_size=True"
        )


def _check_like_weights(vit: nn.Module, images: Tensor) -> None:
    name, weight = model_name(vit), next(vit.parameters())
    if images.dtype != weight.dtype and not torch.is_autocast_enabled(images.device.type):
        raise TypeError(f"images are {images.dtype}, but {name} is {weight.dtype}: convert and normalise them first")
    if images.device != weight.device:
        raise ValueError(f"images are on {images.device}, but {name} is on {weight.device}")


def _check_pieces(vit: nn.Module, pieces: Pieces, images: Any) -> None:
    name, names = model_name(vit), (pieces.patches, *pieces.others, pieces.valid)
    if not isinstance(images, Mapping) or set(images) != set(names):
        got = f"dictionary of {', '.join(images)}" if isinstance(images, Mapping) else type(images).__name__
        raise TypeError(f"images are a {got}, but {name} takes a dictionary of {', '.join(names)}")
    patches, valid = images[pieces.patches], images[pieces.valid]
    width = get(vit, family_of(vit).channels) * prod(to_2tuple(get(vit, family_of(vit).patch)))
    if patches.shape[2:].numel() != width or patches.shape[:2] != valid.shape:
        raise ValueError(
            f"{pieces.patches} have shape {tuple(patches.shape)} and {pieces.valid} {tuple(valid.shape)}, but {name} "
            f"takes (batch, patches, {width}) and (batch, patches)"
        )
    _check_like_weights(vit, patches)
    there = valid.bool()
    if not there[:, :1].all() or (there[:, 1:] & ~there[:, :-1]).any():
        raise ValueError(f"{pieces.valid} has to say of each image that its first patches are valid, one or more")


def patch_grid(vit: nn.Module, images: Any = None) -> tuple[int, ...]:
    """Rows and columns of patches that the images are cut into, of videos steps in time before them.

    Of images that come in pieces, of different shapes, the patches that there is room for.

    Args:
        images: None is those of the ViT's own size.
    """
    if images is not None and (pieces := pieces_of(vit, images)) is not None:
        return (images[pieces.patches].shape[1],)
    size = input_size(vit)[1:] if images is None else tuple(images.shape[-2:])
    family = family_of(vit)
    stem: Any = find(vit, family.stem)
    if hasattr(stem, "dynamic_feat_size"):
        grid = tuple(stem.dynamic_feat_size(size))
    else:
        grid = tuple(side // patch for side, patch in zip(size, to_2tuple(get(vit, family.patch)), strict=True))
    if family.frames is None or family.tubelet is None:
        return grid
    return get(vit, family.frames) // get(vit, family.tubelet), *grid


def sample_shape(vit: nn.Module) -> tuple[int, ...]:
    """Of one image of the model's own size, channels first; of a video frames before them."""
    frames = find(vit, family_of(vit).frames)
    return input_size(vit) if frames is None else (frames, *input_size(vit))


def checkpoint_gradients(vit: Any, enable: bool) -> None:
    """Have a ViT keep of each block its input alone in training, or not, by its own way."""
    does = "enable" if enable else "disable"
    for theirs in (f"activation_checkpointing_{does}", f"gradient_checkpointing_{does}"):  # transformers', old too
        if hasattr(vit, theirs):
            getattr(vit, theirs)()
            return
    if hasattr(vit, "set_grad_checkpointing"):
        vit.set_grad_checkpointing(enable)
    else:
        vit.grad_checkpointing = enable
