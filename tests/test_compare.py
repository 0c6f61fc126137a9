"""Runs that differ in one thing, over seeds."""

import csv
import errno
import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from adaptvit import AViTConfig, files, records
from adaptvit.cli import main
from adaptvit.commands import compare_variants as compare
from adaptvit.commands.compare_variants import Comparison, VariantRow
from adaptvit.commands.comparisons import COMPARISONS
from adaptvit.data import DataConfig
from adaptvit.training import run as running
from adaptvit.training.recipe import Recipe
from adaptvit.training.run import Run
from adaptvit.weights import checkpoints

SIZES = {"img_size": 32, "patch_size": 8, "in_chans": 1, "embed_dim": 24, "depth": 3, "num_heads": 3}


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    base = Run(
        model="vit_tiny_patch16_224",
        model_args=SIZES,
        method=AViTConfig(gate_scale=1.0, gate_center=1.0, class_token="stays"),
        data=DataConfig(),
        recipe=Recipe(epochs=1, warmup_epochs=0, batch_size=240),
    )
    early = replace(base, method=replace(base.method, gate_center=0.0))
    return Comparison(question="Is halting earlier worse?", variants={"late": base, "early": early})


@pytest.fixture(scope="module")
def finished(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[VariantRow]]:
    folder = tmp_path_factory.mktemp("comparison")
    return folder, compare.compare(comparison, folder, seeds=2)


@pytest.fixture
def folder(finished: tuple[Path, list[VariantRow]], tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished[0], tmp_path / "copy"))


def test_every_variant_is_trained_with_every_seed_and_spreads_are_over_seeds(
    finished: tuple[Path, list[VariantRow]],
) -> None:
    folder, (late, early) = finished
    found = {
        name: [json.loads((folder / name / f"seed-{seed}" / "result.json").read_text()) for seed in range(2)]
        for name in ("late", "early")
    }
    top1 = {name: [figures["top1"] for figures in runs] for name, runs in found.items()}
    assert top1["late"][0] != top1["late"][1]
    assert late.over_seeds("top1") == (mean(top1["late"]), stdev(top1["late"]))
    gaps = [after - before for after, before in zip(top1["early"], top1["late"], strict=True)]
    assert early.against_first == pytest.approx((mean(gaps), stdev(gaps) / 2**0.5))
    assert late.against_first is None
    assert late.over_seeds("term ponder") > early.over_seeds("term ponder")
    assert early.speed["realised"] > 0
    assert early.speed["ideal"] > late.speed["ideal"]

    with (folder / "runs.csv").open(newline="") as file:
        lines = [(line["variant"], line["seed"]) for line in csv.DictReader(file)]
    assert lines == [("late", "0"), ("late", "1"), ("early", "0"), ("early", "1")]
    report = (folder / "report.html").read_text()
    assert "Is halting earlier worse?" in report
    assert report.count("<figure>") == 3
    assert {path.stem for path in folder.glob("*.png")} == {"top1", "gmacs", "depth_mean"}
    assert 'src="http' not in report


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.long), 2])
def test_what_is_finished_is_not_run_again_and_the_rest_comes_out_the_same(
    comparison: Comparison, finished: tuple[Path, list[VariantRow]], folder: Path, processes: int
) -> None:
    gone, kept = folder / "early" / "seed-1", folder / "early" / "seed-0" / "finished.json"
    before = kept.stat().st_mtime_ns
    shutil.rmtree(gone)
    rows = compare.compare(comparison, folder, seeds=2, processes=processes)
    assert kept.stat().st_mtime_ns == before
    assert (gone / "finished.json").exists()
    for row, was in zip(rows, finished[1], strict=True):
        assert row.over_seeds("top1") == pytest.approx(was.over_seeds("top1"), abs=0.01)  # threads differ
        assert row.speed == was.speed


@pytest.mark.parametrize(("name", "damage"), [("early/seed-1/finished.json", "changed"), ("speed.json", "{}")])
def test_a_damaged_record_is_named_and_computed_again(
    name: str, damage: str, comparison: Comparison, finished: tuple[Path, list[VariantRow]], folder: Path
) -> None:
    record = folder / name
    whole = record.read_text()
    record.write_text(
        whole.replace('"diverged": null', '"diverged": 1').replace("0.", "1.") if damage == "changed" else damage
    )
    with pytest.warns(UserWarning, match=f"{record.name}' is damaged, .*: computed again"):
        rows = compare.compare(comparison, folder, seeds=2)
    for row, was in zip(rows, finished[1], strict=True):
        assert row.runs == was.runs
        assert row.speed.keys() == was.speed.keys()
    assert json.loads(record.read_text()).keys() == json.loads(whole).keys()


