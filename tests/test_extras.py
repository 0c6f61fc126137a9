"""What works with the core alone, and what a missing library's part of the package says."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from adaptvit.extras import EXTRAS, PACKAGES

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

CORE = """
import json, sys, tempfile
for name in [*{extras!r}, "jax", "flax"]:
    sys.modules[name] = None  # as if it were not installed

import contextlib, importlib, io
import timm, torch
import adaptvit
from adaptvit.training.recipe import Recipe  # which a config may name, with nothing to train by

vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
images = torch.randn(4, 3, 32, 32)
model = adaptvit.adapt(vit, images, 0.8)
logits = model(images)
adaptvit.macs(model(images, detailed=True).usage, model.shape)
with tempfile.TemporaryDirectory() as folder:
    adaptvit.save(model, folder + "/model.safetensors")
    again = adaptvit.load(folder + "/model.safetensors").eval()
assert torch.equal(again(images), logits)

said = {{}}
def tell(what, call):
    try:
        call()
    except ImportError as error:
        said[what] = str(error)

def command(*words):
    from adaptvit.cli import main
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
    said["adaptvit " + " ".join(words)] = f"{{code}} {{errors.getvalue()}}"

for module in {modules!r}:
    tell(module, lambda: importlib.import_module("adaptvit." + module))
tell("open_digits", importlib.import_module("adaptvit.data").open_digits)
report = importlib.import_module("adaptvit.show.report")
tell("write_report", lambda: report.write_report(None, "report.html"))
tell("export", lambda: adaptvit.export(adaptvit.FullConfig().build(vit), "model.onnx"))
tell("photographs", importlib.import_module("adaptvit.data").photographs)
command("draw", "model", "folder")
del sys.modules["jsonargparse"]
for words in {commands!r}:
    command(*words.split())
print(json.dumps(said))
"""
SENTENCES = {
    "show.pictures": "drawing needs matplotlib: pip install 'adaptvit[pictures]'",
    "write_report": "a report needs jinja2: pip install 'adaptvit[pictures]'",
    "training.loop": "training needs accelerate: pip install 'adaptvit[train]'",
    "training.tally": "training needs accelerate: pip install 'adaptvit[train]'",
    "training.run": "training needs accelerate: pip install 'adaptvit[train]'",
    "commands.train": "a command needs jsonargparse: pip install 'adaptvit[cli]'",
    "data.storage": "reading from any filesystem needs pyarrow: pip install 'adaptvit[ray]'",
    "open_digits": "reading the digits needs scikit-learn: pip install 'adaptvit[data]'",
    "photographs": "reading the sample photographs needs scikit-learn: pip install 'adaptvit[data]'",
    "export": "exporting to ONNX needs onnx: pip install 'adaptvit[onnx]'",
    "adaptvit draw model folder": "2 adaptvit: the command line needs jsonargparse: pip install 'adaptvit[cli]'\n",
    "adaptvit train digits": "2 adaptvit: training needs accelerate: pip install 'adaptvit[train]'\n",
    "adaptvit predict a b": "2 adaptvit: predicting needs accelerate: pip install 'adaptvit[train]'\n",
    "adaptvit draw a b": "2 adaptvit: drawing needs matplotlib: pip install 'adaptvit[pictures]'\n",
    "adaptvit playground": "2 adaptvit: drawing needs matplotlib: pip install 'adaptvit[pictures]'\n",
    "adaptvit serve model": "2 adaptvit: serving needs uvicorn: pip install 'adaptvit[serve]'\n",
    "adaptvit demo": "2 adaptvit: drawing needs matplotlib: pip install 'adaptvit[pictures]'\n",
    "adaptvit --help": "0 ",
    "adaptvit evaluate --help": "0 ",
    "adaptvit adapt --help": "0 ",
    "adaptvit bench --help": "0 ",
    "adaptvit convert --help": "0 ",
    "adaptvit export --help": "0 ",
}
"""By what is called, what it says with the core alone; after the first command jsonargparse is there."""


def test_a_missing_library_is_named_by_what_needs_it() -> None:
    modules = [name for name in SENTENCES if "." in name]
    commands = [name.removeprefix("adaptvit ") for name in SENTENCES if name.startswith("adaptvit ")][1:]
    program = CORE.format(extras=[*EXTRAS], modules=modules, commands=commands)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert dict(json.loads(done.stdout.splitlines()[-1])) == SENTENCES


def test_the_core_is_what_the_package_installs() -> None:
    assert {line.split(">")[0] for line in PROJECT["dependencies"]} == {"torch", "timm", "safetensors", "numpy", "tqdm"}


@pytest.mark.parametrize("library", EXTRAS)
def test_an_extra_brings_the_library_that_it_is_named_for(library: str) -> None:
    packages = PROJECT["optional-dependencies"][EXTRAS[library]]
    assert any(line.startswith(PACKAGES.get(library, library)) for line in packages)


def test_all_is_every_extra_but_what_is_for_others() -> None:
    extras = PROJECT["optional-dependencies"]
    others = ("all", "ray", "transformers", "flax", "docs", "dev")
    assert extras["all"] == [f"adaptvit[{','.join(name for name in extras if name not in others)}]"]
