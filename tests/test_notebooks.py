"""The notebooks run, on models and data that take no time, and are pages of the site."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from samples import picture

ROOT = Path(__file__).parents[1]
NOTEBOOKS = runpy.run_path(str(ROOT / "docs" / "notebooks.py"))
SMALL: dict[str, dict[str, Any]] = {
    "faster": {"name": "test_vit", "weights": "weights.pth", "count": 2},
    "fine_tune": {"share": 0.6, "epochs": 1, "count": 48, "tested": 8},
    "your_own_method": {"shares": (0.6,), "tested": 8},
}
"""What their first cells are told."""


def test_every_notebook_is_tested() -> None:
    assert {path.stem for path in NOTEBOOKS["HERE"].glob("*.ipynb")} == {*SMALL}


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs_and_is_a_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for seed in range(2):
        picture(seed).save(f"photos/{seed}.png")
    torch.save(timm.create_model("test_vit").state_dict(), "weights.pth")
    path = NOTEBOOKS["HERE"] / f"{name}.ipynb"
    cells = NOTEBOOKS["run"](path, SMALL[name])
    assert any(output for cell in cells for output in cell.get("outputs", []))
    stored = json.loads(path.read_text())["cells"]
    assert [cell["source"] for cell in cells] == [cell["source"] for cell in stored]
    assert all(cell["outputs"] for cell in stored[-3:-1] if cell["cell_type"] == "code" and "print(" in cell["source"])
    page = NOTEBOOKS["as_markdown"](path)
    assert page.count("```python") == sum(cell["cell_type"] == "code" for cell in stored)
