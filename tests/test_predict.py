import csv
import errno
import io
import json
import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from models import small_vit
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import DataLoader

from adaptvit import AViTConfig, FullConfig, load, macs, save
from adaptvit.commands import predict
from adaptvit.commands.predict import FolderImages, PredictConfig, Prediction, find_images
from adaptvit.methods.avit import AViT

READABLE = ["a/2.png", "a/10.jpg", "B/ümlaut, with comma.png", "cmyk.jpg", "grey16.png", "moving.gif", "palette.png"]
UNREADABLE = ["a/5 empty.png", "a/6 text.jpg", "cut.jpg"]


def noise(seed: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 50, channels), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many kinds, and files that look like images and are none."""
    root = tmp_path_factory.mktemp("images")
    for name in ("a", "B"):
        (root / name).mkdir()
    Image.fromarray(noise(0)).save(root / "a/10.jpg")
    Image.fromarray(noise(1)).save(root / "a/2.png")
    Image.fromarray(noise(2)).save(root / "B/ümlaut, with comma.png")
    Image.fromarray(noise(3, 4), mode="CMYK").save(root / "cmyk.jpg")
    Image.fromarray(noise(4)[..., 0].astype(np.uint16) * 200).save(root / "grey16.png")
    Image.fromarray(noise(5)).quantize(16).save(root / "palette.png", transparency=3)
    frames = [Image.fromarray(noise(seed)) for seed in (6, 7)]
    frames[0].save(root / "moving.gif", save_all=True, append_images=frames[1:])
    whole = (root / "a/10.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "a/5 empty.png").touch()
    (root / "a/6 text.jpg").write_text("no image")
    (root / "a/notes.txt").write_text("not looked at")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "avit.safetensors"
    save(AViTConfig(gate_scale=4.0, gate_center=3.0).build(small_vit()), path)
    return path


@pytest.fixture
def config(folder: Path, weights: Path, tmp_path: Path) -> PredictConfig:
    return PredictConfig(str(weights), folder, tmp_path / "out.csv", top=3, batch_size=4, workers=0)


@pytest.fixture(scope="module")
def whole(folder: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run writes, by suffix."""
    written = {}
    for suffix in (".csv", ".jsonl"):
        output = tmp_path_factory.mktemp("whole") / f"out{suffix}"
        predict_all(PredictConfig(str(weights), folder, output, top=3, batch_size=4, workers=0))
        written[suffix] = output.read_bytes()
    return written


def predict_all(config: PredictConfig) -> Prediction:
    """Run, and look at what holds for every finished run."""
    result = predict.predict(config)
    assert result.images == len(READABLE)
    assert [name for name, _ in result.unreadable] == UNREADABLE
    assert all(reason for _, reason in result.unreadable)
    kept = {config.output.name, f"{config.output.name}.settings.json"}
    assert {path.name for path in config.output.parent.glob(f"*{config.output.name}*")} == kept
    return result


