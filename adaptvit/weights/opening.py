"""A model by any name that a command line gives, and weights by any such name for a ViT that is there.

open_model    a file, or timm's or the Hub's name of a model -> the model
start_from    any of these -> the weights of a ViT to fine-tune
remade        a ViT -> the same for other images or classes
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from adaptvit.backbones.base import model_name
from adaptvit.backbones.record import describe, rebuild
from adaptvit.backbones.segmenting import SegmentingViT
from adaptvit.backbones.video import SpaceTimeViT
from adaptvit.methods import METHODS, MethodConfig, dense, named
from adaptvit.model import AdaptiveViT
from adaptvit.terminal import meant, warn
from adaptvit.weights.names import method_of
from adaptvit.weights.places import HUBS, asked_of_the_hub, is_stored, told_model, weights_file
from adaptvit.weights.published import (
    NOT_FITTED,
    Source,
    fit_positions,
    open_file,
    open_in_folder,
    position_table,
    read_weights,
)
from adaptvit.weights.tensorfiles import check_finite, check_fit, reason

HEADS = ("head.", "head_dist.")
"""What the names of a classifier's tensors begin with."""


def open_model(name: Path | str, pixels: bool = False) -> AdaptiveViT:
    """The model that a command line names, in evaluation mode.

    An adaptvit file; a timm ViT by its name, by the Hub's (`hf-hub:OWNER/NAME`) or by a folder in that format
    (`local-dir:FOLDER`, or the folder alone); a training checkpoint of timm's or DeiT's, which says its model; or
    `MODEL=FILE`, weights of a timm model that do not say so, in the size and with as many classes as they have. A plain
    ViT comes as `FullConfig().build(vit)`. What is not here is downloaded.

    Args:
        pixels: take a model that tells the class of every pixel too, which only trainings do.
    Raises:
        FileNotFoundError: a file that is not there.
        TypeError: the timm model is not a ViT that this library reproduces.
        ValueError: none of these, weights that cannot be downloaded or do not say their model, a model that tells the
            class of every pixel, or what `load` raises.
    """
    model = _opened(name)
    if isinstance(model.vit, SegmentingViT) and not pixels:
        raise ValueError(
            f"{str(name)!r} tells the class of every pixel, where one of the image is wanted: adaptvit.load opens it, "
            "and adaptvit.measure.segmentation.evaluate_pixels measures it"
        )
    return model


def check_name(name: Path | str) -> None:
    """Refuse the name of no model, and a file that is not there, without reading or downloading anything.

    Raises:
        FileNotFoundError, ValueError: as `open_model` does.
    """
    _, word = told_model(name)
    if is_stored(name):
        if not word.startswith(HUBS):
            weights_file(word)
        return
    method_of(word)  # which makes the names of packages outside known
    if not timm.is_model(word):
        near = meant(word, timm.list_models())
        raise ValueError(f"model {word!r} is neither an adaptvit file nor the name of a timm model{near}")


def method_told(name: Path | str) -> type[MethodConfig] | None:
    """The method of a model whose name is timm's, without opening it; None of stored ones, which hold theirs."""
    return None if is_stored(name) else method_of(str(name)) or METHODS[named("dense")]


def classes_told(name: Path | str) -> int | None:
    """How many classes a model has whose name is timm's, without opening it; None where that does not say."""
    weights = None if is_stored(name) else get_pretrained_cfg(str(name))
    return None if weights is None else weights.num_classes


def check_method(name: Path | str, own: MethodConfig | type[MethodConfig] | None, asked: str | None) -> None:
    """Refuse a method for a model that has another already, as far as it is known.

    Raises:
        ValueError: naming both.
    """
    if own is not None and own.role != "dense" and asked not in (None, own.method):
        raise ValueError(f"{name} is {own.method} already; method {asked!r} is for a plain ViT")