def test_an_upgraded_version_computes_everything_again(
    comparison: Comparison, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "version", lambda: "9.9")
    monkeypatch.setattr(compare, "version", lambda: "9.9")
    trained = []

    def counted(job: Run, *arguments: object, **others: object) -> object:
        trained.append(job)
        return running.train_run(job, *arguments, **others)

    monkeypatch.setattr(compare, "train_run", counted)
    logs = set(folder.rglob("log-*.jsonl"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        compare.compare(comparison, folder, seeds=2)
    said = [str(one.message) for one in caught if one.category is UserWarning]
    again = [re.search(r"is of adaptvit .*, and this is 9\.9: computed again$", one) for one in said]
    afresh = [re.search("nothing in '.*' is of this very run, which begins afresh", one) for one in said]
    assert all(one or other for one, other in zip(again, afresh, strict=True))
    assert any(again)
    assert any(afresh)
    assert len(trained) == 4
    assert len(set(folder.rglob("log-*.jsonl")) - logs) == 4  # trained, not read back from a checkpoint
    assert json.loads((folder / "speed.json").read_text())["version of adaptvit"] == "9.9"


def test_a_field_that_a_later_version_adds_does_not_refuse_a_folder(
    comparison: Comparison, finished: tuple[Path, list[VariantRow]], folder: Path
) -> None:
    for path in folder.rglob("*.json"):
        if path.name in ("finished.json", "speed.json"):
            record = records.read_record(path)
            runs = [record["settings"]] if path.name == "finished.json" else record["settings"].values()
            for settings in runs:
                del settings["run"]["drop_path"], settings["run"]["recipe"]["temperature"]
            records.write_record(path, record)
    before = (folder / "speed.json").stat().st_mtime_ns
    rows = compare.compare(comparison, folder, seeds=2)
    assert [row.runs for row in rows] == [row.runs for row in finished[1]]
    assert (folder / "speed.json").stat().st_mtime_ns == before


def test_a_run_is_known_by_the_weights_it_started_from(comparison: Comparison, tmp_path: Path) -> None:
    weights = tmp_path / "vit.safetensors"
    weights.write_bytes(b"one")
    job = replace(comparison.variants["late"], weights=weights)
    before = compare._settings(job, records.contents)
    assert records.same(records.plain(before), compare._settings(job, records.contents))
    weights.write_bytes(b"another")
    assert not records.same(records.plain(before), compare._settings(job, records.contents))


def test_a_run_that_diverges_is_counted_and_the_others_stand(comparison: Comparison, folder: Path) -> None:
    late = comparison.variants["late"]
    wild = replace(late, method=replace(late.method, ponder_weight=1e300))
    both = replace(comparison, variants={**comparison.variants, "wild": wild})
    rows = compare.compare(both, folder, seeds=2)
    assert [row.diverged for row in rows] == [0, 0, 2]
    assert rows[2].over_seeds("top1") is None
    assert "wild (2 of 2 diverged)" in compare.variants_table(rows).text()
    with (folder / "runs.csv").open(newline="") as file:
        lines = [(line["variant"], line["seed"], bool(line["diverged"])) for line in csv.DictReader(file)]
    assert lines[-2:] == [("wild", "0", True), ("wild", "1", True)]
    assert not any(diverged for *_, diverged in lines[:-2])


@pytest.mark.parametrize("full", ["finished.json", "model.safetensors", "summary.csv"])
def test_figures_are_told_where_the_disk_is_full(
    full: str, comparison: Comparison, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = folder / "early" / "seed-1"
    shutil.rmtree(gone)
    told: list[VariantRow] = []
    replacing = files.replacing

    def no_room(path: Path) -> Any:
        if Path(path).name == full:
            raise OSError(errno.ENOSPC, f"cannot write {str(path)!r}: No space left on device")
        return replacing(path)

    for module in (files, checkpoints):
        monkeypatch.setattr(module, "replacing", no_room)
    with pytest.raises(OSError, match="No space left on device") as caught:
        compare.compare(comparison, folder, seeds=2, tell=told.extend)
    late, early = told
    assert (len(late.runs), len(early.runs), early.diverged) == (2, 2 if full == "summary.csv" else 1, 0)
    assert (early.against_first is None) == (full != "summary.csv")
    assert full in str(caught.value)
    assert bool(re.search(r"; the run came to top1 0\.\d+, loss \d", str(caught.value))) == (full != "summary.csv")
    assert compare.variants_table(told).text()


def test_what_cannot_be_compared_is_refused(comparison: Comparison, folder: Path) -> None:
    with pytest.raises(ValueError, match="seeds must be 2 or more, for there is no spread over fewer, got 1"):
        compare.compare(comparison, folder, seeds=1)
    with pytest.raises(ValueError, match=r"processes must lie in 1..1024, got 0"):
        compare.compare(comparison, folder, processes=0)
    with pytest.raises(ValueError, match=r"must be two variants or more, got \['late'\]"):
        Comparison(question="?", variants={"late": comparison.variants["late"]})
    with pytest.raises(ValueError, match="more than punctuation"):
        Comparison(question="?", variants=dict.fromkeys(("a b", "a-b"), comparison.variants["late"]))
    longer = {name: replace(run, recipe=replace(run.recipe, epochs=2)) for name, run in comparison.variants.items()}
    with pytest.raises(ValueError, match="holds a run of other settings"):
        compare.compare(replace(comparison, variants=longer), folder, seeds=2)


@pytest.mark.parametrize("name", COMPARISONS)
def test_named_comparisons_differ_in_what_they_compare_alone(name: str) -> None:
    variants = list(COMPARISONS[name]().variants.values())
    for run in variants[1:]:
        assert replace(run.recipe, target=None) == replace(variants[0].recipe, target=None)
        assert run.data == variants[0].data
        assert run.model == variants[0].model


def test_the_command_names_what_there_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["compare", "nothing"]) == 2
    assert (
        "comparison must be one of priors, parts, parts_halting, thresholds, digits_priors" in capsys.readouterr().err
    )
    assert main(["compare", "digits_priors", "--seeds", "1", "--output", str(tmp_path)]) == 2
    assert "no spread over fewer" in capsys.readouterr().err
