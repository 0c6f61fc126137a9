"""What a forward asks of a device, block by block: kernels launched, and how often the host waits. No device is needed.

    python benchmarks/launches.py            # writes benchmarks/launches.json

Operators that torch dispatches on a CPU are counted, views and allocations left out, with the branches that a device
takes. A wait is what a host cannot go on without: a number that the device computed, or a copy from it or to it.
Features are in float32, where tokens of different numbers are attended to in a padded grid; `half` is `Slab` in
bfloat16, where variable-length flash attention is one kernel, of which a stand-in is counted here.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from adaptvit import (
    AdaViTConfig,
    ATSConfig,
    AViTConfig,
    CalibratedConfig,
    Dense,
    DynamicViTConfig,
    EViTConfig,
    FullConfig,
    MergeConfig,
    MethodConfig,
    Packed,
    Slab,
    ToMeConfig,
)
from adaptvit.methods.grid import GridConfig
from adaptvit.model import AdaptiveViT
from adaptvit.tokens import kernels

TABLE = Path(__file__).with_suffix(".json")
DEPTH = 4
METHODS: dict[str, MethodConfig] = {
    "full": FullConfig(),
    "evit": EViTConfig(blocks=(1, 2), keep_rate=0.7),
    "dynamicvit": DynamicViTConfig(blocks=(1, 2)),
    "tome": ToMeConfig(r=3),
    "grid": GridConfig(rate=0.5),
    "ats": ATSConfig(blocks=(1, 2), tokens=(10, 6)),
    "avit": AViTConfig(gate_scale=3.0),
    "calibrated": CalibratedConfig(r=3),
    "merge": MergeConfig(thresholds=0.3),
    "dynamicvit, threshold": DynamicViTConfig(blocks=(1, 2), select="threshold", threshold=0.3),
    "adavit": AdaViTConfig(),
}
NO_KERNEL = """
    view expand expand_as slice select unsqueeze squeeze transpose permute t mT alias detach unbind split
    split_with_sizes chunk narrow as_strided unfold unflatten _unsafe_view promote_types empty empty_like new_empty
    empty_strided lift_fresh diagonal movedim _local_scalar_dense dropout
"""
"""Views, allocations, and dropout, which does nothing in evaluation."""
SEVERAL = {"compact": 2, "sample": 2, "put": 2}
"""Kernels of operators of `adaptvit.tokens.fused`; of others it is one."""
COPIES_FIRST = dict.fromkeys(
    ("masked_fill", "index_copy", "index_add", "index_put", "index_fill", "scatter", "scatter_add", "scatter_reduce"), 2
)
"""Operators of torch that copy what they then write into."""
SORTS = {"sort": 4, "argsort": 4, "topk": 3}
"""As many as torch was seen to take on CUDA, of a row of some hundred."""
MAYBE_A_VIEW = frozenset({"reshape", "flatten", "to", "contiguous"})
"""A kernel where they copy."""
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "item")
"""Operators whose result the host reads, or whose size it has to know."""
ON_THE_HOST = (Tensor.tolist, Tensor.cpu, Tensor.numpy, torch.tensor, Tensor.new_tensor)
"""What copies from the device or to it."""


class Counter(TorchDispatchMode):
    """Kernels and waits so far."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.waits = 0
        self.no_kernel = frozenset(NO_KERNEL.split())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        is_view = name in MAYBE_A_VIEW and out.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()
        if func.namespace == "adaptvit":
            self.kernels += SEVERAL.get(name, 1)
        elif name not in self.no_kernel and not is_view:
            self.kernels += (COPIES_FIRST | SORTS).get(name, 1)
        by_mask = name.startswith("index") and any(
            isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8)
            for one in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        self.waits += name in WAITS or by_mask
        return out


class _Copies(TorchFunctionMode):
    """Counts in `counter` what copies between host and device."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counter.waits += func in ON_THE_HOST
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on_a_device() -> Iterator[None]:
    """The branches that tokens take on a device."""
    before = kernels.on_host, varlen.varlen_attn
    kernels.on_host = lambda _: False
    varlen.varlen_attn = _flash  # type: ignore[assignment]
    kernels.register(
        kernels.attend_varlen, lambda facts: kernels.is_flash(facts._replace(device="cuda", capability=(9, 0)))
    )
    try:
        yield
    finally:
        kernels.on_host, varlen.varlen_attn = before
        del kernels.KERNELS[0]


def _flash(
    q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, most: int, most_keys: int, scale: float | None
) -> Tensor:
    out: Tensor = _attend(q, k, v, queries, keys, q.shape[-1] ** -0.5 if scale is None else scale)
    return out


@torch.library.custom_op("launches::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Variable-length attention, image by image; rows of no image are 0."""
    out = torch.zeros_like(q)
    for ours, theirs in zip(pairwise(queries.tolist()), pairwise(keys.tolist()), strict=True):
        own, others = slice(*ours), slice(*theirs)
        weights = torch.einsum("qhd,khd->hqk", q[own].float(), k[others].float()).mul(scale).softmax(dim=-1)
        out[own] = torch.einsum("hqk,khd->qhd", weights, v[others].float()).to(out.dtype)
    return out


def count(model: AdaptiveViT, images: Tensor, layout: type) -> dict[str, list[int]]:
    """Kernels and waits before the first block, from each block to the next, and from the last one on."""
    seen: list[tuple[int, int]] = []

    def noted(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seen.append((counter.kernels, counter.waits))
        return run(*args, **kwargs)

    for name in ("run_block", "run_body"):  # a method calls one of them
        setattr(model, name, partial(noted, getattr(model, name)))
    with torch.inference_mode(), as_on_a_device(), Counter() as counter, _Copies(counter):
        model(images, layout)
    del model.run_block, model.run_body
    ends = [(0, 0), *seen, (counter.kernels, counter.waits)]
    steps = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(ends)]
    return {"kernels": [kernels for kernels, _ in steps], "waits": [waits for _, waits in steps]}


def small_vit() -> nn.Module:
    """A DeiT of four narrow blocks."""
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", img_size=64, embed_dim=48, depth=DEPTH, num_classes=7).eval()


def table() -> dict[str, dict[str, dict[str, list[int]]]]:
    """By method and layout; `timm` is the plain ViT's own forward, in all."""
    vit = small_vit()
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), Counter() as counter:
        vit(images)
    found: dict[str, Any] = {"timm": {"own": {"kernels": [counter.kernels], "waits": [counter.waits]}}}
    for name, config in METHODS.items():
        model = config.build(vit).eval()
        layouts = (Dense, Packed) if model.even else (Slab, Packed)
        found[name] = {layout.__name__.lower(): count(model, images, layout) for layout in layouts}
        if not model.even:
            half = deepcopy(model).bfloat16()
            found[name]["slab, half"] = count(half, images.bfloat16(), Slab)
    return found


if __name__ == "__main__":
    rows = (f" {json.dumps(method)}: {json.dumps(layouts)}" for method, layouts in table().items())
    TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    print(TABLE.read_text())
