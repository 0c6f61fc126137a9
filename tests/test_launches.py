"""What a forward asks of a device stays what it was when `benchmarks/launches.json` was written, or becomes less."""

import json
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptvit import Dense, Masked, Packed, Slab, measure_plan

SPEC = spec_from_file_location("benchmarks_launches", Path(__file__).parents[1] / "benchmarks" / "launches.py")
assert SPEC is not None
assert SPEC.loader is not None
launches = module_from_spec(SPEC)
SPEC.loader.exec_module(launches)
RECORDED = json.loads(launches.TABLE.read_text())


class Launched:
    """Kernels of Triton of which launches are counted, and nothing runs."""

    def __init__(self) -> None:
        self.module = import_module("adaptvit.tokens.triton_kernels")
        self.count = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*_: Any, **__: Any) -> None:
            self.count += 1

        return launch

    def of(self, name: str, given: tuple) -> int:
        """Kernels of an operator of `adaptvit.tokens.fused`, what is copied and filled for them included."""
        self.count = 0
        with pytest.MonkeyPatch.context() as patch, launches.Counter() as torchs:
            for own, kernel in vars(self.module).items():
                if own.startswith("_") and hasattr(kernel, "__getitem__") and hasattr(kernel, "fn"):
                    patch.setattr(self.module, own, self)
            getattr(self.module, name)(*given)
        return self.count + torchs.kernels


@pytest.fixture(scope="module")
def counted() -> Any:
    if find_spec("triton") is None:
        yield launches.table()
        return
    launched = Launched()

    class Compared(launches.Counter):
        """What is counted of an operator is what its kernels are."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "adaptvit":
                name = func.overloadpacket.__name__
                assert launched.of(name, args) == launches.SEVERAL.get(name, 1), name
            return super().__torch_dispatch__(func, types, args, kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "Counter", Compared)
        yield launches.table()


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
