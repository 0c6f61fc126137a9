"""What a folder of recordings holds, by kind; ViTs as recordings describe them; how far runs in float32 lie apart.

A kind is known by what its json says, not by its file's name, so that any folder laid out like this one replays. Of
ours the number of recordings is known too: one that is lost fails.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import weights
from timm.layers import LayerNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adaptvit.backbones.parts import add_representation, representation_names, set_head_dim

OURS = Path(__file__).parent
EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Kind:
    """Recordings that one set of tests replays."""

    folder: str
    """One per method."""
    ours: int
    """How many this folder holds."""
    told_by: Callable[[Any], bool]
    """Whether a json is one."""
    array: str = ""
    """The end of the name of an array that it must have."""


def of_kind(*names: str) -> Callable[[Any], bool]:
    return lambda case: case.get("kind") in names


KINDS = {
    "avit_case": Kind("avit", 14, lambda case: "manifest" in case),
    "avit_blocks": Kind("avit", 1, lambda case: case.get("keep_tokens", False)),
    "avit_targets": Kind("avit", 1, lambda case: "targets" in case),
    "avit_recipe": Kind("avit", 1, lambda case: "recipes" in case),
    "avit_sampler": Kind("avit", 1, lambda case: "cases" in case),
    "avit_positions": Kind("avit", 1, lambda case: "tables" in case),
    "borgi_package": Kind("borgi", 1, lambda case: "rows" in case),
    "borgi_notebook": Kind("borgi", 1, lambda case: any(name.startswith("target_") for name in case)),
    "adavit_evaluated": Kind("adavit", 21, of_kind("eval")),
    "adavit_converted": Kind("adavit", 2, lambda case: "registry_name" in case),
    "adavit_stem": Kind("adavit", 1, lambda case: "t2t_stats" in case),
    "adavit_trained": Kind("adavit", 10, of_kind("train")),
    "adavit_losses": Kind("adavit", 1, of_kind("losses")),
    "adavit_table": Kind("adavit", 2, lambda case: "axes" in case),
    "adavit_macs": Kind("adavit", 1, of_kind("macs")),
    "t2t_module": Kind("adavit", 2, of_kind("t2t_module")),
    "sinusoid_case": Kind("adavit", 1, of_kind("sinusoid")),
    "ats_official": Kind("ats", 4, of_kind("official_model")),
    "ats_rows": Kind("ats", 3, of_kind("official_model"), "_selected_residual"),
    "ats_gradients": Kind("ats", 1, of_kind("official_model"), "mask_grad_cotangent"),
    "ats_block": Kind("ats", 1, of_kind("official_block")),
    "lucidrains_case": Kind("ats", 4, of_kind("lucidrains_model")),
    "lucidrains_sampler": Kind("ats", 1, of_kind("lucidrains_sampler")),
    "flax_case": Kind("ats", 3, of_kind("flax_model")),
    "dynamicvit_evaluated": Kind("dynamicvit", 3, lambda case: case.get("mode") == "eval"),
    "dynamicvit_trained": Kind("dynamicvit", 2, lambda case: case.get("mode") == "train"),
    "dynamicvit_units": Kind("dynamicvit", 1, lambda case: "units" in case),
    "evit_case": Kind("evit", 9, lambda case: "model" in case),
    "evit_gradients": Kind("evit", 1, lambda case: "grad_norms" in case),
    "evit_schedule": Kind("evit", 1, of_kind("keep-rate schedule")),
    "tome_case": Kind("tome", 9, lambda case: "model" in case),
    "tome_schedules": Kind("tome", 1, of_kind("r schedule table")),
    "tome_units": Kind("tome", 1, lambda case: "units" in case),
}
"""By the name of the parameter of a test that runs once for each."""


def read(path: Path) -> Any:
    """What a json says; a list of tables of positions under `tables`; of arrays without a json, their names."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return dict.fromkeys(arrays)
    case = json.loads(path.read_text())
    return case if isinstance(case, dict) else {"tables": case}


def listed(folder: Path, method: str) -> list[Path]:
    """The json files, and the arrays without one."""
    alone = [path for path in (folder / method).glob("*.npz") if not path.with_suffix(".json").exists()]
    return sorted([*(folder / method).glob("*.json"), *alone])


@cache
def found(folder: Path, name: str) -> list[Path]:
    """The recordings of a kind."""
    kind = KINDS[name]
    return [path for path in listed(folder, kind.folder) if kind.told_by(read(path)) and has(path, kind.array)]


def has(path: Path, array: str) -> bool:
    """Whether a recording has an array whose name ends so."""
    return not array or any(name.endswith(array) for name in read(path.with_suffix(".npz")))


def is_of_another_model(method: str, path: Path) -> bool:
    """Whether a run of alessioborgi/AdaViT, whose models are not rebuilt here: only its priors are."""
    return method == "borgi" and "manifest" in read(path)


