import csv
import errno
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from adaptvit.files import (
    append_csv,
    as_cell,
    check_output,
    check_output_folder,
    from_cell,
    locked,
    read_csv,
    replacing,
    write_atomically,
    write_csv,
)

FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1", "'=1", "''=1"]


def test_a_full_disk_is_said_with_the_name_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("before")

    def fill() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"figures\.json': No space left") as full:
        fill()
    assert full.value.errno == errno.ENOSPC
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]
    with pytest.raises(FileNotFoundError, match=r"other\.txt"), replacing(path):
        (tmp_path / "other.txt").read_text()  # not the file that is written


def test_text_is_utf_8_whatever_the_locale_and_names_keep_their_bytes(tmp_path: Path) -> None:
    write_atomically(tmp_path / "text", "ä\udcff\n")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa4\xff\n"


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    check_output(file)
    check_output_folder(tmp_path / "a" / "b")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        check_output(tmp_path / "a" / "b")
    with pytest.raises(OSError, match="is there and is no file"):
        check_output(tmp_path)
    with pytest.raises(OSError, match="is there and is no file"):
        check_output("/dev/null")
    with pytest.raises(OSError, match="file' is there and is no folder"):
        check_output_folder(file / "b")

    def full(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(PermissionError, match="new': Permission denied"):
        check_output(tmp_path / "new")
    with pytest.raises(PermissionError, match="new': Permission denied"):
        check_output_folder(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("text", FORMULAS, ids=ascii)
def test_what_a_spreadsheet_would_compute_is_text_and_comes_back(text: str, tmp_path: Path) -> None:
    assert as_cell(text) == f"'{text}"
    assert from_cell(f"'{text}") == text
    write_csv(tmp_path / "table.csv", [{"name": text, "top1": -0.5}])
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["name", "top1"], [f"'{text}", "-0.5"]]


@pytest.mark.parametrize("value", ["ant", "'ant", "a=b", "", -1, -0.5, None])
def test_other_cells_stay(value: object) -> None:
    assert as_cell(value) == value
    assert not isinstance(value, str) or from_cell(value) == value


def test_lines_are_added_and_what_stands_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    append_csv(path, {"model": "=a", "top1": 0.5}, ["model"])
    append_csv(path, {"model": "b", "top1": None, "loss": -1.5}, ["model"])
    append_csv(path, {"model": "c", "loss": 2.0}, ["model"])
    expected = "model,top1,loss\n'=a,0.5,\nb,,-1.5\nc,,2.0\n"
    assert path.read_text() == expected
    path.write_bytes(b"\xef\xbb\xbf" + expected.replace("\n", "\r\n").encode())  # as a spreadsheet saves it
    append_csv(path, {"model": "d"}, ["model"])
    assert path.read_text() == expected + "d,,\n"
    assert [file.name for file in tmp_path.iterdir()] == ["figures.csv"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "other columns, without model"),
        ("model;top1\na;1\n", "other columns, without model"),
        ("model,top1\na\n", "1 cells in line 2 and 2 in its header"),
        ("model,top1\na,1\nb,2,3\n", "3 cells in line 3 and 2 in its header"),
        ("model,top1,top1\na,1,2\n", "two columns of one name"),
        ('model,top1\na,"1\n', "is no CSV file"),
        ("\x00\x01", "other columns|no CSV file"),
    ],
)
def test_a_csv_file_of_another_kind_is_refused_and_stays(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    path.write_text(text)
    for act in (lambda: read_csv(path, ["model"]), lambda: append_csv(path, {"model": "b"}, ["model"])):
        with pytest.raises(ValueError, match=said) as refused:
            act()
        assert "figures.csv" in str(refused.value)
    assert path.read_text() == text


def add(path: Path, number: int) -> None:
    for turn in range(20):
        append_csv(path, {"model": f"{number}-{turn}", f"column {number}": turn}, ["model"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks processes")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_that_add_at_once_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add, args=(path, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    header, lines = read_csv(path, ["model"])
    assert sorted(header) == ["column 0", "column 1", "column 2", "model"]
    assert sorted(line[header.index("model")] for line in lines) == sorted(
        f"{n}-{t}" for n in range(3) for t in range(20)
    )


def hold(path: Path, told: Any) -> None:
    with locked(path):
        told.put(os.getpid())
        multiprocessing.Event().wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks processes")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_lock_is_refused_to_a_second_and_given_back_by_a_process_that_was_killed(tmp_path: Path) -> None:
    path, link = tmp_path / "out.csv", tmp_path / "link.csv"
    path.touch()
    link.symlink_to(path)
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    holder = context.Process(target=hold, args=(path, told), daemon=True)
    holder.start()
    told.get(timeout=60)
    for name in (path, link):
        with pytest.raises(FileExistsError, match=f"another process is writing to '.*{name.name}'"), locked(name):
            pass
    holder.kill()
    holder.join()
    with locked(path):
        pass
    assert {file.name for file in tmp_path.iterdir()} == {"out.csv", "link.csv"}


def test_what_a_killed_writer_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    gone = multiprocessing.get_context("spawn").Process()
    gone.start()
    gone.join()
    dead, others = tmp_path / f".figures.json.{gone.pid}.partial", tmp_path / f".more.json.{gone.pid}.partial"
    running, odd = tmp_path / f".figures.json.{os.getppid()}.partial", tmp_path / ".figures.json.x.partial"
    for path in (dead, others, running, odd):
        path.write_text("half")
    write_atomically(tmp_path / "figures.json", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [others.name, running.name, odd.name, "figures.json"]
    )


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("sync"), sync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), rename(*names)))
    write_atomically(tmp_path / "figures.json", "whole")
    assert done == ["sync", "rename", "sync"]
