"""timm's own scripts on adaptive models: train, validate, benchmark, inference and onnx_export, from a clone of timm.

    pip install onnx onnxruntime pandas
    git clone --branch v1.0.28 https://github.com/huggingface/pytorch-image-models timm_clone
    python benchmarks/timm_scripts.py timm_clone [NAME ...]

On a few made-up pictures, on the CPU; each script as it is, once adaptvit is imported, so that timm knows the names.
Prints a line for each name and script: how it ended, and the last figures that it told. What onnx_export writes runs in
onnxruntime, on other images than it was traced with, beside the model.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch
from PIL import Image

import adaptvit

NAMES = [name for name in timm.list_models("*_tiny_patch16_224") if not name.startswith(("deit", "vit"))]
START = "import adaptvit, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
SIDE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("names", nargs="*", default=NAMES)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pictures = make_pictures(Path(folder) / "pictures")
        for name in arguments.names:
            for script, words in scripts(name, pictures, Path(folder) / name).items():
                command = [sys.executable, "-c", START, str(arguments.clone / f"{script}.py"), *words]
                done = subprocess.run(command, capture_output=True, text=True, timeout=600)
                lines = [line for line in (done.stdout + done.stderr).split("\n") if line.strip()]
                said = figures(lines) if done.returncode == 0 else lines[-1]
                if script == "onnx_export" and done.returncode == 0:
                    said = difference(name, Path(folder) / name)
                print(f"{name:32} {script:12} {done.returncode}  {said}", flush=True)


def make_pictures(folder: Path) -> Path:
    """Two splits of two classes, whose pictures are noise of another mean."""
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        for label in range(2):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(8):
                noise = generator.integers(0, 128, (SIDE, SIDE, 3)) + 127 * label
                Image.fromarray(noise.astype(np.uint8)).save(place / f"{label}{number}.png")
    return folder


def scripts(name: str, pictures: Path, output: Path) -> dict[str, list[str]]:
    """Each script's arguments, in the order in which they need one another."""
    output.mkdir()
    torch.manual_seed(0)
    torch.save(timm.create_model(name, num_classes=2).state_dict(), output / "weights.pt")
    common = f"--model {name} --device cpu -b 4 --num-classes 2".split()
    small = ["--model-kwargs", f"img_size={SIDE}"]
    read = f"--input-size 3 {SIDE} {SIDE} -j 1".split()
    trained = ["--checkpoint", str(output / "trained" / "last.pth.tar")]
    train = f"--data-dir {pictures} --epochs 2 --warmup-epochs 0 --opt adamw --lr 1e-4".split()
    bfloat16 = ["--amp", "--amp-dtype", "bfloat16"]
    kept = ["--output", str(output), "--experiment", "trained"]
    told = ["--results-dir", str(output), "--results-file", "told.csv", "--topk", "1"]
    exported = [str(output / "model.onnx"), "--checkpoint", str(output / "weights.pt")]
    return {
        "train": [*common, *small, *read, *train, *bfloat16, *kept],
        "validate": [*common, *small, *read, *trained, "--data-dir", str(pictures), "--split", "validation"],
        "benchmark": [*common, "--num-warm-iter", "1", "--num-bench-iter", "10"],
        "inference": [*common, *small, *read, *trained, *told, "--data-dir", str(pictures / "validation")],
        "onnx_export": [*exported, *f"--model {name} --num-classes 2 -b 2".split()],
    }


def figures(lines: list[str]) -> str:
    """The last thing told that has a number, in few words."""
    told = [line for line in lines if re.search(r"\d\.\d|infer|Acc", line) and "Warning" not in line]
    return (told or lines or [""])[-1].strip()[:150]


def difference(name: str, output: Path) -> str:
    """How far the exported model's logits are from the model's own, on images that it was not traced with."""
    try:
        session = onnxruntime.InferenceSession(str(output / "model.onnx"))
    except Exception as error:  # it has a dozen kinds of its own
        return f"onnxruntime: {error}"
    images = torch.randn(3, 3, 224, 224) * torch.tensor([0.3, 1.0, 3.0]).view(3, 1, 1, 1)
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=2).eval()
    model.load_state_dict(torch.load(output / "weights.pt"))
    with torch.inference_mode():
        apart = np.abs(found - model(images).numpy()).max()
    return f"in onnxruntime {apart:.1e} from the model (adaptvit {adaptvit.__version__})"


if __name__ == "__main__":
    main()
