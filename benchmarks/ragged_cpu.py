"""Attention within images of different lengths on the CPU: image by image, or groups of like lengths, padded.

    python benchmarks/ragged_cpu.py > benchmarks/ragged_cpu.jsonl

Lengths are drawn around a mean, and cut at the number of slots. `each` is a call of torch's fused attention an image,
`products` two matrix products an image with a softmax between. In turns, two threads; milliseconds, medians.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from adaptvit.files import as_json
from adaptvit.measure.speed import interleaved

CASES = ((65, 33, 9, 3), (65, 50, 8, 3), (197, 100, 25, 3), (197, 100, 25, 6))
"""Slots, mean length, its spread, heads."""
ROUNDS, DIM = 20, 64
Parts = Sequence[Sequence[int]]


def each(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """A call of the fused attention an image."""
    out = torch.empty_like(q)
    for place, *image in zip(*(t.split(lengths) for t in (out, q, k, v)), strict=True):
        alone = (t.transpose(0, 1)[None] for t in image)
        place.copy_(scaled_dot_product_attention(*alone)[0].transpose(0, 1))
    return out


def products(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """As `adaptvit.tokens.kernels.attend_each` has it up to so many tokens."""
    out, nothing = torch.empty_like(q), q.new_zeros(1, 1, 1)
    for place, *image in zip(*(t.transpose(0, 1).split(lengths, 1) for t in (out, q, k, v)), strict=True):
        query, key, value = image
        logits = torch.baddbmm(nothing, query, key.mT, beta=0, alpha=q.shape[-1] ** -0.5)
        torch.bmm(logits.softmax(dim=-1), value, out=place)
    return out


def grouped(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], parts: Parts) -> Tensor:
    """Each part padded to its longest image, what is padded hidden."""
    out, starts = torch.empty_like(q), [0, *accumulate(lengths)]
    for part in parts:
        begin, length = torch.tensor([[starts[one], lengths[one]] for one in part]).T[..., None]
        place = torch.arange(int(length.max()))[None]
        live = place < length
        rows = torch.where(live, begin + place, begin).flatten()
        images = (t.index_select(0, rows).view(*live.shape, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
        mask = None if live.all() else torch.zeros(live.shape).masked_fill_(~live, -torch.inf)[:, None, None]
        mixed = scaled_dot_product_attention(*images, mask).transpose(1, 2).flatten(0, 1)
        real = live.flatten().nonzero().squeeze(1)
        out.index_copy_(0, rows.index_select(0, real), mixed.index_select(0, real))
    return out


def equal_parts(lengths: Sequence[int], count: int) -> Parts:
    """So many groups of images in order of length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    size = -(-len(lengths) // count)
    return [order[start : start + size] for start in range(0, len(order), size)]


def rounded_parts(lengths: Sequence[int], step: int) -> Parts:
    """Images whose lengths round up to the same multiple."""
    found: dict[int, list[int]] = {}
    for image, length in enumerate(lengths):
        found.setdefault(-(-length // step), []).append(image)
    return list(found.values())


def main() -> None:
    """A line for each case and batch."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    for slots, mean, spread, heads in CASES:
        for batch in (32, 8):
            lengths = (mean + spread * torch.randn(batch)).int().clamp(5, slots).tolist()
            qkv = torch.randn(sum(lengths), 3, heads, DIM).unbind(1)
            parts = {f"{count} groups": equal_parts(lengths, count) for count in (1, 2, 4, 8)}
            parts |= {f"rounded to {step}": rounded_parts(lengths, step) for step in (8, 16)}
            calls: dict[str, Callable[[], object]] = {"each": partial(each, *qkv, lengths)}
            calls["products"] = partial(products, *qkv, lengths)
            calls |= {name: partial(grouped, *qkv, lengths, some) for name, some in parts.items()}
            torch.testing.assert_close(products(*qkv, lengths), each(*qkv, lengths))
            for name, some in parts.items():
                torch.testing.assert_close(grouped(*qkv, lengths, some), each(*qkv, lengths), msg=name)
            seconds = interleaved(calls, ROUNDS)
            line = {"slots": slots, "mean": mean, "heads": heads, "batch": batch}
            print(as_json(line | {name: round(1e3 * median(times), 2) for name, times in seconds.items()}), flush=True)
    print(as_json({"torch": torch.__version__, "threads": 2, "rounds": ROUNDS, "load_average": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
