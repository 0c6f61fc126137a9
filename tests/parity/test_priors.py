"""Priors against tables recorded from the released A-ViT and from alessioborgi/AdaViT, its notebook and its package."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from recordings import apart
from torch.nn.functional import kl_div

from adaptvit.methods.avit import kl_divergence
from adaptvit.methods.priors import SKEW_PEAK, log_normal, mixture, released_target

DISTRIBUTIONS = {"normal": "gaussian", "laplace": "laplace", "studentt30": "student_t", "cauchy": "cauchy"}


def package_rows(recorded: Path) -> list[tuple[dict, torch.Tensor, torch.Tensor]]:
    """Settings and loss, our unscaled target, and the recorded one's logarithm."""
    arrays = np.load(recorded.with_suffix(".npz"))
    found = []
    for row in json.loads(recorded.read_text())["rows"]:
        if row.get("kind") not in (
            "unimodal",
            "mixture",
        ):  # the multivariate attempts are not distributions over blocks
            continue
        peaks, scales = np.atleast_1d(row["target_depth"]), np.atleast_1d(row["scaling"])
        narrower = 1 if row["dist"] == "normal" else 2**-0.5
        parts = [
            released_target(DISTRIBUTIONS[row["dist"]], 12, peak, scale * narrower, buffer=None)
            for peak, scale in zip(peaks, scales, strict=True)
        ]
        log_target = arrays[f"{'uni' if row['kind'] == 'unimodal' else 'mix'}_logtarget_{row['dist']}"]
        found.append((row, mixture(parts, row.get("weights", [1.0])), torch.from_numpy(log_target)))
    assert found
    return found


def test_targets_of_the_released_code(avit_targets: Path) -> None:
    rows = json.loads(avit_targets.read_text())["targets"]
    seen = []
    for row in rows:
        blocks, peak, values = row["length"], row["target_depth"], row["values"]
        seen.append(row["mode"])
        if row["mode"] == "gaussian":
            ours = released_target("gaussian", blocks, peak + 1, buffer=row["buffer"] if row["standardized"] else None)
        elif row["mode"] == "skewnorm":  # located at a block, not peaking there; a block short, and never scaled
            ours = released_target("skew_normal", blocks - 1, peak + SKEW_PEAK, buffer=None)
        else:  # of shape 0.99 and scale 1 whatever the target, over 0..L-1
            assert values.pop(0) == 0
            top = np.exp(-(0.99**2))
            ours = torch.from_numpy(np.arange(1.0, blocks))
            ours = log_normal(ours, top, 0.99 * top).exp()
            ours = ours * (1 - row["buffer"]) / ours[: peak - 1].sum()
        assert ours.tolist() == pytest.approx(values, rel=1e-6)
    assert {*seen} <= {"gaussian", "lognorm", "skewnorm"}


def test_targets_of_the_notebook(borgi_notebook: Path) -> None:
    with np.load(borgi_notebook) as arrays:
        targets = {name: arrays[name] for name in arrays if name.startswith("target_")}
    assert targets
    for name, values in targets.items():
        kind, blocks, mean = re.fullmatch(r"target_(.+)_(\d+)_(\d+)", name).groups()
        prior, scale = {
            "gaussian": ("gaussian", 1),
            "quasilaplace": ("quasi_laplace", 1),
            "laplace_b2": ("laplace", 2),
        }[kind]
        ours = released_target(prior, int(blocks), int(mean) + 1, scale)
        assert ours.tolist() == pytest.approx(values.tolist(), rel=1e-9), name


def test_targets_of_the_package(borgi_package: Path) -> None:
    for row, target, log_target in package_rows(borgi_package):
        atol = apart(log_target, len(target))
        torch.testing.assert_close(target.log(), log_target.double(), atol=atol, rtol=0, msg=str(row))


def test_losses_of_the_package(borgi_package: Path) -> None:
    """Its divergence is ours over L, of scores clamped to [0.001, 0.999]."""
    scores = torch.from_numpy(np.load(borgi_package.with_suffix(".npz"))["halting_score_layer"]).double()
    model = (scores / scores.sum()).clamp(0.001, 0.999)
    for row, target, _ in package_rows(borgi_package):
        ours = kl_divergence(model, target, "target||model")
        assert ours.item() / 12 == pytest.approx(row["loss"], rel=1e-5), row
        assert ours.item() == pytest.approx(kl_div(model.log(), target, reduction="sum").item(), rel=1e-12)
