"""`benchmarks/gpu.py` runs to its end, here on a CPU, without what the command line takes."""

import json
import sys
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for absent in ("jsonargparse", "adaptvit.cli", "adaptvit.commands"):
        monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return import_module("gpu")


def test_cells_of_every_part_run(script: ModuleType, tmp_path: Path) -> None:
    job = script.Job("cpu", 60.0, tmp_path / "gpu.jsonl", each=0.0)
    for part in script.PARTS:
        for what, cell in islice(part(job), 0, None, 13):
            job.write({"part": part.__name__, **what, **script.tried(job, cell)})
    lines = [json.loads(line) for line in job.out.read_text().splitlines()]
    assert lines == job.lines
    assert not [line for line in lines if "error" in line]
    assert len(list(script.table(lines))) == 2 + sum("ratio" in line for line in lines)


def test_a_cell_that_fails_is_a_line(script: ModuleType, tmp_path: Path) -> None:
    def cell() -> dict:
        raise RuntimeError("CUDA error: an illegal address was met. Compile with DEBUG\nfor more")

    found = script.tried(script.Job("cpu", 1.0, tmp_path / "gpu.jsonl"), cell)
    assert found["error"] == "RuntimeError: CUDA error: an illegal address was met"


def test_without_time_no_cell_is_started(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    script.main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path / "gpu.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line.keys() for line in lines] == [{"part", "left out"}] * len(script.PARTS)
    assert capsys.readouterr().out.count("left out") == len(lines)
