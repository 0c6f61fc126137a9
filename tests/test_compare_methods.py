"""Methods side by side on one pretrained ViT."""

import csv
import errno
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
import timm
import torch
from models import small_vit
from PIL import Image
from timm.data import resolve_model_data_config

from adaptvit import (
    AdaptiveViT,
    AViTConfig,
    DynamicViTConfig,
    FullConfig,
    MethodConfig,
    ToMeConfig,
    adapt,
    load,
    macs,
    save,
)
from adaptvit.cli import main
from adaptvit.commands import compare_methods
from adaptvit.commands.compare_methods import EntryRow, MethodsConfig, MethodsOutcome, methods_table
from adaptvit.data import DataConfig, Unreadable, list_folder, open_pictures, open_split, preparation
from adaptvit.show.pictures import one_below_another

QUICK = {"workers": 0, "timed": 4, "rounds": 1, "latencies": 2, "calibration": 8, "pictures": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain ViT of seven classes, one of its A-ViT, one of other classes, and images of seven kinds of noise."""
    root = tmp_path_factory.mktemp("methods")
    vit = small_vit(img_size=64).eval()
    save(FullConfig().build(vit), root / "vit.safetensors")
    save(AViTConfig(gate_scale=4.0, gate_center=2.0).build(vit), root / "tuned.safetensors")
    save(FullConfig().build(small_vit(num_classes=5)), root / "five.safetensors")
    save(FullConfig().build(small_vit("mixer", img_size=64)), root / "mixer.safetensors")
    random = np.random.default_rng(0)
    for label in range(7):
        (root / "images" / str(label)).mkdir(parents=True)
        for number in range(5):
            pixels = random.normal(128, 10 + 10 * number, (64, 64, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / str(label) / f"{number}.png")
    return root


def settings(folder: Path, output: Path, **changes: object) -> MethodsConfig:
    given = {"model": str(folder / "vit.safetensors"), "root": folder / "images", "output": output}
    return MethodsConfig(**{**given, **QUICK, **changes})


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[MethodsConfig, MethodsOutcome]:
    files = (str(folder / "tuned.safetensors"),)
    config = settings(folder, tmp_path_factory.mktemp("output"), files=files, budgets=(0.8, 0.6, 0.05))
    return config, compare_methods.compare_methods(config)


def by_label(outcome: MethodsOutcome) -> dict[str, EntryRow]:
    return {row.entry.label: row for row in outcome.rows}


def test_every_method_meets_its_budget_on_images_that_were_not_fitted_to(
    finished: tuple[MethodsConfig, MethodsOutcome],
) -> None:
    rows = by_label(finished[1])
    dense = rows["dense"].record["gmacs"]
    for name in compare_methods.untrained():
        for budget in (0.8, 0.6):
            row = rows[f"{name} {budget}"]
            assert row.record["gmacs"] / dense == pytest.approx(budget, abs=0.04), row.entry
            assert row.speed["ideal"] == pytest.approx(1 / budget, rel=0.1)
            assert row.record["images"] == 27
        assert "meets the target of 0.05" in rows[f"{name} 0.05"].record["refused"]
    one_cost = rows["tome 0.6"].record
    assert one_cost["gmacs_p10"] == one_cost["gmacs_p90"]
    assert rows["merge 0.6"].record["gmacs_p10"] < rows["merge 0.6"].record["gmacs_p90"]


def test_an_unreadable_image_that_was_set_aside_is_told(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "images", tmp_path / "images")
    (tmp_path / "images" / "0" / "0.png").write_bytes(b"")
    outcome = compare_methods.compare_methods(
        settings(folder, tmp_path / "out", root=tmp_path / "images", methods=("tome",), budgets=(0.8,), pictures=0)
    )
    assert [one.name for one in outcome.unreadable] == ["0/0.png"]


def test_differences_from_dense_are_image_by_image(finished: tuple[MethodsConfig, MethodsOutcome]) -> None:
    config, outcome = finished
    rows = by_label(outcome)
    model = load(config.model).eval()
    split = open_split(DataConfig(root=config.root), resolve_model_data_config(model), config.split)
    aside = {place * 35 // 8 for place in range(8)}
    images, labels = zip(*(split[index] for index in range(35) if index not in aside), strict=True)
    with torch.inference_mode():
        dense = model.vit(torch.stack(images)).argmax(dim=1) == torch.tensor(labels)
        tuned = load(config.files[0]).eval()(torch.stack(images)).argmax(dim=1) == torch.tensor(labels)
    gaps = [int(a) - int(b) for a, b in zip(tuned.tolist(), dense.tolist(), strict=True)]
    row = rows[config.files[0]]
    assert rows["dense"].record["top1"] == pytest.approx(dense.double().mean().item())
    assert rows["dense"].against_dense is None
    assert row.against_dense == pytest.approx((mean(gaps), stdev(gaps) / len(gaps) ** 0.5))


def test_what_is_written(finished: tuple[MethodsConfig, MethodsOutcome]) -> None:
    config, outcome = finished
    with (config.output / "methods.csv").open(newline="") as file:
        lines = {(line["name"], line["budget"]): line for line in csv.DictReader(file)}
    assert len(lines) == len(outcome.rows) == 1 + 3 * len(compare_methods.untrained()) + 1
    assert float(lines["merge", "0.6"]["gmacs"]) == by_label(outcome)["merge 0.6"].record["gmacs"]
    assert lines["ats", "0.05"]["refused"]
    conditions = json.loads((config.output / "conditions.json").read_text())
    assert (conditions["images measured"], conditions["images set aside"]) == (27, 8)
    assert conditions["load average before timing"] >= 0
    for name in ("accuracy_gmacs", "accuracy_speed"):
        assert (config.output / f"{name}.png").stat().st_size > 10_000
    report = outcome.report.read_text()
    assert (report.count("<figure>"), report.count('<figure class="wide">')) == (2, 1)
    assert "8 others, spread over the split, were set aside" in report
    assert 'src="http' not in report
    assert "meets the target of 0.05" in report


def test_the_same_images_are_shown_through_every_model_of_one_budget_and_every_file(
    finished: tuple[MethodsConfig, MethodsOutcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = finished
    shown: dict = {}

    def draw(rows: list, blocks: int, below: bool) -> object:
        shown.update(rows=rows, blocks=blocks, below=below)
        return one_below_another(rows, blocks, below)

    monkeypatch.setattr(compare_methods, "one_below_another", draw)
    files = []
    for run, blocks in (("one", 4), ("other", 6)):
        (tmp_path / run).mkdir()
        files.append(str(tmp_path / run / "model.safetensors"))
        save(DynamicViTConfig(blocks=(0, 1)).build(small_vit(img_size=64, depth=blocks)), files[-1])
    copy = shutil.copytree(config.output, tmp_path / "copy")
    compare_methods.compare_methods(replace(config, output=copy, pictures=2, files=tuple(files)))
    names, images, _ = zip(*shown["rows"], strict=True)
    assert [*names] == ["", *(f"{name} 0.6" for name in compare_methods.untrained()), "one/model", "other/model"]
    assert {row.shape for row in images} == {(2, 3, 64, 64), (2, 3, 128, 128)}  # regions are enlarged for their lines
    assert not any(torch.equal(images[0], other) for other in images[1:])
    assert (shown["blocks"], shown["below"]) == (6, True)


@pytest.mark.parametrize("command", ["evaluate", "budget", "compare"])
def test_a_model_in_half_precision_is_given_images_of_its_own(command: str, folder: Path, tmp_path: Path) -> None:
    file, root = tmp_path / "half.safetensors", folder / "images"
    save(load(folder / "vit.safetensors").to(torch.bfloat16), file)
    quick = ["--workers=0", "--rounds=1"]
    commands = {
        "evaluate": ["evaluate", file, root, *quick],
        "budget": ["budget", file, root, tmp_path / "out.safetensors", "--target=0.6"],
        "compare": [
            "compare",
            "methods",
            file,
            root,
            *quick,
            "--latencies=2",
            "--methods=[merge]",
            "--budgets=[0.7]",
            f"--output={tmp_path}",
        ],
    }
    assert main([str(word) for word in commands[command]]) == 0


def test_what_is_there_is_not_computed_again_and_the_rest_is(
    finished: tuple[MethodsConfig, MethodsOutcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, outcome = finished
    again = replace(config, output=shutil.copytree(config.output, tmp_path / "copy"), batch_size=5, pictures=0)
    asked: list[tuple[str, float]] = []

    def counted(vit: object, images: object, target: float, config: MethodConfig) -> AdaptiveViT:
        asked.append((config.method, target))
        return adapt(vit, images, target, config)

    monkeypatch.setattr(compare_methods, "adapt", counted)
    second = compare_methods.compare_methods(again)
    assert {name for name, _ in asked} == {"dynamicvit"}  # fitted anew: its predictors are in no config
    asked.clear()
    assert second.rows == outcome.rows
    (gone,) = (again.output / "records").glob("avit-0.6-*")
    gone.unlink()
    third = compare_methods.compare_methods(again)
    assert ("avit", 0.6) in asked
    assert {name for name, _ in asked} == {"avit", "dynamicvit"}
    asked.clear()
    assert third.rows == outcome.rows
    compare_methods.compare_methods(replace(again, methods=("ats",), budgets=(0.7,), limit=20))
    assert asked == [("ats", 0.7)]


def test_a_rebuilt_model_does_what_its_record_says(finished: tuple[MethodsConfig, MethodsOutcome]) -> None:
    config, outcome = finished
    what = compare_methods._Compared(config)
    for row in outcome.rows:
        if not row.record["refused"]:
            model = what.rebuild(row.entry, row.record)
            images = what.some(model, 27)
            with torch.inference_mode():
                usage = (model.vit(images), model(images, detailed=True).usage)[1]
            if row.entry != compare_methods.DENSE:
                assert macs(usage, model.shape).double().mean() / 1e9 == pytest.approx(row.record["gmacs"], rel=1e-3)


def test_a_method_that_the_model_cannot_do_says_why(folder: Path, tmp_path: Path) -> None:
    config = settings(folder, tmp_path, model=str(folder / "mixer.safetensors"), budgets=(0.6,), pictures=0)
    outcome = compare_methods.compare_methods(config)
    assert "in its place" in by_label(outcome)["merge 0.6"].record["refused"]
    assert all(row.record["refused"] for row in outcome.rows[1:])
    shown = methods_table(outcome.rows).text().splitlines()
    assert "ATS needs attention, but the blocks of parts_vit have TokenMLP in its place" in shown[6]


def test_a_timm_name_takes_weights_from_a_file(folder: Path, tmp_path: Path) -> None:
    vit = timm.create_model("test_vit")
    torch.save(vit.state_dict(), tmp_path / "weights.pth")
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{name}\n" for name in range(1000)))
    config = settings(folder, tmp_path, model="test_vit", weights=tmp_path / "weights.pth", class_map=names)
    outcome = compare_methods.compare_methods(replace(config, methods=("random",), budgets=(0.7,)))
    assert by_label(outcome)["random 0.7"].record["images"] == 27
    torch.save(timm.create_model("test_vit", num_classes=7).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth' has no head of the 1000 classes of test_vit"):
        compare_methods.compare_methods(config)


@pytest.mark.parametrize(("name", "damage"), [("dense", "changed"), ("speed", "{}")])
def test_a_damaged_record_is_named_and_computed_again(name: str, damage: str, folder: Path, tmp_path: Path) -> None:
    config = settings(folder, tmp_path, methods=(), budgets=(), pictures=0)
    whole = compare_methods.compare_methods(config)
    (record,) = [path for path in tmp_path.rglob("*.json") if path.name.startswith(name)]
    text = record.read_text()
    record.write_text(text.replace("0.", "1.") if damage == "changed" else damage)
    with pytest.warns(UserWarning, match=f"{re.escape(record.name)}' is damaged, .*: computed again"):
        again = compare_methods.compare_methods(config)
    assert [row.record for row in again.rows] == [row.record for row in whole.rows]
    assert json.loads(record.read_text()).keys() == json.loads(text).keys()


@pytest.mark.parametrize("change", ["version", "image", "class map"])
def test_what_decides_a_record_has_one_of_its_own(
    change: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, names = tmp_path / "images", tmp_path / "names.txt"
    shutil.copytree(folder / "images", root)
    names.write_text("".join(f"{label}\n" for label in range(7)))
    config = settings(folder, tmp_path / "output", methods=(), budgets=(), root=root, class_map=names)
    compare_methods.compare_methods(config)
    if change == "version":
        monkeypatch.setattr(compare_methods, "version", lambda: "9.9")
    if change == "image":
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(root / "0" / "0.png")
    if change == "class map":
        names.write_text("".join(f"{label}\n" for label in range(7)) + "\n")
    before = set((tmp_path / "output" / "records").iterdir())
    compare_methods.compare_methods(config)
    assert len(set((tmp_path / "output" / "records").iterdir()) - before) == 1


@pytest.mark.filterwarnings("ignore:cannot write")
def test_figures_are_told_where_the_disk_is_full(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    words = ["compare", "methods", str(folder / "vit.safetensors"), str(folder / "images"), "--methods=[evit]"]
    options = [f"--{name}={value}" for name, value in {**QUICK, "pictures": 0}.items()]
    assert main([*words, "--budgets=[0.8]", *options, f"--output={tmp_path / 'out'}"]) == 2
    told = capsys.readouterr()
    assert "evit 0.8" in told.out
    last = told.err.splitlines()[-1]
    assert "methods.csv': No space left on device" in last


def test_the_command_prints_the_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"--{name}={value}" for name, value in QUICK.items()]
    words = ["compare", "methods", str(folder / "vit.safetensors"), str(folder / "images")]
    words += [str(folder / "tuned.safetensors"), "--methods=[merge,evit]", "--budgets=[0.7]", f"--output={tmp_path}"]
    options.append("--pictures=0")
    assert main([*words, *options]) == 0
    said = capsys.readouterr().out.splitlines()
    names = ["", "dense", "merge 0.7", "evit 0.7", str(folder / "tuned.safetensors"), ""]
    assert all(line.startswith(name) for line, name in zip(said, names, strict=False))
    assert said[-1] == f"{tmp_path / 'report.html'}: the report"


def test_a_data_set_by_name_is_the_same_as_its_folder(
    finished: tuple[MethodsConfig, MethodsOutcome], folder: Path, tmp_path: Path
) -> None:
    config = settings(folder, tmp_path, dataset="torch/image_folder", methods=(), budgets=())
    (row,) = compare_methods.compare_methods(config).rows
    assert row.record == by_label(finished[1])["dense"].record


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["--methods=[fly]"],
            "methods must be some of calibrated, merge, tome, grid, exit, merge_exit, ats, evit, avit, dynamicvit, "
            "runlength, runlength_merge, random, got ('fly',)",
        ),
        (["--budgets=[0.5,60]"], "budgets must lie in (0, 1], shares of the dense MACs, got (0.5, 60.0); 60 % is 0.6"),
        (["--calibration=34"], "has 35 images, of which 34 are set aside for calibration: two or more must be left"),
        (["--rounds=0"], "rounds must be 1 or more, got 0"),
        (["five.safetensors"], "has 5 classes, but "),
        (["--model"], "tuned.safetensors is avit already: give a plain ViT, and this model after the folder"),
        (["--root"], "has no images or clips that can be read"),
        (["--weights=x.pth"], "weights are for the name of a timm model"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_compared_is_refused_in_one_sentence(
    changes: list[str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, root = "vit.safetensors", folder / "images"
    if changes == ["--model"]:
        changes, model = [], "tuned.safetensors"
    if changes == ["--root"]:
        changes, root = [], tmp_path
    changes = [str(folder / word) if word.startswith("five") else word for word in changes]
    output = tmp_path / "output"
    assert main(["compare", "methods", str(folder / model), str(root), *changes, f"--output={output}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not output.exists()


def test_embeddings_are_compared_by_their_cosine_whatever_folders_and_head_there_are(
    folder: Path, tmp_path: Path
) -> None:
    for number, path in enumerate(sorted((folder / "images").rglob("*.png"))[:12]):
        shutil.copy(path, tmp_path / f"{number}.png")
    config = settings(folder, tmp_path / "out", root=tmp_path, methods=("tome",), budgets=(0.7,), task="embedding")
    config = replace(config, calibration=4, files=(str(folder / "tuned.safetensors"),))
    dense, tome, tuned = compare_methods.compare_methods(config).rows
    assert dense.record["cosine"] == pytest.approx(1)
    vit = load(folder / "vit.safetensors").vit.eval()
    vit.reset_classifier(0)
    data = open_pictures(list_folder(tmp_path, "root", below=False), preparation(load(folder / "vit.safetensors")))
    images = torch.stack([data[place][0] for place in range(12) if place % 3])  # of which a third were set aside
    model = adapt(vit, torch.stack([data[place][0] for place in range(0, 12, 3)]), 0.7, ToMeConfig())
    with torch.inference_mode():
        cosines = torch.nn.functional.cosine_similarity(model.eval()(images), vit(images))
    assert tome.record["cosines"] == pytest.approx(cosines.tolist(), abs=1e-4)
    assert tome.record["cosine"] == pytest.approx(cosines.mean().item(), abs=1e-4)
    assert tuned.record["cosine"] < 1
    (head, *_), line, *_ = [one.split(",") for one in (tmp_path / "out" / "methods.csv").read_text().splitlines()]
    assert head == "name"
    assert line[0] == "dense"
    table = methods_table([dense, tome, tuned], "embedding")
    assert table.columns[1:4] == ["cosine", "±", "p10"]


def test_embeddings_of_other_images_than_the_dense_models_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = compare_methods._measured
    lacking = {"unreadable": [Unreadable("0.png", "its logits are not finite")]}

    def lacks(model: Any, *args: Any) -> dict[str, Any]:
        return measured(model, *args) | (lacking if isinstance(model, AdaptiveViT) else {})

    monkeypatch.setattr(compare_methods, "_measured", lacks)
    config = settings(folder, tmp_path / "out", methods=("tome",), budgets=(0.7,), task="embedding")
    dense, tome = compare_methods.compare_methods(config).rows
    assert dense.record["refused"] is None
    assert "others than the dense model's" in tome.record["refused"]
