"""The cells of `gpu.py`, by part: what each is, and what measures it."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from itertools import product
from typing import Any

import timm
import torch
from gpu_job import BATCHES, Job, asked, on_device
from gpu_ragged import EVEN, METHODS, RAGGED, SHARES, build, marked, vit_of
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, linear
from torch.profiler import profile

from adaptvit import AdaptiveViT, Dense, Masked, Packed, Plan, Slab, Tokens, measure_plan
from adaptvit.tokens.kernels import PLAIN, AttentionOptions, attend_dense, attend_padded

LAYOUTS = {kind.__name__.lower(): kind for kind in (Dense, Packed, Slab, Masked)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Cell = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


def layouts_of(model: AdaptiveViT) -> tuple[str, ...]:
    return ("dense", "packed") if model.even else ("slab", "packed")


def ceilings(job: Job) -> Iterator[Cell]:
    side, make = 8192 if job.cuda else 256, partial(torch.randn, device=job.device)
    half = DTYPES[job.half]

    def versions() -> dict[str, Any]:
        name = torch.cuda.get_device_name() if job.cuda else "cpu"
        found = {"device": name, "torch": torch.__version__, "timm": timm.__version__, "python": sys.version.split()[0]}
        if job.cuda:
            found |= {"cudnn": torch.backends.cudnn.version(), "capability": torch.cuda.get_device_capability()}
        return found | {"tf32": torch.backends.cuda.matmul.allow_tf32, "threads": torch.get_num_threads()}

    def product_() -> dict[str, Any]:
        a, b = make(side, side).to(half), make(side, side).to(half)
        found = job.clock({"matmul": lambda _: a @ b}, [0])
        return found | {"tflops": 2 * side**3 / found["matmul"][0] / 1e9}

    def copy() -> dict[str, Any]:
        a = make(side * side)
        b = torch.empty_like(a)
        found = job.clock({"copy": lambda _: b.copy_(a)}, [0])
        return found | {"tb_per_s": 8 * side**2 / found["copy"][0] / 1e9}

    def small() -> dict[str, Any]:
        a = make(1)
        return job.clock({"launch": lambda _: a.add_(0), "wait": lambda _: a.item()}, [0])

    yield {"what": "versions"}, versions
    yield {"what": "matmul"}, product_
    yield {"what": "copy"}, copy
    yield {"what": "launch and wait"}, small


def micro(job: Job) -> Iterator[Cell]:
    vit, half = vit_of(*job.small[:2], job.device, torch.float32), DTYPES[job.half]
    images, slots = job.small[2], vit.pos_embed.shape[1]
    live = torch.rand(BATCHES, images, slots, device=job.device) < torch.rand(BATCHES, images, 1, device=job.device)
    live[:, :, 0] = True

    def ragged(heads: int, masks: Tensor) -> list[Any]:
        packed = [Packed.of(torch.zeros(images, slots, 1, device=job.device)).filter(m.flatten())[0] for m in masks]
        return [(*torch.randn(3, len(one.slots), heads, 64, device=job.device).to(half), one) for one in packed]

    def variable(backend: SDPBackend, one: Any) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # needs a CUDA build on some releases

        with sdpa_kernel(backend):
            return varlen_attn(*one[:3], one[3].offsets, one[3].offsets, slots, slots)

    def attention(heads: int, new: bool) -> dict[str, Any]:
        given = ragged(heads, live if new else live[:1])
        calls: dict[str, Any] = {
            "packed": lambda one: one[3].attend(*one[:3], one[3]),
            "packed, biased": lambda one: one[3].attend(*one[:3], one[3], AttentionOptions(bias=one[0][:, 0, 0])),
            "padded": lambda one: attend_padded(*one[:3], one[3], one[3], PLAIN),
        }
        if job.cuda:
            backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
            calls |= {backend.name: partial(variable, backend) for backend in backends}
        found = job.clock(calls, given)
        even = int(live.sum() / BATCHES / images)
        q, k, v = torch.randn(3, images * even, heads, 64, device=job.device).to(half)
        dense = job.clock({"dense, as many tokens": lambda _: attend_dense(q, k, v, images, None, PLAIN)}, [0])
        return found | dense

    def compaction() -> dict[str, Any]:
        given = [mask.flatten() for mask in live]
        size = max(int(mask.sum()) for mask in given)
        static = lambda mask: torch.nonzero_static(mask, size=size)  # noqa: E731
        return job.clock({"nonzero": torch.nonzero, "nonzero_static": static}, given)

    def grouped() -> dict[str, Any]:
        dim = vit.embed_dim
        x, w = (torch.randn(rows, dim, device=job.device).to(torch.bfloat16) for rows in (images * slots, 4 * dim))
        few = x[: len(x) // 2]
        offsets = torch.tensor([len(few)], dtype=torch.int32, device=job.device)
        one = lambda _: functional.grouped_mm(x, w.t()[None], offs=offsets)  # noqa: E731
        return job.clock(
            {"linear, half": lambda _: linear(few, w), "linear": lambda _: linear(x, w), "grouped": one}, [0]
        )

    for heads, new in product((6, 12, 16) if job.cuda else (2,), (False, True)):
        yield {"what": "attention", "heads": heads, "new lengths": new}, partial(attention, heads, new)
    yield {"what": "nonzero"}, compaction
    yield {"what": "a linear map of half the rows"}, grouped


def parity(job: Job) -> Iterator[Cell]:
    """Against the same machine's CPU in float32."""
    models = [(name, size, min(8, batches[0])) for name, size, batches in job.models[:1]]
    sizes = [("vit_tiny_patch16_224", 64, 8), *models] if job.cuda else models

    def outputs(at: tuple[str, int, int], method: str, layout: str) -> dict[str, Any]:
        vit = vit_of(*at[:2], "cpu", torch.float32)
        images, found = marked(vit, method, 0.5, at[2], 0), {}
        own = build(method, vit, f"{at[0]}@{at[1]}", 0.5)
        with torch.inference_mode():
            wanted = own(images, detailed=True)
            for name, dtype in DTYPES.items():
                model = deepcopy(own).to(job.device, dtype)
                got = model(images.to(job.device, dtype), LAYOUTS[layout], detailed=True)
                logits = got.logits.float().cpu()
                found[name] = {
                    "difference": ((logits - wanted.logits).abs().max() / wanted.logits.abs().max()).item(),
                    "counts equal": (got.usage.attended.cpu() == wanted.usage.attended).double().mean().item(),
                    "flips": int((logits.argmax(1) != wanted.logits.argmax(1)).sum()),
                }
        model, images = deepcopy(own).to(job.device), images.to(job.device)
        return found | asked(job, model, images, LAYOUTS[layout])

    def gradients(at: tuple[str, int, int], method: str, layout: str) -> dict[str, Any]:
        vit = vit_of(*at[:2], "cpu", torch.float32)
        images, found = marked(vit, method, 0.5, at[2], 0), {}
        own = build(method, vit, f"{at[0]}@{at[1]}", 0.5)
        wanted = gradient(deepcopy(own), images, Packed, None)
        for name, dtype in DTYPES.items():
            model = deepcopy(own).to(job.device)
            got = gradient(model, images.to(job.device), LAYOUTS[layout], None if name == "fp32" else dtype)
            found[name] = torch.cosine_similarity(got.cpu().double(), wanted.double(), dim=0).item()
        return {"cosine of the gradient": found}

    for at, (method, config) in product(sizes, METHODS.items()):
        even = method not in RAGGED
        for layout in ("dense" if even else "slab", "packed", "masked"):
            yield (
                {"what": "outputs", "model": at[0], "method": config.method, "layout": layout},
                partial(outputs, at, method, layout),
            )
        if method not in ("dynamicvit", "adavit"):  # which train on noise, or masked alone
            yield {"what": "gradients", "model": at[0], "method": method}, partial(gradients, at, method, "packed")


