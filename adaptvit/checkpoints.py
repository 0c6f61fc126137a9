"""One safetensors file per model: the ViT's weights under timm's own names, and the configuration that goes with them.

    save, load    our files; an A-ViT's holds exactly the tensors of its DeiT
    convert       published A-ViT, AdaViT, EViT, DynamicViT, DeiT, T2T-ViT and timm weights -> our files
    start_from    any of these -> a ViT to fine-tune
    open_model    a file, or timm's name of a model, as a command line gives it

Tensors: `vit.state_dict()` as it is, and what a method adds to it under `method.`. The metadata's `adaptvit` is JSON:

    {"version": 1, "method": name, "config": fields of the method's config, "vit": what `adaptvit.vit.describe` says}
"""

import argparse
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.layers import resample_abs_pos_embed
from timm.models import clean_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adaptvit.checks import In, checked
from adaptvit.files import check_is_file, replacing
from adaptvit.methods import METHODS, adavit_official
from adaptvit.methods.avit import AViTConfig
from adaptvit.methods.full import FullConfig
from adaptvit.model import AdaptiveViT, MethodConfig
from adaptvit.names import ADAVIT, AVIT, DYNAMICVIT, DYNAMICVIT_256, EVIT
from adaptvit.records import stable
from adaptvit.t2t import MODELS as T2T_MODELS
from adaptvit.t2t import published_names
from adaptvit.vit import describe, model_name, prefix_tokens, rebuild

KEY = "adaptvit"
VERSION = 1
GATE = ("gate_scale", "gate_center")
"""Fields of `AViTConfig` that published files keep elsewhere than in their tensors."""


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
    tensors = {}
    for key, value in model.state_dict().items():  # safetensors takes no views and no tensors that share memory
        tensors[_stored_name(key)] = value.cpu().clone(memory_format=torch.contiguous_format)
    with replacing(path) as partial:
        partial.write_bytes(safetensors.torch.save(tensors, {KEY: json.dumps(record)}))


def load(path: Path | str, config_type: type[MethodConfig] | None = None) -> AdaptiveViT:
    """The model of a file that `save` or `convert` wrote: on the CPU, in training mode like any new module.

    Args:
        config_type: the config of a method kept outside this package.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, not ours, of another version, or of a method that is not known.
    """
    tensors, metadata = _read_safetensors(_existing(path))
    if KEY not in metadata:
        raise ValueError(f"{path} holds weights but no adaptvit configuration: make one with adaptvit.convert")
    try:
        model = _build(json.loads(metadata[KEY]), config_type)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error} in its adaptvit configuration: save it again") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be rebuilt: {error}") from error
    own = model.state_dict()
    _check_fit(f"{path} does not fit its own configuration", tensors, {_stored_name(key): own[key] for key in own})
    model.load_state_dict({key: tensors[_stored_name(key)] for key in own}, assign=True)  # keeps the file's precision
    return model


def open_model(name: Path | str) -> AdaptiveViT:
    """The model that a command line names, in evaluation mode: an adaptvit file, or a timm ViT with its own weights.

    A timm ViT comes as `FullConfig().build(vit)`; its weights are downloaded where timm has not done so before.

    Raises:
        FileNotFoundError: a file that is not there.
        TypeError: the timm model is not a ViT that this library reproduces.
        ValueError: neither a file nor a timm name, or what `load` raises.
    """
    if Path(name).suffix == ".safetensors" or Path(name).exists():
        return load(name).eval()
    if not timm.is_model(str(name)):
        raise ValueError(f"model {str(name)!r} is neither an adaptvit file nor the name of a timm model")
    model = timm.create_model(str(name), pretrained=True)
    return (model if isinstance(model, AdaptiveViT) else FullConfig().build(model)).eval()


def start_from(vit: VisionTransformer, source: Path | str) -> bool:
    """Give a ViT the weights of a file, to be fine-tuned: positions resized, a head of other classes left out.

    A table of positions that is not trained stays, unless the file has the same, turned as `fit_gate` turns it.

    Args:
        source: a file as `convert` takes it, or an adaptvit file, whose method is left out.
    Returns:
        Whether the head came along.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, needs code to be read, or its other tensors do not fit.
    """
    source = _existing(source)
    tensors, _ = _read_weights(source, ours=True)
    tensors = {key: value for key, value in tensors.items() if not key.startswith("method.")}
    own = vit.state_dict()
    heads = {key for key in own if key.startswith(("head.", "head_dist."))}
    fits = all(key in tensors and tensors[key].shape == own[key].shape for key in heads)
    if not fits:
        tensors = {key: value for key, value in tensors.items() if key not in heads}
    if "pos_embed" in own and not vit.pos_embed.requires_grad:  # no other is of its kind but one turned with its stream
        if not _is_turned(tensors.get("pos_embed"), own["pos_embed"]):
            tensors["pos_embed"] = own["pos_embed"]
    elif "pos_embed" in tensors and "pos_embed" in own:
        prefix = prefix_tokens(vit)
        side = math.isqrt(own["pos_embed"].shape[1] - prefix)
        tensors["pos_embed"] = resize_positions(tensors["pos_embed"], side, prefix)
    wanted = own if fits else {key: own[key] for key in own if key not in heads}
    _check_fit(f"{source} does not fit {model_name(vit)}", tensors, wanted)
    vit.load_state_dict(tensors, strict=fits)
    return fits


