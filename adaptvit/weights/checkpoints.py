"""One safetensors file per model: the ViT's weights under timm's own names, and the configuration that goes with them.

    save, load    our files; an A-ViT's holds exactly the tensors of its DeiT
    convert       published A-ViT, AdaViT, EViT, DynamicViT, DeiT, T2T-ViT and timm weights -> our files
    start_from    any of these -> a ViT to fine-tune
    open_model    a file, or timm's or the Hub's name of a model, as a command line gives it
    remade        a ViT -> the same for other images or classes

Tensors: `vit.state_dict()` as it is, and what a method adds to it under `method.`. The metadata's `adaptvit` is JSON:

    {"version": 1, "method": name, "config": fields of the method's config, "vit": what `describe` says of it}
"""

import argparse
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.layers import resample_abs_pos_embed
from timm.models import clean_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adaptvit.backbones.base import model_name, patch_grid, position_rows, timm_config
from adaptvit.backbones.parts import add_representation, representation_names
from adaptvit.backbones.record import ARGUMENTS, PREPROCESSING, check_described, describe, rebuild
from adaptvit.backbones.t2t import published_names
from adaptvit.checks import In, checked
from adaptvit.files import replacing
from adaptvit.methods import METHODS, MethodConfig, Published, dense, of_today
from adaptvit.model import AdaptiveViT, Dial
from adaptvit.records import stable
from adaptvit.terminal import warn
from adaptvit.weights.names import all_names, method_of
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

KEY = "adaptvit"
VERSION = 1
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
"""Of files with weights: a name that ends so is never a model's."""
HUBS = ("hf-hub:", "hf_hub:", "local-dir:")
"""What stands before a repository of the Hub, or before a folder with the files of one."""
HUB_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""Where such a folder has its weights; the first that is there."""
WRAPPED = ("state_dict_ema", "state_dict", "model", "model_ema")
"""Where training checkpoints have their weights, in the order in which the trainings' own evaluation reads them."""
HEADS = ("head.", "head_dist.")
"""What the names of a classifier's tensors begin with."""
NOT_FITTED = "what it drops says nothing of an image; train it, or let adaptvit budget fit a plain model"
MADE_AT_MOST = 2**30
"""Bytes of tables that a model makes for itself; those of the largest in use are some megabytes."""


@dataclass(frozen=True)
class _Source:
    """What somebody's file has."""

    path: Path
    tensors: dict[str, Tensor]
    """Under our names."""
    trained_with: dict[str, Any]
    """Its training arguments, if any; `model` is the architecture."""
    grid: tuple[int, int] | None = None
    """Rows and columns of patches that its positions are for; None where the file does not say."""


def save(model: AdaptiveViT, path: Path | str) -> None:
    """Write weights and configuration to one safetensors file, whole or not at all.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the ViT or the config could not be rebuilt from the file.
    """
    record = {
        "version": VERSION,
        "method": model.config.method,
        "config": _stored_config(model.config),
        "vit": describe(model.vit),
    }
    if model.dial is not None:
        record["dial"] = asdict(model.dial)
    tensors = {}
    for key, value in model.state_dict().items():  # safetensors takes no views and no tensors that share memory
        tensors[_stored_name(key)] = value.cpu().clone(memory_format=torch.contiguous_format)
    with replacing(path) as partial:
        partial.write_bytes(safetensors.torch.save(tensors, {KEY: json.dumps(record, allow_nan=False)}))


def load(path: Path | str, config_type: type[MethodConfig] | None = None) -> AdaptiveViT:
    """The model of a file that `save` or `convert` wrote: on the CPU, in training mode like any new module.

    Args:
        config_type: the config of a method kept outside this package.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, not ours, of another version, or of a method that is not known.
    """
    path = existing(path)
    tensors, metadata = read_safetensors(path)
    if KEY not in metadata:
        raise ValueError(f"{path} holds weights but no adaptvit configuration: make one with adaptvit.convert")
    with _rebuilding(path):
        model = _build(_record(metadata), tensors, config_type)
    own = model.state_dict()
    check_fit(f"{path} does not fit its own configuration", tensors, {_stored_name(key): own[key] for key in own})
    check_finite(path, tensors)
    model.load_state_dict({key: tensors[_stored_name(key)] for key in own}, assign=True)  # keeps the file's precision
    if len(kinds := {value.dtype for value in model.parameters()}) > 1:
        names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise ValueError(f"{path} mixes weights of {names}, which do not run together: save it in one precision")
    return model


