"""AdaViT against numbers recorded from the released code; decisions and MACs exactly."""

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recordings import EPS, apart, images, our_name, set_widths, terms_of, with_changes
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import cross_entropy

import adaptvit
from adaptvit import AdaViTConfig, FullConfig, Masked, Packed
from adaptvit.backbones.parts import representation_names
from adaptvit.backbones.t2t import SPLITS, published_names, t2t_vit
from adaptvit.methods import adavit
from adaptvit.methods.adavit import AdaViT, Policies
from adaptvit.methods.adavit_files import our_tensors
from adaptvit.methods.released import ReleasedAdaViTConfig
from adaptvit.methods.released import adavit as released

KINDS = {"token": "patches", "head": "heads", "layer": "sublayers"}


@cache
def load(path: Path) -> SimpleNamespace:
    arrays = path.with_suffix(".npz")
    return SimpleNamespace(case=json.loads(path.read_text()), arrays=dict(np.load(arrays)) if arrays.exists() else {})


NOT_REBUILT = ("use_full_head", "random_policy", "random_head", "random_layer", "random_token", "qk_scale")
"""Arguments of the released code that nothing here reproduces."""


def weights_of_case(case: dict) -> dict[str, Tensor]:
    """The recorded ones under our names."""
    state = representation_names(our_tensors(published_names(with_changes(case))))
    return {name_in_model(key): value for key, value in state.items()}


def name_in_model(key: str) -> str:
    """Of a tensor in a file."""
    return key.removeprefix("method.") if key.startswith("method.") else f"vit.{key}"


def vit_of_case(case: dict, state: Mapping[str, Tensor]) -> VisionTransformer:
    """A ViT of the recorded sizes, with weights of its own; those that weights tell are read off `state`."""
    given = case["config"]
    for name in NOT_REBUILT:
        if given.get(name):
            pytest.fail(f"{case['name']} has {name}={given[name]}, which nothing here reproduces")
    state = {key.removeprefix("vit."): value for key, value in state.items()}
    dim, depth = state["norm.weight"].numel(), 1 + max(int(key.split(".")[1]) for key in state if key[:7] == "blocks.")
    settings = {
        "img_size": given["img_size"],
        "embed_dim": dim,
        "depth": depth,
        "num_heads": given["num_heads"] if dim % given["num_heads"] == 0 else 1,
        "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "num_classes": len(state["head.fc.weight" if "head.fc.weight" in state else "head.weight"]),
        "norm_layer": partial(LayerNorm, eps=given["ln_eps"]),
        "in_chans": channels_of(case),
    }
    if "patch_embed.proj.weight" in state:
        vit = VisionTransformer(patch_size=tuple(state["patch_embed.proj.weight"].shape[2:]), **settings)
    else:
        last_window = SPLITS[-1][0] ** 2
        vit = t2t_vit(given["tokens_type"], state["patch_embed.project.weight"].shape[1] // last_window, **settings)
    set_widths(vit, state, given["num_heads"])
    return vit


def channels_of(case: dict) -> int:
    """Channels of the images that the recorded weights take."""
    shapes = published_names(case["manifest"])
    if "patch_embed.proj.weight" in shapes:
        return shapes["patch_embed.proj.weight"][1]
    return shapes["patch_embed.attention1.norm1.weight"][0] // SPLITS[0][0] ** 2


def build(case: dict, **changes: object) -> torch.nn.Module:
    given, state = case["config"], weights_of_case(case)
    vit = vit_of_case(case, state)
    policies = tuple(kind for name, kind in KINDS.items() if given.get(f"ada_{name}"))
    config = FullConfig()
    if policies:
        losses = case.get("loss_config", {})
        config = ReleasedAdaViTConfig(
            **{
                "policies": policies,
                "first_block": given.get("keep_layers", 1),
                "first_patch_block": given.get("ada_token_start_layer", 0),
                "patches_skip": "attention and mlp" if given.get("ada_token_with_mlp") else "attention",
                "heads_take": "hidden"
                if given.get("ada_head_v2")
                else "identity"
                if given.get("ada_head_attn")
                else "input",
                "norm_policies": given.get("norm_policy", False),
                "attention_mask": "after softmax"
                if not given.get("ada_token_pre_softmax", True)
                else "keys"
                if given.get("ada_token_detach_attn", True)
                else "keys with gradient",
                "mlp_gradient": not given.get("ada_token_detach_attn_at_mlp", False),
                "usage_weight": losses.get("head_loss_ratio", 0.0),
                "usage_targets": tuple(losses.get(f"{kind}_target_ratio", 0.5) for kind in KINDS),
                "diversity_weight": losses.get("head_diverse_ratio", 0.0),
                "entropy_weight": losses.get("head_entropy_weight", 0.0),
                "minimums": tuple(losses.get(f"{kind}_minimal", 0.0) for kind in KINDS),
                "minimum_weights": tuple(losses.get(f"{kind}_minimal_weight", 0.0) for kind in KINDS),
                **({"temperature": case["tau"]} if "tau" in case else {}),
                **changes,
            }
        )
    model = config.build(vit)
    model.load_state_dict(state)
    return model.train(case["kind"] == "train")


def batch_of(case: dict) -> Tensor:
    return images({"channels": channels_of(case)} | case["input"])


def decisions(policies: Policies, model: AdaViT) -> dict[str, Tensor]:
    """Under the recorded names, of the blocks that decide."""
    patches = policies.patches[:, model.config.first_patch_block :]
    found = {
        "head": policies.heads[:, model.config.first_block :],
        "layer": policies.sublayers[:, model.config.first_block :],
        "token": torch.cat([torch.ones_like(patches[..., :1]), patches], dim=2),
    }
    return {name: t.detach().float() for name, t in found.items() if KINDS[name] in model.config.policies}


def close(actual: Tensor, expected: np.ndarray | float, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected), atol=atol, rtol=rtol, check_dtype=False)


