"""Exported files in ONNX Runtime: predictions, sizes, accuracy, and speed beside that of the dense model's file.

    python benchmarks/export.py WEIGHTS IMAGES OUTPUT [COUNT]

WEIGHTS is a ViT-Tiny/16 file in timm's names, IMAGES a folder of class folders, OUTPUT a .json file, COUNT the images
that accuracy is of, 1000 unless told. DeiT-S has random weights: its predictions are compared, its accuracy is not
told. Dense is timm's own model, exported as it is; float16 and int8 are what ONNX Runtime's own tools make of the
float32 files. The wall clock is of two threads, files in turns; the processor's time is of one thread, which other
work on the machine does not lengthen. Where there are no images, comparisons are left out, and it is said.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16

import adaptvit
from adaptvit import EViTConfig, GridConfig, ToMeConfig, meet_target
from adaptvit.data import DataConfig, open_split, spread_over
from adaptvit.weights.opening import start_from

TARGET = 0.6
CONFIGS = {"tome": ToMeConfig(), "evit": EViTConfig(), "grid": GridConfig()}
ROUNDS = {1: 9, 8: 3}
COMPARED = 100


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def logits(path: Path, images: torch.Tensor) -> torch.Tensor:
    runs = session(path, 2)
    return torch.cat([torch.from_numpy(runs.run(None, {"images": some.numpy()})[0]) for some in images.split(25)])


def times(files: dict[str, Path], batch: int) -> dict[str, dict[str, float]]:
    """By name, median milliseconds of a batch: wall clock of two threads, processor's time of one."""
    images = np.random.default_rng(0).standard_normal((batch, 3, 224, 224), dtype="float32")
    found: dict[str, dict[str, float]] = {name: {} for name in files}
    for what, threads, clock in (("wall", 2, time.perf_counter), ("cpu", 1, time.process_time)):
        runs = {name: session(path, threads) for name, path in files.items()}
        taken: dict[str, list[float]] = {name: [] for name in files}
        for turn in range(ROUNDS[batch] + 1):
            for name, one in runs.items():
                start = clock()
                one.run(None, {"images": images})
                if turn:
                    taken[name].append(clock() - start)
        for name, seconds in taken.items():
            found[name][what] = statistics.median(seconds) * 1e3
    return found


def main(weights: Path, folder: Path, output: Path, count: int) -> None:
    """Measure, and write the figures."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    tiny, small = timm.create_model("vit_tiny_patch16_224").eval(), timm.create_model("deit_small_patch16_224").eval()
    start_from(tiny, weights)
    settings: dict[str, Any] = timm.data.resolve_model_data_config(tiny) | {
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "crop_pct": 0.9,
    }
    images = labels = None
    if folder.exists():
        split = open_split(DataConfig(root=folder), settings, "validation")
        images, labels, _ = spread_over(split, count)
    else:
        print(f"no images in {folder}: nothing is compared")
    rows: list[dict[str, Any]] = []
    dynamic = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    named: Any = {"input_names": ["images"], "output_names": ["logits"]}
    with tempfile.TemporaryDirectory() as name:
        for which, vit in (("vit_tiny_patch16_224", tiny), ("deit_small_patch16_224", small)):
            files, facts, start = {"dense": Path(name) / "dense.onnx"}, {"dense": {"share": 1.0}}, len(rows)
            given = (torch.zeros(2, 3, 224, 224),)
            torch.onnx.export(vit, given, dynamo=True, verbose=False, dynamic_shapes=dynamic, **named).save(
                files["dense"]
            )
            models: dict[str, Any] = {"dense": vit}
            for method, config in CONFIGS.items():
                models[method] = model = config.build(vit).eval()
                meet_target(model, torch.zeros(1, 3, 224, 224), TARGET)
                files[method] = Path(name) / f"{method}.onnx"
                facts[method] = adaptvit.export(model, files[method]).facts
                print(which, method, "exported", flush=True)
            for key in list(files):
                half, whole = Path(name) / f"{key} float16.onnx", Path(name) / f"{key} int8.onnx"
                onnx.save(convert_float_to_float16(onnx.load(files[key]), keep_io_types=True), half)
                quantize_dynamic(files[key], whole)
                files |= {f"{key} float16": half, f"{key} int8": whole}
                facts |= {f"{key} float16": facts[key], f"{key} int8": facts[key]}
            for key, path in files.items():
                rows.append(
                    {"model": which, "file": key, "mb": path.stat().st_size / 1e6, "share": facts[key]["share"]}
                )
            for batch in ROUNDS:
                load = os.getloadavg()[0]
                taken = times(files, batch)
                for row in rows[start:]:
                    base = taken[f"dense {row['file'].partition(' ')[2]}".strip()]
                    for what, spent in taken[row["file"]].items():
                        row[f"{what}_ms_{batch}"] = spent
                        row[f"{what}_ratio_{batch}"] = base[what] / spent * row["share"]
                    row[f"load_{batch}"] = [load, os.getloadavg()[0]]
                write(output, rows)
            if images is None:
                continue
            few = images[:: len(images) // COMPARED][:COMPARED]
            with torch.inference_mode():
                every = {key: torch.cat([model(one) for one in few.split(25)]) for key, model in models.items()}
            for row in rows[start:]:
                theirs, own = every[row["file"].split()[0]], logits(files[row["file"]], few)
                row |= {"compared": len(few), "equal": int((own.argmax(1) == theirs.argmax(1)).sum())}
                row["difference"] = (own - theirs).abs().max().item()
                write(output, rows)
                if vit is tiny:
                    right = logits(files[row["file"]], images).argmax(1) == labels
                    row |= {"top1": right.double().mean().item(), "images": len(images)}
                    write(output, rows)


def write(output: Path, rows: list[dict[str, Any]]) -> None:
    """What is known by now."""
    conditions = {
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "rounds": ROUNDS,
        "target": TARGET,
    }
    output.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]) if sys.argv[4:] else 1000)