def open_model(name: Path | str) -> AdaptiveViT:
    """The model that a command line names, in evaluation mode.

    An adaptvit file; a timm ViT by its name, by the Hub's (`hf-hub:OWNER/NAME`) or by a folder in that format
    (`local-dir:FOLDER`, or the folder alone); or a training checkpoint of timm's or DeiT's, which says its model. A
    plain ViT comes as `FullConfig().build(vit)`. What is not here is downloaded.

    Raises:
        FileNotFoundError: a file that is not there.
        TypeError: the timm model is not a ViT that this library reproduces.
        ValueError: none of these, weights that cannot be downloaded or do not say their model, or what `load` raises.
    """
    word = str(name)
    if is_stored(name):
        file = weights_file(name)
        opened = _open_file(file) if file == Path(name) else _open_in_folder(file)
        return opened.eval()
    kind = method_of(word)  # which makes the names of packages outside known
    if not timm.is_model(word):
        raise ValueError(f"model {word!r} is neither an adaptvit file nor the name of a timm model")
    try:
        model = timm.create_model(word, pretrained=True)
    except Exception as error:  # timm and the Hub's client raise a dozen kinds
        if isinstance(error, ValueError):  # ours, of models that nobody has weights of
            raise
        raise ValueError(
            f"the weights of {word} are not here and cannot be downloaded ({reason(error)}): download them where there "
            f"is a network, and turn them into a file with adaptvit convert FILE OUT {word}"
        ) from error
    if not isinstance(model, AdaptiveViT):
        return dense(model).eval()
    if kind is not None and (kind.trained or kind.published.fitted):  # nobody taught a DeiT what to decide by
        warn(f"{word} has {kind.method}'s decisions not fitted or trained: {NOT_FITTED}", stacklevel=2)
    return model.eval()


def is_stored(name: Path | str) -> bool:
    """Whether a model's name is of a file, folder or repository, which hold its weights; else it is timm's to know."""
    word, path = str(name), Path(name)
    if word.startswith(HUBS):
        return True
    if path.is_dir():
        return any((path / file).exists() for file in HUB_FILES) or not timm.is_model(word)
    return path.exists() or path.suffix.lower() in SUFFIXES


