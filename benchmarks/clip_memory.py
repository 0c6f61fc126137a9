"""Peak resident memory of a clip of 64 frames, each method in a process of its own: python benchmarks/clip_memory.py

Prints MiB of the whole process, libraries and weights included, and what runs without a clip take.
"""

import multiprocessing
import resource
import sys

import timm
import torch

from adaptvit import ATSConfig, CalibratedConfig, EViTConfig, RunLengthConfig, RunLengthMergeConfig, ToMeConfig
from adaptvit.video import inflate

MODEL, FRAMES, SIDE = "vit_small_patch16_224", 64, 224
METHODS = {
    "nothing": None,
    "dense": None,
    "runlength": RunLengthConfig(),
    "runlength_merge": RunLengthMergeConfig(r=64),
    "calibrated": CalibratedConfig(r=256),
    "tome": ToMeConfig(r=256),
    "ats": ATSConfig(blocks=range(1, 12), tokens=2048),
    "evit": EViTConfig(),
}


def peak(name: str, answers: multiprocessing.Queue) -> None:
    """Put the peak resident set in MiB into `answers`."""
    torch.manual_seed(0)
    vit = inflate(timm.create_model(MODEL, img_size=SIDE).eval(), FRAMES)
    clip = torch.rand(1, 1, 3, SIDE, SIDE) + 0.3 * torch.rand(1, FRAMES, 3, SIDE, SIDE) * (
        torch.arange(SIDE) > SIDE / 2
    )
    config = METHODS[name]
    model = vit if config is None else config.build(vit)
    if name != "nothing":
        with torch.inference_mode():
            model(clip)
    answers.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Print a line for each of the methods that are named, or of all."""
    context = multiprocessing.get_context("spawn")
    for name in sys.argv[1:] or METHODS:
        answers = context.Queue()
        process = context.Process(target=peak, args=(name, answers))
        process.start()
        print(f"{name:>16} {answers.get():8.0f} MiB", flush=True)
        process.join()


if __name__ == "__main__":
    main()
