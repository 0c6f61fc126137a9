"""Which patches a sampling layer keeps: arithmetic on scores, with sizes known when it is compiled.

Letters: B images, T patch slots, K draws, M slots kept (class token included).
"""

import math

import jax
import jax.numpy as jnp
from jax import Array


def gumbel_noise(key: Array, shape: tuple[int, ...]) -> Array:
    """Standard Gumbel noise with the published guard of 1e-6 against log(0)."""
    uniform = jax.random.uniform(key, shape)
    return -jnp.log(-jnp.log(uniform + 1e-6) + 1e-6)


def gumbel_draws(score: Array, live: Array, noise: Array, eps: float = 1e-6) -> Array:
    """Slots of K independent draws with replacement, in proportion to their score, by the Gumbel-max rule.

    Args:
        score: (B, T), non-negative, 0 where not live.
        live: (B, T) bool, the slots that may be drawn.
        noise: (B, K, T) standard Gumbel.
    Returns:
        (B, K) int in [0, T).
    Source: vit-pytorch's `ats_vit` and its port to Flax.
    """
    probability = score / (score.sum(axis=-1, keepdims=True) + eps)
    logits = jnp.where(live, jnp.log(probability + eps), jnp.finfo(noise.dtype).min / 2)
    return jnp.argmax(logits[:, None] + noise, axis=-1)


def quantile_draws(score: Array, live: Array, count: float) -> Array:
    """Slots that the quantiles 1/2K, 3/2K, ... up to 1 of the cumulative score fall on, added up in slot order.

    Live slots count alike where none of them has a score.

    Args:
        score: (B, T), non-negative, 0 where not live.
        live: (B, T) bool, the slots that may be drawn; at least one, after those that may not.
        count: K, at least 1; need not be whole.
    Returns:
        (B, K rounded) int in [0, T].
    Source: ATS (Fayyaz et al., ECCV 2022), section 3.2, inverse transform sampling.
    """
    score = jnp.where(score.sum(axis=-1, keepdims=True) == 0, live, score)
    cumulative = jnp.cumsum(score / score.sum(axis=-1, keepdims=True), axis=-1)
    quantiles = (jnp.arange(whole(count)) + 0.5) / count
    return jax.vmap(jnp.searchsorted, in_axes=(0, None))(cumulative, quantiles)


def whole(count: float) -> int:
    """How many draws K stands for: K rounded to the nearest, one half down."""
    return math.ceil(count - 0.5)


def compact(draws: Array, slots: int, length: int) -> tuple[Array, Array]:
    """Distinct draws as positions of a shorter sequence: the class token, padding, then the patches in ascending order.

    Args:
        draws: (B, K) int, patch slots; T, where a quantile of 1 ends up by rounding, stands for none.
        slots: T.
        length: M, at least 2. Patches beyond M - 1 are left out, the lowest first.
    Returns:
        ids (B, M) int, positions in the incoming sequence, 0 (the class token) for padding; count (B,) int, the
        distinct draws and the class token, above M where they did not fit.
    """
    images = jnp.arange(len(draws))[:, None]
    drawn = jnp.zeros((len(draws), slots), bool).at[images, draws].set(True, mode="drop")
    ascending = jnp.sort(jnp.where(drawn, jnp.arange(1, slots + 1), 0), axis=-1)
    return jnp.pad(ascending[:, slots - (length - 1) :], ((0, 0), (1, 0))), drawn.sum(axis=-1) + 1
