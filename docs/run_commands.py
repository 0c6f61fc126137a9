"""Run the commands of the pages, scaled down, each page's in its own folder:

python docs/run_commands.py [--record FILE] [WORD ...]

With words only those commands that have all of them; with a record not those that it says are done, so that a run goes
on where one was stopped. Names of models become a small ViT's file, folders small ones, and trainings an epoch.
A line for each: `done`, `network` (it needs one), `not here` (torchrun, Ray, a served page, a placeholder), or `FAILED`
and why; at the end how many there are of each. The exit code is 1 where one failed.
"""

import io
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from argparse import ArgumentParser
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from adaptvit import AViTConfig, FullConfig, ToMeConfig, save
from adaptvit.cli import main as adaptvit
from adaptvit.video import inflate

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("hf-hub:", "hfds/", "s3://", "_imagenet")
"""What a command that needs a network, or data that are not ours to bring, has in it."""
COMMAND = r"(?:^ {4}|\| `(?=adaptvit [^`\s]+ ))((?:torchrun .*--no-python )?adaptvit [^`\n]+)"
"""In a block, or begins a cell of a table and has arguments."""
NOT_HERE = ("torchrun", "playground ", "adaptvit serve", "--engine ray", " ...", "ada_step")
"""What one has that runs on several processes, never ends, is no whole command, or takes an author's file."""
FILES = {
    "vit_small_patch16_224": "vit.safetensors",
    "vit_tiny_patch16_224": "vit.safetensors",
    "vit_tiny.safetensors": "vit.safetensors",
    "MODEL": "vit.safetensors",
    "OUT": "out.safetensors",
    "deit_small_patch16_224": "test_vit",
    "imagenet_samples/val": "images/val",
    "camvid480": "scenes",
    "asl24": "hockeyfights",
}
FILES |= dict.fromkeys(
    ("FOLDER", "IMAGES", "ROOT", "photos", "imagenette72", "imagenette160", "imagenet_samples"), "images"
)
SMALL = {
    "train": "--recipe.epochs 1 --recipe.warmup_epochs 0 --recipe.batch_size 32 --data.workers 0",
    "evaluate": "--rounds 1 --workers 0",
    "predict": "--workers 0",
    "compare methods": "--rounds 1 --latencies 2 --timed 2 --workers 0 --pictures 1 --limit 4 "
    "--methods [tome,ats] --budgets [0.8]",
    "compare": "--root images --epochs 2 --seeds 2 --processes 1",
    "adapt": "--images 4 --target 0.7",
    "bench": "--images 2 --batch-size 2 --rounds 1",
    "draw": "--limit 2",
}
"""What is added to each command."""
FROM_A_FILE = ["--model", "vit.safetensors", "--weights", "null", "--img_size", "null", "--model_args", "{}"]
OWN_DATA = ("imagenette", "camvid", "asl24", "hockey")
"""What the names of recipes begin with whose models are made small; the digits' are."""


def commands() -> list[tuple[str, str]]:
    """Page and command, of blocks and of tables, each command once."""
    found: dict[str, str] = {}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = re.sub(r"\\\n\s*", "", page.read_text())
        for command in re.findall(COMMAND, text, flags=re.M):
            found.setdefault(command.split(" #")[0].split(" > ")[0].strip(), str(page.relative_to(ROOT)))
    return [(page, command) for command, page in found.items()]


def prepare() -> None:
    """A small ViT of three classes and its adapted kin, pictures in three folders of each split, scenes and clips."""
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
    Path("dense").mkdir()
    dense, fast = FullConfig(), ToMeConfig()
    for name, config in (("vit", dense), ("fast", fast), ("runs/insects/model", dense), ("dense/model", dense)):
        save(config.build(vit), f"{name}.safetensors")
    save(AViTConfig().build(vit), "avit.safetensors")
    Path("mine.yaml").write_text("recipe:\n  label_smoothing: 0.05\n")
    prepare_scenes(random)
    prepare_clips(random)
    own = timm.create_model("test_vit2", num_classes=3, img_size=32)
    for name in ("FILE", "mine.pth"):
        torch.save(own.state_dict(), name)


def prepare_scenes(random: np.random.Generator) -> None:
    """Pictures and masks of CamVid's classes."""
    for split in ("train", "val"):
        for kind, shape, most in (("images", (32, 32, 3), 255), ("masks", (32, 32), 11)):
            Path("scenes", split, kind).mkdir(parents=True)
            for number in range(32):
                values = random.integers(0, most, shape, dtype=np.uint8)
                Image.fromarray(values).save(Path("scenes", split, kind, f"{number}.png"))


