"""Shards of webdataset: every sample is used or named, and all bytes go through the one decoder."""

import copy
import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import METHODS, small_vit
from PIL import Image
from samples import SETTINGS, encoded, picture
from timm.data import create_transform
from torch.utils.data import DataLoader

from adaptvit import save
from adaptvit.cli import main
from adaptvit.data import DataConfig, Unreadable, collate, filled, open_data, open_split
from adaptvit.data.sets import Batch
from adaptvit.data.shards import Sample, Split, find_shards, flow
from adaptvit.training.loop import _Training, train
from adaptvit.training.recipe import Recipe
from adaptvit.training.resuming import Checkpoints


def shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def good(first: int, count: int = 4) -> dict[str, bytes]:
    """Samples of two classes in turns."""
    files = {}
    for number in range(first, first + count):
        files |= {f"{number:03}.png": encoded(picture(number)), f"{number:03}.cls": b"%d" % (number % 2)}
    return files


@pytest.fixture
def insects(tmp_path: Path) -> DataConfig:
    for number, name in enumerate(("train-0", "train-1", "val-0")):
        shard(tmp_path / "shards" / f"{name}.tar", good(4 * number))
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    return DataConfig(
        root=tmp_path / "shards",
        dataset="wds/insects",
        train_split="train-{0..1}.tar|8",
        test_split="val-0.tar",
        class_map=tmp_path / "names.txt",
        workers=0,
    )


def read(root: Path, split: str, **more: Any) -> tuple[dict[str, tuple[torch.Tensor, int]], dict[str, str]]:
    """By name the items of a split, and why others cannot be read."""
    samples = open_split(DataConfig(root=root, dataset="wds/x", **more), SETTINGS, split)
    items = {samples.name(index): samples[index] for index in range(len(samples))}
    unreadable = {name: item for name, item in items.items() if isinstance(item, Unreadable)}
    assert all(name == item.name for name, item in unreadable.items())
    return {name: item for name, item in items.items() if name not in unreadable}, {
        name: item.reason for name, item in unreadable.items()
    }


def test_shards_train_as_a_stream_and_are_evaluated_by_number(insects: DataConfig) -> None:
    data = open_data(insects, SETTINGS)
    assert data.classes == ("ant", "bee")
    assert data.name == "wds/insects (8 training and 4 test images)"
    (batch,) = DataLoader(data.train, batch_size=8, collate_fn=filled)
    assert sorted(batch.labels.tolist()) == [0, 0, 0, 0, 1, 1, 1, 1]
    (batch,) = DataLoader(data.test, batch_size=4, collate_fn=collate)
    assert batch.labels.tolist() == [0, 1, 0, 1]
    assert torch.equal(batch.images[0], create_transform(**SETTINGS)(picture(8)))
    assert [data.calibration.name(index) for index in (0, 7)] == ["train-0.tar/000.png", "train-1.tar/007.png"]


def test_labels_without_names_are_refused(insects: DataConfig) -> None:
    with pytest.raises(ValueError, match="does not name its classes: pass class_map"):
        open_data(DataConfig(**{**vars(insects), "class_map": None}), SETTINGS)


