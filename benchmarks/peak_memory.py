"""Peak resident memory, each execution in a process of its own: python benchmarks/peak_memory.py [training]

Of evaluation; with `training`, of steps with and without activation checkpoints. Prints MiB above a process that has
built the same model and images but run nothing.
"""

import multiprocessing
import resource
import sys

import timm
import torch
from torch.nn.functional import cross_entropy

from adaptvit import AViTConfig, DynamicViTConfig, FullConfig, Packed, ToMeConfig
from adaptvit.commands.bench import BenchConfig, bench_images

MODEL, BATCH, GATE_CENTER = "deit_small_patch16_224", 32, 5.49
TRAINED = {
    "dense": FullConfig(),
    "A-ViT": AViTConfig(gate_center=GATE_CENTER),
    "ToMe": ToMeConfig(r=8),
    "DynamicViT": DynamicViTConfig(),
}


def peak(run: str, answers: multiprocessing.Queue) -> None:
    """Put the peak resident set in MiB, after running `run` six times, into `answers`."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    vit = timm.create_model(MODEL).eval()
    images = bench_images(BenchConfig(MODEL, images=BATCH, batch_size=BATCH), vit)
    method, _, checkpoints = run.removeprefix("training ").partition(", ")
    if run.startswith("training ") and method in TRAINED:
        model = TRAINED[method].build(vit.train())
        model.set_grad_checkpointing(bool(checkpoints))
        for _ in range(2):
            cross_entropy(model(images), torch.arange(BATCH)).backward()
        answers.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
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
    runs = ["nothing", "dense", "packed, nothing dropped", "packed A-ViT"]
    if sys.argv[1:] == ["training"]:
        runs = ["nothing", *(f"training {name}{more}" for name in TRAINED for more in ("", ", checkpoints"))]
    for run in runs:
        answers = context.Queue()
        process = context.Process(target=peak, args=(run, answers))
        process.start()
        mib = answers.get()
        process.join()
        base = base or mib
        print(f"{run:>32} {mib - base:8.1f} MiB", file=sys.stdout)


if __name__ == "__main__":
    main()
