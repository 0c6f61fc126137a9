"""EViT against numbers recorded from the released code.

With a class token the last block of a model reduces nothing, since nothing would read it. To see what it would keep,
each ViT here has one block more than the recorded one, whose two sub-layers add zero.
"""

import json
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recordings import apart, filled, images, our_name, terms_of, vit_of
from torch import Tensor

from adaptvit import EViTConfig, Masked, Packed
from adaptvit.methods.evit import EViT, keep_rate_at
from adaptvit.usage import Output
from adaptvit.weights.published import resize_positions

LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)


@cache
def load(path: Path) -> SimpleNamespace:
    return SimpleNamespace(case=json.loads(path.read_text()), arrays=dict(np.load(path.with_suffix(".npz"))))


def build(case: dict) -> tuple[EViT, dict[str, object]]:
    """The model, and what its forward is told at run time."""
    given, settings, size = case["model"], case["settings"], case["input"]["size"]
    state = filled(case["weights"])
    state["pos_embed"] = resize_positions(state["pos_embed"], size // given["patch_size"], 1)
    vit = vit_of(state, size, given["num_heads"], given["norm_eps"], idle=1)
    fuse, told = settings["fuse_token"], settings["runtime_keep_rate"]
    rates = {block: rate for block, rate in enumerate(settings["keep_rate"]) if rate < 1}
    if settings["runtime_tokens"]:
        tokens = dict(kept_by_number(settings, (size // given["patch_size"]) ** 2))
        return EViTConfig(blocks=list(tokens), tokens=list(tokens.values()), fuse=fuse).build(vit), {}
    if not rates:  # nothing reduces, whatever is told at run time
        return EViTConfig(blocks=[0], keep_rate=1.0, fuse=fuse).build(vit), {}
    if isinstance(told, list):  # recorded for every block, told for those that reduce
        told = [told[block] for block in rates]
    config = EViTConfig(blocks=list(rates), keep_rate=list(rates.values()), fuse=fuse)
    return config.build(vit), {"keep_rate": told}


def kept_by_number(settings: dict, patches: int) -> Iterator[tuple[int, int]]:
    """Blocks with the numbers that they are told to keep, or that their rates come to where they are told none."""
    told = settings["runtime_keep_rate"]
    for block, (count, rate) in enumerate(zip(settings["runtime_tokens"], settings["keep_rate"], strict=True)):
        now = rate if told is None else told[block] if isinstance(told, list) else told
        wanted = count or math.ceil((now if rate < 1 else 1) * patches)
        if wanted < patches:
            patches = wanted + settings["fuse_token"]
        elif not count:
            continue
        yield block, wanted


def batch_of(case: dict) -> Tensor:
    return images(case["input"], filled(case["weights"]))


def close(actual: Tensor, expected: np.ndarray, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual.detach(), torch.from_numpy(expected), atol=atol, rtol=rtol)


def logits_apart(case: dict, expected: np.ndarray, model: EViT) -> float:
    return apart(expected, terms_of(model.vit), case["checks"]["f32_f64_maxabs"])


def kept_patches(output: Output, block: int, fused_now: bool) -> list[list[int]]:
    """Patch numbers that a block kept, ascending, and -1 for each older fused token that it kept."""
    live, fused = output.usage.live[:, block + 1, 1:], output.usage.fused[:, block + 1, 1:]
    found = []
    for alive, merged in zip(live, fused, strict=True):
        patches = (alive & ~merged).nonzero().flatten().tolist()
        found.append([-1] * (int(merged.sum()) - fused_now) + patches)
    return found


@LAYOUTS
def test_the_released_patches_and_logits(evit_case: Path, layout: type) -> None:
    recorded = load(evit_case)
    model, told = build(recorded.case)
    with torch.inference_mode():
        output = model.eval()(batch_of(recorded.case), layout, **told, detailed=True)
    reduced = [int(name.removeprefix("kept_patch_")) for name in recorded.arrays if name.startswith("kept_patch_")]
    for block in reduced:
        expected = np.sort(recorded.arrays[f"kept_patch_{block}"], axis=1).tolist()  # -1 is a fused token, kept on
        assert kept_patches(output, block, recorded.case["settings"]["fuse_token"]) == expected, f"block {block}"
    counts = [count + 1 for count in recorded.case["tokens_after_block_excl_cls"]]
    for block, count in enumerate(counts):
        assert (output.usage.live[:, block + 1].sum(dim=1) == count).all(), f"block {block}"
    expected = recorded.arrays["logits"]
    close(output.logits, expected, logits_apart(recorded.case, expected, model))


@LAYOUTS
def test_the_released_scores(evit_case: Path, layout: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first block that reduces, where the recorded ones are in the order of the patches."""
    recorded = load(evit_case)
    blocks = [int(name.removeprefix("cls_attn_")) for name in recorded.arrays if name.startswith("cls_attn_")]
    model, told = build(recorded.case)
    seen: list[Tensor] = []
    score = EViT.score
    monkeypatch.setattr(EViT, "score", lambda *given: seen.append(score(*given)) or seen[-1])
    with torch.inference_mode():
        model.eval()(batch_of(recorded.case), layout, **told)
    assert bool(seen) == bool(blocks)
    for first in sorted(blocks)[:1]:
        expected = recorded.arrays[f"cls_attn_{first}"]
        # a softmax of sums of d products: its relative difference is the absolute one of its logits, of size 10 at most
        close(seen[0][:, model.prefix :], expected, apart(expected, terms_of(model.vit)), rtol=1e-5)


@LAYOUTS
def test_the_released_gradients(evit_gradients: Path, layout: type) -> None:
    recorded = load(evit_gradients)
    model, told = build(recorded.case)
    logits = model.train()(batch_of(recorded.case), layout, **told)
    expected = recorded.arrays["train_logits"]
    close(logits, expected, logits_apart(recorded.case, expected, model))
    (logits * torch.from_numpy(recorded.arrays["grad_weights"])).sum().backward()
    parameters = dict(model.vit.named_parameters())
    for name, norm in recorded.case["grad_norms"].items():
        assert gradient_of(parameters, name).norm().item() == pytest.approx(norm, rel=1e-3), name
    compared = 0
    for array, expected in recorded.arrays.items():
        found = re.fullmatch(r"grad_(cls_token|block(\d+)_qkv_bias)", array)
        if found:
            name = f"blocks.{found[2]}.attn.qkv.bias" if found[2] else found[1]
            close(gradient_of(parameters, name), expected, atol=1e-4 * np.abs(expected).max())
            compared += 1
    assert compared


def gradient_of(parameters: dict[str, Tensor], name: str) -> Tensor:
    return parameters[our_name(name, parameters)].grad


def test_the_released_schedule(evit_schedule: Path) -> None:
    for row in json.loads(evit_schedule.read_text())["rows"]:
        assert row["columns"] == ["global_iter", "epoch", "keep_rate"]
        for update, epoch, expected in row["points"]:
            assert update // row["iters_per_epoch"] == epoch
            rate = keep_rate_at(
                update,
                row["iters_per_epoch"],
                row["base_keep_rate"],
                row["shrink_start_epoch"],
                row["shrink_end_epoch"],
                row["max_keep_rate"],
            )
            assert rate == pytest.approx(expected, abs=1e-12), (update, epoch)
