"""What holds for the Flax ATS ViT, whatever its weights."""

import dataclasses
import re
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax", reason="the JAX side needs adaptvit[flax]")

import jax
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import Array
from test_checks import ANYTHING, COMMON, declared, likely
from test_imports import imported, modules

from adaptvit.flax import Flavour, ViT, check_capacities, samplers
from adaptvit.flax.ats_vit import pair

SMALL = ViT(
    image_size=16,
    patch_size=4,
    num_classes=5,
    dim=24,
    depth=3,
    max_tokens_per_depth=(12, 9, 6),
    heads=2,
    mlp_dim=32,
    dim_head=8,
)
QUANTILES = SMALL.clone(sampler="inverse_transform")
IMAGES = np.random.default_rng(0).normal(size=(5, 16, 16, 3)).astype(np.float32)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def variables() -> Any:
    """Weights with which tokens differ enough for the sampler to tell them."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(SMALL.init, {"params": KEY}, IMAGES)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=3 * leaf.shape[0] ** -0.5), shapes)


@partial(jax.jit, static_argnums=0)
def run(vit: ViT, variables: Any, images: Array, rngs: dict[str, Array] | None = None) -> Any:
    """Logits and ids, and what the layers recorded."""
    return vit.apply(variables, images, return_sampled_token_ids=True, rngs=rngs, mutable=["intermediates"])


def test_the_published_usage_runs_compiled_or_not() -> None:
    vit = SMALL.clone(depth=1, max_tokens_per_depth=(9,), dropout=0.1, emb_dropout=0.1)
    rngs = {"params": KEY, "dropout": jax.random.key(1), "emb_dropout": jax.random.key(2)}
    params = vit.init(rngs, IMAGES)
    logits, ids = vit.apply(params, IMAGES, return_sampled_token_ids=True, rngs=rngs)
    assert (logits.shape, ids.shape) == ((5, 5), (5, 9))
    np.testing.assert_allclose(logits, jax.jit(vit.apply)(params, IMAGES, rngs=rngs), atol=1e-5)


def test_gradients_are_finite_and_reach_every_layer(variables: Any) -> None:
    def loss(variables: Any) -> Array:
        return (SMALL.apply(variables, IMAGES, rngs={"ats": KEY}) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))(variables)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


def test_one_image_at_a_time_is_the_batch(variables: Any) -> None:
    def single(image: Array) -> Array:
        return QUANTILES.apply(variables, image[None], return_sampled_token_ids=True)

    (logits, ids), _ = run(QUANTILES, variables, IMAGES)
    each_logits, each_ids = jax.jit(jax.vmap(single))(IMAGES)
    np.testing.assert_allclose(logits, each_logits[:, 0], rtol=1e-4)
    assert np.array_equal(ids, each_ids[:, 0])


def test_shapes_are_known_without_computing() -> None:
    shapes = jax.eval_shape(SMALL.init, {"params": KEY}, IMAGES)
    logits, ids = jax.eval_shape(partial(SMALL.apply, return_sampled_token_ids=True), shapes, IMAGES)
    assert (logits.shape, ids.shape) == ((5, 5), (5, 6))
    assert SMALL.lengths == (13, 10, 7)
    assert SMALL.clone(max_tokens_per_depth=(16, 16, 6)).lengths == (None, None, 7)


def test_draws_follow_the_rng(variables: Any) -> None:
    def ids(seed: int) -> np.ndarray:
        return np.asarray(run(SMALL, variables, IMAGES, {"ats": jax.random.key(seed)})[0][1])

    assert np.array_equal(ids(0), ids(0))
    assert not np.array_equal(ids(0), ids(1))


def test_every_layer_draws_its_own_noise(variables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    same_size = SMALL.clone(max_tokens_per_depth=(8, 8, 8), blocks=(0, 1, 2))
    drawn, noise = [], samplers.gumbel_noise
    monkeypatch.setattr(samplers, "gumbel_noise", lambda *size: drawn.append(noise(*size)) or drawn[-1])

    @jax.jit
    def all_noise() -> list[Array]:
        same_size.apply(variables, IMAGES, rngs={"ats": KEY})
        return drawn

    first, second, third = all_noise()
    assert first.shape == (5, 8, 16)
    assert second.shape == third.shape == (5, 8, 8)
    assert not np.array_equal(second, third)


def test_without_an_rng_the_quantiles_are_drawn(variables: Any) -> None:
    (logits, ids), _ = run(SMALL, variables, IMAGES)
    (expected, expected_ids), _ = run(QUANTILES, variables, IMAGES, {"ats": KEY})
    assert np.array_equal(logits, expected)
    assert np.array_equal(ids, expected_ids)


def test_drop_out_is_off_outside_training(variables: Any) -> None:
    logits = jax.jit(partial(SMALL.clone(dropout=0.3, emb_dropout=0.3).apply, training=False))(variables, IMAGES)
    np.testing.assert_allclose(logits, run(SMALL, variables, IMAGES)[0][0], rtol=1e-4)


def test_ids_are_distinct_patches_in_raster_order_after_the_padding(variables: Any) -> None:
    (_, ids), state = run(SMALL, variables, IMAGES, {"ats": KEY})
    counts = state["intermediates"]["Transformer_0"]["Attention_2"]["AdaptiveTokenSampling_0"]["tokens"][0]
    assert len(set(counts.tolist())) > 1
    for row, count in zip(np.asarray(ids), counts, strict=True):
        patches = row[len(row) - (count - 1) :]
        assert (row[: len(row) - len(patches)] == -1).all()
        assert list(patches) == sorted(set(patches))
        assert (patches >= 0).all()


def test_a_capacity_that_suffices_changes_nothing(variables: Any) -> None:
    (logits, ids), state = run(QUANTILES, variables, IMAGES)
    layers = state["intermediates"]["Transformer_0"]
    most = [int(layers[f"Attention_{i}"]["AdaptiveTokenSampling_0"]["tokens"][0].max()) for i in range(3)]
    tight = QUANTILES.clone(capacities=tuple(most), blocks=(0, 1, 2))
    assert tight.lengths < QUANTILES.lengths
    (same_logits, same_ids), state = run(tight, variables, IMAGES)
    check_capacities(tight, state["intermediates"])
    np.testing.assert_allclose(logits, same_logits, rtol=1e-4)
    assert np.array_equal(ids[:, -same_ids.shape[1] :], same_ids)


def test_an_image_that_exceeds_a_capacity_is_reported_and_the_others_are_not(variables: Any) -> None:
    (logits, _), state = run(QUANTILES, variables, IMAGES)
    counts = np.asarray(state["intermediates"]["Transformer_0"]["Attention_0"]["AdaptiveTokenSampling_0"]["tokens"][0])
    capacity = int(counts.max()) - 1
    short = QUANTILES.clone(capacities=(capacity, 10, 7), blocks=(0, 1, 2))
    (short_logits, _), state = run(short, variables, IMAGES)
    exceeded = counts > capacity
    assert 0 < exceeded.sum() < len(IMAGES)
    assert np.isnan(short_logits[exceeded]).all()
    np.testing.assert_allclose(short_logits[~exceeded], logits[~exceeded], rtol=1e-4)
    with pytest.raises(ValueError, match=rf"layer 0 drew {counts.max()} tokens of image {counts.argmax()}"):
        check_capacities(short, state["intermediates"])


def test_no_layer_that_samples_is_the_plain_vit(variables: Any) -> None:
    (logits, ids), _ = run(SMALL.clone(blocks=()), variables, IMAGES)
    roomy = SMALL.clone(max_tokens_per_depth=(16, 16, 16))
    assert np.array_equal(logits, run(roomy, variables, IMAGES, {"ats": KEY})[0][0])
    assert np.array_equal(ids, np.broadcast_to(np.arange(16), (5, 16)))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_tokens_per_depth": (12, 9)}, r"max_tokens_per_depth must be 3 .* got \(12.0, 9.0\)"),
        ({"max_tokens_per_depth": (9, 12, 6)}, "not growing"),
        ({"max_tokens_per_depth": (float("nan"), 9, 6)}, r"must be 1 or more, got \(nan, 9, 6\)"),
        ({"max_tokens_per_depth": (float("inf"), 9, 6)}, r"must be 1 or more and finite, got \(inf, 9, 6\)"),
        ({"max_tokens_per_depth": "abc"}, "must be numbers, 1 or more, got 'abc'"),
        ({"capacities": (12, 1, 6)}, r"capacities must be 2 or more, got \(12, 1, 6\)"),
        ({"capacities": (12, 6)}, r"capacities must be 3 \(depth\) numbers, got \(12, 6\)"),
        ({"capacities": ()}, r"capacities must be whole numbers, 2 or more, or None, got \(\)"),
        ({"dim": 1.5}, "ViT.dim must be a whole number, 1 or more, got 1.5"),
        ({"dim_head": 0}, "ViT.dim_head must be 1 or more, got 0"),
        ({"dropout": float("nan")}, r"ViT.dropout must lie in \[0, 1\), got nan"),
        ({"image_size": (16, 16, 16)}, r"image_size must be a whole number or 2 whole numbers in 1..65536, got \(16"),
        ({"flavour": None}, "ViT.flavour must be a Flavour, got None"),
        ({"blocks": (True,)}, r"blocks must be whole numbers, 0 or more, or None, got \(True,\)"),
        ({"blocks": (3,)}, r"blocks must lie in 0..2, got \(3,\)"),
        ({"patch_size": 5}, "patch_size 5 does not divide image_size 16"),
        ({"sampler": "released"}, "sampler must be one of gumbel, inverse_transform, got 'released'"),
    ],
)
def test_wrong_settings_fail_when_the_model_is_made(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL.clone(**setting)


@pytest.mark.parametrize("kind", [ViT, Flavour], ids=lambda kind: kind.__name__)
def test_a_config_is_refused_or_works(kind: type) -> None:
    needed = {field.name: getattr(SMALL, field.name) for field in dataclasses.fields(ViT) if field.name != "parent"}
    fields = {field.name: field.type for field in dataclasses.fields(kind) if field.name not in ("parent", "name")}
    assert [name for name, one in fields.items() if not declared(one)] == []

    @settings(max_examples=60, **COMMON)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from([*fields]), min_size=1, max_size=2, unique=True))
        given = {name: data.draw(likely(fields[name]) if data.draw(st.integers(0, 3)) else ANYTHING) for name in names}
        made, said = None, ""
        try:
            made = kind(**(given if kind is Flavour else needed | given))
        except ValueError as error:
            said = str(error)
        assert made is not None or re.fullmatch(f"{kind.__name__}.({'|'.join(fields)}) .*", said)
        if made is None:
            return
        vit = SMALL.clone(flavour=made) if kind is Flavour else made
        if max(vit.dim, vit.heads, vit.mlp_dim, vit.dim_head, vit.num_classes) < 1000:
            images = jax.ShapeDtypeStruct((1, *pair(vit.image_size), 3), "float32")
            keys = dict.fromkeys(("params", "dropout", "emb_dropout"), KEY)
            logits = jax.eval_shape(lambda x: vit.init_with_output(keys, x)[0], images)
            assert logits.shape == (1, vit.num_classes)

    holds()


def test_images_of_another_size_are_refused(variables: Any) -> None:
    with pytest.raises(ValueError, match=r"\(B, 16, 16, channels\), got \(5, 3, 16, 16\)"):
        SMALL.apply(variables, IMAGES.transpose(0, 3, 1, 2))


def test_the_rest_of_the_package_knows_nothing_of_jax() -> None:
    for name, path in modules().items():
        if not name.startswith("flax"):
            assert not {module for module in imported(path) if module.startswith(("jax", "flax", "adaptvit.flax"))}, (
                name
            )