def test_what_cannot_be_used_of_a_shard_is_named_with_its_reason(tmp_path: Path) -> None:
    bomb = encoded(Image.new("1", (8000, 6000)))
    files = {
        "fine.png": encoded(picture(0)),
        "fine.cls": b"1\n",
        "text.jpg": b"no image",
        "text.cls": b"0",
        "script.jpg": encoded(picture(1), "EPS"),
        "script.cls": b"0",
        "bomb.png": bomb,
        "bomb.cls": b"0",
        "cut.jpg": encoded(picture(2), "JPEG")[:600],
        "cut.cls": b"0",
        "classless.png": encoded(picture(3)),
        "imageless.cls": b"0",
        "imageless.json": b"{}",
        "worded.png": encoded(picture(4)),
        "worded.cls": b"ant",
        "hidden.png": encoded(picture(5)),
        "hidden.cls": b"-1",
        "beyond.png": encoded(picture(6)),
        "beyond.cls": b"2",
        "._fine.png": b"of the file system",
        "README": b"of the shard",
    }
    shard(tmp_path / "val-0.tar", files)
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    items, unreadable = read(tmp_path, "val-0.tar", class_map=tmp_path / "names.txt")
    assert {name: label for name, (_, label) in items.items()} == {"val-0.tar/fine.png": 1}
    reasons = {
        "text.jpg": "not an image",
        "script.jpg": "not an image, or of none of the kinds",
        "bomb.png": "8000 x 6000 pixels are more than 40 million",
        "cut.jpg": "runcated",
        "classless.png": "it has no class: there is no .cls, but .png",
        "imageless": "it has no image, but .cls, .json",
        "worded.png": "its class is 'ant', which is no number",
        "hidden.png": "it has no class: its label is -1",
        "beyond.png": "its class is 2, but class_map has 2 names",
    }
    assert unreadable.keys() == {f"val-0.tar/{name}" for name in reasons}
    for name, reason in reasons.items():
        assert reason in unreadable[f"val-0.tar/{name}"]
    samples = open_split(DataConfig(root=tmp_path, dataset="wds/x"), SETTINGS, "val-0.tar")
    assert {one.kind: one.names for one in samples.left_out} == {
        "hidden": ("val-0.tar/._fine.png",),
        "without a name that tells its sample": ("val-0.tar/README",),
    }


