"""A-ViT against numbers recorded from the released code."""

import ast
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import weights
from recordings import apart, filled, images, our_name, terms_of, vit_of
from torch.nn.functional import cross_entropy

from adaptvit import AViTConfig, Masked, Packed
from adaptvit.methods.avit import AViT
from adaptvit.methods.priors import released_target
from adaptvit.methods.released import ReleasedAViTConfig
from adaptvit.methods.released import avit as released
from adaptvit.weights.published import resize_positions


@cache
def load(path: Path) -> SimpleNamespace:
    case = json.loads(path.read_text())
    arrays = dict(np.load(path.with_suffix(".npz")))
    given = {"batch": case["batch"], "size": case["img_size"], "seed": case["image_seed"]}
    return SimpleNamespace(case=case, arrays=arrays, images=images(given, filled(case, case["manifest"])))


def logits_apart(recorded: SimpleNamespace, model: AViT) -> float:
    own = recorded.case["fp32_vs_fp64"]["logits_max_abs"]
    return apart(recorded.arrays["logits"], terms_of(model.vit), own)


def halting_apart(recorded: SimpleNamespace, model: AViT) -> float:
    """Of halting scores and of their sums, which rho is; the gate's scale shows in the recorded rounding of rho."""
    return apart(recorded.arrays["rho"], terms_of(model.vit), recorded.case["fp32_vs_fp64"]["rho_max_abs"])


def prior_apart(recorded: SimpleNamespace, model: AViT) -> float:
    """Of the mean over blocks of target x ln p, p being a share of the scores' mean over all tokens."""
    target = recorded.arrays["distr_target"]
    return model.config.prior_weight * float(target.mean()) * halting_apart(recorded, model)


def build(case: dict, kind: type[AViTConfig] = ReleasedAViTConfig, **changes: object) -> AViT:
    given = case["model_config"]
    heads = given.get("num_heads")
    if heads is None:  # of a published name, whose heads have 64 channels
        heads = case["manifest"]["cls_token"][-1] // 64
    state = filled(case, case["manifest"])
    vit = vit_of(state, case["img_size"], heads, distilled=given.get("distilled", False))
    config = kind(
        **{
            "gate_scale": case["gate_scale"],
            "gate_center": case["gate_center"],
            "epsilon": case["eps"],
            "ponder_weight": case["ponder_token_scale"],
            "prior_weight": case["distr_prior_alpha"],
            "prior_depth": case["target_depth"] + 1,
            **changes,
        }
    )
    return config.build(vit).train(case["mode"] == "train")


def close(actual: torch.Tensor, expected: np.ndarray, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual.detach(), torch.from_numpy(expected), atol=atol, rtol=rtol, check_dtype=False)


