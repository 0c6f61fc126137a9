import io
import random
import struct
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from samples import SETTINGS
from timm.data import create_transform
from torch.utils.data import DataLoader

from adaptvit import FullConfig
from adaptvit.data import (
    HELD_OUT,
    DataConfig,
    Unreadable,
    collate,
    filled,
    open_data,
    open_digits,
    open_split,
)
from adaptvit.data import sets as data_module
from adaptvit.training.loop import train
from adaptvit.training.recipe import Recipe

PLAIN = DataConfig(workers=0)


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (48, 40)) -> Image.Image:
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def folder(root: Path, splits: tuple[str, ...] = ("train", "val"), classes: tuple[str, ...] = ("ant", "bee")) -> Path:
    """Three noise PNGs for each split and class."""
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                picture(10 * label + i + 100 * (split == "train")).save(root / split / name / f"{i}.png")
    return root


def config(root: Path | None, **changes: Any) -> DataConfig:
    return DataConfig(**{"root": root, "workers": 0, **changes})


def spoil(place: Path) -> dict[str, bytes]:
    """Files that no decoder reads."""
    buffer = io.BytesIO()
    picture(1).save(buffer, "JPEG")
    spoiled = {
        "truncated.jpg": buffer.getvalue()[: len(buffer.getvalue()) // 2],
        "empty.png": b"",
        "text.jpg": b"not an image",
    }
    for name, content in spoiled.items():
        (place / name).write_bytes(content)
    return spoiled


def wide(grey: np.ndarray, path: Path) -> None:
    """An 8-bit grey image as a 16-bit PNG."""
    Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    assert struct.unpack(">B", path.read_bytes()[24:25])[0] == 16


def test_every_digit_is_in_one_split_and_every_class_in_both() -> None:
    data = open_digits()
    assert (len(data.train), len(data.test)) == (1797 - HELD_OUT, HELD_OUT)
    for split in (data.train, data.test):
        assert set(split.labels.tolist()) == set(range(10))


def test_an_item_is_a_normalised_image_and_its_label() -> None:
    data = open_digits(size=24, margin=2)
    image, label = data.test[0]
    assert (image.shape, image.dtype, type(label)) == ((1, 24, 24), torch.float32, int)
    assert data.train.images.mean().abs() < 1e-5
    assert data.train.images.std().sub(1).abs() < 1e-5
    pixels = data.pixels(image)
    assert pixels.min() >= 0
    assert pixels.max() <= 1


def test_the_margin_is_black() -> None:
    pixels = open_digits(size=32, margin=4).pixels(open_digits(size=32, margin=4).test.images)
    edge = torch.ones(32, 32, dtype=torch.bool)
    edge[4:-4, 4:-4] = False
    torch.testing.assert_close(pixels[..., edge], torch.zeros_like(pixels[..., edge]), atol=1e-6, rtol=0)


def test_training_images_move_and_test_images_do_not() -> None:
    data = open_digits()
    assert not torch.equal(data.train[0][0], data.train[0][0])
    assert torch.equal(data.test[0][0], data.test[0][0])


def test_augmentation_follows_the_global_seed() -> None:
    data, visits = open_digits(), []
    for _ in range(2):
        torch.manual_seed(3)
        visits.append(data.train[5][0])
    assert torch.equal(*visits)


def test_a_margin_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"margin must lie in \[0, 8\).*got 8"):
        open_digits(size=16, margin=8)


def test_a_folder_has_the_labels_of_its_folders_names(tmp_path: Path) -> None:
    data = open_data(config(folder(tmp_path, classes=("bee", "ant", "cow"))), SETTINGS)
    assert data.classes == ("ant", "bee", "cow")
    assert [label for _, label in data.test] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (data.channels, data.size, data.mean, data.std) == (3, 32, SETTINGS["mean"], SETTINGS["std"])
    assert data.name == f"{tmp_path.name} (9 training and 9 test images)"
    assert data.test.name(3) == "bee/0.png"


