"""The one reader of folders, tars and lists of names; labels must follow the colours of the images."""

import os
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adaptvit.data import (
    ClassFolders,
    DataConfig,
    Unreadable,
    class_names,
    find_images,
    list_images,
    open_split,
    read_class_map,
    read_names,
)
from adaptvit.files import open_file

SETTINGS = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
COLOURS = {"ant": "red", "bee": "lime", "cow": "blue"}


def picture(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def split(root: Path, count: int = 2) -> Path:
    """Images of one colour in a folder for each class."""
    for name, colour in COLOURS.items():
        for number in range(count):
            picture(root / name / f"{number}.png", colour)
    return root


def read(
    root: Path, wanted: str = "validation", class_map: Path | None = None
) -> tuple[ClassFolders, list[Unreadable]]:
    """The reader of a split, whose labels are those of its images' colours, and what cannot be read."""
    samples = open_split(DataConfig(root=root, workers=0, class_map=class_map), SETTINGS, wanted)
    classes, unreadable = class_names(samples), []
    for item in map(samples.__getitem__, range(len(samples))):
        if isinstance(item, Unreadable):
            unreadable.append(item)
        else:
            image, label = item
            brightest = int(image.mean(dim=(1, 2)).argmax())
            assert [*COLOURS][brightest].casefold() == classes[label].casefold()
    return samples.reader, unreadable


def left_out(reader: ClassFolders) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {one.kind: (one.count, one.names) for one in reader.left_out}


def test_the_class_is_the_first_folder_however_deep_an_image_lies(tmp_path: Path) -> None:
    for name, colour in COLOURS.items():
        picture(tmp_path / "val" / name / "camera1" / "monday" / "1.png", colour)
        picture(tmp_path / "val" / name / "camera2" / "1.png", colour)
    reader, unreadable = read(tmp_path)
    assert (list(reader.class_to_idx), len(reader), unreadable) == ([*COLOURS], 6, [])


@pytest.mark.parametrize("suffix", ["webp", "bmp", "tif", "TIFF", "gif", "PNG"])
def test_a_class_of_any_suffix_is_there(tmp_path: Path, suffix: str) -> None:
    split(tmp_path / "val")
    picture(tmp_path / "val" / "ant" / f"more.{suffix}", "red")
    assert len(read(tmp_path)[0]) == 7


def test_hidden_files_and_folders_are_no_data(tmp_path: Path) -> None:
    split(tmp_path / "val")
    picture(tmp_path / "val" / ".ipynb_checkpoints" / "a.png")
    picture(tmp_path / "val" / "ant" / "._1.jpg")
    (tmp_path / "val" / "ant" / "notes.txt").write_text("no image")
    reader, _ = read(tmp_path)
    assert (list(reader.class_to_idx), len(reader)) == ([*COLOURS], 6)
    assert left_out(reader) == {
        "hidden": (2, (".ipynb_checkpoints", "ant/._1.jpg")),
        "without the suffix of an image": (1, ("ant/notes.txt",)),
    }


@pytest.mark.parametrize("target", [".", "..", "../..", "/"])
def test_a_link_that_leads_back_ends(tmp_path: Path, target: str) -> None:
    photos = split(tmp_path / "data" / "photos")
    (photos / "loop").symlink_to(target)
    (photos / "ant" / "loop").symlink_to("../bee")
    assert find_images(photos) == [f"{name}/{number}.png" for name in COLOURS for number in range(2)]
    assert [(one.count, one.names) for one in list_images(photos).left_out] == [(2, ("ant/loop", "loop"))]
    assert list(read(photos)[0].class_to_idx) == [*COLOURS]


def test_two_links_to_one_folder_are_followed_once(tmp_path: Path) -> None:
    picture(tmp_path / "store" / "1.png")
    (tmp_path / "photos").mkdir()
    for name in ("b", "a"):
        (tmp_path / "photos" / name).symlink_to("../store")
    assert find_images(tmp_path / "photos") == ["a/1.png"]


def test_two_classes_that_are_one_folder_are_refused(tmp_path: Path) -> None:
    split(tmp_path / "val")
    (tmp_path / "val" / "wasp").symlink_to("bee")
    with pytest.raises(ValueError, match="folders 'wasp' and 'bee', which are one"):
        read(tmp_path)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    place = os.getcwd()
    os.chdir(path.parent)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(place)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [_pipe, _socket, _device])
