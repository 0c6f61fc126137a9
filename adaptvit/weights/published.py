"""Weights that others wrote: published ones, timm's, training checkpoints, under our names and resized to fit.

convert               a file of theirs -> one of ours
open_file             a file of either kind -> its model
open_in_folder        a folder in the Hub's format -> its model
read_weights          the tensors of a file, and what else it says
resize_positions      a table of positions for another grid
"""

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import clean_state_dict
from torch import Tensor, nn

from adaptvit.backbones.base import input_size, model_name, patch_grid, position_rows, timm_config
from adaptvit.backbones.families import FAMILIES
from adaptvit.backbones.parts import add_representation, representation_names
from adaptvit.backbones.record import ARGUMENTS, PREPROCESSING, TRANSFORMERS, check_described, transformers_class
from adaptvit.backbones.t2t import published_names
from adaptvit.checks import In, checked
from adaptvit.methods import METHODS, MethodConfig, Published, dense
from adaptvit.model import AdaptiveViT
from adaptvit.terminal import warn
from adaptvit.weights.checkpoints import (
    KEY,
    check_made,
    is_safetensors,
    load,
    rebuilding,
    record_of,
    save,
    stored_name,
    twin_of,
)
from adaptvit.weights.names import all_names, method_of
from adaptvit.weights.places import weights_file
from adaptvit.weights.tensorfiles import (
    check_finite,
    check_fit,
    check_state_dict,
    existing,
    read_json,
    read_safetensors,
    read_torch,
    reason,
)

WRAPPED = ("state_dict_ema", "state_dict", "model", "model_ema")
"""Where training checkpoints have their weights, in the order in which the trainings' own evaluation reads them."""
NOT_FITTED = "what it drops says nothing of an image; train it, or let adaptvit adapt fit a plain model"


@dataclass(frozen=True)
class Source:
    """What somebody's file has."""

    path: Path
    tensors: dict[str, Tensor]
    """Under our names."""
    trained_with: dict[str, Any]
    """Its training arguments, if any; `model` is the architecture."""
    grid: tuple[int, int] | None = None
    """Rows and columns of patches that its positions are for; None where the file does not say."""


def open_file(path: Path, of: str | None = None) -> AdaptiveViT:
    """An adaptvit file, one that says which model its weights are of, or one of which `of` does, timm's name."""
    if of is None and is_safetensors(path):
        return load(path)
    source = read_weights(path)
    if of is not None:
        source = replace(source, trained_with=source.trained_with | {"model": of})
    name, settings = _told_model(source)
    own = method_of(name)

    def told(published: Published) -> dict[str, Any]:
        said = {} if own is None else published.by_file_name(path.name)  # of a plain ViT two numbers may be a date
        return said | published.by_arguments(source.trained_with)

    kind, given = _said(name, told)
    if settings.get("depth", 1) > len(source.tensors):
        raise ValueError(f"{path} says {settings['depth']} blocks, but has only {len(source.tensors)} tensors")
    with rebuilding(path), torch.device("meta"):
        twin = _untrained(name, source, kind, given, settings)  # without memory: the file may claim any size
    _check_claims(source, twin, f"{path} does not fit the {name} of its training arguments")
    model = _untrained(name, source, kind, given, settings)
    shown = {key: source.trained_with.get(key) or None for key in PREPROCESSING}
    try:
        data = check_described("its training arguments'", shown | {"input_size": None}, PREPROCESSING)
    except ValueError as error:
        raise ValueError(f"{path} cannot be opened: {error}") from error
    model.vit.pretrained_cfg = timm_config(model.vit) | data
    _filled(model, source, name)
    _tell_unfitted(path, own, given)
    return model


