"""The Flax ATS ViT against numbers recorded from the published file."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import weights
from recordings import apart

pytest.importorskip("jax", reason="the JAX side needs adaptvit[flax]")

import flax
import jax
from timm.layers import to_2tuple

from adaptvit.flax import ViT, samplers
from adaptvit.flax.ats_vit import AdaptiveTokenSampling


def recorded_parameters(case: dict[str, Any]) -> dict[str, Any]:
    """Weights by the rule in the fixture: named and laid out as torch would, kernels transposed back."""
    ends = {"kernel": "weight", "scale": "weight"}
    flat = {}
    for path, shape in case["manifest"].items():
        *scopes, end = path.split("/")
        kernel = end == "kernel"
        value = weights.tensor(
            ".".join([*scopes, ends.get(end, end)]),
            shape[::-1] if kernel else shape,
            case["weights"]["seed"],
            case["weights"]["scale"],
        )
        flat[path] = value.T if kernel else value
    return {"params": flax.traverse_util.unflatten_dict(flat, sep="/")}


def model(case: dict[str, Any], **others: Any) -> ViT:
    """Of the recorded sizes; how many channels images have it learns from them."""
    return ViT(**{name: value for name, value in case["config"].items() if name != "channels"}, **others)


def channels_of(case: dict[str, Any]) -> int:
    """Channels of the images that the recorded weights take."""
    return case["manifest"]["Dense_0/kernel"][0] // math.prod(to_2tuple(case["config"]["patch_size"]))


def capacities(case: dict[str, Any]) -> tuple[int, ...]:
    """Lengths that the published file padded to, layer by layer; it samples where the incoming one exceeds K."""
    images, patches = (math.prod(to_2tuple(case["config"][name])) for name in ("image_size", "patch_size"))
    length, calls, lengths = images // patches + 1, iter(case["calls"]), []
    for count in case["config"]["max_tokens_per_depth"]:
        length = next(calls)["padded_out"] if length - 1 > count else length
        lengths.append(length)
    return tuple(lengths)


def test_the_published_run_is_reproduced(flax_case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, arrays = json.loads(flax_case.read_text()), dict(np.load(flax_case.with_suffix(".npz")))
    noise = (arrays[f"call{number}_gumbel"] for number in range(len(case["calls"])))
    monkeypatch.setattr(samplers, "gumbel_noise", lambda key, shape: next(noise))
    vit, given = model(case, capacities=capacities(case)), case["input"]
    images = weights.images(given["batch"], given["size"], given["seed"], channels_of(case)).transpose(0, 2, 3, 1)

    @jax.jit
    def run(variables: dict[str, Any], images: np.ndarray) -> Any:
        return vit.apply(
            variables,
            images,
            return_sampled_token_ids=True,
            rngs={"ats": jax.random.key(0)},
            capture_intermediates=lambda module, _: isinstance(module, AdaptiveTokenSampling),
            mutable=["intermediates"],
        )

    (logits, ids), state = run(recorded_parameters(case), images)
    given = case["config"]
    terms = given["depth"] * (2 * given["dim"] + given["heads"] * case.get("dim_head", 64) + given["mlp_dim"])
    np.testing.assert_allclose(logits, arrays["logits"], atol=apart(arrays["logits"], terms), rtol=0)
    assert np.array_equal(ids, arrays["token_ids"])
    assert next(noise, None) is None

    layers = state.get("intermediates", {}).get("Transformer_0", {})
    samplings = [layers[name]["AdaptiveTokenSampling_0"] for name in sorted(layers)]
    assert len(samplings) == len(case["calls"])
    for number, (call, sampling) in enumerate(zip(case["calls"], samplings, strict=True)):
        ((local, fits),) = sampling["__call__"]
        assert np.array_equal(local, arrays[f"call{number}_ids_local"])
        assert np.array_equal((local > 0) | (np.arange(local.shape[1]) == 0), arrays[f"call{number}_mask"])
        assert fits.all()
        assert np.array_equal(sampling["tokens"][0], call["counts"])


def test_a_fresh_model_has_the_published_parameters(flax_case: Path) -> None:
    case = json.loads(flax_case.read_text())
    image = np.zeros((1, *to_2tuple(case["config"]["image_size"]), channels_of(case)), np.float32)
    key = jax.random.key(0)
    rngs = {"params": key, "dropout": key, "emb_dropout": key}
    variables = jax.eval_shape(model(case).init, rngs, image)
    shapes = jax.tree.map(lambda leaf: list(leaf.shape), dict(variables), is_leaf=lambda leaf: hasattr(leaf, "shape"))
    assert flax.traverse_util.flatten_dict(shapes["params"], sep="/") == case["manifest"]
    assert set(variables) == {"params"}
