"""DynamicViT: configuration, selection, masks, losses, its knob and its published weights."""

from pathlib import Path
from typing import Literal

import pytest
import timm
import torch
from models import images, small_vit, vary, with_values_of_all_lengths
from torch.nn.functional import cross_entropy

import adaptvit
from adaptvit import DynamicViTConfig, EViTConfig, Masked, Packed, meet_target
from adaptvit.methods import dynamicvit
from adaptvit.methods.dynamicvit import (
    DynamicViT,
    Predictor,
    fit_predictors,
    levelled,
    masked_attention,
    token_loss,
)
from adaptvit.methods.regression import read_by_block

LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)


def build(flavour: str = "class token", **settings: object) -> DynamicViT:
    return vary(DynamicViTConfig(**settings).build(small_vit(flavour)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_rate": 0.0}, r"keep_rate must lie in \(0, 1\], got 0.0"),
        ({"keep_rate": 1.1}, r"keep_rate must lie in \(0, 1\], got 1.1"),
        ({"keep_rate": (0.5, 0.0)}, r"keep_rate must lie in \(0, 1\], got \(0.5, 0.0\)"),
        ({"keep_rate": (0.5, 0.6)}, r"keep_rate must not grow from stage to stage, got \(0.5, 0.6\)"),
        ({"threshold": 1.0}, r"threshold must lie in \[0, 1\), got 1.0"),
        ({"blocks": (2, 2)}, r"blocks must be block numbers from 0 on, ascending, got \(2, 2\)"),
        ({"blocks": "3"}, r"blocks must be block numbers from 0 on, ascending, or None, got '3'"),
        ({"ratio_weight": -1.0}, r"ratio_weight must be 0 or more, got -1.0"),
        ({"select": "best"}, r"select must be one of top-k, threshold, got 'best'"),
    ],
)
def test_wrong_values_fail_when_the_config_is_made(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicViTConfig(**settings)


def test_what_the_vit_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"blocks names block 4, but test_vit has blocks 0\.\.3"):
        DynamicViTConfig(blocks=(1, 4)).build(small_vit())
    with pytest.raises(
        ValueError, match=r"keep_rate has 2 numbers, but test_vit has 3 stages, before blocks \(1, 2, 3\)"
    ):
        DynamicViTConfig(keep_rate=[0.7, 0.5]).build(small_vit())
    with pytest.raises(ValueError, match="test_vit has 30 channels, but DynamicViT's predictors need a multiple of 4"):
        DynamicViTConfig().build(small_vit(embed_dim=30, num_heads=3))


def test_the_counts_follow_the_number_of_patches() -> None:
    model = build()
    assert [model.count(stage, 196) for stage in range(3)] == [137, 96, 67]
    assert [model.count(stage, 3) for stage in range(3)] == [2, 1, 1]


@LAYOUTS
def test_stages_keep_the_shares_of_a_list_which_no_power_gives(layout: type) -> None:
    model = build(keep_rate=[0.8, 0.5, 0.45]).eval()
    with torch.inference_mode():
        live = model(images(model.vit), layout, detailed=True).usage.live
    assert [live[:, block, 1:].sum(dim=1).unique().tolist() for block in model.stages] == [[12], [8], [7]]  # of 16
    half = build(keep_rate=[0.8, 0.5, 0.45], rate=0.5)
    assert [half.count(stage, 16) for stage in range(3)] == [6, 4, 3]
    assert [build(keep_rate=[0.8, 0.5, 0.45], rate=2.0).count(stage, 16) for stage in range(3)] == [16, 16, 14]


def ratio_loss(model: DynamicViT, decided: list[torch.Tensor]) -> float:
    return model.terms(model.shares_kept(decided))["ratio"].item() / model.config.ratio_weight


def test_the_loss_asks_each_stage_for_its_share_of_the_list() -> None:
    model = build(keep_rate=[0.8, 0.5, 0.45])
    decided = [torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.zeros(1, 4)]
    assert ratio_loss(model, decided) == pytest.approx((0.2**2 + 0.0**2 + 0.45**2) / 3)