def test_official_mode_reproduces_the_released_training_pass(avit_case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = load(avit_case)
    case, arrays = recorded.case, recorded.arrays
    seen = {}
    terms = released.terms
    monkeypatch.setattr(
        released, "terms", lambda model, scores, rho: seen.update(h=scores, rho=rho) or terms(model, scores, rho)
    )
    model = build(case)
    output = model(recorded.images, early_exit=False, detailed=True)

    close(output.logits, arrays["logits"], logits_apart(recorded, model))
    assert np.array_equal(output.usage.depth.numpy(), arrays["counter"])
    assert np.array_equal(output.usage.live.transpose(0, 1).numpy(), arrays["active"].astype(bool))
    close(seen["h"], arrays["h"], halting_apart(recorded, model))
    close(seen["rho"], arrays["rho"], halting_apart(recorded, model))
    if "distr_target" in arrays:
        close(model.prior, arrays["distr_target"], apart(arrays["distr_target"], model.depth))

    losses = case["losses"]
    task = cross_entropy(output.logits, torch.tensor(case["labels"]))
    assert task.item() == pytest.approx(losses["ce"], rel=0, abs=logits_apart(recorded, model))
    off = model.config.ponder_weight * halting_apart(recorded, model)
    assert output.terms["ponder"].item() == pytest.approx(losses["ponder"], rel=0, abs=off)
    assert ("prior" in output.terms) == bool(losses.get("distr_added"))
    if "prior" in output.terms:
        assert output.terms["prior"].item() == pytest.approx(losses["distr"], rel=0, abs=prior_apart(recorded, model))

    parameters = dict(model.vit.named_parameters())
    names = {our_name(name, parameters): name for name in case["manifest"]}
    for name, loss in {"ce": task, **output.terms, "total": task + sum(output.terms.values())}.items():
        norms = case["grad_norms"]["distr" if name == "prior" else name]
        largest = max(norm or 0.0 for norm in norms.values())
        rest = apart(np.float64(largest), terms_of(model.vit))  # what is left where a gradient's terms cancel
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for key, gradient in zip(parameters, gradients, strict=True):
            norm = 0.0 if gradient is None else gradient.norm().item()
            assert norm == pytest.approx(norms[names[key]] or 0.0, rel=1e-3, abs=rest), f"gradient of {name} by {key}"
        if name == "total":
            for key, gradient in zip(parameters, gradients, strict=True):
                whole, corner = (arrays.get(f"{kind}:{names[key]}") for kind in ("grad", "grad_slice16"))
                scale = 1e-3 * (norms[names[key]] or 0.0)
                if whole is not None and gradient is not None:
                    close(gradient, whole, scale)
                if corner is not None and gradient is not None:
                    close(gradient.flatten(1)[:16, :16], corner, scale)


@pytest.mark.filterwarnings("ignore:.*halts every token after block 1")  # small_d6_allhalt is meant to
@pytest.mark.parametrize("kind", [AViTConfig, ReleasedAViTConfig])
def test_early_exit_keeps_the_released_logits(avit_case: Path, kind: type[AViTConfig]) -> None:
    recorded = load(avit_case)
    model = build(recorded.case, kind).eval()
    for layout in (Masked, Packed):
        with torch.inference_mode():
            output = model(recorded.images, layout, detailed=True)
        close(output.logits, recorded.arrays["logits"], logits_apart(recorded, model))
        is_read = slice(0, model.read)
        assert np.array_equal(output.usage.depth[:, is_read].numpy(), recorded.arrays["counter"][:, is_read])


def test_clean_mode_keeps_the_released_depths(avit_case: Path) -> None:
    recorded = load(avit_case)
    model = build(recorded.case, AViTConfig).eval()
    for layout in (Masked, Packed):
        with torch.inference_mode():
            output = model(recorded.images, layout, early_exit=False, detailed=True)
        close(output.logits, recorded.arrays["logits"], logits_apart(recorded, model))
        assert np.array_equal(output.usage.depth.numpy(), recorded.arrays["counter"])


def test_blocks_match_the_released_ones(avit_blocks: Path) -> None:
    recorded = load(avit_blocks)
    model = build(recorded.case)
    arrays = {key: torch.from_numpy(value) for key, value in recorded.arrays.items()}
    source = model.enter(torch.zeros(len(arrays["block_in"][0]), 3, *model.vit.patch_embed.img_size), Masked).source
    for index, block in enumerate(model.vit.blocks):
        live = arrays["active"][index].bool()
        out = released.run_block(index, block, Masked(arrays["block_in"][index], live, source=source)).x
        expected = arrays["block_out"][index]
        torch.testing.assert_close(out, expected, atol=apart(expected, terms_of(model.vit)), rtol=0)


def test_released_targets(avit_targets: Path) -> None:
    rows = [
        row
        for row in json.loads(avit_targets.read_text())["targets"]
        if row["mode"] == "gaussian" and row["standardized"]
    ]
    assert rows
    for row in rows:
        target = released_target("gaussian", row["length"], row["target_depth"] + 1, buffer=row["buffer"])
        assert target.tolist() == pytest.approx(row["values"], rel=1e-6)


def test_positions_are_resized_as_released(avit_positions: Path) -> None:
    arrays = np.load(avit_positions.with_suffix(".npz"))
    for case in json.loads(avit_positions.read_text()):
        key, shape, seed, scale = ast.literal_eval(case["input"].removeprefix("weights.tensor"))
        table = torch.from_numpy(weights.tensor(key, shape, seed, scale))
        resized = resize_positions(table, case["new_grid"], case["extra_tokens"])
        expected = arrays[case["key"]]
        # places are coordinates up to the grid's side, which round to eps times it, and values differ by their size
        close(resized, expected, case["orig_grid"] * apart(expected, 1))
