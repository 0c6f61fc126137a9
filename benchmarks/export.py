"""Exported files in ONNX Runtime: predictions, sizes, accuracy, and speed beside that of the dense model's file.

    python benchmarks/export.py FOLDER WEIGHTS IMAGES     # makes the files that FOLDER lacks, and what they predict
    python benchmarks/export.py FOLDER                    # times what is there, writes export.json, prints a table

WEIGHTS is a ViT-Tiny/16 file in timm's names, IMAGES a folder of class folders, of which 100 images are taken.
DeiT-S has random weights, which speed does not go by: its files are compared with it on noise. Dense is timm's own
model, exported as it is; float16 and int8 are what ONNX Runtime's own tools make of the float32 files. Methods that
keep what each image needs have files that take one image, and files of eight, `slab`. All files of a batch take turns
in one process, on two threads; times are medians.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
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
from adaptvit import (
    ATSConfig,
    AViTConfig,
    EViTConfig,
    FullConfig,
    GridConfig,
    MergeConfig,
    Slab,
    ToMeConfig,
    measure_plan,
    meet_target,
)
from adaptvit.data import DataConfig, open_split, spread_over
from adaptvit.export import Exported
from adaptvit.weights.opening import start_from

TARGET, COUNT, THREADS, SLAB = 0.6, 100, 2, 8
EVEN = {"full": FullConfig(), "tome": ToMeConfig(), "evit": EViTConfig(), "grid": GridConfig()}
RAGGED = {"merge": MergeConfig(), "ats": ATSConfig(), "avit": AViTConfig()}
TINY, SMALL = "vit_tiny_patch16_224", "deit_small_patch16_224"
ROUNDS = {1: 30, 8: 8}
OUT = Path(__file__)


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def logits(path: Path, images: torch.Tensor) -> torch.Tensor:
    """Of as many at once as the file takes; NaN where it overflows."""
    runs = session(path)
    batch = runs.get_inputs()[0].shape[0]
    images = images[: len(images) // batch * batch] if isinstance(batch, int) else images
    given = images.split(batch if isinstance(batch, int) else 25)
    return torch.cat([torch.from_numpy(runs.run(None, {"images": some.numpy()})[0]) for some in given])


def export(folder: Path, weights: Path, pictures: Path) -> None:
    """The files that are not there, and beside each what it predicts."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    vits: dict[str, Any] = {name: timm.create_model(name).eval() for name in (SMALL, TINY)}
    start_from(vits[TINY], weights)
    settings: dict[str, Any] = timm.data.resolve_model_data_config(vits[TINY])
    settings |= {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.9}
    images, labels, _ = spread_over(open_split(DataConfig(root=pictures), settings, "validation"), COUNT)
    for name, vit in vits.items():
        real = (images, labels) if name == TINY else None
        dense(folder / f"{name} dense.onnx", vit, real)
        for method, config in EVEN.items():
            if (path := folder / f"{name} {method}.onnx").exists():
                continue
            model = config.build(vit).eval()
            if method != "full":
                meet_target(model, torch.zeros(1, 3, 224, 224), TARGET)
            write(path, adaptvit.export(model, path, images=None if real is None else images), real)
        for path in sorted(folder.glob(f"{name} *.onnx")):
            if not path.stem.endswith(("int8", "float16")) and not path.stem.endswith("slab"):
                reduced(path, real)
    for method, config in RAGGED.items():
        one, slab = (folder / f"{TINY} {method}{end}.onnx" for end in ("", " slab"))
        if one.exists() and slab.exists():
            continue
        model: Any = config.fit(vits[TINY], images[::2], TARGET)
        write(one, adaptvit.export(model, one, batch=1, images=images), (images, labels))
        model.plan = measure_plan(model, images)
        some = images[: COUNT // SLAB * SLAB]
        write(slab, adaptvit.export(model, slab, batch=SLAB, layout=Slab, images=some), (some, labels[: len(some)]))


def dense(path: Path, vit: torch.nn.Module, real: Any) -> None:
    """timm's own model, exported as it is."""
    if path.exists():
        return
    named: Any = {"input_names": ["images"], "output_names": ["logits"]}
    dynamic = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    given = (torch.zeros(2, 3, 224, 224),)
    torch.onnx.export(vit, given, dynamo=True, verbose=False, dynamic_shapes=dynamic, **named).save(path)
    noise = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        images = noise if real is None else real[0]
        theirs = torch.cat([vit(some) for some in images.split(25)])
    ran = logits(path, images)
    found = {"images": len(images), "equal": int((ran.argmax(1) == theirs.argmax(1)).sum()), "share": 1.0}
    tell(path, found | {"difference": (ran - theirs).abs().max().item()} | accuracy(path, real))


def write(path: Path, found: Exported, real: Any) -> None:
    """What is known of an exported file."""
    told = {name: getattr(found, name) for name in ("images", "equal", "difference", "turned", "overflowed")}
    tell(path, told | {"share": found.facts["share"]} | accuracy(path, real))


def reduced(path: Path, real: Any) -> None:
    """The same file in float16 and int8, if they are not there, by the runtime's own tools."""
    for end in ("float16", "int8"):
        if (into := path.with_stem(f"{path.stem} {end}")).exists():
            continue
        if end == "int8":
            quantize_dynamic(path, into)
        else:
            onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), into)
        told = {"share": json.loads(path.with_suffix(".json").read_text())["share"]}
        if real is not None:
            ran, wanted = logits(into, real[0]), logits(path, real[0])
            told |= {"images": len(ran), "equal": int((ran.argmax(1) == wanted.argmax(1)).sum())}
            told |= {"difference": (ran - wanted).abs().max().item()} | accuracy(into, real)
        tell(into, told)