def test_a_class_map_numbers_the_classes(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("bee\nant\n")
    data = open_data(config(folder(tmp_path / "images"), class_map=names), SETTINGS)
    assert data.classes == ("bee", "ant")
    assert {data.test.name(i).split("/")[0]: data.test[i][1] for i in range(6)} == {"bee": 0, "ant": 1}


def test_images_are_prepared_as_timm_prepares_them(tmp_path: Path) -> None:
    data = open_data(config(folder(tmp_path)), SETTINGS)
    transform = create_transform(**SETTINGS)
    for split, name in ((data.test, "val"), (data.calibration, "train")):
        expected = transform(Image.open(tmp_path / name / "ant" / "1.png").convert("RGB"))
        assert torch.equal(split[1][0], expected)


def test_what_the_config_says_goes_before_what_the_model_wants(tmp_path: Path) -> None:
    changed = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear", "crop_pct": 1.0}
    data = open_data(config(folder(tmp_path), **changed), SETTINGS)
    expected = create_transform(**SETTINGS | changed)(Image.open(tmp_path / "val" / "ant" / "0.png"))
    assert torch.equal(data.test[0][0], expected)
    assert (data.mean, data.std) == (changed["mean"], changed["std"])


def test_one_channel_models_see_grey(tmp_path: Path) -> None:
    grey = {**SETTINGS, "input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}
    image, _ = open_data(config(folder(tmp_path)), grey).test[0]
    expected = create_transform(**grey)(Image.open(tmp_path / "val" / "ant" / "0.png").convert("L"))
    assert torch.equal(image, expected)


def test_only_training_images_are_augmented(tmp_path: Path) -> None:
    data = open_data(config(folder(tmp_path)), SETTINGS)
    torch.manual_seed(0)
    assert not torch.equal(data.train[0][0], data.train[0][0])
    for split in (data.calibration, data.test):
        assert torch.equal(split[0][0], split[0][0])


def test_augmentation_off_leaves_crops_whole(tmp_path: Path) -> None:
    data = open_data(config(folder(tmp_path), scale=(1.0, 1.0), hflip=0.0, interpolation="bicubic"), SETTINGS)
    assert data.train[0][0].shape == (3, 32, 32)
    flipped = open_data(config(tmp_path, scale=(1.0, 1.0), hflip=1.0, interpolation="bicubic"), SETTINGS)
    random.seed(0)  # timm crops by Python's own
    torch.manual_seed(0)
    plain = data.train[0][0]
    random.seed(0)
    torch.manual_seed(0)
    torch.testing.assert_close(flipped.train[0][0], plain.flip(-1), atol=0.05, rtol=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tar_file_for_each_split(tmp_path: Path, workers: int) -> None:
    folder(tmp_path / "loose")
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(tmp_path / "loose" / split, arcname="")
    packed = open_data(config(tmp_path, train_split="train.tar", test_split="val.tar"), SETTINGS)
    loose = open_data(config(tmp_path / "loose"), SETTINGS)
    assert packed.classes == loose.classes
    batches = [next(iter(DataLoader(d.test, 6, num_workers=workers, collate_fn=collate))) for d in (packed, loose)]
    assert torch.equal(batches[0].images, batches[1].images)
    assert torch.equal(batches[0].labels, batches[1].labels)


def test_evaluation_names_counts_and_leaves_out_what_cannot_be_read(tmp_path: Path) -> None:
    folder(tmp_path)
    whole = [image for image, _ in open_data(config(tmp_path), SETTINGS).test]
    spoiled = spoil(tmp_path / "val" / "ant")
    split = open_split(config(tmp_path), SETTINGS, "validation")
    batch = collate([split[i] for i in range(len(split))])
    assert {name for name, _ in batch.unreadable} == {f"ant/{name}" for name in spoiled}
    assert all(reason for _, reason in batch.unreadable)
    assert torch.equal(batch.images, torch.stack(whole))
    assert batch.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_batch_of_nothing_readable_is_empty() -> None:
    batch = collate([Unreadable("a.png", "empty")])
    assert (len(batch.images), len(batch.labels), batch.unreadable) == (0, 0, [Unreadable("a.png", "empty")])


def test_training_fills_the_place_of_an_unreadable_image_from_its_batch(tmp_path: Path) -> None:
    folder(tmp_path)
    spoil(tmp_path / "train" / "ant")
    data = open_data(config(tmp_path), SETTINGS)
    loader = DataLoader(data.calibration, batch_size=9, collate_fn=filled)
    (batch,) = loader
    assert (batch.images.shape, len(batch.unreadable)) == ((9, 3, 32, 32), 3)
    assert torch.equal(batch.images[6:], batch.images[:3])
    assert torch.equal(batch.labels[6:], batch.labels[:3])


def test_filling_turns_to_an_image_more_than_once_if_it_must() -> None:
    batch = filled([(torch.ones(1, 2, 2), 4), Unreadable("a", "x"), Unreadable("b", "y"), Unreadable("c", "z")])
    assert batch.labels.tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_batch_of_nothing_readable_is_refused(workers: int, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for kind in ("ant", "bee"):
            (tmp_path / split / kind).mkdir(parents=True)
            (tmp_path / split / kind / "a.png").write_text("no picture")
    data = open_data(replace(config(tmp_path), workers=workers), SETTINGS)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=1, num_heads=2, num_classes=2)
    with pytest.raises(ValueError, match=r"^none of 2 images can be read, the first being '[a-z]{3}/a.png': not an im"):
        train(FullConfig().build(vit), data, Recipe(epochs=1, warmup_epochs=0, batch_size=2), tmp_path / "out")


IMAGE = torch.zeros(3, 4, 4)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"image": IMAGE, "label": 0}, "dict"),
        ((Image.new("RGB", (4, 4)), 0), "Image, int"),
        ((IMAGE.numpy(), 0), "ndarray, int"),
        ((IMAGE, 0, "a.png"), "Tensor, int, str"),
        (IMAGE, "Tensor"),
        ((IMAGE, 1.5), "Tensor, float"),
        ((IMAGE, torch.eye(2)), "Tensor, Tensor"),
        ((IMAGE.byte(), 0), "torch.uint8, 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_items_that_are_no_images_with_labels_are_named(item: object, said: str) -> None:
    with pytest.raises(TypeError, match=rf"must be \(normalised image, label\), .*, got \({said}\)"):
        collate([(IMAGE, 0), item])


def test_whole_numbers_of_any_kind_are_labels_and_images_of_other_shapes_are_refused() -> None:
    labels = [3, np.int64(3), torch.tensor(3), torch.tensor([3])]
    assert collate([(IMAGE, label) for label in labels]).labels.tolist() == [3] * 4
    with pytest.raises(ValueError, match=r"must have one shape, got \(3, 2, 2\) and \(3, 4, 4\)"):
        collate([(IMAGE, 0), (torch.zeros(3, 2, 2), 0)])


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_grey_looks_like_its_eight_bits(tmp_path: Path, channels: int) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    wide(grey, tmp_path / "wide.png")
    with (tmp_path / "wide.png").open("rb") as file:
        image = np.asarray(data_module.read_image(file, channels))
    assert np.array_equal(image if channels == 1 else image[..., 0], grey)


def odd(path: Path) -> None:
    """One readable image for each of the modes that trip decoders, in the folder of a class."""
    picture(0).convert("CMYK").save(path / "cmyk.jpg")
    wide(np.asarray(picture(1, "L")), path / "wide.png")
    palette = picture(2).convert("P")
    palette.info["transparency"] = bytes(range(256))
    palette.save(path / "palette.png", transparency=bytes(range(256)))
    picture(3).convert("RGBA").save(path / "alpha.png")
    picture(4, "L").convert("LA").save(path / "grey-alpha.png")
    picture(5, "L").convert("1").save(path / "bits.png")
    frames = [picture(i) for i in (6, 7)]
    frames[0].save(path / "moving.png", save_all=True, append_images=frames[1:])
    moving = io.BytesIO()
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    (path / "gif.jpg").write_bytes(moving.getvalue())


def test_odd_images_are_read(tmp_path: Path) -> None:
    (tmp_path / "val" / "odd").mkdir(parents=True)
    odd(tmp_path / "val" / "odd")
    split = open_split(config(tmp_path), SETTINGS, "val")
    items = {split.name(i): split[i] for i in range(len(split))}
    assert len(items) == 8
    assert not [item for item in items.values() if isinstance(item, Unreadable)]
    assert all(item[0].shape == (3, 32, 32) and item[0].std() > 0.1 for item in items.values())
    first = create_transform(**SETTINGS)(picture(6))
    assert torch.equal(items["odd/moving.png"][0], first)


@pytest.mark.parametrize(
    ("made", "changes", "error", "message"),
    [
        ([], {"root": "absent"}, FileNotFoundError, r"data folder '.*absent' does not exist"),
        ([], {}, FileNotFoundError, r"has no folder 'train' and none 'validation'"),
        (["train/ant", "val/ant"], {}, ValueError, r"images of the class 'ant' only to train on; two"),
        (["ant", "bee"], {}, FileNotFoundError, r"has no folder 'train' and none 'validation'"),
        (["train/ant", "train/bee"], {}, FileNotFoundError, r"has no folder 'validation'"),
        (["val/ant", "val/bee"], {}, FileNotFoundError, r"has no folder 'train'"),
        (
            ["train/ant", "train/bee", "val/ant", "val/cow"],
            {},
            ValueError,
            r"other classes to test on than the 2 to train on: only 'train' has 'bee', only 'validation' has 'cow'",
        ),
        (["train/ant", "train/bee", "val/ant"], {}, ValueError, r"than the 2 to train on: only 'train' has 'bee'$"),
        (
            ["train/ant", "val/ant"],
            {"class_map": "no.txt"},
            FileNotFoundError,
            r"class_map is '.*no.txt', which is not a file",
        ),
        (["train/ant", "val/ant"], {"class_map": "map.csv"}, ValueError, r"class_map must be a .txt file.*'map.csv'"),
        (["train/ant"], {"class_map": "other.txt"}, FileNotFoundError, r"has no folder 'validation'"),
        (["train/ant", "val/ant"], {"class_map": "other.txt"}, ValueError, r"class_map names none of .* being 'ant'"),
        (["val/ant"], {"train_split": "empty.tar"}, ValueError, r"no images that can be read"),
        (["val/ant"], {"train_split": "bad.tar"}, ValueError, r"no images that can be read"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_refused_in_one_sentence(
    tmp_path: Path, made: list[str], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    for name in made:
        (tmp_path / name).mkdir(parents=True)
        picture(0).save(tmp_path / name / "0.png")
    (tmp_path / "map.csv").write_text("ant\n")
    (tmp_path / "other.txt").write_text("zebra\n")
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    paths = {name: value if name.endswith("split") else tmp_path / value for name, value in changes.items()}
    with pytest.raises(error, match=message) as refusal:
        open_data(config(**{"root": tmp_path, **paths}), SETTINGS)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "value"), [("workers", -1), ("repeated_augmentation", -1), ("hflip", 1.5), ("re_prob", -0.1)]
)
def test_a_config_outside_its_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"DataConfig.{field} must .*, got {value}"):
        DataConfig(**{field: value})


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("datasets", ImportError, r"'hfds/a/b' needs datasets: pip install 'adaptvit\[data\]'"),
        ("scipy", ValueError, "'hfds/a/b' needs a package: No module named 'scipy'"),
    ],
)
def test_a_reader_that_is_not_installed_is_named(
    name: str, kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(data_module, "create_dataset", missing)
    with pytest.raises(kind, match=message):
        open_data(config(tmp_path, dataset="hfds/a/b"), SETTINGS)


def test_no_folder_is_the_digits() -> None:
    assert open_data(DataConfig(), {}).name == open_digits().name


def test_digits_are_the_same_in_three_channels(tmp_path: Path) -> None:
    grey, colour = open_data(DataConfig(), SETTINGS | {"input_size": (1, 32, 32)}), open_data(DataConfig(), SETTINGS)
    assert (colour.channels, colour.mean, colour.std) == (3, grey.mean * 3, grey.std * 3)
    for split in ("test", "calibration"):
        (image, label), (other, same) = getattr(grey, split)[7], getattr(colour, split)[7]
        assert torch.equal(other, image.expand(3, -1, -1))
        assert label == same
    moved = colour.train[7][0]
    assert torch.equal(moved[0], moved[2])
    assert grey.name != colour.name
    with pytest.raises(ValueError, match="not with 2 channels"):
        open_digits(channels=2)


@pytest.mark.parametrize("name", ["insects", "tfds/cifar10", "folder", "hfds"])
def test_a_source_that_is_not_known_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"DataConfig.dataset must begin with one of hfds/, .*, torch/, got '{name}'"):
        DataConfig(dataset=name)


@pytest.mark.parametrize("name", ["wds/insects", "torch/cifar10", "torch/folder"])
def test_a_source_without_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"data set '{name}' needs DataConfig.root"):
        open_data(config(None, dataset=name), SETTINGS)
    with pytest.raises(FileNotFoundError, match=f"data set '{name}': root '.*absent' does not exist"):
        open_data(config(tmp_path / "absent", dataset=name), SETTINGS)