def test_what_is_no_file_is_named_and_never_opened(tmp_path: Path, make: Callable[[Path], None]) -> None:
    split(tmp_path / "val")
    make(tmp_path / "val" / "bee" / "x.png")
    reader, unreadable = read(tmp_path)
    assert (len(reader), [one.name for one in unreadable]) == (7, ["bee/x.png"])
    assert "not a file" in unreadable[0].reason
    assert "bee/x.png" not in find_images(tmp_path / "val")
    with pytest.raises(OSError, match="not a file"):
        open_file(tmp_path / "val" / "bee" / "x.png")


def test_a_folder_that_cannot_be_read_is_named_and_keeps_its_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split(tmp_path / "val")
    scan = os.scandir

    def locked(path: Path | str) -> object:
        if Path(path).name == "bee":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    reader, unreadable = read(tmp_path)
    assert list(reader.class_to_idx) == [*COLOURS]
    assert [one.name for one in unreadable] == ["bee/"]
    assert "Permission denied" in unreadable[0].reason


def test_a_class_without_images_keeps_its_label_and_is_told(tmp_path: Path) -> None:
    split(tmp_path / "val")
    (tmp_path / "val" / "bee" / "0.png").unlink()
    (tmp_path / "val" / "bee" / "1.png").unlink()
    picture(tmp_path / "val" / "loose.png")
    reader, _ = read(tmp_path)
    assert [label for _, label in reader.samples] == [0, 0, 2, 2]
    assert left_out(reader) == {
        "images beside the folders of classes": (1, ("loose.png",)),
        "folders of classes without images": (1, ("bee",)),
    }


def test_another_split_is_never_read_for_a_missing_one(tmp_path: Path) -> None:
    split(tmp_path / "Training")
    with pytest.raises(FileNotFoundError, match="has no folder 'validation', but 'Training'"):
        read(tmp_path)
    assert len(read(tmp_path, "train")[0]) == len(read(tmp_path / "Training")[0]) == 6


def test_two_names_of_one_split_are_refused(tmp_path: Path) -> None:
    split(tmp_path / "val")
    split(tmp_path / "valid")
    with pytest.raises(ValueError, match="has 'val' and 'valid', which mean the same"):
        read(tmp_path)
    assert len(read(tmp_path, "valid")[0]) == 6


def packed(folder: Path, name: str, inside: str = "") -> Path:
    path = folder.parent / name
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname=inside)
    return path


@pytest.mark.parametrize("inside", ["", ".", "val"])
def test_a_tar_is_read_as_the_folder_it_was(tmp_path: Path, inside: str) -> None:
    reader, unreadable = read(packed(split(tmp_path / "val"), "val.tar", inside))
    assert (len(reader), list(reader.class_to_idx), unreadable) == (6, [*COLOURS], [])


def test_splits_in_a_tar_are_told_apart(tmp_path: Path) -> None:
    split(tmp_path / "set" / "train")
    split(tmp_path / "set" / "val", 1)
    assert len(read(packed(tmp_path / "set", "set.tar"))[0]) == 3
    with pytest.raises(FileNotFoundError, match="has no folder 'test', but 'train', 'val'"):
        read(tmp_path / "set.tar", "test")


def test_tars_of_classes_in_a_folder_and_in_a_tar(tmp_path: Path) -> None:
    split(tmp_path / "images")
    (tmp_path / "val").mkdir()
    for name in COLOURS:
        packed(tmp_path / "images" / name, f"{name}.tar").rename(tmp_path / "val" / f"{name}.tar")
    assert len(read(tmp_path)[0]) == len(read(packed(tmp_path / "val", "all.tar"))[0]) == 6


@pytest.mark.parametrize("fill", [b"\0", b"x"])
def test_a_hole_in_a_tar_loses_what_was_in_it_and_no_more(tmp_path: Path, fill: bytes) -> None:
    path = packed(split(tmp_path / "val"), "val.tar")
    with tarfile.open(path) as tar:
        lost, after = (tar.getmember(f"bee/{number}.png") for number in range(2))
    content = bytearray(path.read_bytes())
    content[lost.offset : after.offset] = fill * (after.offset - lost.offset)
    path.write_bytes(content)
    reader, unreadable = read(path)
    assert list(reader.class_to_idx) == [*COLOURS]
    assert [name for name, label in reader.samples if label == 1] == ["bee/1.png"]
    assert [one.name for one in unreadable] == [f"val.tar: bytes {lost.offset} to {after.offset}"]