def vit_of(
    state: Mapping[str, Tensor],
    img_size: int,
    num_heads: int,
    norm_eps: float = 1e-6,
    distilled: bool = False,
    idle: int = 0,
    **others: Any,
) -> VisionTransformer:
    """A ViT with recorded weights, whose widths and depth are read off them.

    Args:
        idle: how many blocks whose two sub-layers add zero follow the recorded ones.
        others: as timm's ViT takes them.
    """
    state = representation_names(state)
    dim, in_chans, *patch = state["patch_embed.proj.weight"].shape
    head = state["head.fc.weight" if "head.fc.weight" in state else "head.weight"]
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    vit = (VisionTransformerDistilled if distilled else VisionTransformer)(
        img_size=img_size,
        patch_size=tuple(patch),
        in_chans=in_chans,
        num_classes=len(head),
        embed_dim=dim,
        depth=depth + idle,
        num_heads=num_heads if dim % num_heads == 0 else 1,
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / dim,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        norm_layer=partial(LayerNorm, eps=norm_eps),
        **others,
    )
    set_widths(vit, state, num_heads)
    load_with_idle(vit, state, depth)
    return vit


def set_widths(vit: VisionTransformer, state: Mapping[str, Tensor], num_heads: int) -> None:
    """Heads and representation layer as wide as the weights say."""
    width = len(state["blocks.0.attn.qkv.weight"]) // 3
    assert width % num_heads == 0
    if width != vit.embed_dim or vit.blocks[0].attn.num_heads != num_heads:
        for block in vit.blocks:
            block.attn.num_heads = num_heads
        set_head_dim(vit, width // num_heads)
    if "head.pre_logits.fc.weight" in state:
        add_representation(vit, len(state["head.pre_logits.fc.weight"]))


def load_with_idle(vit: VisionTransformer, state: Mapping[str, Tensor], depth: int) -> None:
    """Load weights of the first `depth` blocks, and make the others add zero."""
    missing, unknown = vit.load_state_dict(state, strict=False)
    assert not unknown
    assert all(int(key.split(".")[1]) >= depth if key.startswith("blocks.") else False for key in missing), missing
    for block in vit.blocks[depth:]:
        for part in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)


def with_changes(case: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of AdaViT's recordings, whose `overrides` multiply or move some of them, in float32."""
    state = {key: value.numpy() for key, value in filled(case["weights"], case["manifest"]).items()}
    for change in case["weights"]["overrides"]:
        assert change["op"] in ("mul", "add")
        for key in state:
            if key.endswith(change["match"]):
                value = np.float32(change["value"])
                state[key] = state[key] * value if change["op"] == "mul" else state[key] + value
    return {key: torch.from_numpy(value) for key, value in state.items()}


def query_factor(scale: float | None, head_dim: int) -> float:
    """What queries are taken times where logits are taken times `scale`, not 1 / sqrt(d) as of a published model."""
    return 1.0 if scale is None else scale * head_dim**0.5


def with_query_factor(state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Weights whose queries, the first third of each `qkv`, are taken times that."""
    return {
        key: torch.cat([value[: len(value) // 3] * factor, value[len(value) // 3 :]]) if ".qkv." in f".{key}" else value
        for key, value in state.items()
    }


def our_name(name: str, ours: Mapping[str, Any]) -> str:
    """That of a recorded parameter, among names of a model with or without a representation layer."""
    if "head.pre_logits.fc.weight" in ours:
        name = re.sub(r"^head\.", "head.fc.", name)
    return re.sub(r"^pre_logits\.", "head.pre_logits.", name)


def filled(given: Mapping[str, Any], manifest: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Weights by seed and scale."""
    values = weights.fill(given["manifest"] if manifest is None else manifest, given["seed"], given["scale"])
    return {key: torch.from_numpy(value) for key, value in values.items()}


def images(given: Mapping[str, Any], state: Mapping[str, Tensor] | None = None) -> Tensor:
    """Images of a recording: of as many channels as it says, or else as the weights take."""
    channels = given.get("channels", given.get("in_chans"))
    if channels is None:
        stem = (state or {}).get("patch_embed.proj.weight")
        channels = 3 if stem is None else stem.shape[1]
    return torch.from_numpy(weights.images(given["batch"], given["size"], given["seed"], channels))


def apart(expected: np.ndarray | Tensor, terms: int, recorded: float = 0.0) -> float:
    """How far from a recorded array another run in float32 may lie.

    A sum of n products rounds like a random walk of n steps, each half of eps of its largest term, so that two orders
    of summing (vector units, threads) end sqrt(n) eps of the largest value apart. Where a recording says how far it was
    from its own run in float64, the amplification of its weights is known: four times that, two runs being off each.

    Args:
        terms: products added one after another to a number, over all blocks.
        recorded: the recording's largest difference between float32 and float64.
    """
    return max(EPS * math.sqrt(terms) * float(np.abs(np.asarray(expected)).max()), 4 * recorded)


def terms_of(vit: VisionTransformer) -> int:
    """Products from input to logits: of each block the attention's and MLP's maps."""
    block = vit.blocks[0]
    maps = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    return len(vit.blocks) * sum(part.in_features for part in maps)