def _told_model(source: Source) -> tuple[str, dict[str, Any]]:
    """timm's name of a model and arguments for it, as training arguments have them.

    Raises:
        ValueError: they do not.
    """
    told, path = source.trained_with, source.path
    name = told.get("model")
    if not isinstance(name, str) or not timm.is_model(name):
        of = f", but {name[:80]!r}, which timm does not have" if isinstance(name, str) else ""
        raise ValueError(
            f"{path} does not say which timm model its weights are of{of}: name it by --model, or make a file "
            f"that does with adaptvit convert {path} OUT.safetensors NAME"
        )
    settings = {**(told.get("model_kwargs") or {})} if isinstance(told.get("model_kwargs"), Mapping) else {}
    size = told.get("img_size") or told.get("input_size")
    if size is not None:
        settings["img_size"] = list(size)[-2:] if isinstance(size, (list, tuple)) else [size, size]
    elif "img_size" not in settings and (side := _side_of_positions(name, source)):
        settings["img_size"] = [side, side]
    for key, other in (("in_chans", "in_chans"), ("gp", "global_pool")):
        if told.get(key) is not None:
            settings[other] = told[key]
    settings["num_classes"] = _class_count(source) or 0
    try:
        settings = check_described("its training argument", settings, ARGUMENTS)
    except ValueError as error:
        raise ValueError(f"{path} cannot be opened: {error}") from error
    return name, settings


def _side_of_positions(name: str, source: Source) -> int | None:
    """Pixels of a side of the images that a file's positions are for; None where a model's own images fit them.

    Raises:
        TypeError: the model is not a ViT that this library reproduces.
    """
    table = source.tensors.get("pos_embed")
    with torch.device("meta"):
        model = timm.create_model(name)
    vit = (model if isinstance(model, AdaptiveViT) else dense(model)).vit
    if table is None or table.ndim != 3 or "pos_embed" not in vit.state_dict():
        return None
    prefix, grid = position_table(vit)
    side = math.isqrt(max(0, table.shape[1] - prefix))
    if math.prod(grid) == table.shape[1] - prefix or side**2 != table.shape[1] - prefix:
        return None
    return side * input_size(vit)[1] // grid[0]


def _open_transformers(file: Path, architectures: list[Any]) -> AdaptiveViT:
    """A folder as `save_pretrained` of Hugging Face's transformers leaves it."""
    known = {name.rpartition(".")[2]: name for name in FAMILIES.models if name.startswith(TRANSFORMERS)}
    name = next((known[one] for one in architectures if isinstance(one, str) and one in known), None)
    if name is None:
        told = ", ".join(map(str, architectures))[:80]
        raise ValueError(f"{str(file.parent)!r} holds {told}; known of transformers' are {', '.join(known)}")
    with rebuilding(file.parent):
        vit, loaded = transformers_class(name).from_pretrained(file.parent, output_loading_info=True)
        if lacking := sorted(loaded["missing_keys"]):
            raise ValueError(f"its weights lack {lacking[0]}")
    return dense(vit)


def open_in_folder(file: Path) -> AdaptiveViT:
    """Weights in a folder as timm's `save_for_hf` leaves it and the Hub holds it, or one of our files in a folder."""
    if is_safetensors(file) and KEY in read_safetensors(file)[1]:
        return load(file)
    source = read_weights(file)
    config = existing(file.parent / "config.json")
    told = read_json(config, config.read_bytes())
    if isinstance(told, dict) and isinstance(told.get("architectures"), list):
        return _open_transformers(file, told["architectures"])
    arguments = told.get("model_args") if isinstance(told, dict) else None
    depth = arguments.get("depth") if isinstance(arguments, dict) else None
    if isinstance(depth, int) and depth > len(source.tensors):
        raise ValueError(f"{config} says {depth} blocks, but {file.name} has only {len(source.tensors)} tensors")

    def made() -> Any:
        return _with_representation(timm.create_model(f"local-dir:{file.parent}", pretrained=False), source)

    with rebuilding(config), torch.device("meta"):
        twin = dense(made())  # without memory: the file may claim any size
    _check_claims(source, twin, f"{file} does not fit the config.json beside it")
    pool = told.get("global_pool")  # which timm does not read: it builds by model_args alone
    if pool not in (None, twin.vit.global_pool):
        raise ValueError(
            f"{config} says global_pool {repr(pool)[:80]}, but its model_args make a ViT that pools otherwise"
        )
    with rebuilding(config):
        vit = made()
        data = check_described("its images'", {key: timm_config(vit).get(key) for key in PREPROCESSING}, PREPROCESSING)
        vit.pretrained_cfg = timm_config(vit) | data
        model = dense(vit)
    return _filled(model, source, str(file.parent))