def test_a_tar_that_is_cut_off_says_so(tmp_path: Path) -> None:
    path = packed(split(tmp_path / "val"), "val.tar")
    with tarfile.open(path) as tar:
        last = tar.getmember("cow/1.png")
    path.write_bytes(path.read_bytes()[: last.offset_data + 10])
    _, unreadable = read(path)
    assert len(unreadable) == 2
    assert all("cut off" in one.reason for one in unreadable)


def test_tars_hung_on_one_another_have_no_hole(tmp_path: Path) -> None:
    one, other = packed(split(tmp_path / "val"), "1.tar"), packed(split(tmp_path / "more", 3), "2.tar")
    (tmp_path / "both.tar").write_bytes(one.read_bytes() + other.read_bytes())
    reader, unreadable = read(tmp_path / "both.tar")
    assert (len(reader), unreadable) == (9, [])


def test_links_in_a_tar_lead_where_they_would_if_it_were_unpacked(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for name, target in (
            ("2", "1.png"),
            ("1", "0.png"),
            ("lost", "3.png"),
            ("self", "self.png"),
            ("file", "3.png"),
        ):
            link = tarfile.TarInfo(f"ant/{name}.png")
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        for name in ("0", "file"):
            tar.add(tmp_path / "a.png", f"ant/{name}.png")
    reader, unreadable = read(tmp_path / "val.tar")
    assert [name for name, _ in reader.samples] == [f"ant/{name}.png" for name in (0, 1, 2, "file", "lost", "self")]
    assert unreadable == [
        Unreadable("ant/lost.png", "a link to '3.png', which is not in the tar"),
        Unreadable("ant/self.png", "a link to 'self.png', which is not in the tar"),
    ]


@pytest.mark.parametrize("size", [b"00077777777\0", b"\x80" + b"\xff" * 11])
def test_a_size_beyond_the_end_of_a_tar_is_a_cut(tmp_path: Path, size: bytes) -> None:
    path = packed(split(tmp_path / "val"), "val.tar", "val")
    content = bytearray(path.read_bytes())
    start = content.index(b"val/cow/1.png")
    content[start + 124 : start + 136] = size
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    path.write_bytes(content)
    assert "cut off: " in {one.name: one.reason for one in read(path)[1]}["cow/1.png"]


@pytest.mark.parametrize(
    "content",
    [
        b"ant\n\xef\xbb\xbfbee\ncow",
        b"\xef\xbb\xbfAnt\r\nbee\r\n\r\nCOW  \r\n",
        b"ant\rBEE\rcow",
        "\nant\n  bee\ncow\n\n".encode("utf-16"),
    ],
)
def test_a_class_map_is_read_as_a_person_reads_it(tmp_path: Path, content: bytes) -> None:
    names = tmp_path / "names.txt"
    names.write_bytes(content)
    assert [name.lower() for name in read_class_map(names)] == [*COLOURS]
    assert list(map(str.lower, read_names(names, "class_names"))) == [*COLOURS]
    assert len(read(split(tmp_path / "images"), class_map=names)[0]) == 6


def test_folders_and_names_that_have_no_other_are_told(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\nwasp\n")
    reader, _ = read(split(tmp_path / "images"), class_map=names)
    assert len(reader) == 4
    assert left_out(reader) == {
        "folders that class_map does not name": (1, ("cow",)),
        "names in class_map without a folder": (1, ("wasp",)),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ant\nbee\nant\n", "has the name 'ant' twice"),
        (b"\n \n", "holds no names"),
        (b"ant\nb\xffe\n", "is not text in UTF-8: its line 2"),
        (b"wasp\n", "names none of its folders, the first being 'ant'"),
        (b"Ant\nANT\n", "folder 'ant' is both 'Ant' and 'ANT'"),
    ],
)
def test_a_class_map_that_cannot_be_followed_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    names = tmp_path / "names.txt"
    names.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(split(tmp_path / "images"), class_map=names)


def test_a_name_given_twice_is_warned_of(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("crane\ncrane\n")
    with pytest.warns(UserWarning, match="gives two classes the name 'crane'"):
        assert read_names(names, "class_names") == ("crane", "crane")


def test_numbers_in_names_are_ordered_by_value(tmp_path: Path) -> None:
    for name in ("a10", "a2", "B1"):
        picture(tmp_path / name / "x.png")
    samples = open_split(DataConfig(root=tmp_path, workers=0), SETTINGS, "validation")
    assert class_names(samples) == ("a2", "a10", "B1")
    assert np.all(np.diff([label for _, label in samples.reader.samples]) > 0)
