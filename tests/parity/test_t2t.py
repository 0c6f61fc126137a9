"""The tokens-to-token stem against numbers recorded from published code.

How far two runs lie apart depends on the processor's vector units: 2e-6 was enough with AVX2, and not with AVX-512.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recordings import EPS, apart, images, with_changes
from torch import Tensor, nn

from adaptvit.backbones.t2t import SPLITS, TokensToToken, published_names, sinusoid, soft_split


def load(path: Path) -> SimpleNamespace:
    arrays = {key: torch.from_numpy(value) for key, value in np.load(path.with_suffix(".npz")).items()}
    return SimpleNamespace(case=json.loads(path.read_text()), arrays=arrays)


def stem_of(case: dict) -> TokensToToken:
    """The recorded stem, whose widths are read off its weights."""
    state = {key.removeprefix("patch_embed."): value for key, value in published_names(with_changes(case)).items()}
    first, _, last = (kernel**2 for kernel, _, _ in SPLITS)
    stem = TokensToToken(
        img_size=case["config"]["img_size"],
        tokens_type=case["config"]["tokens_type"],
        in_chans=len(state["attention1.norm1.weight"]) // first,
        token_dim=state["project.weight"].shape[1] // last,
        embed_dim=len(state["project.weight"]),
    )
    stem.load_state_dict({key: state[key] for key in stem.state_dict()})
    return stem.eval()


def batch_of(case: dict, stem: TokensToToken) -> Tensor:
    return images({"channels": stem.attention1.norm1.weight.numel() // SPLITS[0][0] ** 2} | case["input"])


def stem_apart(stem: TokensToToken, expected: Tensor) -> float:
    """Tokens of the stem are sums over a window's channels, in each of three splits."""
    return apart(expected, 3 * stem.project.in_features)


def stages(stem: nn.Module, batch: Tensor) -> Mapping[str, Tensor]:
    """What the attentions and the stem give."""
    seen: dict[str, list[Tensor]] = {"attention1": [], "attention2": []}
    for name, parts in seen.items():
        getattr(stem, name).register_forward_hook(lambda module, inputs, out, parts=parts: parts.append(out))
    with torch.inference_mode():
        out = stem(batch)
    return {**{name: torch.cat(parts) for name, parts in seen.items()}, "tokens": out}


def test_the_stem_is_the_published_one(t2t_module: Path) -> None:
    recorded = load(t2t_module)
    stem = stem_of(recorded.case)
    batch = batch_of(recorded.case, stem)
    split = soft_split(batch.permute(0, 2, 3, 1), *SPLITS[0])
    assert torch.equal(split[:, : recorded.arrays["soft_split0_slice"].shape[1]], recorded.arrays["soft_split0_slice"])
    found = stages(stem, batch)
    for key, name in (("attention1", "attention1"), ("attention2", "attention2"), ("out", "tokens")):
        expected = recorded.arrays[key]
        torch.testing.assert_close(found[name], expected, atol=stem_apart(stem, expected), rtol=0)


def test_the_stem_of_a_model_is_the_published_one(adavit_stem: Path) -> None:
    recorded = load(adavit_stem)
    stem = stem_of(recorded.case)
    for name, found in stages(stem, batch_of(recorded.case, stem)).items():
        first, last = recorded.arrays[f"t2t_{name}_slice"], recorded.arrays[f"t2t_{name}_tail"]
        told = recorded.case["t2t_stats"][name]
        torch.testing.assert_close(
            found[:, : first.shape[1], : first.shape[2]], first, atol=stem_apart(stem, first), rtol=0
        )
        torch.testing.assert_close(
            found[:, -last.shape[1] :, -last.shape[2] :], last, atol=stem_apart(stem, last), rtol=0
        )
        assert list(found.shape) == told["shape"]
        off = stem_apart(stem, found) * found.numel() ** 0.5  # a random walk of so many steps
        assert found.double().abs().sum().item() == pytest.approx(told["abs_sum"], rel=0, abs=off)


def test_positions_are_the_published_ones(sinusoid_case: Path) -> None:
    arrays, note = load(sinusoid_case).arrays, load(sinusoid_case).case["note"]
    for name, expected in arrays.items():
        count, channels, rows = re.fullmatch(r"n(\d+)_d(\d+)(_rows)?", name).groups()
        table = sinusoid(int(count), int(channels))
        if rows:  # a few of the first channels
            told = re.search(rf"{name}: rows ([\d,]+)", note)
            assert told, f"{sinusoid_case} does not say which rows {name} has"
            table = table[0, [int(row) for row in told[1].split(",")], : expected.shape[1]]
        torch.testing.assert_close(table, expected, atol=EPS, rtol=0)  # of numbers up to 1