@checked
def convert(
    source: Path | str,
    target: Path | str,
    model_name: str,
    *,
    gate_scale: Annotated[float | None, In("(0, 1e6]")] = None,
    gate_center: Annotated[float | None, In("[-1e9, 1e9]")] = None,
    keep_rate: Annotated[float | Sequence[float] | None, In("(0, 1]")] = None,
    fuse: bool | None = None,
    num_classes: Annotated[int, In("[0, 1048576]")] = 1000,
    img_size: Annotated[int | None, In("[1, 65536]")] = None,
) -> AdaptiveViT:
    """Turn published weights into a file for `load`.

    A-ViT and DeiT weights have the same tensors; the released A-ViT files keep their gate in the file name. Each of its
    two numbers is the argument here, else the name's (`tiny-10-30.pth`: scale 10, centre 30), else what the file's
    training arguments say. Without any of these the weights are a plain ViT's and become a file of `FullConfig`; where
    `model_name` is an A-ViT's, they get the gate of that name, and a warning says that it is not fitted to them.
    AdaViT weights bring their policies, DynamicViT's their predictors, and EViT's have the tensors of a DeiT; none of
    the three has a gate. What weights of EViT or DynamicViT were trained to keep is not in the tensors: `keep_rate` and
    `fuse` say it.

    Args:
        source: a released A-ViT, AdaViT, EViT, DynamicViT, DeiT or T2T-ViT file, a training checkpoint with weights
            under `state_dict_ema`, `state_dict`, `model` or `model_ema`, the first that is there, or a bare state dict,
            as `.pth` or `.safetensors`; or a folder or repository with one. Nothing in it is executed.
        target: the file to write; replaced where it exists.
        model_name: a name that adaptvit registers with timm, such as `avit_tiny_patch16_224` or
            `ada_step_deit_small_patch16_224`, or a timm ViT's own.
        gate_scale: of A-ViT, where neither the file's name nor its training arguments are to say.
        gate_center: likewise.
        keep_rate: of EViT or DynamicViT, in (0, 1], a number or one for each block or stage that drops patches; None is
            the released default, 0.7.
        fuse: whether EViT fuses what it drops; None is the released default, that it does.
        num_classes: classes of the head in `source`.
        img_size: pixels per side of the converted model, None for that of `model_name`. A position table of another
            size is resized, as the released code does to fine-tune.
    Returns:
        The model as written; `config` says which gate it has.
    Raises:
        FileNotFoundError: no `source`, or no folder for `target`.
        ValueError: a setting that the method does not have or that is out of range; `source` is damaged, needs code to
            be read, is not finite, or does not fit `model_name` and `num_classes`.
    """
    own = method_of(model_name)
    if not timm.is_model(model_name):
        raise ValueError(f"model_name must be a timm ViT or one of {', '.join(all_names())}, got {model_name!r}")
    options = {"gate_scale": gate_scale, "gate_center": gate_center, "keep_rate": keep_rate, "fuse": fuse}
    chosen = {name: value for name, value in options.items() if value is not None}
    if wrong := [name for name in chosen if not any(name in kind.published.untold for kind in _of(model_name))]:
        raise ValueError(f"{model_name} has no {' and no '.join(wrong)}: leave out what its method does not have")
    found = read_weights(weights_file(source))
    settings = {"num_classes": num_classes} | ({} if img_size is None else {"img_size": img_size})

    def told(published: Published) -> dict[str, Any]:
        said = published.by_arguments(found.trained_with) | published.by_file_name(found.path.name)
        return said | {name: chosen[name] for name in published.untold if name in chosen}

    kind, given = _said(model_name, told)
    model = _untrained(model_name, found, kind, given, settings)
    classes = _class_count(found)
    if classes not in (None, num_classes):
        raise ValueError(f"{source} has a head of {classes} classes, not {num_classes}: pass num_classes={classes}")
    save(_filled(model, found, model_name), target)
    _tell_unfitted(source, own, given)
    return model


def _filled(model: AdaptiveViT, source: Source, name: str) -> AdaptiveViT:
    """The model with a file's weights, positions resized."""
    own = model.state_dict()
    wanted = {stored_name(key): own[key] for key in own}
    if source.tensors.keys() == wanted.keys():
        fit_positions(source, model.vit)
    check_fit(f"{source.path} does not fit {name}", source.tensors, wanted)
    check_finite(source.path, source.tensors)
    model.load_state_dict({key: source.tensors[stored_name(key)] for key in own})
    return model


def _class_count(source: Source) -> int | None:
    """Classes of the head in a file; None where it has none."""
    head = source.tensors.get("head.fc.weight", source.tensors.get("head.weight"))
    return len(head) if head is not None and head.ndim else None


