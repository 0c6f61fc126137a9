"""AdaViT's published models: their names, and what their authors' files hold."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptvit.methods.base import Named, Published, around_deits

POLICIES = {
    "token_select.mlp_head": "patch_policy",
    "head_select.mlp_head": "head_policy",
    "layer_select.mlp_head": "sublayer_policy",
    "norm_policy": "policy_norm",
}
"""The released names of the policies' parameters, and ours."""
NAMES = around_deits(
    "ada_step_deit",
    {"tiny": " with policies.", "small": " with policies: published with weights.", "base": " with policies."},
) | {
    "ada_step_t2t_vit_14_lnorm": Named(
        inside="t2t_vit_14", about="T2T-ViT-14 (384 channels, 14 blocks, 6 heads) with policies."
    ),
    "ada_step_t2t_vit_19_lnorm": Named(
        inside="t2t_vit_19",
        about="T2T-ViT-19 (448 channels, 19 blocks, 7 heads) with policies: published with weights.",
    ),
}
"""As its authors named them."""


def settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the training arguments in a released file say of its model, as fields of `AdaViTConfig`.

    Args:
        arguments: by their released names; of a file that has none, an empty mapping gives no field.
    """
    if not any(name.startswith("ada_") for name in arguments):
        return {}
    on = {name for name, value in arguments.items() if value is True}
    kinds = {
        "patches": on & {"ada_token", "ada_token_with_mlp"},
        "heads": on & {"ada_head", "ada_head_v2", "ada_head_attn"},
        "sublayers": on & {"ada_layer", "ada_block"},
    }
    found: dict[str, Any] = {
        "policies": tuple(kind for kind, options in kinds.items() if options),
        "patches_skip": "attention" if kinds["patches"] == {"ada_token"} else "attention and mlp",
        "heads_take": "hidden" if "ada_head_v2" in on else "identity" if "ada_head_attn" in on else "input",
        "norm_policies": "norm_policy" in on,
    }
    for name, field in (("keep_layers", "first_block"), ("ada_token_start_layer", "first_patch_block")):
        if arguments.get(name) is not None:
            found[field] = arguments[name]
    return found


def our_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released file's tensors by our names: its queries, keys and values in one, its policies."""
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        part = re.fullmatch(r"(blocks\.\d+\.attn)\.(query|key|value)\.(weight|bias)", key)
        policy = re.fullmatch(r"blocks\.(\d+)\.(?:attn\.)?(\w+_select\.mlp_head|norm_policy)\.(weight|bias)", key)
        if part:
            parts[f"{part[1]}.qkv.{part[3]}"][part[2]] = value
        elif policy and policy[2] in POLICIES:
            renamed[f"method.{POLICIES[policy[2]]}.{policy[1]}.{policy[3]}"] = value
        else:
            renamed[key] = value
    for key, found in parts.items():
        if len(found) == 3:
            renamed[key] = torch.cat([found[name] for name in ("query", "key", "value")])
        else:  # stay as they are, for whoever compares names to find
            renamed |= {key.replace(".qkv.", f".{name}."): value for name, value in found.items()}
    return renamed


PUBLISHED = Published(names=NAMES, by_arguments=settings, our_tensors=our_tensors)