def weights_file(name: Path | str) -> Path:
    """The file with the weights that a file's, a folder's or a repository's name stands for; downloaded if need be.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be downloaded, or is no ordinary file.
    """
    word = str(name)
    source = next((source for source in HUBS if word.startswith(source)), "")
    if source not in ("", "local-dir:"):
        return existing(_downloaded(word.removeprefix(source)))
    path = Path(word.removeprefix(source))
    if not source and not path.is_dir():
        return existing(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{word}: there is no folder {str(path)!r}")
    found = [path / file for file in HUB_FILES if (path / file).exists()]
    if not found:
        raise FileNotFoundError(f"{str(path)!r} is a folder without weights: none of {', '.join(HUB_FILES)} is in it")
    return existing(found[0])


def _open_file(path: Path) -> AdaptiveViT:
    """An adaptvit file, or one that says which model its weights are of."""
    if _is_safetensors(path):
        return load(path)
    source = _read_weights(path)
    name, settings = _told_model(source)
    own = method_of(name)

    def told(published: Published) -> dict[str, Any]:
        said = {} if own is None else published.by_file_name(path.name)  # of a plain ViT two numbers may be a date
        return said | published.by_arguments(source.trained_with)

    kind, given = _said(name, told)
    if settings.get("depth", 1) > len(source.tensors):
        raise ValueError(f"{path} says {settings['depth']} blocks, but has only {len(source.tensors)} tensors")
    with _rebuilding(path), torch.device("meta"):
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


def _told_model(source: "_Source") -> tuple[str, dict[str, Any]]:
    """timm's name of a model and arguments for it, as training arguments have them.

    Raises:
        ValueError: they do not.
    """
    told, path = source.trained_with, source.path
    name = told.get("model")
    if not isinstance(name, str) or not timm.is_model(name):
        of = f", but {name[:80]!r}, which timm does not have" if isinstance(name, str) else ""
        raise ValueError(
            f"{path} does not say which timm model its weights are of{of}: make a file that does with adaptvit convert "
            f"{path} OUT.safetensors NAME"
        )
    settings = {**(told.get("model_kwargs") or {})} if isinstance(told.get("model_kwargs"), Mapping) else {}
    size = told.get("img_size") or told.get("input_size")
    if size is not None:
        settings["img_size"] = list(size)[-2:] if isinstance(size, (list, tuple)) else [size, size]
    for key, other in (("in_chans", "in_chans"), ("gp", "global_pool")):
        if told.get(key) is not None:
            settings[other] = told[key]
    settings["num_classes"] = _class_count(source) or 0
    try:
        settings = check_described("its training argument", settings, ARGUMENTS)
    except ValueError as error:
        raise ValueError(f"{path} cannot be opened: {error}") from error
    return name, settings


def _open_in_folder(file: Path) -> AdaptiveViT:
    """Weights in a folder as timm's `save_for_hf` leaves it and the Hub holds it, or one of our files in a folder."""
    if _is_safetensors(file) and KEY in read_safetensors(file)[1]:
        return load(file)
    source = _read_weights(file)
    config = existing(file.parent / "config.json")
    told = read_json(config, config.read_bytes())
    arguments = told.get("model_args") if isinstance(told, dict) else None
    depth = arguments.get("depth") if isinstance(arguments, dict) else None
    if isinstance(depth, int) and depth > len(source.tensors):
        raise ValueError(f"{config} says {depth} blocks, but {file.name} has only {len(source.tensors)} tensors")

    def made() -> Any:
        return _with_representation(timm.create_model(f"local-dir:{file.parent}", pretrained=False), source)

    with _rebuilding(config), torch.device("meta"):
        twin = dense(made())  # without memory: the file may claim any size
    _check_claims(source, twin, f"{file} does not fit the config.json beside it")
    pool = told.get("global_pool")  # which timm does not read: it builds by model_args alone
    if pool not in (None, twin.vit.global_pool):
        raise ValueError(
            f"{config} says global_pool {repr(pool)[:80]}, but its model_args make a ViT that pools otherwise"
        )
    with _rebuilding(config):
        vit = made()
        data = check_described("its images'", {key: timm_config(vit).get(key) for key in PREPROCESSING}, PREPROCESSING)
        vit.pretrained_cfg = timm_config(vit) | data
        model = dense(vit)
    return _filled(model, source, str(file.parent))


def _downloaded(name: str) -> Path:
    """The weights of a repository, `OWNER/NAME` or `OWNER/NAME@REVISION`, where the Hub's client keeps them.

    Raises:
        ValueError: it is neither here nor can it be downloaded.
    """
    repository, _, revision = name.partition("@")
    unseen: Exception | None = None
    try:
        for file in HUB_FILES:
            try:
                found = Path(hf_hub_download(repository, file, revision=revision or None))
            except LocalEntryNotFoundError as error:  # no network: one of the others may be here
                unseen = error
            except EntryNotFoundError:
                pass
            else:
                with suppress(EntryNotFoundError):  # which our own files do without
                    hf_hub_download(repository, "config.json", revision=revision or None)
                return found
    except Exception as error:  # the Hub's client raises a dozen kinds
        unseen = error
    if unseen is None:
        raise ValueError(f"hf-hub:{name} has no weights: none of {', '.join(HUB_FILES)} is in it")
    raise ValueError(
        f"hf-hub:{name} is not here and cannot be downloaded ({reason(unseen)}): where there is no network, bring "
        "the repository's files in a folder and name it as local-dir:FOLDER"
    ) from unseen


def start_from(vit: VisionTransformer, source: Path | str) -> bool:
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
    found = _read_weights(weights_file(source), ours=True)
    tensors = {key: value for key, value in found.tensors.items() if not key.startswith("method.")}
    return _started(vit, replace(found, tensors=tensors), str(source))


def remade(vit: VisionTransformer, **arguments: Any) -> tuple[VisionTransformer, bool]:
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
    source = _Source(Path(name), dict(vit.state_dict()), {}, _position_table(vit)[1])
    return new, _started(new, source, f"{name} as it was")


def _started(vit: VisionTransformer, source: "_Source", name: str) -> bool:
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
        _fit_positions(replace(source, tensors=tensors), vit)
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


def digest(model: nn.Module, what: object) -> str:
    """SHA-256, in hexadecimal digits, of settings and of the model's tensors: what a result is known by."""
    found = hashlib.sha256(stable(what).encode())
    for name, value in model.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


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
            as `.pth` or `.safetensors`; or a folder or repository with one, as `open_model` takes it. Nothing in it is
            executed.
        target: the file to write; replaced where it exists.
        model_name: a name that adaptvit registers with timm, such as `avit_tiny_patch16_224` or
            `ada_step_deit_small_patch16_224`, or a timm ViT's own.
        gate_scale, gate_center: of A-ViT, where neither the file's name nor its training arguments are to say.
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
    found = _read_weights(weights_file(source))
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


def _filled(model: AdaptiveViT, source: "_Source", name: str) -> AdaptiveViT:
    """The model with a file's weights, positions resized."""
    own = model.state_dict()
    wanted = {_stored_name(key): own[key] for key in own}
    if source.tensors.keys() == wanted.keys():
        _fit_positions(source, model.vit)
    check_fit(f"{source.path} does not fit {name}", source.tensors, wanted)
    check_finite(source.path, source.tensors)
    model.load_state_dict({key: source.tensors[_stored_name(key)] for key in own})
    return model


def _class_count(source: "_Source") -> int | None:
    """Classes of the head in a file; None where it has none."""
    head = source.tensors.get("head.fc.weight", source.tensors.get("head.weight"))
    return len(head) if head is not None and head.ndim else None


def _with_representation(vit: Any, source: "_Source") -> Any:
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
    source: "_Source",
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


def _fit_positions(source: "_Source", vit: VisionTransformer) -> None:
    """Resize the table of positions of a file to the ViT's grid, in `source.tensors`.

    Raises:
        ValueError: the grid of the file's is not known, and not to be told from its size.
    """
    table, own = source.tensors.get("pos_embed"), vit.state_dict().get("pos_embed")
    if table is None or own is None or table.ndim != 3 or (len(table), table.shape[2]) != (len(own), own.shape[2]):
        return  # `check_fit` names it
    prefix, new = _position_table(vit)
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


def _position_table(vit: VisionTransformer) -> tuple[int, tuple[int, int]]:
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


def _read_weights(path: Path, ours: bool = False) -> _Source:
    """Somebody else's weights under our names; one of our own files too where `ours` is true."""
    if _is_safetensors(path):
        tensors, metadata = read_safetensors(path)
        if KEY not in metadata:
            return _Source(path, _under_our_names(path, check_state_dict(path, tensors)), {})
        if not ours:
            raise ValueError(f"{path} is an adaptvit file already: read it with adaptvit.load")
        with _rebuilding(path):
            _, grid = _position_table(_twin(_record(metadata), tensors))
        return _Source(path, tensors, {}, grid)
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
    return _Source(path, _under_our_names(path, check_state_dict(path, weights)), trained_with)


def _check_claims(source: _Source, twin: nn.Module, complaint: str) -> None:
    """Refuse weights far from those of a model that is built without memory for its own, positions aside.

    Raises:
        ValueError: naming them, or the memory that positions would take.
    """
    wanted = {_stored_name(key): value for key, value in twin.state_dict().items()}
    sized = [{key: value for key, value in some.items() if key != "pos_embed"} for some in (source.tensors, wanted)]
    check_fit(complaint, *sized)
    with _rebuilding(source.path):
        _check_made(twin)


def _check_made(twin: nn.Module) -> None:
    """Refuse a model whose positions, which are not those of its file, would take more memory than there may be.

    Raises:
        ValueError: telling how much.
    """
    kept = twin.state_dict()
    made = sum(part.nbytes for key, part in twin.named_buffers() if key not in kept)
    made += sum(value.nbytes for key, value in kept.items() if key.endswith("pos_embed"))
    if made > MADE_AT_MOST:
        raise ValueError(f"its positions would take {made / 1e9:.0f} GB: it has too many patches")


def _is_safetensors(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"


def _under_our_names(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights as our files spell them.

    What is named otherwise: what the methods say; T2T-ViT's stem; the representation layer of timm's up to 0.5; what
    `_timm_names` has.

    Raises:
        ValueError: two tensors have one name then, or parts of one tensor do not go together.
    """
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


def _record(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What `save` wrote about a model, its outermost kinds checked."""
    record = read_json("its configuration", metadata[KEY])
    if not isinstance(record, dict):
        raise ValueError(f"its configuration is no table, but {type(record).__name__}")
    version = record["version"]
    if not isinstance(version, int) or version != VERSION:
        raise ValueError(f"it has format version {repr(version)[:80]}, and this adaptvit reads version {VERSION}")
    for name in ("config", "vit"):
        if not isinstance(record[name], dict):
            raise ValueError(f"its {name} is no table, but {type(record[name]).__name__}")
    return record


@contextmanager
def _rebuilding(path: Path) -> Iterator[None]:
    """Whatever timm, torch and we say while a model is made from what a file tells is said of that file."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path} lacks {str(error)[:80]} in its adaptvit configuration: save it again") from error
    except Exception as error:  # timm asserts, torch overflows, memory runs out: what a number can do has no end
        raise ValueError(f"{path} cannot be rebuilt: {reason(error)}") from error


def _build(record: dict[str, Any], tensors: dict[str, Tensor], config_type: type[MethodConfig] | None) -> AdaptiveViT:
    """The model that a file's record describes, with fresh weights, once its tensors are known to have that size."""
    method = record["method"]
    if not isinstance(method, str):
        raise ValueError(f"its method must be a word, got {repr(method)[:80]}")
    method, values = of_today(method, record["config"])
    kind = config_type or METHODS.get(method)
    if kind is None:
        raise ValueError(f"its method {method!r} is none of {', '.join(METHODS)}: pass that method's config_type")
    if kind.method != method:
        raise ValueError(f"its method is {method!r}, but config_type {kind.__name__} is of {kind.method!r}")
    config = _restored_config(kind, values)
    _twin(record, tensors)
    model = config.build(rebuild(record["vit"]))
    if (dial := record.get("dial")) is not None:
        if not isinstance(dial, dict) or dial.keys() != {"knobs", "shares"}:
            raise ValueError(f"its dial must have knobs and shares, got {repr(dial)[:80]}")
        model.dial = Dial(*(_tuples(dial[name]) for name in ("knobs", "shares")))
    return model


def _twin(record: dict[str, Any], tensors: Mapping[str, Tensor]) -> VisionTransformer:
    """The ViT of a record without memory for its weights, which must be those of the file: it may claim any size."""
    vit, weights = record["vit"], {key: value for key, value in tensors.items() if not key.startswith("method.")}
    arguments = vit.get("arguments")
    depth = arguments.get("depth") if isinstance(arguments, dict) else None
    if isinstance(depth, int) and depth > len(weights):
        raise ValueError(f"its configuration has {depth} blocks, but the file only {len(weights)} tensors")
    with torch.device("meta"):
        twin = rebuild(vit)
    kept = twin.state_dict()
    _check_made(twin)
    check_fit("it does not fit its own configuration", weights, kept)
    return twin


def _stored_config(config: Any) -> dict[str, Any]:
    """A config's fields as JSON holds them.

    Raises:
        ValueError: a field would not come back as it is.
    """
    name = type(config).__name__
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    for field, value in values.items():
        try:
            kept = _tuples(json.loads(json.dumps(value, allow_nan=False))) == value
        except (TypeError, ValueError):
            kept = False
        if not kept:
            allowed = "numbers, strings, booleans, None and tuples of these"
            raise ValueError(f"{name}.{field} is {value!r}, which a checkpoint cannot hold; allowed are {allowed}")
    return values


def _restored_config(kind: type[Any], values: dict[str, Any]) -> Any:
    """The config of `_stored_config`; a field that the file does not have yet takes its default."""
    unknown = values.keys() - {field.name for field in fields(kind)}
    if unknown:
        raise ValueError(
            f"{kind.__name__} has no field {', '.join(sorted(unknown))}; a newer adaptvit may have written it"
        )
    return kind(**{name: _tuples(value) for name, value in values.items()})


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, which is what a frozen config holds."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _stored_name(key: str) -> str:
    """A state-dict key of an adaptive model as files spell it: the ViT's own, or `method.` and the method's."""
    return key.removeprefix("vit.") if key.startswith("vit.") else f"method.{key}"