@LAYOUTS
def test_the_patches_above_the_threshold_are_kept_and_the_best_always_is(
    layout: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(blocks=(1, 2), select="threshold", threshold=0.7).eval()
    drop = DynamicViT.drop
    kept_one = 0

    def checked(self: DynamicViT, tokens: adaptvit.Packed, score: torch.Tensor, stage: int) -> adaptvit.Packed:
        nonlocal kept_one
        after, pi = drop(self, tokens, score, stage), tokens.grid(score).sigmoid()
        for image, alive in enumerate(tokens.live):
            patches = [slot for slot in alive.nonzero().flatten().tolist() if slot > 0]
            wanted = {slot for slot in patches if pi[image, slot] > 0.7}
            kept_one += not wanted
            wanted = wanted or {max(patches, key=lambda slot: score_at[image, slot].item())}
            assert set(after.live[image].nonzero().flatten().tolist()) == {0} | wanted
        return after

    score_at = torch.zeros(0)

    def remembered(self: DynamicViT, tokens: adaptvit.Packed, score: torch.Tensor, stage: int) -> adaptvit.Packed:
        nonlocal score_at
        score_at = tokens.grid(score)
        return checked(self, tokens, score, stage)

    monkeypatch.setattr(DynamicViT, "drop", remembered)
    with torch.inference_mode():
        model(images(model.vit, count=24), layout)
    assert kept_one


def test_masked_attention_is_the_softmax_over_the_kept_and_oneself() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    policy = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], dtype=torch.float64)
    seen = (policy[:, None, None] > 0) | torch.eye(5, dtype=torch.bool)
    wanted = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(masked_attention(logits, policy), wanted)


def test_a_hidden_key_that_overflows_all_others_leaves_attention_finite() -> None:
    logits = torch.zeros(1, 1, 3, 3)
    logits[..., 1] = 300.0
    weights = masked_attention(logits, torch.tensor([[1.0, 0.0, 1.0]]))
    assert weights.isfinite().all()


@pytest.mark.parametrize("threshold", [0.0, 0.45, 0.5, 0.55])
def test_training_without_noise_decides_as_evaluation_by_threshold_does(
    threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamicvit, "gumbel_difference", torch.zeros_like)
    model = build(select="threshold", threshold=threshold)
    batch = images(model.vit)
    trained, evaluated = model.train()(batch, detailed=True), model.eval()(batch, detailed=True)
    assert torch.equal(trained.usage.live, evaluated.usage.live)
    assert torch.equal(trained.usage.deciding, evaluated.usage.deciding)
    torch.testing.assert_close(trained.logits, evaluated.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flavour", ["class token", "distilled", "average pool", "average pool, no class token"])
@pytest.mark.parametrize("select", ["top-k", "threshold"])
def test_every_parameter_that_is_used_learns(flavour: str, select: Literal["top-k", "threshold"]) -> None:
    torch.manual_seed(0)
    model = build(flavour, select=select).train()
    output = model(images(model.vit), detailed=True)
    task = cross_entropy(output.logits, torch.tensor([0, 1, 2]))
    names, parameters = zip(*model.score_predictor.named_parameters(), strict=True)
    for loss, counts in ((task, False), (task + sum(output.terms.values()), select == "threshold")):
        for name, gradient in zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True):
            assert gradient.isfinite().all(), name
            if name.endswith("out_conv.4.bias") and not counts:  # of all patches alike: how many is not for the task
                torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)
            else:
                assert gradient.any(), name


