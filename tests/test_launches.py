"""What a forward asks of a device stays what it was when `benchmarks/launches.json` was written, or becomes less."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from adaptvit import Dense, Masked, Packed, Slab, measure_plan

SPEC = spec_from_file_location("benchmarks_launches", Path(__file__).parents[1] / "benchmarks" / "launches.py")
assert SPEC is not None
assert SPEC.loader is not None
launches = module_from_spec(SPEC)
SPEC.loader.exec_module(launches)
RECORDED = json.loads(launches.TABLE.read_text())


@pytest.fixture(scope="module")
def counted() -> dict:
    return launches.table()


def test_no_figure_rises(counted: dict) -> None:
    for method, layouts in RECORDED.items():
        for layout, figures in layouts.items():
            for what, numbers in figures.items():
                found = counted[method][layout][what]
                assert len(found) == len(numbers)
                assert all(now <= before for now, before in zip(found, numbers, strict=True)), (method, layout, what)


def test_dense_never_waits_and_packed_at_most_for_what_it_drops(counted: dict) -> None:
    for method, layouts in counted.items():
        if "dense" in layouts:
            assert not any(layouts["dense"]["waits"]), method
    assert counted["full"]["packed"]["waits"] == [0] * (launches.DEPTH + 1)
    assert max(max(counted[method]["packed"]["waits"]) for method in ("avit", "ats", "merge")) == 1
    assert not any(counted["tome"]["packed"]["waits"])


@pytest.mark.parametrize("method", launches.METHODS)
def test_as_on_a_device_it_computes_what_a_host_does(method: str) -> None:
    model = launches.METHODS[method].build(launches.small_vit()).eval()
    batch = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    layouts = [Dense, Packed] if model.even else [Slab, Packed]
    with torch.inference_mode():
        wanted = model(batch, Masked, detailed=True)
        if not model.even:
            model.plan = measure_plan(model, batch)
        for layout in layouts:
            with launches.as_on_a_device():
                found = model(batch, layout, detailed=True)
            torch.testing.assert_close(found.logits, wanted.logits, atol=1e-5, rtol=1e-4)
            assert torch.equal(found.usage.attended, wanted.usage.attended)
            assert torch.equal(found.usage.updated, wanted.usage.updated)
            assert torch.equal(found.usage.live, wanted.usage.live)
