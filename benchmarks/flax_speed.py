"""The Flax ATS ViT against the same ViT without sampling, both compiled, in one run: ideal and realised gain.

Run it: python benchmarks/flax_speed.py --json benchmarks/flax_ats.json
The ViT is that of the published README; its layers sample down to 256, 128, 64, 32, 16 and 8 patches.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median

import flax
import jax

from adaptvit.flax import ViT
from adaptvit.measure.speed import interleaved

IMAGE, PATCH = 256, 16
SETTINGS = {
    "image_size": IMAGE,
    "patch_size": PATCH,
    "num_classes": 1000,
    "dim": 1024,
    "depth": 6,
    "max_tokens_per_depth": (256, 128, 64, 32, 16, 8),
    "heads": 16,
    "mlp_dim": 2048,
}


def macs(vit: ViT) -> int:
    """Multiply-accumulates of the linear maps and of attention, for the slots that the compiled model has."""
    slots = (IMAGE // PATCH) ** 2 + 1
    inner = vit.heads * vit.dim_head
    total = (slots - 1) * PATCH**2 * 3 * vit.dim + vit.dim * vit.num_classes
    for length in vit.lengths:
        kept = length or slots
        score = slots * inner if length else 0
        attention = 3 * slots * vit.dim * inner + score + 2 * kept * slots * inner + kept * inner * vit.dim
        total += attention + 2 * kept * vit.dim * vit.mlp_dim
        slots = kept
    return total


def measure(models: dict[str, ViT], batch: int, rounds: int) -> dict[str, float]:
    """Median seconds of a compiled forward pass, by name; the models take turns."""
    images = jax.random.normal(jax.random.key(0), (batch, IMAGE, IMAGE, 3))
    rngs = {"ats": jax.random.key(1)}
    variables = jax.jit(models["plain"].init)({"params": jax.random.key(2)}, images)

    def call(vit: ViT) -> Callable[[], object]:
        forward = jax.jit(lambda *inputs: vit.apply(*inputs, training=False, rngs=rngs))
        return lambda: jax.block_until_ready(forward(variables, images))

    seconds = interleaved({name: call(vit) for name, vit in models.items()}, rounds)
    return {name: median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    models = {
        "plain": ViT(**SETTINGS, blocks=()),
        "inverse_transform": ViT(**SETTINGS, sampler="inverse_transform"),
        "gumbel": ViT(**SETTINGS, sampler="gumbel"),
    }
    ideal = macs(models["plain"]) / macs(models["gumbel"])
    results = []
    for batch in arguments.batch_sizes:
        seconds = measure(models, batch, arguments.rounds)
        for sampler in ("inverse_transform", "gumbel"):
            realised = seconds["plain"] / seconds[sampler]
            results.append(
                {
                    "batch_size": batch,
                    "sampler": sampler,
                    "plain_seconds": seconds["plain"],
                    "sampled_seconds": seconds[sampler],
                    "ideal_speedup": ideal,
                    "realised_speedup": realised,
                    "ratio": realised / ideal,
                }
            )
            print(f"batch {batch}, {sampler}: ideal {ideal:.2f}, realised {realised:.2f}, ratio {realised / ideal:.2f}")
    record = {
        "settings": SETTINGS,
        "macs": {name: macs(vit) for name, vit in models.items()},
        "results": results,
        "rounds": arguments.rounds,
        "device": jax.devices()[0].device_kind,
        "threads": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[:2],
        "jax": jax.__version__,
        "flax": flax.__version__,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
