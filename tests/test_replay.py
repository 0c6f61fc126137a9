"""`pytest tests/parity --fixtures DIR` replays what it is given, of whatever sizes, and loses nothing of ours."""

import importlib.util
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import recorder
import recordings
from recordings import KINDS, OURS


def replay(folder: Path) -> tuple[int, Counter, list[str]]:
    """Replay a folder as the command line does: the exit status, the tests passed of each recording, what failed."""
    passed, faults = Counter(), []

    class Notes:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" and report.passed:
                passed[re.findall(r"\[([^\]-]*)", report.nodeid)[0]] += 1
            if report.failed:
                faults.append(report.longreprtext)

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.failed:
                faults.append(report.longreprtext)

    words = [str(OURS), "--fixtures", str(folder), "--capture=no", "-qq", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return pytest.main(words, plugins=[Notes()]), passed, faults


def test_recordings_of_other_sizes_replay(tmp_path: Path) -> None:
    """Of 1, 2, 4 and 5 channels, with representation layers, heads of any width and rates in lists."""
    for record in recorder.RECORDERS.values():
        record(tmp_path)
    code, passed, faults = replay(tmp_path)
    assert not faults, faults[0]
    assert code == pytest.ExitCode.OK
    assert {*passed} == {path.stem for path in tmp_path.rglob("*.json")}
    for name in recorder.RECORDERS:
        assert recordings.found(tmp_path, name), name


def spoil(path: Path, changes: Callable[[dict[str, Any]], object]) -> None:
    case = json.loads(path.read_text())
    changes(case)
    path.write_text(json.dumps(case))


def test_what_is_not_rebuilt_or_has_other_numbers_fails(tmp_path: Path) -> None:
    recorder.ats(tmp_path)
    recorder.adavit(tmp_path)
    spoil(tmp_path / "ats" / "scaled.json", lambda case: case["config"].update(HYBRID_BACKBONE="resnet50"))
    spoil(tmp_path / "adavit" / "four_channels.json", lambda case: case["config"].update(use_full_head=True))
    recorder.tome(tmp_path)
    arrays = dict(np.load(tmp_path / "tome" / "one_channel.npz"))
    arrays["logits"] = arrays["logits"] + np.float32(1e-4)
    np.savez(tmp_path / "tome" / "one_channel.npz", **arrays)
    code, passed, faults = replay(tmp_path)
    assert code == pytest.ExitCode.TESTS_FAILED
    assert not passed
    for words in ("scaled.json has a HYBRID_BACKBONE", "four_channels has use_full_head=True"):
        assert any(words in fault for fault in faults), words
    assert sum("logits" in fault for fault in faults) >= 2  # in both layouts


@pytest.fixture
def conftest() -> ModuleType:
    """That of `tests/parity`, once more."""
    spec = importlib.util.spec_from_file_location("parity_conftest", OURS / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ours(tmp_path: Path, conftest: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of ours, with links to all of it."""
    for path in OURS.rglob("*"):
        if path.suffix in (".json", ".npz"):
            link = tmp_path / path.relative_to(OURS)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(path)
    monkeypatch.setattr(conftest, "OURS", tmp_path.resolve())
    return tmp_path


def collect(conftest: ModuleType, folder: Path, name: str) -> list[Any]:
    """What a test with a parameter of that name runs on."""
    given: list[Any] = []
    metafunc = SimpleNamespace(
        config=SimpleNamespace(getoption=lambda _: folder),
        fixturenames=[name],
        parametrize=lambda _, values: given.extend(values),
    )
    conftest.pytest_generate_tests(metafunc)
    return given


@pytest.mark.parametrize("name", KINDS)
def test_a_recording_of_ours_that_is_lost_fails(name: str, ours: Path, conftest: ModuleType) -> None:
    given = collect(conftest, ours, name)
    assert len(given) == KINDS[name].ours
    lost = given[0].values[0]
    recordings.found.cache_clear()
    for path in {lost, lost.with_suffix(".json"), lost.with_suffix(".npz")}:
        path.unlink(missing_ok=True)
    with pytest.raises(pytest.fail.Exception, match=rf"holds {KINDS[name].ours - 1} recordings for {name}, not"):
        collect(conftest, ours, name)


@pytest.mark.parametrize("method", sorted({kind.folder for kind in KINDS.values()}))
def test_a_folder_of_ours_that_is_lost_fails(method: str, ours: Path, conftest: ModuleType) -> None:
    shutil.rmtree(ours / method)
    for name in (name for name, kind in KINDS.items() if kind.folder == method):
        with pytest.raises(pytest.fail.Exception, match=f"{method} holds 0 recordings for {name}"):
            collect(conftest, ours, name)


def test_every_kind_of_recording_has_a_test() -> None:
    text = "".join(path.read_text() for path in OURS.glob("test_*.py"))
    assert [name for name in KINDS if f"{name}: Path" not in text] == []


@pytest.mark.parametrize(
    ("folder", "message"), [("ats", "is a recording of no kind"), ("cait", "holds recordings of no method")]
)
def test_what_nothing_replays_is_refused(folder: str, message: str, tmp_path: Path, conftest: ModuleType) -> None:
    recorder.table_of_macs(tmp_path)
    recorder.write(tmp_path / folder, "other", {"kind": "other"}, {"logits": np.zeros(3)})
    with pytest.raises(pytest.UsageError, match=message):
        conftest.pytest_collection_modifyitems(SimpleNamespace(getoption=lambda _: tmp_path))
