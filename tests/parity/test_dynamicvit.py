"""DynamicViT against numbers recorded from the released code."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recordings import apart, filled, images, our_name, terms_of, vit_of
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from adaptvit import DynamicViTConfig, Masked, Packed
from adaptvit.backbones.blocks import run_block
from adaptvit.backbones.door import Acts
from adaptvit.backbones.forward import enter, final_norm
from adaptvit.methods import dynamicvit
from adaptvit.methods.dynamicvit import DynamicViT, Predictor, masked_attention
from adaptvit.methods.losses import distillation
from adaptvit.methods.released.dynamicvit import ReleasedDynamicViT, ReleasedDynamicViTConfig

LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)


@cache
def load(path: Path) -> SimpleNamespace:
    return SimpleNamespace(case=json.loads(path.read_text()), arrays=dict(np.load(path.with_suffix(".npz"))))


def plain_vit(case: dict, given: dict) -> VisionTransformer:
    """The recorded ViT, with the student's or the teacher's weights."""
    state = {key: value for key, value in filled(given).items() if not key.startswith("score_")}
    return vit_of(state, case["model"]["img_size"], case["model"]["num_heads"], case["model"]["norm_eps"])


def build(case: dict, kind: type[DynamicViTConfig] = DynamicViTConfig, **settings: object) -> DynamicViT:
    model = kind(blocks=case["settings"]["pruning_loc"], **settings).build(plain_vit(case, case["weights"]))
    predictors = {key: value for key, value in filled(case["weights"]).items() if key.startswith("score_")}
    _, unknown = model.load_state_dict(predictors, strict=False)
    assert not unknown
    for predictor in model.score_predictor:
        assert predictor.in_conv[0].eps == case["model"].get("predictor_norm_eps", 1e-5)
    return model


def batch_of(case: dict) -> Tensor:
    return images(case["input"], filled(case["weights"]))


def logits_apart(case: dict, expected: np.ndarray, model: DynamicViT) -> float:
    return apart(expected, terms_of(model.vit), case["checks"].get("f32_f64_maxabs", 0.0))


def close(actual: Tensor, expected: np.ndarray, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual.detach(), torch.from_numpy(expected), atol=atol, rtol=rtol, check_dtype=False)


@LAYOUTS
def test_the_released_patches_and_logits(dynamicvit_evaluated: Path, layout: type) -> None:
    case, arrays = load(dynamicvit_evaluated).case, load(dynamicvit_evaluated).arrays
    model = build(case, keep_rate=case["settings"]["token_ratio"]).eval()
    with torch.inference_mode():
        output = model(batch_of(case), layout, detailed=True)
    for stage, block in enumerate(model.stages):
        live = output.usage.live[:, block, 1:]
        assert [row.nonzero().flatten().tolist() for row in live] == np.sort(arrays[f"kept_patch_{stage}"], 1).tolist()
        assert (live.sum(dim=1) == case["settings"]["kept_counts"][stage]).all()
    close(output.logits, arrays["logits"], logits_apart(case, arrays["logits"], model))


@LAYOUTS
def test_the_released_scores(dynamicvit_evaluated: Path, layout: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stage, in the order of its patches' scores in the stage before."""
    case, arrays, seen = load(dynamicvit_evaluated).case, load(dynamicvit_evaluated).arrays, []
    model = build(case, keep_rate=case["settings"]["token_ratio"]).eval()
    drop = DynamicViT.drop
    monkeypatch.setattr(
        DynamicViT,
        "drop",
        lambda self, tokens, score, stage: seen.append(tokens.grid(score)) or drop(self, tokens, score, stage),
    )
    with torch.inference_mode():
        model(batch_of(case), layout)
    order = torch.arange(seen[0].shape[1] - 1).expand(len(seen[0]), -1)
    for stage, score in enumerate(seen):
        expected = arrays[f"score_{stage}"]
        close(logsigmoid(score[:, 1:].gather(1, order)), expected, logits_apart(case, expected, model))
        order = torch.from_numpy(arrays[f"kept_patch_{stage}"]).long()


def teacher_says(case: dict) -> tuple[Tensor, Tensor]:
    """The teacher's logits and its patches after the last norm."""
    teacher = plain_vit(case, case["teacher"])
    with torch.no_grad():
        tokens = enter(teacher.eval(), batch_of(case), Masked)
        for number in range(len(teacher.blocks)):
            tokens = run_block(number, tokens, Acts())
        return teacher(batch_of(case)), final_norm(teacher, tokens.x)[:, 1:]


