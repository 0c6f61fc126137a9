"""Drawing and compacting, against torch, counts and loops."""

import numpy as np
import pytest
import torch

pytest.importorskip("jax", reason="the JAX side needs adaptvit[flax]")

import jax

from adaptvit.flax.samplers import compact, gumbel_draws, gumbel_noise, quantile_draws, whole
from adaptvit.methods.ats import inverse_transform


def scores(images: int, slots: int, dead: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Uneven scores, and which slots are live: all but the first `dead`."""
    live = np.broadcast_to(np.arange(slots) >= dead, (images, slots))
    return (np.random.default_rng(0).random((images, slots)) ** 4 * live).astype(np.float32), live


@pytest.mark.parametrize("count", [1, 2, 7, 7.4, 12.6, 24, 60])
def test_quantiles_fall_where_torch_says(count: float) -> None:
    score, live = scores(images=50, slots=24, dead=3)
    drawn = np.asarray(quantile_draws(score, live, count))
    assert drawn.shape == (50, whole(count))
    expected = inverse_transform(torch.from_numpy(score / score.sum(axis=1, keepdims=True)), count)
    assert np.array_equal((drawn[:, :, None] == np.arange(24)).any(axis=1), expected)


def test_live_patches_count_alike_where_none_has_a_score() -> None:
    live = np.array([[False, False, True, True, True, True]])
    assert np.asarray(quantile_draws(np.zeros((1, 6), np.float32), live, 2)).tolist() == [[2, 4]]


def test_gumbel_draws_in_proportion_to_the_score_and_never_a_dead_slot() -> None:
    score, live = scores(images=1, slots=6, dead=2)
    drawn = gumbel_draws(score, live, gumbel_noise(jax.random.key(0), (1, 20000, 6)))
    shares = np.bincount(np.asarray(drawn)[0], minlength=6) / 20000
    np.testing.assert_allclose(shares, score[0] / score.sum(), atol=0.02)
    assert shares[:2].sum() == 0


@pytest.mark.parametrize("length", [9, 6, 2])
def test_compact_gives_the_class_token_padding_and_the_distinct_draws_in_order(length: int) -> None:
    draws = np.random.default_rng(1).integers(0, 9, size=(20, 8))  # 8, of 8 slots, is a quantile past the end
    ids, count = compact(draws, slots=8, length=length)
    for row, kept, total in zip(draws, ids, count, strict=True):
        distinct = sorted({slot + 1 for slot in row if slot < 8})
        assert total == len(distinct) + 1
        patches = distinct[-(length - 1) :]
        assert kept.tolist() == [0] * (length - len(patches)) + patches
