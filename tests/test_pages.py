"""The pages of docs/: their Python runs as written, their commands are taken, and the site has all of them.

Help of the commands, which is written down too, is what they say.
"""

import json
import re
import shlex
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import yaml
from models import images, small_vit
from samples import picture
from torch import nn
from torch.nn.functional import cross_entropy

from adaptvit import FullConfig, ToMeConfig, adapt, cli, save
from adaptvit.commands import answers
from adaptvit.commands.list import lines
from adaptvit.methods import METHODS
from adaptvit.model import AdaptiveViT
from adaptvit.weights.names import all_names
from adaptvit_cli import ANSWERS, MODELS, models_like

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}
HERE = ("docs/dense.md", "docs/first_steps.md", "docs/scale.md", "docs/segmentation.md", "docs/your_own_method.md")
ELSEWHERE = {
    "README.md": "test_readme.py",
    "docs/export.md": "test_export.py",
    "docs/your_own_vit.md": "test_your_own_vit.py",
    "docs/methods/ats_flax.md": "flax/test_ats_vit.py",
    "docs/video.md": "test_video.py",
}
"""Pages whose Python another test runs."""
METHOD_PAGES = ("adavit", "ats", "avit", "dynamicvit", "evit", "tome")
WRITTEN = json.loads(ANSWERS.read_text())


