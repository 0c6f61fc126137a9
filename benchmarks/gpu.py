"""What a few minutes of a GPU are to tell, cell by cell: ceilings, kernels, parity, waits, speed, memory, training.

    python benchmarks/gpu.py                                   # cuda, 330 seconds; writes gpu.jsonl, prints a table
    python benchmarks/gpu.py --device cpu --seconds 60         # tiny models, to see that it runs
    python benchmarks/gpu.py --prepare WEIGHTS IMAGES          # on a CPU, beforehand: gpu_counts.npz and gpu_knobs.json

A line of JSON a cell, flushed; a cell that fails is a line with the first sentence of its error. No cell starts that,
going by the longest of its kind, would not fit into its part of the time; what a part leaves, the next have.

Weights are random; how ragged batches are is not (`gpu_ragged.py`). AdaViT's patches are as many as ATS's.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_cells import ceilings, compiled, micro, parity, profiles, throughput, training
from gpu_job import MODELS, Job
from gpu_ragged import find_knobs, record

PARTS = {ceilings: 8, micro: 22, parity: 50, throughput: 130, compiled: 90, training: 20, profiles: 10}
"""In order, and their shares of the time."""


def run(job: Job) -> None:
    """All cells that fit."""
    job.out.write_text("")
    end = 0.0
    for part, share in PARTS.items():
        end += share * job.seconds / sum(PARTS.values())
        longest: dict[Any, float] = {}
        left_out = 0
        for what, cell in part(job):
            kind = tuple(what.get(name) for name in ("model", "batch", "what"))
            if job.spent() + longest.get(kind, max(longest.values(), default=0.0)) > end:
                left_out += 1
                continue
            line = {"part": part.__name__, **what, **tried(job, cell)}
            longest[kind] = max(longest.get(kind, 0.0), line["seconds"])
            job.write(line)
        if left_out:
            job.write({"part": part.__name__, "left out": left_out})


def tried(job: Job, cell: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a cell finds, or its error, and how long it took."""
    start = job.spent()
    try:
        found = cell()
    except Exception as error:  # whatever a device says; the others still run
        found = {"error": f"{type(error).__name__}: {str(error).strip().partition('. ')[0].partition(chr(10))[0]}"}
        if job.cuda:
            torch.cuda.empty_cache()
    return found | {"seconds": round(job.spent() - start, 3)}


def table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """What was found: a row for each cell with a ratio, and of others the failures."""
    yield "| part | model | batch | method | | ideal | realised / ideal |"
    yield "| --- | --- | ---: | --- | --- | ---: | --- |"
    for line in lines:
        if "ratio" in line:
            ratio = ", ".join(f"{name} {one:.2f}" for name, one in line["ratio"].items())
            beside = line.get("mode") or line.get("dtype", "")
            yield f"| {line['part']} | {line['model']} | {line['batch']} | {line['method']} | {beside} | " + (
                f"{line['ideal']:.2f} | {ratio} |"
            )
    for line in lines:
        if "error" in line or "left out" in line:
            yield json.dumps(line)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=MODELS, default="cuda")
    parser.add_argument("--seconds", type=float, default=330.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--prepare", type=Path, nargs=2, metavar=("WEIGHTS", "IMAGES"))
    given = parser.parse_args(arguments)
    if given.prepare:
        record(*given.prepare)
        find_knobs(sorted({at[:2] for sizes in MODELS.values() for at in sizes} | {("vit_tiny_patch16_224", 64)}))
    else:
        job = Job(given.device, given.seconds, given.out)
        run(job)
        print("\n".join(table(job.lines)))


if __name__ == "__main__":
    main(sys.argv[1:])
