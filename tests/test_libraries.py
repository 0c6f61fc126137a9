"""Data sets of the Hub and of torchvision: every image through the one decoder, used or named."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from samples import SETTINGS, encoded, picture
from timm.data import create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from adaptvit.data import DataConfig, Samples, Unreadable, class_names, collate, open_data, open_split, sets
from adaptvit.data.libraries import TorchImages

NEEDED = "the extra `data` is not installed"


def turned(seed: int) -> tuple[bytes, torch.Tensor]:
    """A picture that a camera held on its side wrote, and as it is to be seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = picture(seed).transpose(Image.Transpose.ROTATE_270)
    return encoded(picture(seed), exif=exif), create_transform(**SETTINGS)(upright)


def folder(root: Path, splits: tuple[str, ...] = ("train", "validation")) -> Path:
    for split in splits:
        for label, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for number in range(3):
                picture(10 * label + number).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a data set in the Hub's format of rows (bytes, label)."""
    datasets = pytest.importorskip("datasets", reason=NEEDED)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def make(rows: list[tuple[bytes | None, Any]], label: Any = None, column: str = "label") -> DataConfig:
        features = datasets.Features(
            {"image": datasets.Image(), column: label or datasets.ClassLabel(names=["ant", "bee"])}
        )
        values = {"image": [content and {"bytes": content, "path": None} for content, _ in rows]}
        values[column] = [one for _, one in rows]
        (tmp_path / "set").mkdir()
        made = datasets.Dataset.from_dict(values, features=features)
        made.to_parquet(tmp_path / "set" / "validation-00000-of-00001.parquet")
        (tmp_path / "set" / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: validation\n    path: validation-*\n"
            f"dataset_info:\n  features:\n{_yaml(made)}  splits:\n  - name: validation\n    num_examples: {len(rows)}\n"
            f"    num_bytes: 1\n  download_size: 1\n  dataset_size: 1\n---\n"
        )
        return DataConfig(root=tmp_path / "cache", dataset=f"hfds/{tmp_path / 'set'}", workers=0)

    return make


def _yaml(made: Any) -> str:
    import yaml

    lines = yaml.safe_dump(made.features._to_yaml_list()).splitlines()
    return "".join(f"  {line}\n" for line in lines)


def items(samples: Samples) -> list[Any]:
    return [samples[index] for index in range(len(samples))]


def test_a_folder_in_the_format_of_the_hub(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason=NEEDED)
    folder(tmp_path / "images")
    bad = {"empty.png": b"", "text.jpg": b"no image", "cut.jpg": encoded(picture(0), "JPEG")[:600]}
    for name, content in bad.items():
        (tmp_path / "images" / "validation" / "bee" / name).write_bytes(content)
    data = open_data(DataConfig(root=tmp_path / "cache", dataset=f"hfds/{tmp_path / 'images'}", workers=0), SETTINGS)
    assert data.classes == ("ant", "bee")
    assert (len(data.train), len(data.test)) == (6, 9)
    batch = collate(items(data.test))
    assert batch.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert sorted(Path(name).name for name, _ in batch.unreadable) == ["cut.jpg", "empty.png", "text.jpg"]
    assert torch.equal(data.test[0][0], create_transform(**SETTINGS)(picture(0)))


def test_rows_of_the_hub_that_cannot_be_used_are_named_with_their_reason(hub: Any) -> None:
    sideways, upright = turned(1)
    rows = [
        (encoded(picture(0)), 0),
        (sideways, 1),
        (None, 1),
        (b"", 1),
        (encoded(picture(2), "EPS"), 1),
        (encoded(Image.new("1", (8000, 6000))), 1),
        (encoded(picture(3)), None),
        (encoded(picture(4)), -1),
        (encoded(picture(5).convert("L")), 1),
    ]
    samples = open_split(hub(rows), SETTINGS, "validation")
    found = items(samples)
    assert [item[1] for item in found if not isinstance(item, Unreadable)] == [0, 1, 1]
    assert torch.equal(found[1][0], upright)
    reasons = {
        2: "there is no image in this row",
        3: "not an image",
        4: "not an image, or of none of the kinds",
        5: "more than 40 million",
        6: "it has no class",
        7: "it has no class: its label is -1",
    }
    for index, item in enumerate(found):
        assert isinstance(item, Unreadable) == (index in reasons)
        if index in reasons:
            assert item.name == samples.name(index) == f"image {index}"
            assert reasons[index] in item.reason


