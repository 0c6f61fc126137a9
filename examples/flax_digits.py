"""Train the Flax ATS ViT on handwritten digits with optax, save it with orbax, and go on from there.

Run it: python examples/flax_digits.py --directory runs/flax_digits --epochs 20
The same command with more epochs goes on from the last checkpoint, to the numbers of a run without interruption.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax import Array
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from adaptvit.flax import ViT

BATCH = 64
VIT = ViT(
    image_size=8,
    patch_size=2,
    num_classes=10,
    dim=64,
    depth=4,
    max_tokens_per_depth=(16, 12, 8, 4),
    heads=4,
    mlp_dim=128,
    dim_head=16,
    dropout=0.1,
)
OPTIMIZER = optax.adamw(optax.warmup_constant_schedule(0.0, 2e-3, 40), weight_decay=0.05)


def loss_of(params: Any, images: Array, labels: Array, key: Array) -> Array:
    """Mean cross-entropy, with tokens drawn at random."""
    dropout, ats = jax.random.split(key)
    logits = VIT.apply(params, images, rngs={"dropout": dropout, "ats": ats})
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def step(state: dict[str, Any], images: Array, labels: Array, key: Array) -> tuple[dict[str, Any], Array]:
    loss, gradient = jax.value_and_grad(loss_of)(state["params"], images, labels, key)
    updates, optimizer = OPTIMIZER.update(gradient, state["optimizer"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer}, loss


@partial(jax.jit, static_argnames="patches")
def evaluate(params: Any, images: Array, labels: Array, patches: int = 16) -> tuple[Array, Array]:
    """Accuracy and mean share of patches left, both in [0, 1]; tokens are drawn at the quantiles."""
    logits, ids = VIT.apply(params, images, return_sampled_token_ids=True, training=False)
    return (logits.argmax(axis=-1) == labels).mean(), (ids >= 0).sum(axis=1).mean() / patches


def train(directory: Path, epochs: int, seed: int = 0) -> tuple[list[float], float]:
    """Train up to `epochs`, a checkpoint after each; the mean loss of each epoch trained, and the test accuracy."""
    digits = load_digits()
    images, labels = jnp.asarray(digits.images, jnp.float32)[..., None] / 16, jnp.asarray(digits.target)
    rows, held_out = train_test_split(range(len(labels)), test_size=0.2, stratify=digits.target, random_state=seed)
    rows = jnp.asarray(rows)

    key = jax.random.key(seed)
    params = jax.jit(VIT.init)({"params": key, "dropout": key, "emb_dropout": key}, images[:1])
    state = {"params": params, "optimizer": OPTIMIZER.init(params)}
    losses = []
    with ocp.CheckpointManager(directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager:
        done = manager.latest_step() or 0
        if done:
            state = manager.restore(done, args=ocp.args.StandardRestore(state))
            print(f"resumed after epoch {done}")
        for epoch in range(done + 1, epochs + 1):
            order_key, *keys = jax.random.split(jax.random.fold_in(key, epoch), 1 + len(rows) // BATCH)
            order = jax.random.permutation(order_key, rows)[: len(keys) * BATCH].reshape(-1, BATCH)
            total = 0.0
            for batch, batch_key in zip(order, keys, strict=True):
                state, loss = step(state, images[batch], labels[batch], batch_key)
                total += float(loss) / len(keys)
            losses.append(total)
            manager.save(epoch, args=ocp.args.StandardSave(state))
            print(f"epoch {epoch}: loss {total:.3f}")
    held_out = jnp.asarray(held_out)
    accuracy, share = evaluate(state["params"], images[held_out], labels[held_out])
    print(f"test accuracy {accuracy:.1%}, {share:.0%} of patches left")
    return losses, float(accuracy)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("runs/flax_digits"))
    parser.add_argument("--epochs", type=int, default=20)
    train(**vars(parser.parse_args()))