def accuracy(path: Path, real: Any) -> dict[str, float]:
    if real is None:
        return {}
    ran = logits(path, real[0])
    return {"top1": (ran.argmax(1) == real[1][: len(ran)]).double().mean().item()}


def tell(path: Path, found: dict[str, Any]) -> None:
    path.with_suffix(".json").write_text(json.dumps({"mb": path.stat().st_size / 1e6} | found))
    print(path.stem, found, flush=True)


def times(files: list[Path], batch: int) -> Iterator[tuple[Path, list[float]]]:
    """Milliseconds of a batch, files in turns."""
    images = np.random.default_rng(0).standard_normal((batch, 3, 224, 224), dtype="float32")
    runs = {path: session(path) for path in files}
    taken: dict[Path, list[float]] = {path: [] for path in files}
    for turn in range(ROUNDS[batch] + 1):
        for path, one in runs.items():
            start = time.perf_counter()
            one.run(None, {"images": images})
            if turn:
                taken[path].append((time.perf_counter() - start) * 1e3)
    yield from taken.items()


def measure(folder: Path) -> None:
    """Times of all files, and the tables; what is known of a model that has no files here stays."""
    known = json.loads(OUT.with_suffix(".json").read_text())
    for name in (SMALL, TINY):
        files = sorted(folder.glob(f"{name} *.onnx"), key=lambda path: path.stem)
        if not files:
            continue
        load = os.getloadavg()[0]
        found = {path: json.loads(path.with_suffix(".json").read_text()) for path in files}
        sizes = {path: session(path).get_inputs()[0].shape[0] for path in files}
        for batch in ROUNDS:
            taken = dict(times([path for path, size in sizes.items() if isinstance(size, str) or size == batch], batch))
            for path, spent in taken.items():
                end = next((end for end in (" float16", " int8") if path.stem.endswith(end)), "")
                base = taken[folder / f"{name} dense{end}.onnx"]
                gains = [slow / fast for slow, fast in zip(base, spent, strict=True)]
                found[path] |= {f"ms_{batch}": statistics.median(spent)}
                found[path] |= {f"ratio_{batch}": statistics.median(gains) * found[path]["share"]}
        rows = [{"file": path.stem.removeprefix(f"{name} ")} | told for path, told in found.items()]
        conditions = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__, "threads": THREADS}
        known[name] = {"conditions": conditions | {"load": load, "rounds": ROUNDS, "target": TARGET}, "rows": rows}
        OUT.with_suffix(".json").write_text(json.dumps(known, indent=2) + "\n")
        print(name, *table(rows), sep="\n", flush=True)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    names = ("file", "MB", "share", "predictions", "logits", "top-1", "ms, 1", "ms, 8", "ratio, 1", "ratio, 8")
    yield f"| {' | '.join(names)} |"
    yield "| --- |" + " ---: |" * (len(names) - 1)
    forms = {"mb": ".1f", "share": ".3f", "kept": "", "difference": ".1e", "top1": ".2f"}
    forms |= {"ms_1": ".1f", "ms_8": ".0f", "ratio_1": ".2f", "ratio_8": ".2f"}
    for row in rows:
        told = row | ({"kept": f"{row['equal']} of {row['images']}"} if "equal" in row else {})
        cells = [format(told[name], form) if name in told else "" for name, form in forms.items()]
        yield f"| {' | '.join([row['file'], *cells])} |"


if __name__ == "__main__":
    given = [Path(one) for one in sys.argv[1:]]
    export(*given) if given[1:] else measure(*given)