@pytest.mark.parametrize("texts", [False, True])
def test_a_class_map_numbers_a_data_set_of_the_hub(hub: Any, tmp_path: Path, texts: bool) -> None:
    """Whether its labels are numbers of classes that it names, or the names themselves."""
    datasets = pytest.importorskip("datasets", reason=NEEDED)
    kinds = ["bee", "ant", "cow"]
    told = [1, 0, 2, 1]
    rows = [(encoded(picture(number)), kinds[label] if texts else label) for number, label in enumerate(told)]
    rows.append((encoded(picture(9)), None))
    source = hub(rows, datasets.Value("string") if texts else datasets.ClassLabel(names=kinds))
    (tmp_path / "names.txt").write_text("Ant\nwasp\nBee\n")
    samples = open_split(DataConfig(**vars(source) | {"class_map": tmp_path / "names.txt"}), SETTINGS, "validation")
    assert class_names(samples) == ("Ant", "wasp", "Bee")
    found = items(samples)
    assert [item[1] for item in found[:3]] == [0, 2, 0]
    assert [(item.name, item.reason) for item in found[3:]] == [("image 4", "it has no class")]
    assert [(one.kind, one.names) for one in samples.left_out] == [("classes that class_map does not name", ("cow",))]
    assert torch.equal(found[2][0], create_transform(**SETTINGS)(picture(3)))
    (tmp_path / "names.txt").write_text("zebra\n")
    with pytest.raises(ValueError, match=r"class_map names none of the classes of data set 'hfds/.*', the first being"):
        open_split(DataConfig(**vars(source) | {"class_map": tmp_path / "names.txt"}), SETTINGS, "validation")


def test_a_data_set_without_labels_is_refused(hub: Any) -> None:
    with pytest.raises(ValueError, match="has no column 'label', but 'image', 'kind'"):
        open_split(hub([(encoded(picture(0)), 0)], column="kind"), SETTINGS, "validation")


