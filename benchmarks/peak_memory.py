"""Peak resident memory of evaluation, each execution in a process of its own: python benchmarks/peak_memory.py

Prints MiB above a process that has built the same model and images but run nothing.
"""

import multiprocessing
import resource
import sys

import timm
import torch

from adaptvit import AViTConfig, FullConfig, Packed
from adaptvit.commands.bench import BenchConfig, bench_images

MODEL, BATCH, GATE_CENTER = "deit_small_patch16_224", 32, 5.49


def peak(run: str, answers: multiprocessing.Queue) -> None:
    """Put the peak resident set in MiB, after running `run` six times, into `answers`."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    vit = timm.create_model(MODEL).eval()
    images = bench_images(BenchConfig(MODEL, images=BATCH, batch_size=BATCH), vit)
    with torch.inference_mode():
        for _ in range(6):
            if run == "dense":
                vit(images)
            elif run == "packed, nothing dropped":
                FullConfig().build(vit)(images, Packed)
            elif run == "packed A-ViT":
                AViTConfig(gate_center=GATE_CENTER).build(vit)(images, Packed)
    answers.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Print a line per execution."""
    context = multiprocessing.get_context("spawn")
    base = 0.0
    for run in ("nothing", "dense", "packed, nothing dropped", "packed A-ViT"):
        answers = context.Queue()
        process = context.Process(target=peak, args=(run, answers))
        process.start()
        mib = answers.get()
        process.join()
        base = base or mib
        print(f"{run:>24} {mib - base:8.1f} MiB", file=sys.stdout)


if __name__ == "__main__":
    main()