def test_lines_are_what_the_model_says_image_by_image(
    config: PredictConfig, folder: Path, weights: Path, whole: dict[str, bytes]
) -> None:
    model = load(weights).eval()
    transform = create_transform(**resolve_model_data_config(model))
    rows = list(csv.DictReader(io.StringIO(whole[".csv"].decode())))
    assert [row["file"] for row in rows] == READABLE
    for row in rows:
        if row["file"] == "grey16.png":
            image = Image.fromarray(noise(4)[..., 0].astype(np.uint16) * 200 // 257).convert("RGB")
        else:
            with Image.open(folder / row["file"]) as file:
                image = file.convert("RGB")
                if row["file"] == "palette.png":  # transparent where its index is 3: white is seen there
                    pixels = np.array(image)
                    pixels[np.asarray(file) == 3] = 255
                    image = Image.fromarray(pixels)
        with torch.inference_mode():
            output = model(transform(image)[None], detailed=True)
        probabilities = output.logits[0].softmax(dim=0)
        order = probabilities.argsort(descending=True)[:3].tolist()
        assert [int(row[f"class_{place}"]) for place in (1, 2, 3)] == order
        told = torch.tensor([float(row[f"probability_{place}"]) for place in (1, 2, 3)])
        torch.testing.assert_close(told, probabilities[order], atol=2e-6, rtol=0)
        assert float(row["gmacs"]) == pytest.approx(macs(output.usage, model.shape).item() / 1e9, abs=1e-6)
        assert [int(row[f"tokens_{block}"]) for block in range(1, 5)] == output.usage.attended[0].tolist()
        assert len(row) == 1 + 2 * 3 + 1 + 4


def test_all_classes_are_told_where_there_are_fewer_than_asked_for(config: PredictConfig) -> None:
    predict_all(replace(config, top=8))
    with config.output.open() as lines:
        first = next(csv.DictReader(lines))
    assert len(first) == 1 + 2 * 7 + 1 + 4
    assert sum(float(first[f"probability_{place}"]) for place in range(1, 8)) == pytest.approx(1, abs=1e-5)


def test_json_lines_tell_the_same_as_csv(whole: dict[str, bytes]) -> None:
    rows = list(csv.reader(io.StringIO(whole[".csv"].decode())))[1:]
    for row, line in zip(rows, whole[".jsonl"].decode().splitlines(), strict=True):
        record = json.loads(line)
        told = [value for one in record["top"] for value in (one["class"], one["probability"])]
        flat = [record["file"], *told, record["gmacs"], *record["tokens"]]
        assert [str(value) if isinstance(value, str) else float(value) for value in flat] == [
            row[0],
            *(float(cell) for cell in row[1:]),
        ]


def test_paths_are_in_natural_order(tmp_path: Path) -> None:
    names = ["1.png", "2.png", "10.png", "A1.PNG", "a1.png", "a02.png", "a2/1.png", "a11.png", "x1²2.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == names


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_cut_output_is_completed_to_the_same_bytes(
    config: PredictConfig, whole: dict[str, bytes], suffix: str
) -> None:
    config = replace(config, output=config.output.with_suffix(suffix))
    predict_all(config)
    expected = whole[suffix]
    assert config.output.read_bytes() == expected
    lines = expected.splitlines(keepends=True)
    for cut in (0, 3, len(lines[0]), len(b"".join(lines[:3])) + 5, len(b"".join(lines[:6])) - 1, len(expected)):
        config.output.write_bytes(expected[:cut])
        earlier = expected[:cut].count(b"\n") - (suffix == ".csv")
        assert predict_all(config).earlier == max(0, earlier)
        assert config.output.read_bytes() == expected


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    config: PredictConfig, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, forward = [], AViT.run

    def stop_at_the_third(self: AViT, *arguments: Any) -> Any:
        calls.append(arguments[0].shape[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    monkeypatch.setattr(AViT, "run", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        predict.predict(config)
    kept = config.output.read_bytes()
    assert kept.count(b"\n") == 1 + calls[0] + calls[1]
    assert whole[".csv"].startswith(kept)
    assert predict_all(config).earlier == calls[0] + calls[1]
    assert config.output.read_bytes() == whole[".csv"]
    assert calls[3:] == calls[2:3]  # a batch whose missing images are still unreadable is not run again


def test_an_image_repaired_meanwhile_gets_its_line_in_its_place(config: PredictConfig, tmp_path: Path) -> None:
    names = [f"{index}.png" for index in range(6)]
    folder = tmp_path / "images"
    folder.mkdir()
    for seed, name in enumerate(names):
        Image.fromarray(noise(seed)).save(folder / name)
    good = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(good[:100])
    config = replace(config, folder=folder)
    assert [name for name, _ in predict.predict(config).unreadable] == ["1.png"]
    (folder / "1.png").write_bytes(good)
    result = predict.predict(config)
    assert (result.images, result.earlier, result.unreadable) == (6, 5, ())
    rows = list(csv.DictReader(io.StringIO(config.output.read_text())))
    assert [row["file"] for row in rows] == names


def test_processes_that_decode_change_nothing(config: PredictConfig, whole: dict[str, bytes]) -> None:
    predict_all(replace(config, workers=1))
    assert config.output.read_bytes() == whole[".csv"]


def on_one_of_two(rank: str, port: str, config: PredictConfig, told: Any) -> None:
    """What torchrun does, without importing everything twice."""
    everyone = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= everyone | {"OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank}
    PartialState._reset_state()
    told.put(predict.predict(config))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks processes")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_write_the_bytes_of_one_also_after_an_interruption(
    config: PredictConfig, whole: dict[str, bytes]
) -> None:
    predict_all(config)
    lines = whole[".csv"].splitlines(keepends=True)
    config.output.write_bytes(b"".join(lines[:2]))
    part = config.output.with_name("out.csv.part-2-of-3")  # left by three processes
    part.write_bytes(lines[0] + lines[6] + lines[7][:9])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    runs = [context.Process(target=on_one_of_two, args=(rank, port, config, told), daemon=True) for rank in "01"]
    for run in runs:
        run.start()
    results = [told.get(timeout=60) for _ in runs]
    for run in runs:
        run.join(timeout=60)
        assert run.exitcode == 0
    assert results[0] == results[1]
    assert (results[0].images, results[0].earlier) == (len(READABLE), 2)
    assert [name for name, _ in results[0].unreadable] == UNREADABLE
    assert config.output.read_bytes() == whole[".csv"]
    assert not list(config.output.parent.glob("*.part-*"))


def test_classes_are_named(config: PredictConfig) -> None:
    names = [f"class, {index}" for index in range(7)]
    config = replace(config, class_names=config.output.with_name("names.txt"))
    config.class_names.write_text("\n".join(names) + "\n")
    predict_all(config)
    rows = list(csv.DictReader(io.StringIO(config.output.read_text())))
    assert {row["class_1"] for row in rows} <= set(names)


def test_a_model_of_grey_images_and_half_precision(config: PredictConfig) -> None:
    path = config.output.with_name("grey.safetensors")
    vit = small_vit(in_chans=1, dtype=torch.bfloat16)
    save(FullConfig().build(vit), path)
    config = replace(config, model=str(path))
    with pytest.raises(ValueError, match="takes images of 1 channels and normalises 3"):
        predict.predict(config)
    vit.pretrained_cfg = vit.pretrained_cfg | {"mean": (0.5,), "std": (0.5,)}
    save(FullConfig().build(vit), path)
    predict_all(config)


def test_an_output_of_other_settings_is_refused_and_stays(config: PredictConfig, tmp_path: Path) -> None:
    predict_all(config)
    written = config.output.read_bytes()
    other = tmp_path / "other.safetensors"
    save(AViTConfig(gate_scale=4.0, gate_center=3.5).build(small_vit()), other)
    twin = tmp_path / "images"
    twin.symlink_to(config.folder)
    with pytest.raises(ValueError, match="made with another top: choose"):
        predict.predict(replace(config, top=2))
    with pytest.raises(ValueError, match="made with another model: choose"):
        predict.predict(replace(config, model=str(other)))
    with pytest.raises(ValueError, match="made with another folder: choose"):
        predict.predict(replace(config, folder=config.folder / "a"))
    predict_all(replace(config, folder=twin, batch_size=3))  # neither of these decides a line
    assert config.output.read_bytes() == written


def test_a_file_that_predict_did_not_write_is_refused_and_stays(config: PredictConfig) -> None:
    config.output.write_text("mine")
    with pytest.raises(ValueError, match=r"is there without its 'out\.csv\.settings\.json'"):
        predict.predict(config)
    assert config.output.read_text() == "mine"
    config.output.unlink()
    predict_all(config)
    written = config.output.read_text()
    twice = written.splitlines(keepends=True)[-1]
    for text in ("file,label\n", f"{written}gone.png,1\n", f"{written}\n", written + twice):
        config.output.write_text(text)
        with pytest.raises(ValueError, match="has lines that predict did not write"):
            predict.predict(config)
        assert config.output.read_text() == text


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"output": Path("out.txt")}, r"output must end in \.csv or \.jsonl, got 'out\.txt'"),
        ({"top": 0}, "top must be 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"workers": -1}, "workers must lie in 0..1024, got -1"),
        ({"device": "gpu"}, "device must be cpu, cuda, xpu or mps, or one of these with a number, got 'gpu'"),
    ],
)
def test_a_wrong_field_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PredictConfig(**{"model": "m", "folder": Path("f"), **wrong})


def test_what_is_missing_is_told_before_anything_is_written(config: PredictConfig, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    few, headless = tmp_path / "few.txt", tmp_path / "headless.safetensors"
    few.write_text("one\ntwo\n")
    save(FullConfig().build(small_vit(num_classes=0).eval()), headless)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"folder": tmp_path / "none"}, FileNotFoundError, "folder is .*none', which is not a folder"),
        ({"folder": empty}, ValueError, "folder .*empty' has no images or clips that can be read: there is no file"),
        ({"output": tmp_path / "none" / "out.csv"}, FileNotFoundError, "output lies in .*none', which is not"),
        ({"class_names": tmp_path / "none"}, FileNotFoundError, "class_names is .*none', which is not a file"),
        ({"class_names": few}, ValueError, "has 2 names, but .* has 7 classes"),
        ({"model": str(headless)}, ValueError, "headless.safetensors', which has no classes to tell"),
        ({"model": "nothing"}, ValueError, "neither an adaptvit file nor the name of a timm model"),
    ]
    for change, kind, said in wrong:
        with pytest.raises(kind, match=said):
            predict.predict(replace(config, **change))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows allows no such names")