def test_the_likeliest_patch_of_an_image_is_kept_whatever_the_noise_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamicvit, "gumbel_difference", lambda score: torch.full_like(score, -1e3))
    model = build().train()
    output = model(images(model.vit), detailed=True)
    sum(output.terms.values(), output.logits.sum()).backward()
    assert (output.usage.live[:, -1, 1:].sum(dim=1) == 1).all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_training_draws_as_many_patches_as_are_asked_for_whatever_the_predictors_say() -> None:
    score = torch.linspace(-9, 9, 20).expand(3, -1) + torch.tensor([[-50.0], [0.0], [4.0]])
    live = torch.arange(20).expand(3, -1) % 4 > 0
    level = levelled(score, live, torch.tensor([[2.0], [7.0], [15.0]]))
    torch.testing.assert_close((level.sigmoid() * live).sum(dim=1), torch.tensor([2.0, 7.0, 15.0]), atol=1e-2, rtol=0)
    torch.testing.assert_close(level.diff(dim=1), score.diff(dim=1))
    count = torch.tensor([[2.0], [0.0], [40.0]])  # none of the second's, all of the third's
    score.requires_grad_(True)
    (more,) = torch.autograd.grad((levelled(score, live, count).sigmoid() * live).sum(), score)
    torch.testing.assert_close(more, torch.zeros_like(more))  # what is undone is not learned
    torch.manual_seed(0)
    model = build(blocks=(0,), keep_rate=0.25).train()
    for parameter in model.score_predictor[0].out_conv[-1].parameters():
        torch.nn.init.constant_(parameter, 0.0)
    model.score_predictor[0].out_conv[-1].bias.data[0] = 5.0
    kept = torch.cat([model(images(model.vit, 8), detailed=True).usage.attended[:, 1] for _ in range(4)])
    assert kept.double().mean().item() - 1 == pytest.approx(4, abs=0.8)  # of 16: drawn, four standard errors


def test_each_image_is_asked_for_its_share_or_the_batch_is() -> None:
    decided = [torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])]
    by_image, by_batch = (build(blocks=(1,), select=select, keep_rate=0.5) for select in ("top-k", "threshold"))
    assert ratio_loss(by_image, decided) == 0.25
    assert ratio_loss(by_batch, decided) == 0


def test_only_patches_that_are_kept_are_compared_with_a_teachers() -> None:
    student, teacher = torch.zeros(1, 3, 2), torch.ones(1, 3, 2)
    teacher[0, 1] = 100.0
    assert token_loss(student, teacher, torch.tensor([[1.0, 0.0, 1.0]]), "mse").item() == 1
    assert token_loss(student, teacher, torch.tensor([[1.0, 0.0, 1.0]]), "kl").item() == pytest.approx(0, abs=1e-6)


def test_misuse_is_told() -> None:
    model = build().train()
    batch = images(model.vit)
    with pytest.raises(ValueError, match="DynamicViT trains with layout=Masked"):
        model(batch, Packed)
    with pytest.raises(
        ValueError, match=r"the teacher's patches have shape \(3, 9, 64\), but the student's \(3, 16, 64\)"
    ):
        model(batch, teacher=torch.zeros(3, 9, 64))
    with pytest.raises(ValueError, match="takes a teacher's patches in training only"):
        model.eval()(batch, teacher=torch.zeros(3, 16, 64))
    with torch.no_grad():
        model.score_predictor[1].out_conv[4].bias.fill_(float("nan"))
    assert not model(batch).isfinite().any()


@pytest.mark.parametrize(
    ("settings", "knob"),
    [({}, "keep_rate"), ({"keep_rate": (0.9, 0.5, 0.45)}, "rate"), ({"select": "threshold"}, "threshold")],
)
@pytest.mark.parametrize("target", [0.6])
def test_the_knob_meets_a_budget(settings: dict, knob: str, target: float) -> None:
    before = DynamicViTConfig(**settings)
    model = vary(before.build(small_vit(img_size=128))).eval()
    batch = images(model.vit, count=6)
    config = meet_target(model, batch, target, tolerance=0.03)
    assert config.knob.field == knob
    assert getattr(config, knob) != getattr(before, knob)
    usage = model(batch, detailed=True).usage
    share = adaptvit.macs(usage, model.shape).double().mean() / adaptvit.dense_macs(model.shape, usage.grid)
    assert share.item() == pytest.approx(target, rel=0.03)


