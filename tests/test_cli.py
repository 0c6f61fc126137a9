import csv
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from models import METHODS, small_vit
from PIL import Image

import adaptvit_cli
from adaptvit import cli, load, save
from adaptvit.commands import bench, demo, evaluate, train
from adaptvit.commands.parsing import made_plain, parser_of, written_out
from adaptvit.extras import EXTRAS
from adaptvit.methods import METHODS as KINDS
from adaptvit.training.recipes import RECIPES
from adaptvit.training.run import Run
from adaptvit.weights.names import all_names
from adaptvit_cli import COMMANDS

ROOT = Path(__file__).parents[1]
WRITTEN = json.loads(adaptvit_cli.ANSWERS.read_text())


def said(capsys: pytest.CaptureFixture) -> str:
    return capsys.readouterr().err


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["fly"]) == 2
    assert "fly" in said(capsys)


def test_demo_takes_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folders = []

    def run(folder: Path) -> SimpleNamespace:
        folders.append(folder)
        return SimpleNamespace(figures={"ideal_speedup": 2.0})

    monkeypatch.setattr(demo, "run_demo", run)
    assert cli.main(["demo", "--output", str(tmp_path), "--json", str(tmp_path / "told.json")]) == 0
    assert folders == [tmp_path]
    assert json.loads((tmp_path / "told.json").read_text()) == {"ideal_speedup": 2.0}


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt("stopped; go on"), 130), (FloatingPointError("the loss is nan"), 2), (OSError("disk full"), 2)],
    ids=["interrupt", "nan", "disk"],
)
def test_what_stops_a_command_is_said_without_a_traceback(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stop(folder: Path) -> None:
        raise error

    monkeypatch.setattr(demo, "run_demo", stop)
    assert cli.main(["demo"]) == code
    assert said(capsys) == f"adaptvit: {error}\n"


def test_convert_says_which_gate_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, target = tmp_path / "tiny-10-30.pth", tmp_path / "avit.safetensors"
    vit = timm.create_model("deit_tiny_patch16_224", num_classes=10)
    torch.save({"model": vit.state_dict()}, source)
    arguments = ["convert", str(source), str(target), "avit_tiny_patch16_224", "--num-classes", "10"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{target}: avit_tiny_patch16_224, gate_scale 10.0, gate_center 30.0\n"
    assert cli.main([*arguments[:-1], "12"]) == 2
    assert "10 classes, not 12" in said(capsys)


@pytest.fixture(scope="module")
def deit_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.device("meta"):
        vit = timm.create_model("deit_small_patch16_224")
    path = tmp_path_factory.mktemp("weights") / "deit.pth"
    torch.save({key: torch.zeros(value.shape) for key, value in vit.state_dict().items()}, path)
    return path


@pytest.mark.parametrize(("given", "kept"), [("0.6", 0.6), ("[1, 0.7, 0.5]", (1.0, 0.7, 0.5))])
def test_convert_takes_a_keep_rate_or_one_for_each_block(
    given: str, kept: object, deit_small: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.safetensors"
    assert cli.main(["convert", str(deit_small), str(target), "evit_small_patch16_224", "--keep-rate", given]) == 0
    assert load(target).config.keep_rate == kept


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["0.9,0.7,0.5"], "keep_rate must be a number or several as [1, 2] or null, got 0.9,0.7,0.5"),
        (["[0.9, true, 0.5]"], "keep_rate must be a number or several as [1, 2] or null, got [0.9, True, 0.5]"),
        (["0.9", "0.7"], "unrecognized arguments: 0.7"),
        (["[0.9, 0.7]"], "EViTConfig.keep_rate has 2 numbers for 3 blocks: (3, 6, 9)"),
        (["[0.9, 2, 0.5]"], "keep_rate must lie in (0, 1], got [0.9, 2.0, 0.5]"),
        (["[]"], "keep_rate must be a number or several in (0, 1], or None, got []"),
    ],
    ids=str,
)
def test_convert_refuses_other_keep_rates_in_one_sentence(
    given: list[str], message: str, deit_small: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = tmp_path / "out.safetensors"
    assert cli.main(["convert", str(deit_small), str(target), "evit_small_patch16_224", "--keep_rate", *given]) == 2
    (line,) = said(capsys).splitlines()
    assert line.startswith("adaptvit: ")
    assert line.endswith(message)
    assert not target.exists()


def test_convert_says_no_gate_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    plain = timm.create_model("t2t_vit_7", num_classes=10).state_dict()
    adaptive = timm.create_model("ada_step_deit_tiny_patch16_224", num_classes=10).state_dict()
    policies = {
        "patch_policy": "attn.token_select.mlp_head",
        "head_policy": "head_select.mlp_head",
        "sublayer_policy": "layer_select.mlp_head",
    }
    published = {}
    for key, value in adaptive.items():
        kind, block, *rest = key.split(".")
        if kind in policies:
            published[f"blocks.{block}.{policies[kind]}.{rest[0]}"] = value
        elif ".qkv." in key:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                published[key.removeprefix("vit.").replace("qkv", part)] = third.clone()
        else:
            published[key.removeprefix("vit.")] = value
    for name, tensors in (("t2t_vit_7", plain), ("ada_step_deit_tiny_patch16_224", published)):
        torch.save({"state_dict": tensors}, source)
        assert cli.main(["convert", str(source), str(target), name, "--num-classes", "10"]) == 0
        assert capsys.readouterr().out == f"{target}: {name}\n"
    given = ["--num-classes", "10", "--gate-scale", "1"]
    assert cli.main(["convert", str(source), str(target), "ada_step_deit_tiny_patch16_224", *given]) == 2
    assert "has no gate_scale: leave out" in said(capsys)


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def run(folder: Path) -> SimpleNamespace:
        warnings.warn("the gate halts everything", stacklevel=2)
        return SimpleNamespace(figures={})

    monkeypatch.setattr(demo, "run_demo", run)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["demo"]) == 0
    assert said(capsys) == "adaptvit: warning: the gate halts everything\n"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Run, bool]]:
    """What `adaptvit train` was about to run; nothing is trained."""
    asked: list[tuple[Run, bool]] = []

    def stop(config: Run, resume: bool, tell: object) -> None:
        asked.append((config, resume))
        raise KeyboardInterrupt("not trained here")

    monkeypatch.setattr(train, "train_run", stop)
    return asked


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_through_the_command_line_as_it_is(name: str, runs: list[tuple[Run, bool]]) -> None:
    assert cli.main(["train", name]) == 130
    assert runs == [(RECIPES[name](), False)]