def gradient(model: AdaptiveViT, images: Tensor, layout: type[Tokens], autocast: torch.dtype | None) -> Tensor:
    """Of a training step, of all parameters, end to end."""
    model.train()
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        output = model(images, layout, detailed=True)
        labels = torch.arange(len(images), device=images.device)
        loss = cross_entropy(output.logits.float(), labels) + sum(output.terms.values())
    loss.backward()
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


def throughput(job: Job) -> Iterator[Cell]:
    half = DTYPES[job.half]

    def speed(name: str, size: int, batch: int, method: str, share: float, dtype: torch.dtype) -> dict[str, Any]:
        vit = vit_of(name, size, job.device, dtype)
        model = build(method, vit, f"{name}@{size}", share)
        images = job.batches(vit, method, share, batch, dtype)
        with torch.inference_mode():
            if not model.even:
                model.plan = planned(job, model, method, share)
            ideal = 1 / statistics.fmean(model(one, detailed=True).usage.share.mean().item() for one in images)
            calls = {"timm": vit} | {kind: partial(model, layout=LAYOUTS[kind]) for kind in layouts_of(model)}
            found = job.clock(calls, images)
            peaks = {name: job.peak(partial(call, images[0])) for name, call in calls.items()}
        return {"ideal": ideal, "ms": found, "ratio": ratios(found, ideal), "peak_mib": peaks}

    combined = [(share, *at) for share in (None, *SHARES) for at in job.models]
    for share, name, size, batches in combined:
        for batch, method in product(batches, ["full"] if share is None else [*EVEN, *RAGGED]):
            what = {"model": f"{name}@{size}", "batch": batch, "method": method, "share": share, "dtype": job.half}
            yield what, partial(speed, name, size, batch, method, share or SHARES[0], half)
    name, size, batch = job.small
    for dtype, method in product(("fp32", "fp16"), ("full", "evit", "avit", "merge")):
        what = {"model": f"{name}@{size}", "batch": batch, "method": method, "share": 0.5, "dtype": dtype}
        yield what, partial(speed, name, size, batch, method, 0.5, DTYPES[dtype])