def test_the_released_training(dynamicvit_trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, arrays = load(dynamicvit_trained).case, load(dynamicvit_trained).arrays
    settings = case["settings"]
    model = build(
        case,
        ReleasedDynamicViTConfig,
        keep_rate=settings["keep_ratio"],
        select="threshold" if settings["dynamic"] else "top-k",
        token_loss="mse" if settings["mse_token"] else "kl",
        ratio_weight=settings["ratio_weight"],
        token_weight=settings["distill_weight"],
    ).train()
    noise = iter(torch.from_numpy(arrays["gumbel"]))
    students, decided = [], []
    monkeypatch.setattr(dynamicvit, "gumbel_difference", lambda score: (drawn := next(noise))[..., 0] - drawn[..., 1])
    token_loss, shares_kept = dynamicvit.token_loss, DynamicViT.shares_kept
    monkeypatch.setattr(dynamicvit, "token_loss", lambda *given: students.append(given[0]) or token_loss(*given))
    monkeypatch.setattr(
        DynamicViT, "shares_kept", lambda self, kept, *own: decided.extend(kept) or shares_kept(self, kept, *own)
    )

    lesson, patches = teacher_says(case)
    output = model(batch_of(case), teacher=patches, detailed=True)
    for stage, kept in enumerate(decided):
        assert np.array_equal(kept.detach().numpy(), arrays[f"mask_{stage}"]), f"stage {stage}"
    assert np.array_equal(decided[-1].detach().numpy(), arrays["final_mask"])
    assert np.array_equal(output.usage.live[:, -1, 1:].numpy(), arrays["final_mask"] > 0)
    close(output.logits, arrays["train_logits"], logits_apart(case, arrays["train_logits"], model))
    rounding = apart(np.float64(1), terms_of(model.vit), case["checks"].get("loss_rel_err", 0.0))
    close(students[0].norm(dim=-1), arrays["features_l2"], atol=0, rtol=rounding)

    task = -(torch.from_numpy(arrays["target"]) * output.logits.log_softmax(dim=1)).sum(dim=1).mean()
    taught = distillation(output.logits, lesson, "soft")
    total = settings["clf_weight"] * task + settings["distill_weight"] * taught + sum(output.terms.values())
    stages = len(decided)
    for ours, theirs in (
        (task, "cls"),
        (taught, "logit_kl"),
        (output.terms["ratio"] * stages / settings["ratio_weight"], "ratio_sum_over_stages"),
        (output.terms["tokens"] / settings["distill_weight"], "token"),
        (total, "total"),
    ):
        assert ours.item() == pytest.approx(case["loss"][theirs], rel=rounding), theirs

    total.backward()
    parameters = {name.removeprefix("vit."): parameter for name, parameter in model.named_parameters()}
    for name, norm in case["grad_norms"].items():
        assert parameters[our_name(name, parameters)].grad.norm().item() == pytest.approx(norm, rel=1e-3), name
    recorded = {name.replace(".", "_"): our_name(name, parameters) for name in case["weights"]["manifest"]}
    for array in (name for name in arrays if name.startswith("grad__")):
        close(
            parameters[recorded[array.removeprefix("grad__")]].grad,
            arrays[array],
            atol=1e-3 * np.abs(arrays[array]).max(),
        )


def test_the_released_softmax_and_predictor(dynamicvit_units: Path) -> None:
    recorded = load(dynamicvit_units)
    for unit in recorded.case["units"]:
        name, arrays = unit["id"], recorded.arrays
        policy, kept = (torch.from_numpy(arrays[f"{name}_{part}"]).float() for part in ("policy", "pred_policy"))
        logits = torch.from_numpy(arrays[f"{name}_logits"])
        expected = arrays[f"{name}_softmax"]
        close(masked_attention(logits, policy, ReleasedDynamicViT.epsilon), expected, apart(expected, logits.shape[-1]))
        predictor = Predictor(unit["dim"]).eval()
        predictor.load_state_dict(filled(unit["predictor_weights"]))
        with torch.inference_mode():
            score = predictor(Masked.of(torch.from_numpy(arrays[f"{name}_x"])), 0, kept)
        terms = sum(part.in_features for part in predictor.modules() if isinstance(part, nn.Linear))
        expected = arrays[f"{name}_pred"]
        close(torch.stack([logsigmoid(score), logsigmoid(-score)], dim=-1), expected, apart(expected, terms))
