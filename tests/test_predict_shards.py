"""Predictions in shards: the predictor, sources on any filesystem, what is finished, batches of like cost, budgets."""

import errno
import io
import json
import pickle
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from models import small_vit
from pyarrow import fs, parquet
from samples import encoded, picture

from adaptvit import AViTConfig, save
from adaptvit.cli import main
from adaptvit.commands import predict_ray
from adaptvit.commands.predict import PredictConfig, options, predict
from adaptvit.commands.predict_ray import InProcess, ScaleConfig, Scaled, run
from adaptvit.commands.predict_shards import (
    Job,
    Pace,
    Record,
    Store,
    check_settings,
    images_of_lot,
    measure_pace,
    share_in_time,
    share_within,
)
from adaptvit.data.sources import Source, Unit
from adaptvit.data.storage import open_place, write_whole
from adaptvit.measure.predictor import Predictor, expected_costs, of_like_cost
from adaptvit.model import Dial

IMAGES, SHARD = 11, 4
FAR = ("all.tar", "paths.parquet")
BROKEN = "a5.jpg"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "avit.safetensors"
    model = AViTConfig(gate_scale=4.0, gate_center=3.0).build(small_vit())
    model.dial = Dial((2.0, 3.0, 6.0), (0.4, 0.6, 1.0))
    save(model, path)
    return path


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    """Pictures by name, of which one cannot be decoded."""
    found = {f"a{seed}.png": encoded(picture(seed)) for seed in range(IMAGES)}
    return found | {BROKEN: b"no image"}