def prepare_clips(random: np.random.Generator) -> None:
    """A ViT for clips, as it is and adapted, strips of 16 frames in folders of two classes, and folders of frames."""
    vit = timm.create_model("test_vit", num_classes=2, img_size=32, patch_size=8, depth=4)
    clips = inflate(vit, frames=4, tubelet=1)
    Path("runs/hockey_dense").mkdir()
    for name in ("clips", "runs/hockey_dense/model"):
        save(FullConfig().build(clips), f"{name}.safetensors")
    save(ToMeConfig().build(clips), "fast_clips.safetensors")
    for split in ("train", "val"):
        for label in ("fight", "no_fight"):
            Path("hockeyfights", split, label).mkdir(parents=True)
            for number in range(16):
                strip = random.integers(0, 255, (16 * 32, 32, 3), dtype=np.uint8)
                Image.fromarray(strip).save(Path("hockeyfights", split, label, f"{number}.png"))
    for clip in ("first", "second"):
        Path("videos", clip).mkdir(parents=True)
        for number in range(8):
            Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
                Path("videos", clip, f"{number}.png")
            )


def scaled_down(command: str) -> list[str]:
    """Its words, for the files that `prepare` made."""
    words = [word for word in shlex.split(command.replace("METHOD", "merge"))[1:] if word != "[FILES...]"]
    name = " ".join(words[:2]) if words[:2] == ["compare", "methods"] else words[0]
    told = words[words.index("--model") + 1 :][:1] if "--model" in words and name != "train" else []
    of_a_file = [word for word in words if "FILE" in words and "vit_" in word]
    words = ["test_vit2" if word in (*told, *of_a_file) else FILES.get(word, word) for word in words]
    if name == "export" and "--target" in words:  # of a model that has a method
        words = ["fast.safetensors" if word == "vit.safetensors" else word for word in words]
    if name == "convert":
        words = ["3" if word == "1000" else word for word in words]
    if name == "adapt" and "--method" not in words and words[1] not in ("fast.safetensors", "avit.safetensors"):
        words += ["--method", "tome"]
    if name == "train" and words[1].startswith(OWN_DATA):
        words = [word for word in words if word not in ("--pretrained", "true")]
        if not words[1].endswith("_runlength"):  # which starts from a file of that recipe's
            words += FROM_A_FILE if "--frames" not in words else ["--model", "clips.safetensors"]
        words += ["--recipe.freeze", "[]", "--img_size", "64"] if words[1].startswith("camvid") else []
    if name in ("compare methods", "draw"):
        words = ["images/val" if word == "images" and "--summary" not in words else word for word in words]
    if name == "draw" and "--per-class" not in words and "--summary" not in words:
        words = ["images/val/ant" if word == "images/val" else word for word in words]
    left_out = {"compare methods": "--weights", "compare": "--seeds"}.get(name)  # a file's, or too many
    words = [word for word, before in zip(words, ["", *words], strict=False) if left_out not in (word, before)]
    added = SMALL.get(name, "").split()
    known = {word for word in words if word.startswith("--") and name != "train"}  # whose last word counts
    for option, value in zip(added[::2], added[1::2], strict=True):
        words += [] if option in known else [option, value]
    return words


def outcome(command: str) -> str:
    """What came of a command."""
    if any(word in command for word in ELSEWHERE):
        return "network"
    if any(word in f"{command} " for word in NOT_HERE):
        return "not here"
    told = io.StringIO()
    with redirect_stdout(told), redirect_stderr(told):
        try:
            code = adaptvit(scaled_down(command))
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Exception as error:  # a fault of the command, which is what is looked for
            return f"FAILED: {error!r}"
    if code in (130, 143):  # stopped, and not by a fault of the command
        raise KeyboardInterrupt
    return "done" if code == 0 else f"FAILED ({code}): {told.getvalue().strip().splitlines()[-1:]}"


def main() -> int:
    """Run them; the exit code."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path)
    parser.add_argument("words", nargs="*")
    arguments = parser.parse_args()
    record: Path | None = arguments.record and arguments.record.absolute()
    known = json.loads(record.read_text()) if record and record.exists() else {}
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        begun = Path(folder, "begun")
        begun.mkdir()
        os.chdir(begun)
        prepare()
        for page, command in commands():
            if not all(word in command for word in arguments.words):
                continue
            if known.get(command) == "done":
                found[command] = "done"
                continue
            if not (own := Path(folder, page.replace("/", "-"))).exists():
                shutil.copytree(begun, own)
                if page == "docs/video.md":
                    shutil.copy(own / "fast_clips.safetensors", own / "fast.safetensors")
            os.chdir(own)
            before = time.process_time()
            found[command] = known[command] = outcome(command)
            print(
                f"{page}: {command}\n    {found[command]}, {time.process_time() - before:.1f} CPU seconds", flush=True
            )
            if record:
                record.write_text(json.dumps(known, indent=1) + "\n")
        os.chdir(ROOT)
    count = Counter(what.partition(" (")[0].partition(":")[0] for what in found.values())
    print(", ".join(f"{number} {what}" for what, number in count.items()))
    return int(count["FAILED"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
