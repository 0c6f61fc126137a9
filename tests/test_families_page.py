"""docs/families.md names every model there is, and says of them what is found now."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import timm

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "families.md").read_text()


def script() -> Any:
    """benchmarks/families.py, which writes the page."""
    spec = spec_from_file_location("benchmarks_families", ROOT / "benchmarks" / "families.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


families = script()


def rows(title: str) -> list[list[str]]:
    """Cells of the rows of all tables under a title, without their heads."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    tables = re.findall(r"\| ---.*\n((?:\|.*\n)+)", section)
    return [line.strip("| ").split(" | ") for table in tables for line in table.splitlines()]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


TAKEN = {name: cells for cells in rows("Names that run") for name in named(cells[0])}
LEFT_OUT = {name: cells for cells in rows("Names that are left out") for name in named(cells[1])}
CLASSES = {f"{named(cells[1])[0]}.{named(cells[0])[0]}": cells for cells in rows("Classes")}
KINDS = {tuple(cells[1:5]): named(cells[6])[0] for cells in reversed(rows("By structure"))}
"""A name for each block, positions, what is read, and tier."""
SUCH = sorted(name for name in KINDS.values() if name in TAKEN)
AWAY = ("samvit_base_patch16_224", "cait_xxs24_224", "convit_tiny", "levit_128s", "pit_ti_224", "tnt_s_patch16_224")
MODULE_OF = {name: module for module, name in families.names_of_timm()}


@pytest.mark.skipif(f"timm {timm.__version__} has" not in PAGE, reason="the page is of another version of timm")
def test_the_page_names_what_timm_has() -> None:
    named_in_tables = [
        name
        for title, place in (("Names that run", 0), ("Names that are left out", 1))
        for cells in rows(title)
        for name in named(cells[place])
    ]
    assert sorted(named_in_tables) == sorted(MODULE_OF)
    assert f"Of {len(MODULE_OF)} vision transformers" in PAGE
    assert f"{len(TAKEN)} run: {sum(' with ' not in cells[1] for cells in TAKEN.values())} as timm creates" in PAGE
    assert len(TAKEN) >= 305


def test_the_page_ends_with_what_is_recorded_of_merging() -> None:
    assert families.with_merging(PAGE) == PAGE


def test_what_is_recorded_of_merging_makes_a_table() -> None:
    row = {"positions": "rotary", "seed": 0, "dense": 0.9, "target": 0.5, "method": "tome", "position": "mean"}
    found = [row | {"share": 0.5, "top1": 0.88, "divergence": 0.1}]
    found += [row | {"seed": 1, "dense": 0.92, "share": 0.5, "top1": 0.86, "divergence": 0.2}]
    found += [row | {"positions": "learned", "position": "receiver", "share": 0.49, "top1": 0.9, "divergence": 0.0}]
    found += [row | {"method": "grid", "position": None, "share": 0.51, "top1": 0.9, "divergence": 0.0}]
    text = families.merging({"conditions": {"fitting": 4, "images": 8, "torch": "", "timm": ""}, "rows": found})
    assert text.splitlines()[-3:] == [
        "| rotary | 50% | ToMe, even | mean | 50.0% | 87.0 ± 1.4 | -4.0 ± 2.8 | 0.150 ± 0.071 |",
        "| rotary | 50% | merging on the grid | in the grid | 51.0% | 90.0 | +0.0 | 0.000 |",
        "| learned | 50% | ToMe, even | in the features | 49.0% | 90.0 | +0.0 | 0.000 |",
    ]
    assert "2 seeds each" in text


def test_every_class_of_timm_is_of_a_module_of_the_page() -> None:
    of_timm = [name.split(".")[2] for name in families.FAMILIES.models if name.startswith("timm.")]
    assert set(of_timm) <= set(families.MODULES)


def test_the_page_names_the_classes_that_are_known() -> None:
    assert sorted(name for name, cells in CLASSES.items() if cells[2] != "-") == sorted(families.classes())


def test_everything_on_the_page_agrees() -> None:
    assert not [cells for cells in rows("By structure") if not set(cells[7:]) <= {"yes", "-"}]
    taken = [*TAKEN.values(), *(cells[1:] for cells in CLASSES.values() if cells[2] != "-")]
    assert all(float(number) < families.AGREE for cells in taken for number in cells[3:5])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SUCH)
def test_a_name_of_each_structure_is_taken_as_the_page_says(name: str) -> None:
    found = families.examine(MODULE_OF[name], name)
    assert [families.verdict(found), found.kind[3]] == TAKEN[name][1:3]
    assert max(found.apart, found.layouts) <= families.AGREE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", AWAY)
def test_a_name_that_is_left_out_is_refused_as_the_page_says(name: str) -> None:
    found = families.examine(MODULE_OF[name], name)
    assert found.tier is None
    assert families.sentence(found) == LEFT_OUT[name][3]
