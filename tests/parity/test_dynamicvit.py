"""DynamicViT against numbers recorded from the released code; tolerances as the fixtures' description gives them."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import weights
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import logsigmoid

from adaptvit import DynamicViTConfig, Masked, Packed
from adaptvit.losses import distillation
from adaptvit.methods import dynamicvit
from adaptvit.methods.dynamicvit import DynamicViT, Predictor, masked_attention
from adaptvit.vit import embed, final_norm, run_block

LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)


@cache
def load(path: Path) -> SimpleNamespace:
    return SimpleNamespace(case=json.loads(path.read_text()), arrays=dict(np.load(path.with_suffix(".npz"))))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a parameter `evaluated` runs once for every recorded model in evaluation, one with `trained` ..."""
    folder = metafunc.config.getoption("--fixtures") / "dynamicvit"
    for name, mode in (("evaluated", "eval"), ("trained", "train")):
        if name in metafunc.fixturenames:
            found = [path for path in sorted(folder.glob("*.json")) if load(path).case["mode"] == mode]
            metafunc.parametrize(name, [load(path) for path in found], ids=[path.stem for path in found])


def filled(given: dict) -> dict[str, Tensor]:
    return {
        key: torch.from_numpy(value)
        for key, value in weights.fill(given["manifest"], given["seed"], given["scale"]).items()
    }


def plain_vit(case: dict) -> VisionTransformer:
    given = case["model"]
    assert (given["norm_eps"], given["predictor_norm_eps"]) == (1e-6, 1e-5)
    names = ("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads", "qkv_bias")
    return VisionTransformer(**{name: given[name] for name in names})


def build(case: dict, **settings: object) -> DynamicViT:
    state = filled(case["weights"])
    model = DynamicViTConfig(blocks=case["settings"]["pruning_loc"], **settings).build(plain_vit(case))
    model.load_state_dict({key if key.startswith("score_") else f"vit.{key}": state[key] for key in state})
    return model


def images(case: dict) -> Tensor:
    return torch.from_numpy(weights.images(**case["input"]))


def close(actual: Tensor, expected: np.ndarray, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual.detach(), torch.from_numpy(expected), atol=atol, rtol=rtol, check_dtype=False)


@LAYOUTS
def test_the_released_patches_and_logits(evaluated: SimpleNamespace, layout: type) -> None:
    case, arrays = evaluated.case, evaluated.arrays
    model = build(case, keep_rate=case["settings"]["token_ratio"][0]).eval()
    with torch.inference_mode():
        output = model(images(case), layout)
    for stage, block in enumerate(model.stages):
        live = output.usage.live[:, block, 1:]
        assert [row.nonzero().flatten().tolist() for row in live] == np.sort(arrays[f"kept_patch_{stage}"], 1).tolist()
        assert (live.sum(dim=1) == case["settings"]["kept_counts"][stage]).all()
    close(output.logits, arrays["logits"], 2e-5)


@LAYOUTS
def test_the_released_scores(evaluated: SimpleNamespace, layout: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stage, in the order of its patches' scores in the stage before."""
    case, arrays, seen = evaluated.case, evaluated.arrays, []
    model = build(case, keep_rate=case["settings"]["token_ratio"][0]).eval()
    drop = DynamicViT.drop
    monkeypatch.setattr(
        DynamicViT,
        "drop",
        lambda self, tokens, score, stage: seen.append(tokens.grid(score)) or drop(self, tokens, score, stage),
    )
    with torch.inference_mode():
        model(images(case), layout)
    order = torch.arange(seen[0].shape[1] - 1).expand(len(seen[0]), -1)
    for stage, score in enumerate(seen):
        close(logsigmoid(score[:, 1:].gather(1, order)), arrays[f"score_{stage}"], atol=2e-5)
        order = torch.from_numpy(arrays[f"kept_patch_{stage}"]).long()


def teacher_says(case: dict) -> tuple[Tensor, Tensor]:
    """The teacher's logits and its patches after the last norm."""
    teacher = plain_vit(case)
    teacher.load_state_dict(filled(case["teacher"]))
    with torch.no_grad():
        tokens = Masked.of(embed(teacher.eval(), images(case))[0])
        for block in teacher.blocks:
            tokens = run_block(block, tokens)
        return teacher(images(case)), final_norm(teacher, tokens.x)[:, 1:]


def test_the_released_training(trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    case, arrays = trained.case, trained.arrays
    settings = case["settings"]
    model = build(
        case,
        keep_rate=settings["keep_ratio"][0],
        select="threshold" if settings["dynamic"] else "top-k",
        token_loss="mse" if settings["mse_token"] else "kl",
        ratio_weight=settings["ratio_weight"],
        token_weight=settings["distill_weight"],
        mode="official",
    ).train()
    noise = iter(torch.from_numpy(arrays["gumbel"]))
    students, decided = [], []
    monkeypatch.setattr(dynamicvit, "gumbel_difference", lambda score: (drawn := next(noise))[..., 0] - drawn[..., 1])
    token_loss, ratio_loss = dynamicvit.token_loss, DynamicViT.ratio_loss
    monkeypatch.setattr(dynamicvit, "token_loss", lambda *given: students.append(given[0]) or token_loss(*given))
    monkeypatch.setattr(DynamicViT, "ratio_loss", lambda self, kept: decided.extend(kept) or ratio_loss(self, kept))

    lesson, patches = teacher_says(case)
    output = model(images(case), teacher=patches)
    for stage, kept in enumerate(decided):
        assert np.array_equal(kept.detach().numpy(), arrays[f"mask_{stage}"]), f"stage {stage}"
    assert np.array_equal(decided[-1].detach().numpy(), arrays["final_mask"])
    assert np.array_equal(output.usage.live[:, -1, 1:].numpy(), arrays["final_mask"] > 0)
    close(output.logits, arrays["train_logits"], 2e-5)
    close(students[0].norm(dim=-1), arrays["features_l2"], atol=0, rtol=1e-4)

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
        assert ours.item() == pytest.approx(case["loss"][theirs], rel=1e-5), theirs

    total.backward()
    parameters = {name.removeprefix("vit."): parameter for name, parameter in model.named_parameters()}
    for name, norm in case["grad_norms"].items():
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-3), name
    for array in (name for name in arrays if name.startswith("grad__")):
        (name,) = (name for name in parameters if name.replace(".", "_") == array.removeprefix("grad__"))
        close(parameters[name].grad, arrays[array], atol=1e-3 * np.abs(arrays[array]).max())


def test_the_released_softmax_and_predictor(request: pytest.FixtureRequest) -> None:
    path = request.config.getoption("--fixtures") / "dynamicvit" / "unit_softmax_predictor.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    recorded = load(path)
    for unit in recorded.case["units"]:
        name, arrays = unit["id"], recorded.arrays
        policy, kept = (torch.from_numpy(arrays[f"{name}_{part}"]).float() for part in ("policy", "pred_policy"))
        logits = torch.from_numpy(arrays[f"{name}_logits"])
        close(masked_attention(logits, policy, dynamicvit.EPSILON), arrays[f"{name}_softmax"], atol=1e-6)
        predictor = Predictor(unit["dim"]).eval()
        predictor.load_state_dict(filled(unit["predictor_weights"]))
        with torch.inference_mode():
            score = predictor(Masked.of(torch.from_numpy(arrays[f"{name}_x"])), 0, kept)
        close(torch.stack([logsigmoid(score), logsigmoid(-score)], dim=-1), arrays[f"{name}_pred"], atol=2e-6)