def test_a_damaged_data_set_of_the_hub_is_refused_in_one_sentence(hub: Any, tmp_path: Path) -> None:
    source = hub([(encoded(picture(0)), 0)])
    (tmp_path / "set" / "validation-00000-of-00001.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"data set 'hfds/.*' has no images that can be read: ") as refusal:
        open_split(source, SETTINGS, "validation")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_of_the_hub_gives_what_its_rows_give(hub: Any, workers: int) -> None:
    sideways, _ = turned(1)
    rows = [(encoded(picture(0)), 0), (sideways, 1), (b"no image", 1), (encoded(picture(2), "EPS"), 0), (None, 1)]
    rows.append((encoded(picture(4)), -1))
    source = hub(rows)
    by_number = collate(items(open_split(source, SETTINGS, "validation")))
    stream = open_split(DataConfig(**vars(source) | {"dataset": "hfids" + source.dataset[4:]}), SETTINGS, "validation")
    (batch,) = DataLoader(stream, batch_size=6, collate_fn=collate, num_workers=workers)
    assert torch.equal(batch.images, by_number.images)
    assert batch.labels.tolist() == [0, 1]
    assert [item.reason for item in batch.unreadable] == [item.reason for item in by_number.unreadable]
    assert len({item.name for item in batch.unreadable}) == 4


def test_processes_share_a_stream_to_train_on_and_each_evaluates_all_of_it(
    hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason=NEEDED)
    source = hub([(encoded(picture(number)), number) for number in range(6)], datasets.ClassLabel(names=list("abcdef")))
    source = DataConfig(**vars(source) | {"dataset": "hfids" + source.dataset[4:]})
    labels = []
    for rank in (0, 1):
        monkeypatch.setattr(sets, "place", lambda rank=rank: (rank, 2))
        train = open_split(source, SETTINGS, "validation", augment=True)
        train.set_epoch(5)
        assert len(train) == 3
        labels.append([label for _, label in train])
        test = open_split(source, SETTINGS, "validation")
        assert [label for _, label in test] == [*range(6)]
        assert len(test) == 6
    assert sorted(labels[0] + labels[1]) == [*range(6)]


def test_torchvisions_folders_are_read_by_the_one_decoder(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
    sideways, upright = turned(1)
    (tmp_path / "ant" / "0.png").write_bytes(sideways)
    (tmp_path / "ant" / "1.png").write_bytes(encoded(picture(2), "EPS"))
    (tmp_path / "bee" / "2.png").write_bytes(encoded(Image.new("1", (8000, 6000))))
    os.mkfifo(tmp_path / "bee" / "3.png")
    picture(4).convert("RGBA").save(tmp_path / "bee" / "4.png")
    samples = Samples(TorchImages(ImageFolder(tmp_path), None, "x"), 3, create_transform(**SETTINGS))
    found = items(samples)
    assert class_names(samples) == ("ant", "bee")
    assert torch.equal(found[0][0], upright)
    assert [item[1] for item in (found[0], found[4])] == [0, 1]
    for index, reason in ((1, "none of the kinds"), (2, "more than 40 million"), (3, "is a named pipe, not a file")):
        assert found[index].name == str(tmp_path / ("ant" if index == 1 else "bee") / f"{index}.png")
        assert reason in found[index].reason


def test_a_folder_by_torchvisions_name_is_read_as_all_folders_and_numbered_as_torchvision_does(tmp_path: Path) -> None:
    for name in ("c2", "c10", "c1", ".ipynb_checkpoints"):
        (tmp_path / "val" / name).mkdir(parents=True)
        picture(0).save(tmp_path / "val" / name / "0.bmp")
    samples = open_split(DataConfig(root=tmp_path, dataset="torch/image_folder"), SETTINGS, "validation")
    assert class_names(samples) == ("c1", "c10", "c2")
    assert {samples.name(index): samples[index][1] for index in range(3)} == {
        "c1/0.bmp": 0,
        "c10/0.bmp": 1,
        "c2/0.bmp": 2,
    }
    assert [one.names for one in samples.left_out] == [(".ipynb_checkpoints",)]


class Arrays:
    """A data set of torchvision's that holds its images decoded, of any kind."""

    def __init__(self, images: list[Any], labels: list[int], **more: Any) -> None:
        self.images, self.targets = images, labels
        vars(self).update(more)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], self.targets[index]


class Unlisted:
    classes = ("ant",)

    def __len__(self) -> int:
        return 1


def test_a_class_map_numbers_a_data_set_of_torchvisions(tmp_path: Path) -> None:
    source = Arrays([picture(0), picture(1), picture(2)], torch.tensor([1, 0, 2]), classes=["bee", "ant", "cow"])
    samples = Samples(TorchImages(source, ["ant", "wasp", "bee"], "x"), 3, create_transform(**SETTINGS))
    assert class_names(samples) == ("ant", "wasp", "bee")
    assert [item[1] for item in items(samples)] == [0, 2]
    assert [one.names for one in samples.left_out] == [("cow",)]
    with pytest.raises(ValueError, match="x does not list its labels, so that class_map cannot number them"):
        TorchImages(Unlisted(), ["ant"], "x")


def test_classes_of_one_name_stay_two() -> None:
    source = Arrays([], [], wnids=["n1", "n2"], classes=[("crane",), ("crane",)], class_to_idx={"crane": 1})
    assert TorchImages(source, None, "x").class_to_idx == {"n1": 0, "n2": 1}