def test_a_predictor_begins_with_a_linear_map() -> None:
    torch.manual_seed(0)
    predictor, tokens = Predictor(16), torch.randn(2, 9, 16)
    weights, constant = torch.randn(16), torch.tensor([0.7])
    predictor.begin_with(weights, constant)
    normed = predictor.in_conv[0](tokens)
    with torch.inference_mode():
        said = predictor(Masked.of(tokens), 1)
    torch.testing.assert_close(said, normed @ weights + constant)


@pytest.mark.parametrize("flavour", ["class token", "average pool"])
def test_predictors_are_fitted_to_what_is_read_of_patches_from_there_on(flavour: str) -> None:
    vit = with_values_of_all_lengths(small_vit(flavour, img_size=64))
    calibration = images(vit, count=64)
    model = DynamicViTConfig(blocks=(1,)).build(vit).eval()
    explained = fit_predictors(model, calibration)
    assert 0.05 < explained <= 1
    with torch.inference_mode():
        tokens = model.enter(calibration, Masked)
        wanted = read_by_block(model, tokens)[:, 1:].mean(dim=1).log()
        tokens = model.run_block(0, tokens, every=True)
        score = model.score_predictor[0](tokens, model.prefix)[:, model.prefix :]
    told = torch.corrcoef(torch.stack([score.flatten(), wanted.flatten()]))[0, 1] ** 2
    assert told.item() == pytest.approx(explained, abs=0.01)
    assert (score > 0).double().mean().item() == pytest.approx(model.shares[0], abs=0.01)


@pytest.mark.parametrize("select", ["top-k", "threshold"])
def test_a_fitted_model_meets_its_budget(select: Literal["top-k", "threshold"]) -> None:
    vit = small_vit(img_size=64)
    calibration = images(vit, count=64)
    model = DynamicViTConfig(blocks=(1, 2), select=select).fit(vit, calibration, 0.7)
    with torch.inference_mode():
        output = model(calibration, detailed=True)
    assert output.usage.share.mean().item() == pytest.approx(0.7, abs=0.03)
    assert isinstance(model.config, DynamicViTConfig)
    assert (model.config.select, model.config.threshold) == (select, pytest.approx(0.5, abs=0.1))


def test_a_predictors_macs_are_those_of_its_maps() -> None:
    predictor = Predictor(48)
    assert Predictor.macs(48) == sum(
        part.weight.numel() for part in predictor.modules() if isinstance(part, torch.nn.Linear)
    )


@pytest.mark.parametrize(
    ("name", "told", "expected"),
    [
        pytest.param("evit_small_patch16_224", {}, EViTConfig(), marks=pytest.mark.long),
        ("evit_small_patch16_224", {"keep_rate": 0.5, "fuse": False}, EViTConfig(keep_rate=0.5, fuse=False)),
        pytest.param(
            "dynamicvit_small_patch16_224", {"keep_rate": 0.8}, DynamicViTConfig(keep_rate=0.8), marks=pytest.mark.long
        ),
        ("dynamicvit_small_patch16_224", {"keep_rate": [0.8, 0.5, 0.4]}, DynamicViTConfig(keep_rate=(0.8, 0.5, 0.4))),
        pytest.param("dynamicvit_256_patch16_224", {}, DynamicViTConfig(), marks=pytest.mark.long),
    ],
)
def test_published_weights_convert(name: str, told: dict, expected: EViTConfig, tmp_path: Path) -> None:
    published = timm.create_model(name).state_dict()
    published = {key.removeprefix("vit."): value for key, value in published.items()}
    torch.save({"model": published}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match=f"^{name} has no gate_scale: leave out"):
        adaptvit.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", name, gate_scale=1.0)
    adaptvit.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", name, **told)
    model = adaptvit.load(tmp_path / "out.safetensors")
    assert model.config == expected
    found = {key.removeprefix("vit."): value for key, value in model.state_dict().items()}
    assert found.keys() == published.keys()
    assert all(torch.equal(found[key], published[key]) for key in found)
