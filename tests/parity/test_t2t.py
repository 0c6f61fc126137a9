"""The tokens-to-token stem against numbers recorded from published code.

The greatest differences measured are 1.2e-6 for the small stems, 8.3e-7 for the one of T2T-ViT-19, none for positions.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import weights
from torch import Tensor, nn

from adaptvit.t2t import SPLITS, TokensToToken, published_names, sinusoid, soft_split


def load(request: pytest.FixtureRequest, name: str) -> SimpleNamespace:
    path: Path = request.config.getoption("--fixtures") / "adavit" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    arrays = {key: torch.from_numpy(value) for key, value in np.load(path.with_suffix(".npz")).items()}
    return SimpleNamespace(case=json.loads(path.read_text()), arrays=arrays)


def state(case: dict) -> dict[str, Tensor]:
    """The recorded weights, under their published names."""
    given = case["weights"]
    tensors = weights.fill(case["manifest"], given["seed"], given["scale"])
    for change in given["overrides"]:
        assert change["op"] == "mul"
        for key in tensors:
            if key.endswith(change["match"]):
                tensors[key] = tensors[key] * np.float32(change["value"])
    return {key: torch.from_numpy(value) for key, value in tensors.items()}


def images(case: dict) -> Tensor:
    return torch.from_numpy(weights.images(**case["input"]))


def stages(stem: nn.Module, batch: Tensor) -> Mapping[str, Tensor]:
    """What the attentions and the stem give."""
    seen: dict[str, list[Tensor]] = {"attention1": [], "attention2": []}
    for name, parts in seen.items():
        getattr(stem, name).register_forward_hook(lambda module, inputs, out, parts=parts: parts.append(out))
    with torch.inference_mode():
        out = stem(batch)
    return {**{name: torch.cat(parts) for name, parts in seen.items()}, "tokens": out}


@pytest.mark.parametrize("tokens_type", ["performer", "transformer"])
def test_the_stem_is_the_published_one(tokens_type: str, request: pytest.FixtureRequest) -> None:
    recorded = load(request, f"t2t_module_{tokens_type}")
    stem = TokensToToken(**recorded.case["config"]).eval()
    stem.load_state_dict(state(recorded.case))
    batch = images(recorded.case)
    split = soft_split(batch.permute(0, 2, 3, 1), *SPLITS[0])
    assert torch.equal(split[:, : recorded.arrays["soft_split0_slice"].shape[1]], recorded.arrays["soft_split0_slice"])
    found = stages(stem, batch)
    for key, name in (("attention1", "attention1"), ("attention2", "attention2"), ("out", "tokens")):
        torch.testing.assert_close(found[name], recorded.arrays[key], atol=2e-6, rtol=0)


def test_the_stem_of_t2t_vit_19_is_the_published_one(request: pytest.FixtureRequest) -> None:
    recorded = load(request, "eval_full_t2t_vit_19")
    vit = timm.create_model("t2t_vit_19").eval()
    published = published_names(state(recorded.case))
    stem = {key.removeprefix("patch_embed."): published[key] for key in published if key.startswith("patch_embed.")}
    vit.patch_embed.load_state_dict(stem)
    for name, found in stages(vit.patch_embed, images(recorded.case)).items():
        first, last = recorded.arrays[f"t2t_{name}_slice"], recorded.arrays[f"t2t_{name}_tail"]
        told = recorded.case["t2t_stats"][name]
        torch.testing.assert_close(found[:, : first.shape[1], : first.shape[2]], first, atol=2e-6, rtol=0)
        torch.testing.assert_close(found[:, -last.shape[1] :, -last.shape[2] :], last, atol=2e-6, rtol=0)
        assert list(found.shape) == told["shape"]
        assert found.double().abs().sum().item() == pytest.approx(told["abs_sum"], rel=1e-7)


def test_positions_are_the_published_ones(request: pytest.FixtureRequest) -> None:
    arrays = load(request, "sinusoid").arrays
    torch.testing.assert_close(sinusoid(10, 24), arrays["n10_d24"], atol=1e-7, rtol=0)
    rows = sinusoid(197, 448)[0, [0, 1, 2, 50, 196], :64]
    torch.testing.assert_close(rows, arrays["n197_d448_rows"], atol=1e-7, rtol=0)
