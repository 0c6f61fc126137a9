"""What a forward asks of a device stays what it was when `benchmarks/launches.json` was written, or becomes less."""

import json
from collections import defaultdict
from functools import partial
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptvit import Dense, Masked, Packed, Slab, measure_plan

SPEC = spec_from_file_location("benchmarks_launches", Path(__file__).parents[1] / "benchmarks" / "launches.py")
assert SPEC is not None
assert SPEC.loader is not None
launches = module_from_spec(SPEC)
SPEC.loader.exec_module(launches)
RECORDED = json.loads(launches.TABLE.read_text())


TYPES: dict[Any, str] = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    float: "fp32",
    int: "i32",
}
"""Triton's names."""


class Launched:
    """Kernels of Triton, of which launches are counted and nothing runs.

    Attributes:
        asked: each kernel that was launched, the types of its arguments, and what is known of them beforehand.
    """

    def __init__(self) -> None:
        self.module = import_module("adaptvit.tokens.triton_kernels")
        self.count = 0
        self.asked: dict[Any, tuple[Any, dict[str, str], dict[str, Any]]] = {}

    def of(self, name: str, given: tuple) -> int:
        """Kernels of an operator of `adaptvit.tokens.fused`, what is copied and filled for them included."""
        self.count = 0
        with pytest.MonkeyPatch.context() as patch, launches.Counter() as torchs:
            for own, kernel in vars(self.module).items():
                if own.startswith("_") and hasattr(kernel, "arg_names"):
                    patch.setattr(self.module, own, defaultdict(partial(partial, self._note, kernel)))
            getattr(self.module, name)(*given)
        return self.count + torchs.kernels

    def _note(self, kernel: Any, *given: Any, num_warps: int = 4, **named: Any) -> None:
        self.count += 1
        values = dict(zip(kernel.arg_names, given, strict=False)) | named
        known = {one.name: values[one.name] for one in kernel.params if one.is_constexpr or values[one.name] is None}
        types = {
            name: "constexpr" if name in known else TYPES[value.dtype if isinstance(value, Tensor) else type(value)]
            for name, value in values.items()
        }
        branches = tuple(value is None or (isinstance(value, bool) and value) for value in known.values())
        self.asked.setdefault((kernel.__name__, *types.values(), branches), (kernel, types, known))


@pytest.fixture(scope="module")
def launched() -> Launched | None:
    return Launched() if find_spec("triton") else None


@pytest.fixture(scope="module")
def counted(launched: Launched | None) -> Any:
    if launched is None:
        yield launches.table()
        return

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


def test_every_kernel_is_one_to_a_compiler(counted: dict, launched: Launched | None) -> None:
    """Types that an interpreter does not ask for are those that a device needs: as far as no device is needed."""
    if launched is None:
        pytest.skip("needs triton")
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options = backend.parse_options({"enable_fp_fusion": True})  # or it warns of its default
    generated = options, backend.get_codegen_implementation(options), backend.get_module_map()
    assert {kernel.__name__ for kernel, *_ in launched.asked.values()} >= {"_attended", "_received", "_merge", "_gates"}
    for kernel, types, known in launched.asked.values():
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        source = ASTSource(kernel, types, {(kernel.arg_names.index(name),): value for name, value in known.items()})
        source.make_ir(target, *generated, context)


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