def planned(job: Job, model: AdaptiveViT, method: str, share: float) -> Plan:
    """By as many images as were recorded. Counts go by images, so that one holds for all widths."""
    key = (model.depth, model.vit.patch_embed.grid_size, method, share)
    if key not in job.plans:
        images = marked(model.vit, method, share, 256 if job.cuda else 32, BATCHES, job.device)
        job.plans[key] = measure_plan(model, images.to(next(model.parameters())))
    return job.plans[key]


def ratios(ms: dict[str, Any], ideal: float) -> dict[str, float]:
    """Realised over ideal of all but the first, which they are held against."""
    (_, (dense, *_)), *others = ms.items()
    return {name: round(dense / one[0] / ideal, 4) for name, one in others}


def compiled(job: Job) -> Iterator[Cell]:
    """Each beside timm's in eager mode, in the same cell."""
    half, (name, size, _) = DTYPES[job.half], job.small

    def speed(batch: int, method: str, mode: str) -> dict[str, Any]:
        torch.compiler.reset()
        vit = vit_of(name, size, job.device, half)
        images = job.batches(vit, method, 0.5, batch, half)
        with torch.inference_mode():
            calls, ideal = {"timm": vit}, 1.0
            if method == "timm":
                calls[mode] = job.compiled(vit, mode)
            else:
                model = build(method, vit, f"{name}@{size}", 0.5)
                layout = Dense if model.even else Slab
                model.plan = None if model.even else planned(job, model, method, 0.5)
                calls[mode] = partial(job.compiled(model, mode), layout=layout)
                ideal = 1 / model(images[0], detailed=True).usage.share.mean().item()
            start = time.perf_counter()
            calls[mode](images[0])
            job.wait()
            seconds = time.perf_counter() - start
            found = job.clock(calls, images)
            return {"ideal": ideal, "ms": found, "ratio": ratios(found, ideal), "seconds of compiling": seconds}

    largest, *_, smallest = job.models[0][2]
    for batch, mode in ((largest, "default"), (smallest, "reduce-overhead")):
        for method in ("timm", "evit", "avit", "tome", "merge", "ats"):
            yield (
                {"model": f"{name}@{size}", "batch": batch, "method": method, "mode": mode},
                partial(speed, batch, method, mode),
            )


def training(job: Job) -> Iterator[Cell]:
    name, size, batch = job.small

    def step(model: nn.Module, images: Tensor, **options: Any) -> None:
        with torch.autocast(job.device, torch.bfloat16, enabled=job.cuda):
            logits = model(images, **options)
        cross_entropy(logits.float(), logits.new_zeros(len(logits), dtype=torch.long)).backward()
        model.zero_grad()

    def speed(method: str) -> dict[str, Any]:
        vit = deepcopy(vit_of(name, size, job.device, torch.float32)).train()
        model = build(method, vit, f"{name}@{size}", 0.5).train()
        images = job.batches(vit, method, 0.5, batch, torch.float32)
        calls = {"timm": partial(step, vit)} | {
            kind: partial(step, model, layout=LAYOUTS[kind]) for kind in ("packed", "masked")
        }
        peaks = {name: job.peak(partial(call, images[0])) for name, call in calls.items()}
        ideal = 1 / model(images[0], detailed=True).usage.share.mean().item()
        found = job.clock(calls, images)
        return {"ideal": ideal, "ms": found, "ratio": ratios(found, ideal), "peak_mib": peaks}

    for method in ("avit", "ats", "evit", "merge"):
        yield {"model": f"{name}@{size}", "batch": batch, "method": method}, partial(speed, method)


def profiles(job: Job) -> Iterator[Cell]:
    half, (name, size, batch) = DTYPES[job.half], job.small

    def seen(method: str) -> dict[str, Any]:
        vit = vit_of(name, size, job.device, half)
        model = build(method, vit, f"{name}@{size}", 0.5)
        images = marked(vit, method, 0.5, batch, 0, job.device).to(half)
        with torch.inference_mode():
            model(images)
            job.wait()
            with profile() as seen:
                start = time.perf_counter()
                model(images)
                job.wait()
                wall = time.perf_counter() - start
        every = on_device(seen) if job.cuda else [one for one in seen.events() if one.cpu_parent is None]
        spent: dict[str, float] = {}
        for one in every:
            spent[one.name[:60]] = spent.get(one.name[:60], 0.0) + one.time_range.elapsed_us() / 1e3
        longest = dict(sorted(spent.items(), key=lambda item: -item[1])[:10])
        return {"kernels": len(every), "busy": sum(spent.values()) / 1e3 / wall, "longest_ms": longest}

    for method in ("full", "evit", "avit", "merge"):
        yield {"model": f"{name}@{size}", "batch": batch, "method": method, "layout": "packed"}, partial(seen, method)