def _is_turned(table: Tensor | None, own: Tensor) -> bool:
    """Whether a table is `own` but for a rotation of the channels."""
    if table is None or table.shape != own.shape:
        return False
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
    training arguments say, else the default of `model_name`, so that plain DeiT weights can be converted too. T2T-ViT
    weights without a gate become a file of `FullConfig`. AdaViT weights bring their policies, DynamicViT's their
    predictors, and EViT's have the tensors of a DeiT; none of the three has a gate. What weights of EViT or DynamicViT
    were trained to keep is not in the tensors: `keep_rate` and `fuse` say it.

    Args:
        source: a released A-ViT, AdaViT, EViT, DynamicViT, DeiT or T2T-ViT file, a training checkpoint with weights
            under `state_dict_ema`, `state_dict` or `model`, or a bare state dict, as `.pth` or `.safetensors`. Nothing
            in it is executed.
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
            be read, or does not fit `model_name` and `num_classes`.
    """
    if not timm.is_model(model_name):
        names = ", ".join([*AVIT, *ADAVIT, *EVIT, *DYNAMICVIT, DYNAMICVIT_256])
        raise ValueError(f"model_name must be a timm ViT or one of {names}, got {model_name!r}")
    chosen = {"gate_scale": gate_scale, "gate_center": gate_center, "keep_rate": keep_rate, "fuse": fuse}
    given = {name: value for name, value in chosen.items() if value is not None}
    if wrong := [name for name in given if name not in _told(model_name)]:
        raise ValueError(f"{model_name} has no {' and no '.join(wrong)}: leave out what its method does not have")
    source = _existing(source)
    tensors, trained_with = _read_weights(source)
    settings = {"num_classes": num_classes} | ({} if img_size is None else {"img_size": img_size})
    model = _untrained(model_name, trained_with, source, given, settings)
    own = model.state_dict()
    wanted = {_stored_name(key): own[key] for key in own}
    if "head.weight" in tensors and len(tensors["head.weight"]) != num_classes:
        classes = len(tensors["head.weight"])
        raise ValueError(f"{source} has a head of {classes} classes, not {num_classes}: pass num_classes={classes}")
    if tensors.keys() == wanted.keys():
        slots = wanted["pos_embed"].shape[1]
        tensors["pos_embed"] = resize_positions(tensors["pos_embed"], math.isqrt(slots - model.prefix), model.prefix)
    _check_fit(f"{source} does not fit {model_name}", tensors, wanted)
    model.load_state_dict({key: tensors[_stored_name(key)] for key in own})
    save(model, target)
    return model


def _told(model_name: str) -> tuple[str, ...]:
    """What the tensors of a published file do not say of its method, as arguments of `convert`."""
    if model_name in ADAVIT:
        return ()
    if model_name in EVIT:
        return ("keep_rate", "fuse")
    if model_name in DYNAMICVIT or model_name == DYNAMICVIT_256:
        return ("keep_rate",)
    return GATE


def _untrained(
    model_name: str, trained_with: dict[str, Any], source: Path, given: dict[str, Any], settings: dict[str, Any]
) -> AdaptiveViT:
    """The model that `convert` fills: a name's own method; else A-ViT, but around a T2T-ViT only with a gate."""
    if model_name in ADAVIT:
        return timm.create_model(model_name, **settings, **adavit_official.settings(trained_with))
    if _told(model_name) != GATE:
        return timm.create_model(model_name, **settings, **given)
    gate = {name: trained_with[name] for name in trained_with.keys() & {*GATE}} | gate_in_name(source) | given
    if model_name in AVIT:
        return timm.create_model(model_name, **settings, **gate)
    made = timm.create_model(model_name, **settings)
    return FullConfig().build(made) if model_name in T2T_MODELS and not gate else AViTConfig(**gate).build(made)


def resize_positions(table: Tensor, side: int, prefix: int) -> Tensor:
    """A position table of one square grid resized to another: bicubic, no antialiasing, rows before the patches kept.

    Args:
        table: (1, prefix + n * n, D).
        side: patches per side of the new grid.
        prefix: rows of class and distillation token.
    Returns:
        (1, prefix + side * side, D).
    Raises:
        ValueError: the table's patches are not a square.
    Source: A-ViT's and DeiT's released code, as it loads weights to fine-tune.
    """
    patches = table.shape[1] - prefix
    if math.isqrt(patches) ** 2 != patches:
        raise ValueError(f"the position table has {patches} patches, which do not make a square grid")
    return resample_abs_pos_embed(table, [side, side], num_prefix_tokens=prefix, antialias=False)