def test_a_damaged_member_is_named_and_those_behind_it_are_read(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", good(0))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmember("001.png").offset
    content[start : start + 512] = bytes(range(256)) * 2
    path.write_bytes(content)
    items, unreadable = read(tmp_path, "a.tar")
    assert items.keys() == {"a.tar/000.png", "a.tar/002.png", "a.tar/003.png"}
    hole, lonely = sorted(unreadable)[1], "a.tar/001"
    assert hole.startswith(f"a.tar: bytes {start} to ")
    assert unreadable == {hole: unreadable[hole], lonely: "it has no image, but .cls"}
    assert "damaged" in unreadable[hole]


@pytest.mark.parametrize("broken", [b"no tar" * 300, b""])
def test_a_shard_that_is_no_tar_is_named_and_the_others_are_read(tmp_path: Path, broken: bytes) -> None:
    shard(tmp_path / "a-1.tar", good(0))
    (tmp_path / "a-0.tar").write_bytes(broken)
    items, unreadable = read(tmp_path, "a-{0..1}.tar")
    assert len(items) == 4
    assert set(unreadable) == {"a-0.tar"}


@pytest.mark.parametrize("ending", ["jpeg", "JPG", "bmp", "tif", "webp", "gif"])
def test_images_of_any_kind_are_read_upright(tmp_path: Path, ending: str) -> None:
    kind = {"tif": "TIFF", "jpg": "JPEG"}.get(ending.lower(), ending.upper())
    shard(tmp_path / "a.tar", {f"0.{ending}": encoded(picture(0), kind), "0.cls": b"0", "0.mask.png": b""})
    items, unreadable = read(tmp_path, "a.tar")
    assert (list(items), unreadable) == ([f"a.tar/0.{ending.lower()}"], {})


def test_pictures_in_shards_are_turned_as_the_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    shard(tmp_path / "a.tar", {"0.png": encoded(picture(0), exif=exif), "0.cls": b"0"})
    items, _ = read(tmp_path, "a.tar")
    upright = create_transform(**SETTINGS)(picture(0).transpose(Image.Transpose.ROTATE_270))
    assert torch.equal(items["a.tar/0.png"][0], upright)


def test_evaluate_counts_and_names_what_a_shard_does_not_give(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shard(tmp_path / "val-0.tar", good(0) | {"4.png": b"no image", "4.cls": b"0", "notes": b""})
    shard(tmp_path / "val-1.tar", {"5.png": encoded(picture(5))})
    save(METHODS["full"].build(small_vit().eval()), tmp_path / "model.safetensors")
    words = ["evaluate", str(tmp_path / "model.safetensors"), str(tmp_path), "--dataset=wds/x", "--rounds=0"]
    words += ["--json", str(tmp_path / "figures.json"), "--split=val-{0..1}.tar", "--workers=2", "--batch_size=2"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "left out: 1 without a name that tells its sample: 'val-0.tar/notes'" in said
    assert "cannot read val-0.tar/4.png: not an image" in said
    assert "cannot read val-1.tar/5.png: it has no class" in said
    assert "2 images could not be read" in said
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["images"], figures["unreadable"]) == (4, 2)


def test_training_names_what_takes_no_part(insects: DataConfig, tmp_path: Path) -> None:
    shard(tmp_path / "shards" / "train-1.tar", {"bad.png": b"", "bad.cls": b"0"} | good(5, 3))
    (batch,) = DataLoader(open_data(insects, SETTINGS).train, batch_size=8, collate_fn=filled)
    assert [name for name, _ in batch.unreadable] == ["train-1.tar/bad.png"]
    assert len(batch.labels) == 8


def names(samples: list[Sample]) -> list[str]:
    return [sample.name for sample in samples]


@pytest.mark.parametrize("places", [1, 2, 3, 4])
def test_readers_share_an_epoch(tmp_path: Path, places: int) -> None:
    """Shards are dealt out whole to two, sample by sample to three or four."""
    for number in (0, 1):
        shard(tmp_path / f"{number}.tar", good(6 * number, 6))
    split = find_shards(tmp_path, "{0..1}.tar", "x")
    parts = [names(list(flow(split, place, places, 12 // places, seed=3))) for place in range(places)]
    everything = [name for part in parts for name in part]
    assert sorted(everything) == [f"{number // 6}.tar/{number:03}.png" for number in range(12)]
    assert parts == [names(list(flow(split, place, places, 12 // places, seed=3))) for place in range(places)]
    assert parts != [names(list(flow(split, place, places, 12 // places, seed=4))) for place in range(places)]


def test_an_epoch_longer_than_its_shards_begins_again(tmp_path: Path) -> None:
    split = find_shards(shard(tmp_path / "0.tar", good(0)).parent, "0.tar", "x")
    assert set(Counter(names(list(flow(split, 0, 1, 12, seed=0)))).values()) == {3}
    shard(tmp_path / "0.tar", {})
    with pytest.raises(ValueError, match=r"none of the shards 0\.tar has a sample"):
        next(flow(split, 0, 1, 12, seed=0))


def test_a_streams_order_follows_its_epoch_with_workers_and_without(insects: DataConfig) -> None:
    train = open_data(insects, SETTINGS).train
    orders = []
    for seed, workers in ((1, 0), (1, 0), (2, 0), (1, 2)):
        train.set_epoch(seed)
        batches = DataLoader(train, batch_size=4, collate_fn=filled, num_workers=workers)
        orders.append([label for batch in batches for label in batch.labels.tolist()])
    assert len(orders[0]) == len(orders[3]) == 8
    assert orders[0] == orders[1]
    assert sorted(orders[3]) == sorted(orders[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_goes_on_within_an_epoch_of_a_stream_as_if_nothing_had_happened(
    insects: DataConfig, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the first epoch and in the second, after checkpoints at steps 2 and 4 of their 8."""
    data = open_data(replace(insects, workers=workers), SETTINGS)
    model = METHODS["adavit"].build(small_vit(depth=2, num_classes=2)).train()
    recipe = Recipe(
        epochs=2, batch_size=1, accumulate=2, warmup_epochs=0, evaluate_every=0, ema_decay=0.5, checkpoint_every=1
    )
    whole, resumed = copy.deepcopy(model), copy.deepcopy(model)
    history = train(whole, data, recipe, tmp_path / "whole")
    steps: list[int] = []
    step = _Training._step
    for last in (5, 8 + 3):

        def stopped(self: _Training, number: int, batch: Batch, last: int = last) -> Any:
            if number == last:
                raise KeyboardInterrupt
            steps.append(number)
            return step(self, number, batch)

        monkeypatch.setattr(_Training, "_step", stopped)
        trained = copy.deepcopy(model)
        with pytest.raises(KeyboardInterrupt):
            train(trained, data, recipe, tmp_path / "resumed")
        (part,) = (tmp_path / "resumed").glob("part-*.pt")
    kept = Checkpoints(part.parent, part.stem.removeprefix("part-"))
    told = rf"other processes \(1 that train, {workers} that decode .* \(2 that train, .*; epoch 2 begins anew"
    with pytest.warns(UserWarning, match=told):
        assert kept.read_part(1, [2, workers], tells=True) is None
    assert kept.read_part(2, [1, workers], tells=True) is None
    monkeypatch.setattr(_Training, "_step", step)
    again = train(resumed, data, recipe, tmp_path / "resumed")
    assert steps == [*range(5), *range(4, 8 + 3)]
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert [replace(one, seconds=0) for one in again] == [replace(one, seconds=0) for one in history]
    assert not [*(tmp_path / "resumed").glob("part-*")]


def test_splits_are_told_by_braces_or_by_a_file(tmp_path: Path) -> None:
    info = {
        "train": {"filenames": ["t-08.tar", "t-09.tar", "t-10.tar"], "shard_lengths": [4, 4, 3], "alt_label": "kind.id"}
    }
    for name in (*info["train"]["filenames"], "v-a.tar", "v-b.tar"):
        shard(tmp_path / name, {"0.png": encoded(picture(0)), "0.cls": b"0", "0.json": b'{"kind": {"id": 1}}'})
    (tmp_path / "_info.json").write_text(json.dumps({"splits": info}))
    told = Split(tmp_path, tuple(info["train"]["filenames"]), 11, "kind.id", None)
    assert find_shards(tmp_path, "train", "x") == told
    assert find_shards(tmp_path, "t-{08..10}.tar", "x") == told
    assert find_shards(tmp_path, "t-{08..10}.tar|7", "x").count == 7
    assert find_shards(tmp_path, "v-{a,b}.tar", "x") == Split(tmp_path, ("v-a.tar", "v-b.tar"), None, "", None)
    assert find_shards(tmp_path, "v-a.tar::t-09.tar", "x").shards == ("v-a.tar", "t-09.tar")
    items, _ = read(tmp_path, "train")
    assert [label for _, label in items.values()] == [1, 1, 1]


@pytest.mark.parametrize(
    ("split", "info", "error", "said"),
    [
        ("val", None, FileNotFoundError, r"x has no split 'val': its info.json is not there; name shards, as in"),
        ("val", '{"splits": {}}', FileNotFoundError, r"x has no split 'val'"),
        ("val", '{"splits": 3}', ValueError, r"x: '.*info.json' does not tell its splits as webdataset does"),
        ("val", "no json", ValueError, r"x: '.*info.json' does not tell its splits"),
        ("a-{0..3}.tar", None, FileNotFoundError, r"x has no shard '.*a-1.tar'"),
        ("a-0.tar|many", None, ValueError, r"after \| comes the number of its samples, got 'many'"),
        ("a-0.tar|0", None, ValueError, r"after \| comes the number of its samples, got '0'"),
        ("folder.tar", None, OSError, r"'.*folder.tar' is a folder, not a file"),
    ],
)
def test_a_split_that_is_none_is_refused(
    tmp_path: Path, split: str, info: str | None, error: type[Exception], said: str
) -> None:
    shard(tmp_path / "a-0.tar", good(0))
    (tmp_path / "folder.tar").mkdir()
    if info is not None:
        (tmp_path / "info.json").write_text(info)
    with pytest.raises(error, match=said):
        find_shards(tmp_path, split, "x")