def _with_representation(vit: Any, source: Source) -> Any:
    """A ViT for these weights, which may have a representation layer that the ViT lacks.

    Raises:
        ValueError: they have, and no such layer can stand in this ViT.
    """
    layer = source.tensors.get("head.pre_logits.fc.weight")
    if layer is not None and layer.ndim:
        try:
            add_representation(vit, len(layer))
        except ValueError as error:
            raise ValueError(f"{source.path} has pre_logits, which cannot be taken along: {error}") from error
    return vit


def _of(model_name: str) -> list[type[MethodConfig]]:
    """The methods that a file may be of: the name's own; of a plain ViT, those that its weights may be fitted for."""
    own = method_of(model_name)
    return [own] if own else [kind for kind in METHODS.values() if kind.published.fitted]


def _said(
    model_name: str, told: Callable[[Published], dict[str, Any]]
) -> tuple[type[MethodConfig] | None, dict[str, Any]]:
    """The method that a file is of, None of a plain ViT, and what is said of its config, as `told` has it."""
    for kind in _of(model_name):
        if given := told(kind.published):
            return kind, given
    return method_of(model_name), {}


def _untrained(
    model_name: str,
    source: Source,
    kind: type[MethodConfig] | None,
    given: dict[str, Any],
    settings: dict[str, Any],
) -> AdaptiveViT:
    """The model that is filled: a name's own method; a method around a timm ViT; else the plain ViT.

    Args:
        given: fields of the method's config.
    """
    try:
        if method_of(model_name):
            model = timm.create_model(model_name, **settings, **given)
        else:
            vit = timm.create_model(model_name, **settings)
            model = dense(vit) if kind is None else kind(**given).build(vit)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source.path} cannot have {given}: {reason(error)}" if given else str(error)) from error
    return model.config.build(_with_representation(model.vit, source))


def _tell_unfitted(path: Path | str, own: type[MethodConfig] | None, given: dict[str, Any]) -> None:
    """Say so where a model has numbers of its name alone, which nobody fitted to these weights."""
    if own is not None and own.published.fitted and not given:
        warn(f"{path} has no {own.published.fitted} that was fitted or trained: {NOT_FITTED}", stacklevel=3)


def fit_positions(source: Source, vit: nn.Module) -> None:
    """Resize the table of positions of a file to the ViT's grid, in `source.tensors`.

    Raises:
        ValueError: the grid of the file's is not known, and not to be told from its size.
    """
    table, own = source.tensors.get("pos_embed"), vit.state_dict().get("pos_embed")
    if table is None or own is None or table.ndim != 3 or (len(table), table.shape[2]) != (len(own), own.shape[2]):
        return  # `check_fit` names it
    prefix, new = position_table(vit)
    old, count = source.grid, table.shape[1] - prefix
    if count < 1 or not table.is_floating_point():
        return
    side = math.isqrt(max(0, count))
    if old is None and count == math.prod(new) != side**2:
        old = new  # what the same number of patches is likeliest to be
    elif old is None and count == math.prod(new) and new != (side, side):
        raise ValueError(
            f"{source.path} does not say whether its {count} positions are for {side} x {side} patches or for the "
            f"{new[0]} x {new[1]} of {model_name(vit)}: make it an adaptvit file, which says so, with adaptvit.save"
        )
    if old is None and side**2 != count:
        raise ValueError(f"{source.path} has positions of {count} patches, which do not make a square grid")
    if old is None or math.prod(old) == count:
        source.tensors["pos_embed"] = resize_positions(table, new, prefix, old)


def position_table(vit: nn.Module) -> tuple[int, tuple[int, int]]:
    """Rows of the position table before the patches, and the grid of those."""
    rows, columns = patch_grid(vit)
    return position_rows(vit), (rows, columns)