def logits_apart(case: dict, arrays: Mapping[str, np.ndarray], model: torch.nn.Module) -> float:
    own = case.get("fp64_check", {}).get("max_abs_logit_diff", 0.0)
    return apart(arrays["logits"], terms_of(model.vit), own)


def loss_apart(expected: float, terms: int) -> float:
    """A loss is of means over so many numbers, compared with targets up to 1, which it may lie close to."""
    return apart(np.float64(max(1.0, abs(expected))), terms)


@pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)
def test_evaluation_gives_the_recorded_logits_decisions_and_states(
    adavit_evaluated: Path, layout: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, arrays = load(adavit_evaluated).case, load(adavit_evaluated).arrays
    model, states = build(case).eval(), []
    original = adavit.run_gated

    def noted(*arguments: object) -> object:
        tokens = original(*arguments)
        states.append(tokens.first(tokens.x, 1)[:, 0].clone())
        return tokens

    monkeypatch.setattr(adavit, "run_gated", noted)
    with torch.inference_mode():
        close(model(batch_of(case), layout), arrays["logits"], logits_apart(case, arrays, model))
        if "hidden_cls" in arrays and states:
            recorded = arrays["hidden_cls"]
            close(torch.stack(states, dim=1)[..., : recorded.shape[2]], recorded, apart(recorded, terms_of(model.vit)))
        if not isinstance(model, AdaViT):
            return
        _, policies = model.decided(model.enter(batch_of(case), layout))
    active = policies.sublayers.any(dim=2) if layout is Packed else torch.ones(policies.sublayers.shape[:2], dtype=bool)
    for name, found in decisions(policies, model).items():
        expected = torch.from_numpy(arrays[f"{name}_select"]).float()
        if name == "token" and not active.all():  # a block that is off in both sub-layers does not score its patches
            on = active[:, model.config.first_patch_block :]
            found, expected = found[on], expected[on]
        assert torch.equal(found, expected), name
    if "macs" in case:
        sizes = case["config"]["embed_dim"], case["config"]["mlp_ratio"]
        found = summed_gmacs(policies, *sizes, case["macs"]["base_gmacs"])
        assert torch.equal(found, torch.tensor(case["macs"]["gmacs_per_image"]))
    for name in ("head", "layer"):
        if f"{name}_logits" in arrays:
            logits = policies.head_logits if name == "head" else policies.sublayer_logits
            close(logits, arrays[f"{name}_logits"], apart(arrays[f"{name}_logits"], terms_of(model.vit)))


def test_training_gives_the_recorded_losses_and_gradients(
    adavit_trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, arrays = load(adavit_trained).case, load(adavit_trained).arrays
    model = build(case)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    asked = noise_asked_for(model)

    def recorded_noise(logits: Tensor) -> Tensor:
        name, place = next(asked)
        if f"{name}_gumbel1" not in arrays:
            return torch.zeros_like(logits)
        first, second = (torch.from_numpy(arrays[f"{name}_gumbel{which}"][:, place]) for which in (1, 2))
        return first - second

    monkeypatch.setattr(released, "gumbel_difference", recorded_noise)
    output = model(batch_of(case), detailed=True)
    close(output.logits, arrays["logits"], logits_apart(case, arrays, model))
    asked = noise_asked_for(model)
    with torch.no_grad():
        _, policies = model.decided(model.enter(batch_of(case), Masked))
    for name, found in decisions(policies, model).items():
        assert torch.equal(found, torch.from_numpy(arrays[f"{name}_select"]).float()), name

    labels, losses, weight = torch.tensor(case["labels"]), case["losses"], model.config.usage_weight
    task = cross_entropy(output.logits, labels, label_smoothing=case["label_smoothing"])
    close(task, losses["base_loss"], loss_apart(losses["base_loss"], terms_of(model.vit)))
    for name, kind in KINDS.items():
        if kind in output.terms:
            expected = losses[f"{name}_loss"]
            close(output.terms[kind] / weight, expected, loss_apart(expected, terms_of(model.vit)))
    total = task + sum(output.terms.values())
    close(total, losses["total"], loss_apart(losses["total"], terms_of(model.vit)))
    total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    largest = max(value for value in case["grad_norms"].values() if value is not None)
    rest = 4 * EPS * largest  # what rounding leaves where the terms of a gradient cancel, as of the keys' biases
    compared = 0
    for key, value in case["grad_norms"].items():
        gradient = gradient_of(gradients, key)
        assert (gradient is None) == (value is None), key
        if value is not None:
            close(gradient.double().norm(), value, atol=rest, rtol=1e-4)
            compared += 1
    for key, value in arrays.items():
        if key.startswith("grad/"):
            gradient = gradient_of(gradients, key.removeprefix("grad/"))
            close(gradient.flatten()[: value.size], value, atol=1e-4 * np.abs(value).max() + rest)
    assert compared


def noise_asked_for(model: AdaViT) -> Iterator[tuple[str, int]]:
    """Of a training pass: whose noise each draw is, and the how manieth of that policy."""
    policies = {"layer": model.sublayer_policy, "head": model.head_policy, "token": model.patch_policy}
    taken = dict.fromkeys(policies, 0)
    for block in range(model.depth):
        for name in policies:
            if str(block) in policies[name]:
                yield name, taken[name]
                taken[name] += 1


def leaves(recorded: SimpleNamespace) -> dict[str, Tensor]:
    """The arrays of `losses`, those that losses are differentiated by as leaves."""
    found = {name: torch.from_numpy(array.copy()) for name, array in recorded.arrays.items()}
    for name in found.keys() & {"attn", "attn_teacher", "hidden", "hidden_teacher"}:
        found[name] = found[name].transpose(0, 1)  # recorded as a list of blocks
    for name in ("logits", "head_select", "layer_select", "token_select", "head_logits", "layer_logits"):
        found[name].requires_grad_()
    return found


def losses_of(given: dict[str, Tensor], case: dict) -> dict[str, Tensor]:
    """The released losses of one case, under their recorded names and not weighted."""
    settings = case["loss_config"]

    def options(kind: str) -> list[float]:
        names = ("target_ratio", "diverse_ratio", "entropy_weight", "minimal", "minimal_weight")
        return [settings[f"{kind}_{name}"] for name in names if f"{kind}_{name}" in settings]

    layers = given["layer_select"] if case["layer"] else torch.ones_like(given["layer_select"])
    found = {
        "base_loss": cross_entropy(given["logits"], given["labels" if case.get("hard_labels") else "targets"]),
        **{f"{kind}_loss": torch.zeros(()) for kind in KINDS},
    }
    if case["token"]:
        found["token_loss"] = released.token_loss(given["token_select"], *options("token"))
    if case["head"]:
        heads = given["head_select"], layers, given["head_logits"]
        found["head_loss"] = released.head_loss(*heads, *options("head"))
    if case["layer"]:
        found["layer_loss"] = released.layer_loss(layers, given["layer_logits"], *options("layer"))
    if "teacher" in case:
        first = case["teacher"]["keep_layers"]
        ones = {
            kind: torch.ones_like(given[f"{kind}_select"][:, :1]).expand(-1, first, -1) for kind in ("head", "layer")
        }
        heads = given["head_select"] if case["head"] else torch.ones_like(given["head_select"])
        policies = Policies(
            given["token_select"][..., 1:], torch.cat([ones["head"], heads], 1), torch.cat([ones["layer"], layers], 1)
        )
        pairs = ((given[name], given[f"{name}_teacher"]) for name in ("attn", "hidden", "logits"))
        taught = released.distillation(*pairs, policies, case["teacher"]["tau"])
        for name, ours in (("attn", "attention"), ("hidden", "hidden"), ("pred", "prediction")):
            used = case["teacher"][f"{name}_ratio"] > 0  # the recorded code leaves out what has no weight
            found[f"{name}_loss"] = taught[ours] if used else torch.zeros(())
    return found


def test_the_released_losses_and_their_gradients_are_the_recorded_ones(adavit_losses: Path) -> None:
    recorded = load(adavit_losses)
    terms = max(array.size for array in recorded.arrays.values())
    for case in recorded.case["cases"]:
        given = leaves(recorded)
        found, total = losses_of(given, case), torch.zeros(())
        ratios = case["loss_config"] | {f"{name}_loss_ratio": of for name, of in weights_of(case).items()}
        for name, value in found.items():
            close(value, case["losses"][name], loss_apart(case["losses"][name], terms))
            total = total + ratios.get(f"{name}_ratio", 1.0) * value
        close(total, case["losses"]["total"], loss_apart(case["losses"]["total"], terms))
        total.backward()
        for name, value in case.get("grad_norms", {}).items():
            gradient = given[name].grad
            if value is None:
                assert gradient is None or not gradient.any(), (case["name"], name)
            else:
                close(gradient.double().norm(), value, atol=EPS, rtol=1e-4)  # of losses of size 1


def weights_of(case: dict) -> dict[str, float]:
    """Of the losses towards a teacher, by the recorded names."""
    teacher = case.get("teacher", {})
    return {name: teacher.get(f"{name}_ratio", 0.0) for name in ("attn", "hidden", "pred")}


BACKBONES = {"deit": (384, 6, 4.0), "t2t": (448, 7, 3.0)}
"""Channels, heads and MLP ratio of the two published models."""


def sizes_of(table: Tensor) -> tuple[int, int, int, float]:
    """Heads, tokens, channels and MLP ratio of a block, from its GMACs (heads + 1, tokens + 1, 2, 2) to float32.

    With both sub-layers off it is one norm of all tokens, 5 for each element; the MLP of all tokens is 2 D x hidden.
    """
    heads, tokens = len(table) - 1, table.shape[1] - 1
    dim = round(table[-1, -1, 0, 0].item() * 1e9 / (5 * tokens))
    hidden = round((table[-1, -1, 0, 1] - table[-1, -1, 0, 0]).item() * 1e9 / (2 * tokens * dim))
    return heads, tokens, dim, hidden / dim


def test_every_entry_of_the_released_tables_of_macs(adavit_table: Path) -> None:
    table = torch.tensor(load(adavit_table).case["values"], dtype=torch.float64)
    heads, tokens, dim, ratio = sizes_of(table)
    assert table.shape == (heads + 1, tokens + 1, 2, 2)
    assert not table[:, 0].any()  # the class token is never off: no policy reaches these
    index = torch.cartesian_prod(torch.arange(heads + 1), torch.arange(1, tokens + 1), torch.arange(2), torch.arange(2))
    policies = Policies(
        (torch.arange(tokens - 1) < index[:, 1:2] - 1).long()[:, None],
        (torch.arange(heads) < index[:, :1]).long()[:, None],
        index[:, 2:].contiguous()[:, None],
    )
    computed = released.published_gmacs(policies, dim, ratio, base=0.0)
    assert torch.equal(computed.float(), table[:, 1:].flatten().float())


def test_macs_of_given_policies_by_the_released_tables(adavit_macs: Path) -> None:
    recorded = load(adavit_macs)
    cases = recorded.case["cases"]
    assert cases
    for case in cases:
        model = case["model"]
        if model not in BACKBONES:
            pytest.fail(
                f"{adavit_macs} counts {model!r}, whose sizes it does not say: known are {', '.join(BACKBONES)}"
            )
        (dim, heads, ratio), constants = BACKBONES[model], recorded.case["constants"][model]
        count, depth = len(case["gmacs_per_image"]), constants["block_num"]
        policies = {"head": torch.ones(count, depth, heads), "layer": torch.ones(count, depth, 2)}
        policies["token"] = torch.ones(count, depth, 197)
        for kind in case["arrays"]:
            array = recorded.arrays[f"{model}_{case['name']}_{kind}_select"]
            if kind == "token":
                array = np.unpackbits(array, axis=-1)[..., :197]
            policies[kind][:, depth - array.shape[1] :] = torch.from_numpy(array).float()
        assert policies["token"][..., 0].all()
        decided = Policies(policies["token"][..., 1:], policies["head"], policies["layer"])
        found = summed_gmacs(decided, dim, ratio, constants["base_flops"])
        assert torch.equal(found, torch.tensor(case["gmacs_per_image"])), case["name"]


def summed_gmacs(policies: Policies, dim: int, ratio: float, base: float) -> Tensor:
    """`published_gmacs`, block after block in float32 as the recorded code sums them."""
    total = torch.full((len(policies.patches),), base)
    for block in range(policies.patches.shape[1]):
        kinds = (t[:, block : block + 1] for t in (policies.patches, policies.heads, policies.sublayers))
        total += released.published_gmacs(Policies(*kinds), dim, ratio, base=0.0).float()
    close(
        total, released.published_gmacs(policies, dim, ratio, base), apart(total, policies.patches.shape[1])
    )  # which sums exactly
    return total


def test_a_file_in_the_published_layout_converts_to_the_recorded_logits(adavit_converted: Path, tmp_path: Path) -> None:
    recorded = load(adavit_converted)
    case, published = recorded.case, with_changes(recorded.case)
    content = {
        "epoch": 9,
        "arch": case["registry_name"],
        "state_dict": {"head.weight": torch.zeros(1, 1)},
        "state_dict_ema": {f"module.{key}": value for key, value in published.items()},
        "optimizer": {"state": {}},
        "version": 2,
        "args": argparse.Namespace(lr=5e-4),
    }
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    adaptvit.convert(tmp_path / "checkpoint.pth.tar", tmp_path / "out.safetensors", case["registry_name"])
    model = adaptvit.load(tmp_path / "out.safetensors").eval()
    assert model.config == AdaViTConfig()
    with torch.inference_mode():
        close(model(batch_of(case)), recorded.arrays["logits"], logits_apart(case, recorded.arrays, model))


def gradient_of(gradients: dict[str, Tensor | None], key: str) -> Tensor | None:
    """Of a parameter under its recorded name; the queries', keys' and values' are thirds of one of ours."""
    found = re.fullmatch(r"(.+)\.(query|key|value)\.(\w+)", key)
    if found:
        whole = gradients[f"vit.{found[1]}.qkv.{found[3]}"]
        return None if whole is None else whole.chunk(3)[("query", "key", "value").index(found[2])]
    key = our_name(key, {name.removeprefix("vit."): None for name in gradients})
    (name,) = our_tensors(published_names({key: torch.zeros(1)}))
    return gradients[name_in_model(name)]