def gate_in_name(path: Path | str) -> dict[str, float]:
    """The gate in a released file's name, `<anything>-<scale>-<centre>.pth`; empty where the name has none.

    A date at the end of a name reads as a gate too: rename such a file, or pass the gate to `convert`.
    """
    found = re.search(r"-(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)\.(?:pth|pt|safetensors)$", Path(path).name)
    return {"gate_scale": float(found[1]), "gate_center": float(found[2])} if found else {}


def _read_weights(path: Path, ours: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of somebody else's file, and its training arguments, if any."""
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
        if KEY in metadata and not ours:
            raise ValueError(f"{path} is an adaptvit file already: read it with adaptvit.load")
        return _under_our_names(tensors), {}
    content = _read_torch(path)
    weights, arguments = content, None
    if isinstance(content, dict):
        held = [content[key] for key in ("state_dict_ema", "state_dict", "model") if content.get(key) is not None]
        weights, arguments = held[0] if held else content, content.get("args")
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds no state dict, bare or under 'state_dict_ema', 'state_dict' or 'model'")
    return _under_our_names(weights), vars(arguments) if isinstance(arguments, argparse.Namespace) else {}


def _under_our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights as our files spell them.

    What is named otherwise: T2T-ViT's stem; AdaViT's queries, keys, values and policies; DynamicViT's predictors.
    """
    renamed = adavit_official.state_dict(published_names(clean_state_dict(tensors)))
    names = {key: key.removeprefix("vit.") if key.startswith("vit.score_predictor.") else key for key in renamed}
    return {_stored_name(names[key]): value for key, value in renamed.items()}


def _read_torch(path: Path) -> Any:
    """What `torch.save` wrote, as long as it is tensors, plain values and an `argparse.Namespace`."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, KeyError and more
        needed = re.search(r"GLOBAL ([\w.]+)", str(error))
        if needed:
            raise ValueError(
                f"{path} is refused: reading its {needed[1]} could run code; save its state dict alone"
            ) from error
        raise ValueError(f"{path} is damaged or was not written by torch.save") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata."""
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            return file.get_tensors(), file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def _existing(path: Path | str) -> Path:
    """`path`, if a file is there."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        check_is_file(path)
    except PermissionError:
        raise
    except OSError as error:
        raise ValueError(str(error)) from None
    return path


def _build(record: dict[str, Any], config_type: type[MethodConfig] | None) -> AdaptiveViT:
    """The model that a file's metadata describes, with fresh weights."""
    if record["version"] != VERSION:
        raise ValueError(f"it has format version {record['version']}, and this adaptvit reads version {VERSION}")
    method = record["method"]
    kind = config_type or METHODS.get(method)
    if kind is None:
        raise ValueError(f"its method {method!r} is none of {', '.join(METHODS)}: pass that method's config_type")
    if kind.method != method:
        raise ValueError(f"its method is {method!r}, but config_type {kind.__name__} is of {kind.method!r}")
    return _restored_config(kind, record["config"]).build(rebuild(record["vit"]))


def _stored_config(config: Any) -> dict[str, Any]:
    """A config's fields as JSON holds them.

    Raises:
        ValueError: a field would not come back as it is.
    """
    name = type(config).__name__
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for field, value in values.items():
        try:
            kept = _tuples(json.loads(json.dumps(value))) == value
        except TypeError:
            kept = False
        if not kept:
            allowed = "numbers, strings, booleans, None and tuples of these"
            raise ValueError(f"{name}.{field} is {value!r}, which a checkpoint cannot hold; allowed are {allowed}")
    return values


def _restored_config(kind: type[Any], values: dict[str, Any]) -> Any:
    """The config of `_stored_config`; a field that the file does not have yet takes its default."""
    unknown = values.keys() - {field.name for field in dataclasses.fields(kind)}
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


def _check_fit(complaint: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Compare names and shapes.

    Raises:
        ValueError: the complaint, and which tensors are missing, unexpected or misshaped.
    """
    faults = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key for key in found if key not in wanted],
        "misshaped": [
            f"{key} {tuple(value.shape)} instead of {tuple(wanted[key].shape)}"
            for key, value in found.items()
            if key in wanted and value.shape != wanted[key].shape
        ],
    }
    told = [f"{fault} {_some(names)}" for fault, names in faults.items() if names]
    if told:
        raise ValueError(f"{complaint}: {'; '.join(told)}")


def _some(names: Sequence[str]) -> str:
    """The first three names and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