def test_options_and_yaml_change_a_recipe(tmp_path: Path, runs: list[tuple[Run, bool]]) -> None:
    changes = tmp_path / "changes.yaml"
    changes.write_text("drop_path: 0.2\nrecipe:\n  epochs: 5\n  learning_rate: 1e-4\ndata:\n  workers: 0\n")
    arguments = ["train", "digits", "--config", str(changes), "--recipe.epochs", "4", "--data.re-prob=0.1", "--resume"]
    assert cli.main([*arguments, "--recipe.freeze", "[patch_embed.*]", "--data.root", str(tmp_path)]) == 130
    ((asked, resume),) = runs
    digits = RECIPES["digits"]()
    assert (resume, asked.drop_path, asked.data.workers, asked.data.re_prob) == (True, 0.2, 0, 0.1)
    assert (asked.recipe.epochs, asked.recipe.learning_rate) == (4, 1e-4)
    assert (asked.recipe.freeze, asked.data.root) == (("patch_embed.*",), tmp_path)
    assert (asked.recipe.batch_size, asked.method) == (digits.recipe.batch_size, digits.method)


def test_a_printed_config_is_one_to_start_from(
    tmp_path: Path, runs: list[tuple[Run, bool]], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "imagenette_avit", "--recipe.epochs", "7", "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["recipe"]["epochs"] == 7
    saved = tmp_path / "saved.yaml"
    saved.write_text(printed)
    cli.main(["train", "imagenette_avit", "--recipe.epochs", "7"])
    cli.main(["train", "imagenette_avit", "--config", str(saved)])
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], f"recipe must be one of {', '.join(RECIPES)}, got 'fly'"),
        (["--recipe.epochs", "3", "imagenette_avit"], "comes before all options: adaptvit train imagenette_avit"),
        (["digits", "--recipe.epoch", "3"], "epoch"),
        (["digits", "--recipe.epochs", "0"], "Recipe.epochs must be 1 or more, got 0"),
        (["digits", "--recipe.epochs", "many"], "adaptvit: recipe.epochs must be a whole number, got many"),
        (["digits", "--method.epsilon", ".nan"], "AViTConfig.epsilon must lie in (0, 1), got nan"),
        (["digits", "--model", "vit_of_nobody"], "Run.model must be the name of a timm ViT, got 'vit_of_nobody'"),
        (["imagenette_dense", "--fit", "true"], "Run.fit needs a budget to fit to"),
        (["digits", "--method-name", "skip"], "method_name must be one of calibrated, merge, tome"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_word_is_refused_in_one_sentence(
    arguments: list[str], message: str, runs: list[tuple[Run, bool]], capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["train", *arguments]) == 2
    (line,) = said(capsys).splitlines()
    assert line.startswith("adaptvit: ")
    assert message in line
    assert not runs


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device"])
@pytest.mark.parametrize(
    "words",
    [
        "train digits --config {}",
        "train digits --config={}",
        "train digits --config group.yaml",
        "train digits --data {}",
        "train digits --method={}",
        "train digits --weights {}",
        "train digits --teacher {}",
        "train digits --data.root {}",
        "train digits --data.root . --data.class_map {}",
        "evaluate {} .",
        "evaluate model .  --class_map {}",
        "evaluate model {}",
        "predict model . --class-names {}",
        "draw model {}",
        "adapt model {} new.safetensors",
        "compare methods model . --class_map={}",
        "compare methods model . {}",
        "bench deit_tiny_patch16_224 --settings {}",
        "convert {} new.safetensors deit_tiny_patch16_224",
        "playground model --class_names {}",
    ],
)
def test_what_may_never_end_is_no_file(
    words: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket may have a hundred characters only
    name = "/dev/zero" if kind == "a device" else "endless"
    if kind == "a named pipe":
        os.mkfifo(name)
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "a socket":
            listener.bind(name)
        Path("group.yaml").write_text(f"data: {name}\n")
        assert cli.main(words.format(name).split()) == 2
    (line,) = said(capsys).splitlines()
    assert line.endswith(f"'{name}' is {kind}, not a file")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes, two images each, in two splits."""
    for split in ("train", "val"):
        for number, name in enumerate(("ant", "bee")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(2):
                noise = np.random.default_rng(2 * number + i).integers(0, 256, (32, 32), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path / "images" / split / name / f"{i}.png")
    return tmp_path / "images"


VIT = ["--img_size", "32", "--model_args", "{patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}"]
RECTANGULAR = ["--img-size", "[64,32]", *VIT[2:]]
TINY = ["train", "digits", *VIT, "--data.workers", "0", "--recipe.batch_size", "2", "--recipe.epochs", "1"]


@pytest.mark.parametrize("fault", ["folder", "one class", "split", "teacher", "weights"])
def test_what_cannot_be_trained_on_leaves_no_files(
    fault: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output, more, message = tmp_path / "run", [], ""
    if fault == "folder":
        more, message = ["--data.root", str(tmp_path / "absent")], "absent' does not exist"
    if fault == "one class":
        for split in ("train", "val"):
            for path in (images / split / "bee").iterdir():
                path.unlink()
        message = "has no images of 'bee' to train on"
    if fault == "split":
        (images / "val").rename(tmp_path / "elsewhere")
        message = "has no folder 'validation'"
    if fault == "teacher":
        save(METHODS["full"].build(small_vit()), tmp_path / "teacher.safetensors")
        more, message = ["--teacher", str(tmp_path / "teacher.safetensors")], "has 7 classes, but images"
    if fault == "weights":
        more, message = ["--weights", str(tmp_path / "absent.safetensors")], "absent.safetensors does not exist"
    warm = ["--recipe.warmup_epochs", "0", "--recipe.target", "null", "--output", str(output)]
    assert cli.main([*TINY, *warm, "--data.root", str(images), *more]) == 2
    (line,) = said(capsys).splitlines()
    assert message in line
    assert not output.exists()


def test_a_trained_model_is_said_where_it_is_and_names_its_classes(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "run"
    more = ["--recipe.warmup_epochs", "0", "--recipe.optimizer", "adamw", "--recipe.target", "null"]
    assert cli.main([*TINY, *more, "--data.root", str(images), "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1].startswith(f"{output / 'model.safetensors'}: ")
    assert {path.name.split("-")[0] for path in output.iterdir()} >= {"model.safetensors", "result.json", "checkpoint"}
    evaluated = ["evaluate", str(output / "model.safetensors"), str(images), "--workers", "0", "--rounds", "0"]
    assert cli.main(evaluated) == 0
    assert f"top1  {float(shown.split('top1')[1].split()[0]):.4f}" in capsys.readouterr().out
    lines = tmp_path / "lines.csv"
    words = ["predict", evaluated[1], str(images), "--top", "1", "--workers", "0", "--output", str(lines)]
    assert cli.main(words) == 0
    with lines.open(newline="") as file:
        assert {row["class_1"] for row in csv.DictReader(file)} <= {"ant", "bee"}


def test_adapt_refuses_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tmp_path / "vit.safetensors"
    save(METHODS["full"].build(small_vit()), model)
    output = tmp_path / "avit.safetensors"
    assert cli.main(["adapt", str(model), str(tmp_path / "absent"), str(output)]) == 2
    assert "absent' does not exist" in said(capsys)
    assert not output.exists()


def test_a_mixture_of_priors_is_written_in_brackets() -> None:
    words = ["--method.prior", "[gaussian,cauchy]", "--method.prior_depth", "[2,10]", "--method.prior_weights", "[7,3]"]
    method = train.options(["train", "digits"]).parse_args(words).method
    assert (method.prior, method.prior_depth, method.prior_weights) == (("gaussian", "cauchy"), (2, 10), (7, 3))
    assert train.options(["train", "digits"]).parse_args(["--method.prior", "cauchy"]).method.prior == "cauchy"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_sigterm_says_what_sigint_says(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    of_the_shell = signal.signal(signal.SIGINT, signal.default_int_handler)  # which ignores it in the background

    def long(folder: Path) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on") from None

    monkeypatch.setattr(demo, "run_demo", long)
    try:
        assert cli.main(["demo"]) == code
    finally:
        signal.signal(signal.SIGINT, of_the_shell)
    assert said(capsys) == "adaptvit: stopped; the same command goes on\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_interruption_without_words_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def stop(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", stop)
    assert cli.main(["demo"]) == 130
    assert said(capsys) == "adaptvit: interrupted\n"


@pytest.mark.parametrize("fault", [AssertionError, KeyError, AttributeError, IndexError, RuntimeError], ids=str)
def test_a_fault_of_ours_is_not_said_to_be_the_users(fault: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(folder: Path) -> None:
        raise fault("ours")

    monkeypatch.setattr(demo, "run_demo", wrong)
    with pytest.raises(fault, match="ours") as told:
        cli.main(["demo"])
    assert told.value.__notes__ == ["This is a fault of adaptvit, not yours: please report it with the lines above."]


def test_a_type_error_that_python_finds_in_our_lines_is_said_to_be_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(demo, "execute", None)  # which cannot be called
    assert cli.main(["demo"]) == 2
    assert said(capsys).startswith(
        "adaptvit: TypeError, which looks like a fault of adaptvit itself; ADAPTVIT_TRACEBACK=1"
    )


def test_a_variable_shows_where_an_error_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["adapt", "a\x1b[31m", "folder", "no/where/out.safetensors"]
    assert cli.main(words) == 2
    (sentence,) = said(capsys).splitlines()
    monkeypatch.setenv("ADAPTVIT_TRACEBACK", "1")
    assert cli.main(words) == 2
    lines = said(capsys).splitlines()
    assert lines[0].startswith("Traceback")
    assert "in check_output" in "".join(lines)
    assert lines[-1] == sentence


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "no.pth", "no\x1b[31m\u202ewhere"],
        ["fly\x1b[31m"],
        ["bench", "vit\x1b[31m"],
        ["train", "digits", "--recipe.epochs", "\x1b[31m"],
        ["convert", "a\x1b[31m.pth", "b", "deit_tiny_patch16_224"],
        ["compare", "\x1b[31m"],
        ["predict", "m", "f\x1b[31m", "--output", "\x1b.txt"],
    ],
    ids=lambda words: words[0].strip("\x1b[31m"),
)
def test_escapes_in_a_name_are_shown(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(words) == 2
    told = capsys.readouterr()
    assert r"\x1b" in told.err
    assert "\x1b" not in told.err + told.out
    assert "\u202e" not in told.err + told.out


TINY_BENCH = ["test_vit", "--method=full", "--img-size=32", "--images=2", "--batch-size=2", "--rounds=1", "--threads=1"]


def test_a_reader_that_goes_away_leaves_the_command_quiet(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, tmp_path: Path
) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    target = tmp_path / "figures.json"
    words = ["bench", *TINY_BENCH]
    with os.fdopen(writes, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert cli.main([*words, "--json", str(target)]) == 0
    assert json.loads(target.read_text())["rounds"] == 1
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", "--help"])
        assert stop.value.code == 0
    assert capfd.readouterr().err == ""


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_figures_are_told_where_the_disk_is_full(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = tmp_path / "vit.safetensors"
    save(METHODS["full"].build(small_vit(num_classes=2)), model)
    target = tmp_path / "figures"

    def full(self: Path, *_: object, **__: object) -> None:
        raise FULL

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    evaluate = [str(model), str(images), "--rounds", "0", "--workers", "0"]
    commands = {
        "ratio": ["bench", *TINY_BENCH, "--json", str(target)],
        "top1": ["evaluate", *evaluate, "--json", str(target)],
        "gmacs": ["evaluate", *evaluate, "--csv", str(target)],
        "of the MACs": ["adapt", str(model), str(images), str(target), "--target", "0.9", "--method", "ats"],
    }
    for figure, words in commands.items():
        assert cli.main(words) == 2
        told = capsys.readouterr()
        assert figure in told.out
        last = told.err.splitlines()[-1]
        assert last.startswith("adaptvit: ")
        assert "No space left on device" in last
        assert str(target) in last
    assert "rate" in last  # of the budget, whose knob was found
    assert not target.exists()


def test_an_image_size_is_told_as_height_and_width(images: Path, tmp_path: Path) -> None:
    words = [
        "train",
        "digits",
        *RECTANGULAR,
        *TINY[2 + len(VIT) :],
        "--recipe.warmup_epochs",
        "0",
        "--recipe.target",
        "null",
    ]
    words += ["--data.root", str(images), "--output", str(tmp_path / "out")]
    assert cli.main(words) == 0
    assert load(tmp_path / "out" / "model.safetensors").vit.patch_embed.img_size == (64, 32)
    words = ["bench", "test_vit", "--img_size=[64,32]", "--images=2", "--batch_size=2", "--rounds=1", "--threads=1"]
    assert cli.main([*words, "--method=tome", "--json", str(tmp_path / "bench.json")]) == 0
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert figures["tokens_per_block"]["max"][0] == 1 + 4 * 2


@pytest.mark.parametrize("size", ["[64]", "[64,32,3]", "[64,0]", "tall"])
def test_what_is_no_image_size_is_refused(size: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", "digits", "--img_size", size]) == 2
    (line,) = said(capsys).splitlines()
    assert "img_size" in line


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]], ids=str)
def test_no_words_are_told_what_there_is(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(words) == adaptvit_cli.main(words) == 0
    told, again = capsys.readouterr().out.split("usage: ")[1:]
    assert told == again
    assert {line.split()[0] for line in told.splitlines() if line.startswith("  ")} == set(COMMANDS)


def test_every_command_has_a_file() -> None:
    folder = Path(cli.__file__).parent / "commands"
    assert all((folder / f"{name}.py").exists() for name in {*COMMANDS, *adaptvit_cli.ALIASES.values()})


def test_help_imports_nothing_of_weight() -> None:
    words = [[], ["--help"], ["--version"], ["evaluate", "-h"], *(asked.split() for asked in WRITTEN), ["fly"]]
    words.insert(0, ["list", "models", "vit_*"])
    program = (
        "import sys, adaptvit_cli\n"
        f"codes = [adaptvit_cli.main(words) for words in {words}]\n"
        "print(codes, *sorted({name.split('.')[0] for name in sys.modules}), sep='\\n', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    refusal, codes, *modules = done.stderr.splitlines()
    assert refusal.startswith("adaptvit: no command 'fly'")
    assert json.loads(codes) == [0] * (len(words) - 1) + [2]
    assert done.stdout.count("usage: adaptvit evaluate MODEL ROOT") == 2
    assert "adaptvit_cli" in modules
    assert not {"adaptvit", "torch", "timm", "torchvision", "numpy", "jsonargparse", "yaml"} & {*modules}


def test_the_program_is_what_answers_first() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"] == {
        "adaptvit": "adaptvit_cli:main"
    }


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("trian", "train"),
        ("evaluate model images --batch-sise 3", "--batch-size"),
        ("train digits --recipe.epoch 3", "--recipe.epochs"),
        ("train digts", "digits"),
        ("train digits --method-name tomee", "tome"),
        ("compare prior", "priors"),
        ("adapt model images out --method mergee", "merge"),
        ("compare methods model images --methods [tome,evitt]", "evit"),
        ("bench deit_tny_patch16_224", "deit_tiny_patch16_224"),
        ("list modles", "models"),
        ("train digits --model vit_tny_patch16_224", "vit_tiny_patch16_224"),
    ],
)
def test_a_wrong_name_is_told_the_nearest(words: str, name: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(words.split()) == 2
    (line,) = said(capsys).splitlines()
    assert line.endswith(f"did you mean {name!r}?")


PYTHON = re.compile(r"<class|<function|\b0x\w|\(required|type:|Optional\[|Annotated|\bNone\b|--[\w.-]*_|locals")


@pytest.mark.parametrize("command", [*COMMANDS, "compare methods"])
def test_help_has_no_python_in_it_and_a_sentence_of_every_option(command: str) -> None:
    parser = parser_of(command.split())
    made_plain(parser, command.split())
    told = parser.format_help().replace("--print_config", "")
    assert not PYTHON.findall(told)
    assert told.startswith(f"usage: adaptvit {command} ")
    assert "\n" in told
    for action in parser._actions:
        assert re.search(r"\w\w.*[.?)]$", action.help), action.dest


def test_an_option_is_one_thing_in_every_spelling() -> None:
    parser = evaluate.options([])
    for name in ("--class-names", "--class_names", "--class_map", "--class-map"):
        words = written_out([cli._underscored(word) for word in ("model", ".", name, "names.txt", "--json")], parser)
        arguments = parser.parse_args(words)
        assert (arguments.class_map, arguments.json) == (Path("names.txt"), "-")
    parser = bench.options([])
    for words, expected in (("--train vit", True), ("vit --train", True), ("--train=false vit", False)):
        arguments = parser.parse_args(written_out(words.split(), parser))
        assert (arguments.model, arguments.train) == ("vit", expected)


@pytest.mark.parametrize("option", [["--json", "-"], ["--json"]], ids=str)
def test_figures_alone_come_to_the_standard_output(option: list[str], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["bench", *TINY_BENCH, *option]) == 0
    assert json.loads(capsys.readouterr().out)["rounds"] == 1


def test_adapt_tells_figures_by_its_old_name_too(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, output = tmp_path / "vit.safetensors", tmp_path / "fast.safetensors"
    save(METHODS["full"].build(small_vit(num_classes=2)), model)
    words = [str(model), str(images), str(output), "--target", "0.9", "--method", "ats"]
    assert cli.main(["budget", *words, "--quiet"]) == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == (
        "",
        "adaptvit: budget is called adapt now, and by its old name until the next version\n",
    )
    assert cli.main(["adapt", *words, "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["share"] == pytest.approx(0.9, abs=0.1)  # of few tokens
    assert (figures["method"], figures["knob"]) == ("ats", load(output).config.rate)
    assert 0 <= figures["share_error"] < 0.1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("adapt NAME absent out", "data folder 'absent' does not exist"),
        ("adapt NAME texts out", "has no images that can be read: none of its files, as 'a.txt', is one, or a clip"),
        ("adapt NAME images out --target 2", "target must lie in (0, 1]"),
        ("bench NAME --data texts", "has no images that can be read"),
        ("compare methods NAME images absent.pth", "absent.pth does not exist"),
        ("compare methods NAME images --class-names twice.txt", "has the name 'a' twice"),
        ("compare methods NAME images --weights absent.pth", "absent.pth does not exist"),
        ("compare methods NAME loose", "has images, but no folders of classes: '0.png' lies in none"),
        ("compare methods NAME images", "the model has 1000 classes, but 'images' has 2"),
        ("draw NAME texts --per-class", "has no images that can be read"),
        ("draw NAME loose --per-class", "has images, but no folders of classes: '0.png' lies in none"),
        ("evaluate NAME absent", "data folder 'absent' does not exist"),
        ("evaluate NAME images --split testing", "has no folder 'testing', but 'train', 'val'"),
        ("evaluate NAME images --class-names twice.txt", "has the name 'a' twice"),
        ("evaluate NAME images --class-names other.txt", "class_map names none of its folders, the first being 'ant'"),
        ("evaluate NAME images --class-names some.txt", "has 1000 classes, but class_map 'some.txt' has 1"),
        ("evaluate NAME images", "the model has 1000 classes, but 'images' has 2"),
        ("evaluate NAME loose", "has images, but no folders of classes: '0.png' lies in none"),
        ("export NAME out.pt", "a file of format 'onnx' ends in .onnx, got 'out.pt'"),
        ("export NAME out.onnx --target 2", "target must lie in (0, 1]"),
        ("export NAME out.onnx --target 0.5", "is a plain ViT, which costs what it costs: choose its method"),
        ("export NAME out.onnx --layout slab --batch 8", "layout slab plans its rows by images"),
        ("export NAME out.onnx --class-names some.txt", "has 1000 classes, but there are 1 names of them"),
        ("export NAME out.onnx --data texts", "data is 'texts', which holds no images"),
        ("export NAME out.onnx --layout slab", "choose its batch"),
        ("export NAME out.onnx --class-names absent.txt", "class_names is 'absent.txt', which is not a file"),
        ("playground NAME --class-names some.txt", "has 1000 classes, but there are 1 names of them"),
        ("playground NAME absent.pth", "absent.pth does not exist"),
        ("predict NAME texts", "has no images that can be read"),
        ("predict NAME images --class-names empty.txt", "holds no names"),
        ("predict NAME images --class-names some.txt", "some.txt has 1 names, but NAME has 1000 classes"),
        ("train digits --weights absent.pth", "absent.pth does not exist: --weights names others"),
        ("evaluate NAME", "no ROOT; --help tells what is taken"),
    ],
)
def test_mistakes_are_told_before_a_model_is_opened(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for kind in ("ant", "bee"):
            Path("images", split, kind).mkdir(parents=True)
            Path("images", split, kind, "0.png").touch()
    Path("texts").mkdir()
    Path("loose").mkdir()
    Path("loose", "0.png").touch()
    texts = {"texts/a.txt": "a", "twice.txt": "a\na\n", "empty.txt": "\n", "some.txt": "ant\n", "other.txt": "cow\n"}
    for name, text in texts.items():
        Path(name).write_text(text)
    for module in ("adapt", "bench", "compare_methods", "draw", "evaluate", "export", "predict", "sessions"):
        monkeypatch.setattr(f"adaptvit.commands.{module}.open_model", None)
    monkeypatch.setattr(timm, "create_model", None)
    assert cli.main(words.replace("NAME", "vit_tiny_patch16_224").split()) == 2
    (line,) = said(capsys).splitlines()
    assert message.replace("NAME", "vit_tiny_patch16_224") in line


@pytest.mark.parametrize("what", ["methods", "models", "recipes"])
def test_a_list_has_a_sentence_of_each(what: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["list", what]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    known = {"methods": KINDS, "models": all_names(), "recipes": RECIPES}[what]
    assert set(lines) - {"Any"} == set(known)
    assert all(sentence.endswith(".") for sentence in lines.values())


def test_info_says_what_is_here(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert {name.removeprefix("extra ") for name in found if name.startswith("extra ")} == set(EXTRAS.values())


def test_a_shell_completes_commands_and_options(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["list", "completion"]) == 0
    script = capsys.readouterr().out
    asked = {1: ("ev", ["evaluate"]), 2: ("--class", ["--class-names"])}
    for place, (word, expected) in asked.items():
        given = f"COMP_WORDS=(adaptvit evaluate {word}); COMP_CWORD={place}; _adaptvit adaptvit {word}"
        done = subprocess.run(
            ["bash", "-c", f'{script}\n{given}; echo "${{COMPREPLY[@]}}"'], capture_output=True, text=True
        )
        assert done.stdout.split() == expected
