"""Run the commands of the pages, scaled down, each page's in its own folder: python docs/run_commands.py [WORD ...]

With words only those commands that have all of them. Names of models become a small ViT's file, folders small ones, and
trainings an epoch. A line for each: `done`, `network` (it needs one), `not here` (torchrun, Ray, a served page, a
placeholder), or `FAILED` and why. The exit code is 1 where one failed.
"""

import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from adaptvit import FullConfig, ToMeConfig, save
from adaptvit.cli import main as adaptvit

ROOT = Path(__file__).parents[1]
ELSEWHERE = (
    "hf-hub:",
    "hfds/",
    "s3://",
    "imagenet_samples",
    "_imagenet",
    "camvid_",
    "hockey_",
    "asl24_",
)
"""What a command that needs a network, or data that are not ours to bring, has in it."""
COMMAND = r"(?:^ {4}|\| `(?=adaptvit [^`\s]+ ))((?:torchrun .*--no-python )?adaptvit [^`\n]+)"
"""In a block, or begins a cell of a table and has arguments."""
NOT_HERE = (
    "torchrun",
    "playground",
    "adaptvit serve",
    "--engine ray",
    " ...",
    "--config",
    "--print_config",
    "avit.safetensors",
)
FILES = {
    "vit_small_patch16_224": "vit.safetensors",
    "vit_tiny_patch16_224": "vit.safetensors",
    "MODEL": "vit.safetensors",
}
FILES |= {"FOLDER": "images", "IMAGES": "images", "ROOT": "images", "photos": "images", "OUT": "out.safetensors"}
FILES |= {"deit_small_patch16_224": "test_vit", "imagenette72": "images", "imagenette160": "images"}
SMALL = {
    "train": ["--recipe.epochs", "1", "--recipe.warmup_epochs", "0", "--recipe.batch_size", "4", "--data.workers", "0"],
    "evaluate": ["--rounds", "1", "--workers", "0"],
    "predict": ["--workers", "0", "--top", "2"],
    "compare methods": ["--rounds", "1", "--latencies", "2", "--timed", "2", "--workers", "0", "--pictures", "1"],
    "compare": ["--root", "images", "--epochs", "2", "--seeds", "2", "--processes", "1"],
    "adapt": ["--images", "4", "--target", "0.7"],
    "bench": ["--images", "2", "--batch-size", "2", "--rounds", "1"],
    "draw": ["--limit", "2"],
}
"""What is added to each command."""
FROM_A_FILE = ["--model", "vit.safetensors", "--weights", "null", "--img_size", "null", "--model_args", "{}"]


def commands() -> list[tuple[str, str]]:
    """Page and command, of blocks and of tables, each command once."""
    found: dict[str, str] = {}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = re.sub(r"\\\n\s*", "", page.read_text())
        for command in re.findall(COMMAND, text, flags=re.M):
            found.setdefault(command.split(" #")[0].split(" > ")[0].strip(), str(page.relative_to(ROOT)))
    return [(page, command) for command, page in found.items()]


def prepare() -> None:
    """A small ViT of three classes and its adapted kin, and pictures in three folders of each split."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("ant", "bee", "wasp"):
            Path("images", split, label).mkdir(parents=True)
            for number in range(44 if split == "train" else 4):  # of which a comparison takes 128 at a time
                pixels = random.integers(0, 255, (48, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(Path("images", split, label, f"{number}.png"))
    Image.fromarray(pixels).save("images/one.png")
    Path("classes.txt").write_text("ant\nbee\nwasp\n")
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=3, img_size=32, patch_size=8, depth=4)
    Path("runs/insects").mkdir(parents=True)
    for name, config in (("vit", FullConfig()), ("fast", ToMeConfig()), ("runs/insects/model", FullConfig())):
        save(config.build(vit), f"{name}.safetensors")
    own = timm.create_model("test_vit2", num_classes=3, img_size=32)
    for name in ("FILE", "mine.pth"):
        torch.save(own.state_dict(), name)


def scaled_down(command: str) -> list[str]:
    """Its words, for the files that `prepare` made."""
    words = [word for word in shlex.split(command)[1:] if word != "[FILES...]"]
    told = words[words.index("--model") + 1 :][:1] if "--model" in words and words[0] != "train" else []
    of_a_file = [word for word in words if "FILE" in words and "vit_" in word]
    words = ["test_vit2" if word in (*told, *of_a_file) else FILES.get(word, word) for word in words]
    if words[0] == "export" and "--target" in words:  # of a model that has a method
        words = ["fast.safetensors" if word == "vit.safetensors" else word for word in words]
    if words[0] == "convert":
        words = ["3" if word == "1000" else word for word in words]
    name = " ".join(words[:2]) if words[:2] == ["compare", "methods"] else words[0]
    if name == "adapt" and "--method" not in words and "fast.safetensors" not in words[1:2]:
        words += ["--method", "tome"]
    if name == "train" and words[1].startswith("imagenette"):
        words = [word for word in words if word not in ("--pretrained", "true")] + FROM_A_FILE
    if name in ("compare methods", "draw"):
        words = ["images/val" if word == "images" and "--summary" not in words else word for word in words]
    if name == "draw" and "--per-class" not in words and "--summary" not in words:
        words = ["images/val/ant" if word == "images/val" else word for word in words]
    if name == "compare":  # what the pages ask for takes longest
        words = [word for word, before in zip(words, ["", *words], strict=False) if "--seeds" not in (word, before)]
    left_out = {"predict": "--top", "compare methods": "--weights"}.get(name)  # of three classes; of a file
    words = [word for word, before in zip(words, ["", *words], strict=False) if left_out not in (word, before)]
    known = {word for word in words if word.startswith("--") and name != "train"}  # whose last word counts
    for option, value in zip(SMALL.get(name, [])[::2], SMALL.get(name, [])[1::2], strict=True):
        words += [] if option in known else [option, value]
    return words


def outcome(command: str) -> str:
    """What came of a command."""
    if any(word in command for word in ELSEWHERE):
        return "network"
    if any(word in command for word in NOT_HERE):
        return "not here"
    told = io.StringIO()
    with redirect_stdout(told), redirect_stderr(told):
        try:
            code = adaptvit(scaled_down(command))
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Exception as error:  # a fault of the command, which is what is looked for
            return f"FAILED: {error!r}"
    return "done" if code == 0 else f"FAILED ({code}): {told.getvalue().strip().splitlines()[-1:]}"


def main(*words: str) -> int:
    """Run them; the exit code."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        begun = Path(folder, "begun")
        begun.mkdir()
        os.chdir(begun)
        prepare()
        for page, command in commands():
            if all(word in command for word in words):
                if not (own := Path(folder, page.replace("/", "-"))).exists():
                    shutil.copytree(begun, own)
                os.chdir(own)
                found = outcome(command)
                failed += found.startswith("FAILED")
                print(f"{page}: {command}\n    {found}", flush=True)
        os.chdir(ROOT)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
