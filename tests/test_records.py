import json
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path

import pytest

from adaptvit import records
from adaptvit.records import contents, known, plain, read_record, same, stable, write_record

DAMAGES = ["", "{", "null", "{}", "[]", "3", '"text"', "NaN", "[" * 100_000, '{"top1": 0.5}', "\x00"]


@dataclass(frozen=True)
class Inner:
    rates: tuple[float, ...] = (0.5, 1.0)


@dataclass(frozen=True)
class Settings:
    root: Path
    inner: Inner = Inner()
    more: dict[str, int] = field(default_factory=dict)


def test_settings_are_the_same_whatever_they_print_as() -> None:
    made = Settings(Path("a/b"), more={"x": 1, "y": 2})
    assert plain(made) == {
        "kind": "Settings",
        "root": "a/b",
        "inner": {"kind": "Inner", "rates": [0.5, 1.0]},
        "more": {"x": 1, "y": 2},
    }
    assert json.loads(stable(made)) == plain(made)
    assert stable(replace(made, more={"y": 2, "x": 1})) == stable(made)
    assert stable(replace(made, inner=Inner((0.5,)))) != stable(made)
    assert stable({"x": float("inf")}) == '{"x": "inf"}'


def test_a_field_that_came_later_counts_as_its_default() -> None:
    old = plain(Settings(Path("a")))
    Later = make_dataclass(
        "Settings",
        [("inner", Inner, field(default=Inner())), ("new", int, field(default=3))],
        bases=(Settings,),
        frozen=True,
    )
    assert same(old, Settings(Path("a")))
    assert same(old, Later(Path("a")))
    assert same([{"run": old}], [{"run": Later(Path("a"))}])
    assert not same(old, Later(Path("a"), new=4))
    assert not same(old, Settings(Path("b")))
    assert not same(old, Settings(Path("a"), Inner((1.0,))))
    assert not same(old | {"gone": 1}, Settings(Path("a")))
    for wrong in (None, [], {}, "text", {"kind": "Settings"}, old | {"kind": "Others"}, old | {"inner": None}):
        assert not same(wrong, Settings(Path("a")))


@pytest.mark.filterwarnings("error")
def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    path, record = tmp_path / "record.json", {"top1": 0.1 + 0.2, "by label": {3: [1, None]}, "pair": (1, "ä\udcff")}
    assert known(path) is None
    write_record(path, record)
    assert known(path) == {"top1": 0.1 + 0.2, "by label": {"3": [1, None]}, "pair": [1, "ä\udcff"]}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda text: ascii(text[:12]))
def test_a_damaged_record_is_named_and_not_read(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(damage)
    with pytest.raises(ValueError, match=r"record\.json' is damaged"):
        read_record(path)
    with pytest.warns(UserWarning, match=r"record\.json' is damaged, .*: computed again"):
        assert known(path) is None


def test_a_record_that_was_changed_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, {"top1": 0.5})
    for changed in ("0.6", '"0.5"', "null"):
        path.write_text(path.read_text().replace("0.5", changed))
        with pytest.raises(ValueError, match="is damaged"):
            read_record(path)
        write_record(path, {"top1": 0.5})


def test_a_record_of_another_version_is_named_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_record(path, {"top1": 0.5})
    monkeypatch.setattr(records, "version", lambda: "9.9")
    with pytest.warns(UserWarning, match=r"record\.json' is of adaptvit .*, and this is 9\.9: computed again"):
        assert known(path) is None


def test_contents_change_with_names_sizes_and_times_and_loops_end(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "ant").mkdir(parents=True)
    (folder / "loop").symlink_to(folder)
    file = folder / "ant" / "1.png"
    file.write_bytes(b"one")
    seen = [contents(folder), contents(file)]
    assert [contents(folder), contents(file)] == seen
    file.write_bytes(b"longer")
    assert contents(folder) not in seen
    assert contents(file) not in seen
    seen.append(contents(folder))
    file.rename(folder / "ant" / "2.png")
    assert contents(folder) not in seen
    assert contents(tmp_path / "absent") == contents(None) == ""