@pytest.fixture(scope="module")
def folder(contents: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for name, content in contents.items():
        (root / name).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def predictor(weights: Path) -> Predictor:
    return Predictor(str(weights), batch_size=3)


def do(source: object, output: object, weights: Path, **more: Any) -> Scaled:
    """The whole, without Ray."""
    config = ScaleConfig(str(weights), str(source), str(output), batch_size=3, shard=SHARD, **more)
    predictor = Predictor(config.model, budget=config.budget, embedding=config.embedding, batch_size=3)
    shard = images_of_lot(config.shard, predictor)
    job = Job(Source(config.source, config.column), Store(config.output), predictor, shard, config.tries)
    return run(job, config, InProcess())


def rows(output: object, folder: str = "predictions") -> dict[str, dict[str, Any]]:
    """What the shards hold, by path; each path once."""
    filesystem, root = open_place(str(output))
    selector = fs.FileSelector(f"{root}/{folder}", allow_not_found=True)
    told = []
    for info in filesystem.get_file_info(selector):
        with filesystem.open_input_file(info.path) as file:
            told += parquet.read_table(file).to_pylist()
    assert len({row["path"] for row in told}) == len(told)
    return {row["path"]: row for row in told}


@pytest.fixture(scope="module")
def whole(folder: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The rows of a run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole") / "out"
    done = do(folder, output, weights)
    assert (done.images, done.earlier, done.unreadable, done.faults) == (IMAGES, 0, 1, ())
    assert [row["path"] for row in rows(output, "errors").values()] == [BROKEN]
    assert "not an image" in rows(output, "errors")[BROKEN]["reason"]
    assert {path.name for path in output.iterdir()} == {"predictions", "errors", "manifest", "settings.json"}
    return rows(output)


def agree(found: dict[str, dict[str, Any]], whole: dict[str, dict[str, Any]]) -> None:
    """The same rows; probabilities to rounding, as another batch has them."""
    assert found.keys() == whole.keys()
    for name, row in found.items():
        assert {**row, "probability": None} == {**whole[name], "probability": None}
        assert row["probability"] == pytest.approx(whole[name]["probability"], abs=1e-5)


def test_rows_are_those_of_the_embedded_engine(
    whole: dict[str, dict[str, Any]], folder: Path, weights: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    predict(PredictConfig(str(weights), folder, output, top=1, batch_size=4, workers=0))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert {line["file"] for line in lines} == whole.keys()
    for line in lines:
        row = whole[line["file"]]
        assert row["class"] == line["top"][0]["class"]
        assert row["probability"] == pytest.approx(line["top"][0]["probability"], abs=1e-5)
        assert row["macs"] == pytest.approx(line["gmacs"] * 1e9, abs=501)
        assert row["tokens"] == line["tokens"]


def test_a_predictor_pickles_without_weights_and_says_the_same(
    predictor: Predictor, contents: dict[str, bytes]
) -> None:
    told = predictor(list(contents.values()))
    again = pickle.loads(pickle.dumps(predictor))
    assert len(pickle.dumps(predictor)) < 5000
    assert "opened" not in vars(again)
    again.prepare(contents["a1.png"])
    assert "opened" not in vars(again)
    assert again(list(contents.values()))["class"] == told["class"]
    place = list(contents).index(BROKEN)
    assert told["error"][place]
    assert told["class"][place] is None
    assert [error is None for error in told["error"]].count(False) == 1
    assert predictor([b"none"])["class"] == [None]


def test_an_embedding_is_what_the_classifier_reads(weights: Path, contents: dict[str, bytes]) -> None:
    predictor = Predictor(str(weights), embedding=True, batch_size=2)
    pixels = np.stack([predictor.prepare(contents[f"a{seed}.png"]) for seed in (1, 2, 3)])
    told = predictor.predict(pixels)
    logits = predictor.opened.get_classifier()(torch.tensor(np.stack(told["embedding"])))
    assert logits.argmax(dim=1).tolist() == told["class"]
    torch.testing.assert_close(logits.softmax(dim=1).amax(dim=1), torch.tensor(told["probability"]))


def test_a_budget_moves_the_knob_and_half_precision_runs(weights: Path, contents: dict[str, bytes]) -> None:
    least, most = (Predictor(str(weights), "bfloat16", budget=share)([contents["a1.png"]]) for share in (0.4, 1.0))
    assert least["macs"][0] < most["macs"][0]
    with pytest.raises(ValueError, match="compute must lie in"):
        Predictor(str(weights), budget=0.1)


def test_batches_of_like_cost_have_every_image_once_and_cost_alike() -> None:
    costs = np.random.default_rng(0).uniform(0.5, 2, 1000)
    batches = of_like_cost(costs, 32)
    assert sorted(np.concatenate(batches)) == list(range(1000))
    sums = np.array([costs[batch].sum() for batch in batches])
    assert (sums <= 32 + 2).all()
    assert (sums[:-1] >= 30).all()
    within = np.mean([costs[batch].std() for batch in batches])
    assert within < 0.1 * costs.std()


def test_costs_are_expected_by_detail_where_it_tells_them() -> None:
    flat, busy = (
        np.full((8, 3, 16, 16), 90, np.uint8),
        np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16), np.uint8),
    )
    pixels = np.concatenate([flat, busy])
    costs = expected_costs(pixels, np.array([1.0] * 8 + [3.0] * 8))
    assert costs is not None
    assert costs[1] > 0
    assert expected_costs(pixels, np.array([1.0, 3.0] * 8)) is None
    assert expected_costs(pixels, np.ones(16)) is None


def shards_of(source: str, units: list[Unit]) -> list[tuple[str, int]]:
    return [(unit.kind, Source(source).count(unit)) for unit in units]


def test_tars_parquet_and_folders_on_two_filesystems_give_the_same_rows(
    contents: dict[str, bytes], whole: dict[str, dict[str, Any]], weights: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    images = list(contents.values())
    structs = [{"bytes": content, "path": None} for content in images]
    parquet.write_table(pyarrow.table({"image": structs, "label": [0] * len(images)}), tmp_path / "bytes.parquet")
    parquet.write_table(pyarrow.table({"path": [f"apart/{name}" for name in contents]}), tmp_path / "paths.parquet")
    (tmp_path / "apart").mkdir()
    for name, content in contents.items():
        (tmp_path / "apart" / name).write_bytes(content)
    there, base = open_place(f"memory://{tmp_path.name}")
    for path in tmp_path.rglob("*.*"):
        write_whole(there, f"{base}/{path.relative_to(tmp_path)}", path.read_bytes())
    for place in (str(tmp_path), f"memory://{tmp_path.name}"):
        for name in ("all.tar", "bytes.parquet", "paths.parquet", "apart") if place == str(tmp_path) else FAR:
            output = f"{place}/out {name}"
            done = do(f"{place}/{name}", output, weights)
            assert (done.images, done.unreadable, done.faults) == (IMAGES, 1, ())
            order = {f"bytes.parquet/{row}": path for row, path in enumerate(contents)}
            found = {
                order.get(path, path.removeprefix("all.tar/").removeprefix("apart/")): row
                for path, row in rows(output).items()
            }
            agree({name: {**row, "path": name} for name, row in found.items()}, whole)
    units, _ = Source(f"memory://{tmp_path.name}").units(SHARD)
    assert {unit.kind for unit in units} == {"files", "tar", "parquet"}


class Killed(BaseException):
    """What stops a process at any place."""


@pytest.mark.parametrize("place", [0, 1, 3, 5, 7])
def test_a_run_that_is_killed_and_started_again_gives_the_same_rows(
    place: int, folder: Path, weights: Path, whole: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: Any
) -> None:
    """Killed before each file that is written, in turn."""
    left = [place]
    write = Store.write

    def stopped(self: Store, name: str, content: bytes) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        write(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", stopped)
        with pytest.raises(Killed):
            do(folder, tmp_path / "out", weights)
    done = do(folder, tmp_path / "out", weights)
    assert (done.images, done.unreadable) == (IMAGES, 1)
    agree(rows(tmp_path / "out"), whole)
    assert rows(tmp_path / "out", "errors").keys() == {BROKEN}


def test_an_image_that_is_repaired_before_its_shard_is_done_again_is_no_error_any_more(
    contents: dict[str, bytes], weights: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "one.png").write_bytes(b"cut")
    do(source, tmp_path / "out", weights)
    next((tmp_path / "out" / "manifest").iterdir()).unlink()
    (source / "one.png").write_bytes(contents["a1.png"])
    assert do(source, tmp_path / "out", weights).unreadable == 0
    assert not rows(tmp_path / "out", "errors")


def test_a_shard_that_always_fails_is_named_skipped_counted_and_tried_again_later(
    folder: Path, weights: Path, whole: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("adaptvit.commands.predict_shards.PAUSE", 0)
    tries = []
    written = Job._written

    def failing(self: Job, record: Record, row: dict[str, Any]) -> Record:
        if record.shard == "000001-000000":
            tries.append(record.shard)
            raise RuntimeError("the model breaks on it")
        return written(self, record, row)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "_written", failing)
        done = do(folder, tmp_path / "out", weights, tries=2)
    assert len(tries) == 2
    assert [one.shard for one in done.faults] == ["000001-000000"]
    assert "a4.png to a6.png" in done.faults[0].fault
    assert "the model breaks on it" in done.faults[0].fault
    assert (done.images, done.left) == (IMAGES - 3, 4)  # one of them cannot be read
    monkeypatch.setattr(predict_ray, "predict_at_scale", lambda _: done)
    assert main(["predict", str(weights), str(folder), str(tmp_path / "out"), "--engine", "ray", "--tries", "2"]) == 1
    told = capsys.readouterr().err
    assert "shard 000001-000000 failed 2 times and is left out: a4.png to a6.png: RuntimeError: the model" in told
    assert "1 shards failed, with 4 images; the same command tries them again" in told
    do(folder, tmp_path / "out", weights)
    agree(rows(tmp_path / "out"), whole)


def test_a_damaged_file_is_named_and_the_others_are_done(weights: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("adaptvit.commands.predict_shards.PAUSE", 0)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.parquet").write_bytes(b"none" * 100)
    (tmp_path / "in" / "one.png").write_bytes(encoded(picture(1)))
    done = do(tmp_path / "in", tmp_path / "out", weights, tries=2)
    assert done.images == 1
    assert [one.shard for one in done.faults] == ["000001-000000"]
    assert done.faults[0].fault.startswith("bad.parquet: ")


def test_a_full_disk_ends_it_in_a_sentence_and_what_is_done_stays(
    folder: Path, weights: Path, whole: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: Any
) -> None:
    write = Store.write

    def full(self: Store, name: str, content: bytes) -> None:
        if name == "manifest/000001-000000.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", full)
        with pytest.raises(OSError, match=r"out' cannot be written, the same command goes on with it: No space left"):
            do(folder, tmp_path / "out", weights)
    done = do(folder, tmp_path / "out", weights)
    assert done.earlier == SHARD
    agree(rows(tmp_path / "out"), whole)


def test_the_budget_of_a_job_sets_the_dial(folder: Path, weights: Path, tmp_path: Path, predictor: Predictor) -> None:
    total = 0.6 * (IMAGES + 1) * predictor.dense_macs
    do(folder, tmp_path / "out", weights, total_macs=total)
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["share"] == pytest.approx(0.6)
    assert share_within(10 * total, IMAGES, predictor) == 1.0
    with pytest.raises(ValueError, match=r"12 images cost .* MACs at least"):
        share_within(0.1 * total, 12, predictor)
    with pytest.raises(ValueError, match="was made with another budget"):
        do(folder, tmp_path / "out", weights, total_macs=2 * total)


def test_hours_set_the_dial_between_what_its_ends_take() -> None:
    pace = Pace(decoding=0.01, shares=(0.4, 1.0), computing=(0.02, 0.08), costs=None)
    assert share_in_time(1.0, 72_000, pace, 1, 1) == pytest.approx(0.7)  # 0.05 s an image
    assert share_in_time(1.0, 72_000, pace, 1, 2) == 1.0
    with pytest.raises(ValueError, match=r"decoding 720000 images takes 2 h with 1 processes"):
        share_in_time(1.0, 720_000, pace, 1, 8)
    with pytest.raises(ValueError, match=r"360000 images take 2 h at least with 1 of the model"):
        share_in_time(1.0, 360_000, pace, 8, 1)


def test_the_pace_is_measured_at_both_ends_and_leaves_the_model_as_it_was(folder: Path, weights: Path) -> None:
    predictor = Predictor(str(weights), batch_size=8)
    config = predictor.opened.config
    job = Job(Source(str(folder)), Store("nowhere"), predictor, SHARD)
    pace = measure_pace(job, job.source.units(SHARD)[0])
    assert pace.shares == (0.4, 1.0)
    assert min(pace.decoding, *pace.computing) > 0
    assert predictor.opened.config == config


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"source": "{tmp}/none"}, "the source '.*none' is not there"),
        ({"source": "{tmp}/empty"}, "the source '.*empty' holds no images"),
        ({"source": "memory://empty"}, "the source 'memory://empty' is not there"),
        ({"source": "foo://bar"}, "'foo://bar' is on no filesystem that pyarrow or fsspec knows"),
        ({"source": "{tmp}/text.parquet"}, "text.parquet' has no images in text: name the column with --column"),
        ({"source": "{tmp}/text.parquet", "column": "b"}, "text.parquet' has no column 'b', but text"),
        ({"source": "{tmp}/x.txt"}, "is neither a folder nor a file that ends in .tar"),
    ],
)
def test_bad_sources_are_told_in_a_sentence(more: dict[str, Any], message: str, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").touch()
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "text.parquet")
    source = more.pop("source").format(tmp=tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        do(source, tmp_path / "out", weights, budget=0.6, **more)


def test_a_filesystem_without_its_package_is_told(monkeypatch: Any) -> None:
    def lacking(_: str) -> None:
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(
        "adaptvit.data.storage.fs", type("fs", (), {"FileSystem": type("F", (), {"from_uri": lacking})})
    )
    with pytest.raises(ValueError, match=r"'gcsx://a' needs a package that is not here: Please install gcsfs"):
        open_place("gcsx://a")


def test_several_files_of_a_bucket_are_named_as_several_here_are() -> None:
    """Of which no URI may have the braces."""
    assert open_place("s3://anonymous@bucket/in/{0..9}.tar?region=eu-west-1")[1] == "bucket/in/{0..9}.tar"
    assert open_place("memory://in/train-{0..9}.tar")[1] == "/in/train-{0..9}.tar"


def test_a_filesystem_that_nobody_answers_for_is_told_in_a_sentence(monkeypatch: Any) -> None:
    def lost(*_: Any) -> None:
        raise RuntimeError("Name or\nservice not known")  # as the libraries behind fsspec have errors of their own

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", lost)
    for place in (Source("memory://a/b"), Store("memory://a/b")):
        with pytest.raises(ConnectionError, match="'memory://a/b' cannot be reached: Name or service not known"):
            assert place._place


def test_other_settings_are_refused() -> None:
    check_settings({"a": 1, "share": 0.5}, {"a": 1}, "out")
    with pytest.raises(ValueError, match="'out' was made with another a and b"):
        check_settings({"a": 1}, {"a": 2, "b": 3}, "out")


def test_two_budgets_and_a_cluster_that_does_not_answer_are_refused() -> None:
    with pytest.raises(ValueError, match="budget and hours, which set the same"):
        ScaleConfig("m", "s", "o", budget=0.5, hours=1)
    with pytest.raises(ConnectionError, match=r"no Ray cluster answers at '127\.0\.0\.1:9'"):
        predict_ray._check_reached("127.0.0.1:9")


def test_the_engine_chooses_the_options() -> None:
    words = ["predict", "m", "s", "o", "--engine", "ray", "--hours", "2"]
    told = options(words).parse_args(words[1:])
    assert (told.source, told.output, told.engine, told.hours) == ("s", "o", "ray", 2.0)
    assert options(["predict", "m", "s"]).parse_args(["m", "s"]).engine == "embedded"
    with pytest.raises(ValueError, match="--engine must be embedded or ray, got 'spark'"):
        options(["predict", "m", "s", "o", "--engine", "spark"])


def test_ray_that_does_not_start_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(**_: Any) -> None:
        raise Exception("The current node timed out\nduring startup.")

    ray, data = ModuleType("ray"), ModuleType("ray.data")
    vars(ray).update(data=data, is_initialized=lambda: False, init=late)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
    with pytest.raises(ConnectionError, match=r"Ray did not start on this machine: The current node timed out during"):
        predict_ray.RayEngine(ScaleConfig("m", "s", "o")).start()


@pytest.fixture(scope="module")
def local_ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'adaptvit[ray]'")
    yield ray
    ray.shutdown()


@pytest.mark.filterwarnings("ignore")
def test_ray_gives_the_same_rows(
    local_ray: Any, folder: Path, weights: Path, whole: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    config = ScaleConfig(str(weights), str(folder), str(tmp_path / "out"), batch_size=3, shard=SHARD, device="cpu")
    done = predict_ray.predict_at_scale(config)
    assert (done.images, done.unreadable, done.faults) == (IMAGES, 1, ())
    agree(rows(tmp_path / "out"), whole)
    again = predict_ray.predict_at_scale(replace(config, batch_size=4))
    assert again.earlier == IMAGES