def python_of(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", PAGES[page], flags=re.DOTALL))


def commands_of(page: str) -> list[str]:
    """Lines that call adaptvit, those that go on in the next one joined."""
    text = re.sub(r"\\\n\s*", "", PAGES[page])
    return re.findall(r"^ {4}(?:torchrun .*--no-python )?(adaptvit [^>\n]+)", text, flags=re.MULTILINE)


def test_the_python_of_every_page_is_run() -> None:
    assert {page for page in PAGES if python_of(page)} == {*HERE, *ELSEWHERE}


@pytest.fixture
def vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A small ViT of three classes, its file, and folders of images, where the pages have them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(METHODS, "_known", {**METHODS._known})
    for name in ("images/val/ant", "images/val/bee", "images/val/wasp", "photos"):
        Path(name).mkdir(parents=True)
        for seed in range(3):
            picture(seed).save(Path(name, f"{seed}.png"))
    vit = small_vit(num_classes=3, depth=6)
    save(FullConfig().build(vit), "vit.safetensors")
    return vit


def test_the_first_steps_run(vit: nn.Module) -> None:
    space: dict[str, Any] = {"vit": vit, "images": images(vit)}
    exec(python_of("docs/your_own_method.md").split("model = ")[0], space)
    exec(python_of("docs/first_steps.md"), space)
    assert Path("runs/methods/methods.csv").read_text().count("\n") >= 3
    assert {path.name for path in Path("pictures").glob("*.png.png")} == {"0.png.png", "1.png.png", "2.png.png"}


def test_the_page_of_a_method_of_ones_own_runs(vit: nn.Module) -> None:
    space: dict[str, Any] = {"vit": vit, "images": images(vit), "adaptvit": import_module("adaptvit")}
    exec(python_of("docs/your_own_method.md"), space)
    assert Path("norm.safetensors").exists()


def test_the_page_of_dense_features_runs() -> None:
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    space: dict[str, Any] = {}
    exec(python_of("docs/dense.md"), space)
    assert space["embeddings"].shape == (2, 192)


def test_the_page_of_segmentation_runs() -> None:
    torch.manual_seed(0)
    space: dict[str, Any] = {}
    exec(python_of("docs/segmentation.md"), space)
    assert space["logits"].shape == (4, 11, 64, 96)
    assert space["usage"].share.mean().item() == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("page", ["parts", *(f"methods/{name}" for name in METHOD_PAGES)])
def test_the_lines_that_a_page_begins_with_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = re.search(
        r"(?:^(?: {4}.*)?\n)*^    import timm, adaptvit\n(?:^(?: {4}.*)?\n)*", PAGES[f"docs/{page}.md"], re.M
    )
    assert lines is not None
    code = "\n".join(line[4:] for line in lines[0].splitlines() if not line.startswith("    adaptvit "))
    make = timm.create_model

    def small(name: str, pretrained: bool = False, **settings: Any) -> nn.Module:
        size = {} if name == "parts_vit" else {"img_size": 64, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
        return make(name, **size | settings)

    monkeypatch.setattr(timm, "create_model", small)
    torch.manual_seed(0)
    space = {"images": torch.randn(4, 3, 64, 64), "labels": torch.tensor([0, 1, 2, 3]), "cross_entropy": cross_entropy}
    exec(code, space)
    assert isinstance(space["model"], AdaptiveViT)


class Engine:
    """Of Spark or Dask what docs/scale.md calls: hands all there is to a function, at once."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def mapInPandas(self, label: Any, schema: str) -> Any:
        (self.found,) = label([self.given])
        return SimpleNamespace(write=SimpleNamespace(parquet=lambda folder: None))

    def map_partitions(self, label: Any) -> "Engine":
        self.found = label(self.given)
        return self

    def to_dataframe(self) -> Any:
        return SimpleNamespace(to_parquet=lambda folder: None)


def test_the_page_of_scale_runs(vit: nn.Module) -> None:
    pandas = pytest.importorskip("pandas")
    save(adapt(vit, images(vit), 0.7, ToMeConfig()), "fast.safetensors")
    names = ["photos/0.png", "photos/1.png"]
    spark = Engine(pandas.DataFrame({"path": names, "content": [Path(name).read_bytes() for name in names]}))
    dask = Engine(names)
    bag = SimpleNamespace(from_sequence=lambda names, partition_size: dask)
    space = {"pandas": pandas, "images": spark, "names": names, "dask": SimpleNamespace(bag=bag)}
    exec(python_of("docs/scale.md"), space)
    assert [*zip(spark.found["path"], spark.found["class"], strict=True)] == dask.found


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)])
def test_the_commands_of_a_page_are_taken(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("{}")
    for command in commands_of(page):
        words = shlex.split(command, comments=True)[1:]
        if (
            not words
            or "..." in command
            or words[0].isupper()
            or any(word in ("--help", "--version", "--print_config") for word in words)
        ):
            continue
        module: Any = import_module(f"adaptvit.commands.{cli.ALIASES.get(words[0], words[0])}")
        monkeypatch.setattr(module, "execute", lambda arguments: 0)
        assert cli.main(words) == 0, command


@pytest.mark.parametrize("words", WRITTEN)
def test_what_is_written_down_is_what_the_command_says(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", str(answers.COLUMNS))
    with suppress(SystemExit):  # by which the parser ends after help
        cli.main(words.split())
    told = capsys.readouterr().out.split()
    assert told == " ".join(WRITTEN[words]).split(), "python -m adaptvit.commands.answers writes it anew"


def test_help_of_every_command_and_every_list_is_written_down() -> None:
    assert set(WRITTEN) == set(answers.asked())


def test_names_of_models_are_written_down() -> None:
    written, found = json.loads(MODELS.read_text()), answers.models()
    anew = "python -m adaptvit.commands.answers writes them anew"
    assert written["timm"] == found["timm"], anew
    assert written["models"].items() <= found["models"].items(), anew  # to which other tests may have added
    assert {*all_names()} <= {*written["models"]}, anew
    assert models_like(["list", "models", "*_tiny_*patch16_224"]) == lines("models", "*_tiny_*patch16_224")
    assert not models_like(["list", "models", "no_such_*"])  # which the command says


def test_the_site_has_every_page() -> None:
    def pages_in(nav: Any) -> set[str]:
        if isinstance(nav, str):
            return {nav}
        return set().union(*(pages_in(one) for one in (nav.values() if isinstance(nav, dict) else nav)))

    settings = yaml.safe_load((ROOT / "docs" / "mkdocs.yml").read_text())
    assert "!/assets" in settings["exclude_docs"].split(), "without which the site has no styles"
    found = pages_in(settings["nav"])
    written = {str(page.relative_to(ROOT)) for page in (ROOT / "benchmarks").glob("*.md")}
    notebooks = {f"docs/notebooks/{path.stem}.md" for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    assert found == {*PAGES} | written | notebooks
