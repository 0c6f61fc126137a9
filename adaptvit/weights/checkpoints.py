"""One safetensors file per model: the ViT's weights under timm's own names, and the configuration that goes with them.

    save, load    our files; an A-ViT's holds exactly the tensors of its DeiT
    digest        what a model with its settings is known by

Tensors: `vit.state_dict()` as it is, and what a method adds to it under `method.`. The metadata's `adaptvit` is JSON:

    {"version": 1, "method": name, "config": fields of the method's config, "vit": what `describe` says of it}
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from adaptvit.backbones.record import describe, rebuild
from adaptvit.files import replacing
from adaptvit.methods import METHODS, MethodConfig, of_today
from adaptvit.model import AdaptiveViT, Dial
from adaptvit.records import stable
from adaptvit.tokens import Plan
from adaptvit.weights.tensorfiles import check_finite, check_fit, existing, read_json, read_safetensors, reason

KEY = "adaptvit"
VERSION = 1
MADE_AT_MOST = 2**30
"""Bytes of tables that a model makes for itself; those of the largest in use are some megabytes."""


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
    if model.plan is not None:
        record["plan"] = asdict(model.plan)
    tensors = {}
    for key, value in model.state_dict().items():  # safetensors takes no views and no tensors that share memory
        tensors[stored_name(key)] = value.cpu().clone(memory_format=torch.contiguous_format)
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
        raise ValueError(
            f"{path} holds weights but no adaptvit configuration: name its model by --model, or make a file that has "
            "one with adaptvit convert"
        )
    with rebuilding(path):
        model = _build(record_of(metadata), tensors, config_type)
    own = model.state_dict()
    check_fit(f"{path} does not fit its own configuration", tensors, {stored_name(key): own[key] for key in own})
    check_finite(path, tensors)
    model.load_state_dict({key: tensors[stored_name(key)] for key in own}, assign=True)  # keeps the file's precision
    if len(kinds := {value.dtype for value in model.parameters()}) > 1:
        names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise ValueError(f"{path} mixes weights of {names}, which do not run together: save it in one precision")
    return model


def digest(model: nn.Module, what: object) -> str:
    """SHA-256, in hexadecimal digits, of settings and of the model's tensors: what a result is known by."""
    found = hashlib.sha256(stable(what).encode())
    for name, value in model.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def check_made(twin: nn.Module) -> None:
    """Refuse a model whose positions, which are not those of its file, would take more memory than there may be.

    Raises:
        ValueError: telling how much.
    """
    kept = twin.state_dict()
    made = sum(part.nbytes for key, part in twin.named_buffers() if key not in kept)
    made += sum(value.nbytes for key, value in kept.items() if key.endswith("pos_embed"))
    if made > MADE_AT_MOST:
        raise ValueError(f"its positions would take {made / 1e9:.0f} GB: it has too many patches")


def is_safetensors(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"


def record_of(metadata: Mapping[str, str]) -> dict[str, Any]:
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
def rebuilding(path: Path) -> Iterator[None]:
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
    twin_of(record, tensors)
    model = config.build(rebuild(record["vit"]))
    if (dial := record.get("dial")) is not None:
        if not isinstance(dial, dict) or dial.keys() != {"knobs", "shares"}:
            raise ValueError(f"its dial must have knobs and shares, got {repr(dial)[:80]}")
        model.dial = Dial(*(_tuples(dial[name]) for name in ("knobs", "shares")))
    if (plan := record.get("plan")) is not None:
        if not isinstance(plan, dict) or plan.keys() != {"means", "spreads", "images"}:
            raise ValueError(f"its plan must have means, spreads and images, got {repr(plan)[:80]}")
        model.plan = Plan(means=_tuples(plan["means"]), spreads=_tuples(plan["spreads"]), images=plan["images"])
    return model


def twin_of(record: dict[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The ViT of a record without memory for its weights, which must be those of the file: it may claim any size."""
    vit, weights = record["vit"], {key: value for key, value in tensors.items() if not key.startswith("method.")}
    arguments = vit.get("arguments")
    depth = arguments.get("depth") if isinstance(arguments, dict) else None
    if isinstance(depth, int) and depth > len(weights):
        raise ValueError(f"its configuration has {depth} blocks, but the file only {len(weights)} tensors")
    with torch.device("meta"):
        twin = rebuild(vit)
    kept = twin.state_dict()
    check_made(twin)
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


def stored_name(key: str) -> str:
    """A state-dict key of an adaptive model as files spell it: the ViT's own, or `method.` and the method's."""
    return key.removeprefix("vit.") if key.startswith("vit.") else f"method.{key}"