def test_names_of_any_bytes_come_back_in_json_lines_and_line_breaks_are_refused_in_csv(
    config: PredictConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    strange = os.fsdecode(b"a\xff.png")
    Image.fromarray(noise(0)).save(folder / strange)
    config = replace(config, folder=folder)
    assert predict.predict(config).images == predict.predict(config).earlier == 1
    assert config.output.read_bytes().splitlines()[1].startswith(b"a\xff.png,")
    Image.fromarray(noise(0)).save(folder / "two\nlines.png")
    with pytest.raises(ValueError, match="has a line break"):
        predict.predict(config)
    config = replace(config, output=config.output.with_suffix(".jsonl"))
    assert predict.predict(config).images == predict.predict(config).earlier == 2
    assert {json.loads(line)["file"] for line in config.output.read_text().splitlines()} == {strange, "two\nlines.png"}


def test_an_unreadable_item_says_which_file_and_why(folder: Path) -> None:
    preparation = resolve_model_data_config(FullConfig().build(small_vit()))
    images = FolderImages(folder, UNREADABLE, preparation)
    (batch,) = DataLoader(images, batch_size=3, collate_fn=list)
    assert [item.name for item in batch] == UNREADABLE
    assert "truncated" in batch[2].reason


def test_a_second_run_on_one_output_is_refused(
    config: PredictConfig, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused, forward = [], AViT.run

    def start_another(self: AViT, *arguments: Any) -> Any:
        with pytest.raises(FileExistsError, match=r"another process is writing to '.*out\.csv'") as error:
            predict.predict(config)
        refused.append(error)
        return forward(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(AViT, "run", start_another)
        predict.predict(config)
    assert refused
    assert config.output.read_bytes() == whole[".csv"]
    predict_all(config)


def run_until(config: PredictConfig, told: Any) -> None:
    forward = AViT.run

    def wait_at_the_second(self: AViT, *arguments: Any) -> Any:
        if config.output.read_bytes().count(b"\n") > 1:
            told.put("there")
            multiprocessing.Event().wait()
        return forward(self, *arguments)

    AViT.run = wait_at_the_second
    predict.predict(config)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks processes")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_that_was_killed_is_no_obstacle(config: PredictConfig, whole: dict[str, bytes]) -> None:
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    other = context.Process(target=run_until, args=(config, told))
    other.start()
    told.get(timeout=60)
    with pytest.raises(FileExistsError, match="another process"):
        predict.predict(config)
    other.kill()
    other.join()
    assert predict_all(config).earlier > 0
    assert config.output.read_bytes() == whole[".csv"]


def test_names_that_a_spreadsheet_would_compute_are_text_and_found_again(config: PredictConfig, tmp_path: Path) -> None:
    folder, names = tmp_path / "images", ["+1.png", "-1.png", "'=1.png", "=1.png", "@1.png", "a.png"]
    folder.mkdir()
    for seed, name in enumerate(names):
        Image.fromarray(noise(seed)).save(folder / name)
    classes = tmp_path / "names.txt"
    classes.write_text("".join(f"=class {index}\n" for index in range(7)))
    config = replace(config, folder=folder, class_names=classes)
    assert predict.predict(config).images == 6
    rows = list(csv.DictReader(io.StringIO(config.output.read_text())))
    assert sorted(row["file"] for row in rows) == sorted([*(f"'{name}" for name in names[:-1]), "a.png"])
    assert all(row["class_1"].startswith("'=class ") for row in rows)
    written = config.output.read_bytes()
    config.output.write_bytes(b"".join(written.splitlines(keepends=True)[:4]))
    assert predict.predict(config).earlier == 3
    assert config.output.read_bytes() == written
    config = replace(config, output=config.output.with_suffix(".jsonl"))
    predict.predict(config)
    assert {json.loads(line)["file"] for line in config.output.read_text().splitlines()} == set(names)


@pytest.mark.parametrize("damage", ["", "{", "null", "{}", '{"model": 1}'])
def test_damaged_settings_are_named_and_the_output_stays(config: PredictConfig, damage: str) -> None:
    predict_all(config)
    written, record = config.output.read_bytes(), config.output.with_name("out.csv.settings.json")
    record.write_text(damage)
    with pytest.raises(
        ValueError, match=r"out\.csv\.settings\.json' is damaged.*: choose another output, or remove it"
    ):
        predict.predict(config)
    assert config.output.read_bytes() == written


def test_lines_of_another_version_are_not_gone_on_with(config: PredictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    predict_all(config)
    monkeypatch.setattr(predict, "version", lambda: "9.9")
    with pytest.raises(ValueError, match="was made with another version of adaptvit: choose"):
        predict.predict(config)


def test_a_full_disk_is_said_with_the_output_and_the_same_command_goes_on(
    config: PredictConfig, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, calls = predict._image_rows, []

    def full(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rows(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(predict, "_image_rows", full)
        with pytest.raises(OSError, match=r"out\.csv' cannot be written, the same command goes on .*No space left"):
            predict.predict(config)
    assert predict_all(config).earlier > 0
    assert config.output.read_bytes() == whole[".csv"]