def resize_positions(
    table: Tensor, side: int | tuple[int, int], prefix: int, old: tuple[int, int] | None = None
) -> Tensor:
    """A position table of one grid resized to another: bicubic, no antialiasing, rows before the patches kept.

    Args:
        table: (1, prefix + n, D).
        side: patches per side of the new grid, or its rows and columns.
        prefix: rows of class and distillation token.
        old: rows and columns that the table is for; None is a square.
    Returns:
        (1, prefix + rows * columns, D).
    Raises:
        ValueError: the table's patches are not a square, or not those of `old`.
    Source: A-ViT's and DeiT's released code, as it loads weights to fine-tune.
    """
    patches = table.shape[1] - prefix
    if old is None:
        old = (math.isqrt(max(0, patches)),) * 2
        if patches < 1 or math.prod(old) != patches:
            raise ValueError(f"the position table has {patches} patches, which do not make a square grid")
    if math.prod(old) != patches:
        raise ValueError(f"the position table has {patches} patches, but a grid of {old[0]} x {old[1]} has others")
    new = (side, side) if isinstance(side, int) else side
    return resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=prefix, antialias=False)


def read_weights(path: Path, ours: bool = False) -> Source:
    """Somebody else's weights under our names; one of our own files too where `ours` is true."""
    if is_safetensors(path):
        tensors, metadata = read_safetensors(path)
        if KEY not in metadata:
            return Source(path, _under_our_names(path, check_state_dict(path, tensors)), {})
        if not ours:
            raise ValueError(f"{path} is an adaptvit file already, which says its model: read it with adaptvit.load")
        with rebuilding(path):
            _, grid = position_table(twin_of(record_of(metadata), tensors))
        return Source(path, tensors, {}, grid)
    content = read_torch(path)
    if isinstance(content, dict) and {"model", "optimizer", "history"} <= content.keys():
        raise ValueError(f"{path} is what a training resumes from: take the model.safetensors beside it")
    weights, trained_with = content, dict[str, Any]()
    if isinstance(content, dict):
        held = [content[key] for key in WRAPPED if content.get(key) is not None]
        if held:
            weights, arguments = held[0], content.get("args")
            arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
            named = arguments.items() if isinstance(arguments, Mapping) else ()
            trained_with = {name: value for name, value in named if isinstance(name, str)}
            if "arch" in content:
                trained_with.setdefault("model", content["arch"])
    return Source(path, _under_our_names(path, check_state_dict(path, weights)), trained_with)


def _check_claims(source: Source, twin: nn.Module, complaint: str) -> None:
    """Refuse weights far from those of a model that is built without memory for its own, positions aside.

    Raises:
        ValueError: naming them, or the memory that positions would take.
    """
    wanted = {stored_name(key): value for key, value in twin.state_dict().items()}
    sized = [{key: value for key, value in some.items() if key != "pos_embed"} for some in (source.tensors, wanted)]
    check_fit(complaint, *sized)
    with rebuilding(source.path):
        check_made(twin)


def _under_our_names(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights as our files spell them.

    What is named otherwise: what the methods say; T2T-ViT's stem; the representation layer of timm's up to 0.5; what
    `_timm_names` has.

    Raises:
        ValueError: two tensors have one name then, or parts of one tensor do not go together.
    """
    shared = {name.partition(".")[0] for name in tensors}
    if len(shared) == 1 and all("." in name for name in tensors):  # of a module around the model, as Lightning's
        tensors = {name.partition(".")[2]: value for name, value in tensors.items()}
    cleaned = clean_state_dict(tensors)
    if len(cleaned) < len(tensors):
        raise ValueError(f"{path} holds a tensor twice: with and without the prefix that parallel training gives it")
    renamed = published_names(representation_names(_timm_names(cleaned)))
    try:
        for kind in METHODS.values():
            renamed = kind.published.our_tensors(renamed)
    except RuntimeError as error:
        raise ValueError(f"{path} holds queries, keys and values that do not go together: {reason(error)}") from error
    return renamed


def _timm_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DeiT III's and DINOv2's weights, as their authors name them, as timm does; others come back as they are.

    DINOv2's `mask_token`, which only its training reads, is left out. With registers timm has no position for the class
    token, so that token takes it up.
    """
    tensors = {key: value for key, value in tensors.items() if key != "mask_token"}
    table, token = tensors.get("pos_embed"), tensors.get("cls_token")
    if "register_tokens" in tensors and table is not None and token is not None and table.ndim == token.ndim == 3:
        tensors |= {"cls_token": token + table[:, :1], "pos_embed": table[:, 1:]}
    others = [(r"^register_tokens$", "reg_token"), (r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma")]
    others += [(r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2.")]
    for theirs, timms in others:
        tensors = {re.sub(theirs, timms, key): value for key, value in tensors.items()}
    return tensors