def _opened(name: Path | str) -> AdaptiveViT:
    """Any model by its name, in evaluation mode."""
    check_name(name)
    told, word = told_model(name)
    if is_stored(name):
        file = weights_file(word)
        opened = open_file(file, told) if told or file == Path(word) else open_in_folder(file)
        return opened.eval()
    kind = method_of(word)
    try:
        with asked_of_the_hub() as unreachable:
            model = timm.create_model(word, pretrained=True)
    except Exception as error:  # timm and the Hub's client raise a dozen kinds
        if isinstance(error, ValueError):  # ours, of models that nobody has weights of
            raise
        raise ValueError(
            f"the weights of {word} are not here and cannot be downloaded ({unreachable or reason(error)}): download "
            f"them where there is a network, and name the file with --model {word}"
        ) from error
    opened = model if isinstance(model, AdaptiveViT) else dense(model)
    subset = infer_imagenet_subset(opened.vit)
    if subset is not None and not opened.class_names:
        names = ImageNetInfo(subset)
        opened.class_names = [names.index_to_description(number) for number in range(opened.num_classes)]
    own = any(not name.startswith("vit.") for name, _ in opened.named_parameters())
    if kind is not None and (own or kind.published.fitted):  # nobody taught a DeiT what to decide by
        warn(f"{word} has {kind.method}'s decisions not fitted or trained: {NOT_FITTED}", stacklevel=2)
    return opened.eval()


def start_from(vit: nn.Module, source: Path | str) -> bool:
    """Give a ViT the weights of a file, to be fine-tuned: positions resized, a head of other classes left out.

    A table of positions that is not trained stays, unless the file has the same, turned as `fit_gate` turns it.

    Args:
        source: a file as `convert` takes it, or an adaptvit file, whose method is left out; or the name of a folder or
            repository with one, as `open_model` takes it.
    Returns:
        Whether the head came along.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, needs code to be read, its other tensors do not fit or are not finite, or it is
            not to be told which grid its positions are for.
    """
    found = read_weights(weights_file(source), ours=True)
    tensors = {key: value for key, value in found.tensors.items() if not key.startswith("method.")}
    return _started(vit, replace(found, tensors=tensors), str(source))


def remade(vit: nn.Module, **arguments: Any) -> tuple[nn.Module, bool]:
    """A ViT made anew with other arguments, and the weights it had, as `start_from` gives them.

    Args:
        arguments: of `timm.create_model`.
    Returns:
        The new ViT, and whether the head came along.
    Raises:
        ValueError: weights do not fit those arguments, or nothing can be made of them.
    """
    name = model_name(vit)
    try:
        new = rebuild(describe(vit), **arguments)
    except Exception as error:  # timm asserts, torch overflows, and each constructor has other arguments
        raise ValueError(f"{name} cannot be made with {arguments}: {reason(error)}") from error
    image, new_image = vit, new
    if isinstance(vit, SpaceTimeViT):  # whose positions in time go by no size
        image, new_image = vit.vit, new.vit
        new.time_embed.data.copy_(vit.time_embed)
    tensors = dict(image.state_dict())
    source = Source(Path(name), tensors, {}, position_table(image)[1] if "pos_embed" in tensors else None)
    return new, _started(new_image, source, f"{name} as it was")


def _started(vit: nn.Module, source: Source, name: str) -> bool:
    """Fill a ViT with what fits; whether the head did."""
    tensors, own = source.tensors, vit.state_dict()
    heads = {key for key in own if key.startswith(HEADS)}
    fits = all(key in tensors and tensors[key].shape == own[key].shape for key in heads)
    if not fits:
        tensors = {key: value for key, value in tensors.items() if not key.startswith(HEADS)}
    if "pos_embed" in own and not vit.pos_embed.requires_grad:  # no other is of its kind but one turned with its stream
        if not _is_turned(tensors.get("pos_embed"), own["pos_embed"]):
            tensors["pos_embed"] = own["pos_embed"]
    else:
        fit_positions(replace(source, tensors=tensors), vit)
    wanted = own if fits else {key: own[key] for key in own if key not in heads}
    check_fit(f"{name} does not fit {model_name(vit)}", tensors, wanted)
    check_finite(name, tensors)
    vit.load_state_dict(tensors, strict=fits)
    return fits


def _is_turned(table: Tensor | None, own: Tensor) -> bool:
    """Whether a table is `own` but for a rotation of the channels."""
    if table is None or table.shape != own.shape or not table.is_floating_point():
        return False
    table = table.to(own)
    return torch.allclose(table @ table.mT, own @ own.mT, atol=1e-3)
