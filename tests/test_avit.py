import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import images, small_vit
from timm.layers import Attention
from torch import Tensor
from torch.nn.functional import kl_div

from adaptvit import AViTConfig, Masked, Packed, Slab, dense_macs, load, macs, save
from adaptvit.methods.avit import LEAST_SHARE, AViT, halt, kl_divergence
from adaptvit.methods.priors import PRIORS, halting_prior
from adaptvit.methods.released import ReleasedAViTConfig

LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)
GATE = {"gate_scale": 4.0, "gate_center": 2.0}


def run_halting(scores: Tensor, epsilon: float = 0.01) -> tuple[Tensor, Tensor]:
    """Weights (L, B, N) and depths (B, N) of given halting scores (L, B, N), the last block's being 1."""
    live, remainder, weights, depth = torch.ones_like(scores[0], dtype=torch.bool), torch.ones_like(scores[0]), [], 0
    for block, score in enumerate(scores):
        depth = depth + live.long()
        score = live * (torch.ones_like(score) if block == len(scores) - 1 else score)
        weight, going, left = halt(score, remainder, epsilon)
        weights.append(weight)
        remainder, live = left * going, live & going
    assert not live.any()
    return torch.stack(weights), depth


@given(st.integers(0, 10_000), st.floats(0.001, 0.9))
def test_halting_weights_sum_to_one(seed: int, epsilon: float) -> None:
    scores = torch.rand(6, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) ** 3
    weights, _ = run_halting(scores, epsilon)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(2, 5, dtype=torch.float64))


def test_halting_by_hand() -> None:
    scores = torch.tensor([[0.5, 0.995, 0.0], [0.3, 0.1, 0.0], [0.4, 0.9, 0.0], [0.7, 0.7, 0.7]])[:, None]
    weights, depth = run_halting(scores)
    assert depth.tolist() == [[3, 1, 4]]
    expected = torch.tensor([[0.5, 1.0, 0.0], [0.3, 0.0, 0.0], [0.2, 0.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(weights[:, 0], expected)


def test_a_total_of_exactly_the_threshold_halts() -> None:
    weight, going, _ = halt(torch.tensor([[0.25]]), torch.tensor([[0.5]]), epsilon=0.25)
    assert not going.any()
    assert weight.item() == 0.5


@LAYOUTS
def test_logits_are_the_mean_field_of_the_class_token(layout: type) -> None:
    """Against a loop over the blocks that keeps every token and hides halted ones with timm's own attention mask."""
    vit = small_vit().eval()
    model = AViTConfig(**GATE).build(vit)
    batch = images(vit)
    with torch.no_grad():
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(batch)))
        live, total, mixed = torch.ones(x.shape[:2], dtype=torch.bool), torch.zeros(x.shape[:2]), 0.0
        for number, block in enumerate(vit.blocks, start=1):
            x = block(x, attn_mask=live[:, None, None, :] | torch.eye(x.shape[1], dtype=torch.bool))
            score = torch.sigmoid(4.0 * x[:, :, 0] - 2.0) if number < len(vit.blocks) else torch.ones_like(total)
            ends = live & (total + score >= 0.99)
            mixed = mixed + (torch.where(ends, 1 - total, score) * live)[:, :1] * x[:, 0]
            total, live = total + score, live & ~ends
        expected = vit.head(vit.norm(mixed))
        torch.testing.assert_close(model(batch, layout, early_exit=False), expected, atol=1e-5, rtol=1e-5)


@LAYOUTS
@pytest.mark.parametrize(
    ("flavour", "center"),
    [("class token", 2.0), ("distilled", -3.0), ("registers", 2.0), ("average pool", 2.0), ("attention pool", 2.0)],
)
def test_leaving_early_changes_no_logit(flavour: str, center: float, layout: type) -> None:
    vit = small_vit(flavour, torch.float64).eval()
    model = AViTConfig(gate_scale=4.0, gate_center=center).build(vit)
    batch = images(vit, count=6, dtype=torch.float64)
    with torch.inference_mode():
        early, full = model(batch, layout, detailed=True), model(batch, layout, early_exit=False, detailed=True)
    torch.testing.assert_close(early.logits, full.logits, atol=1e-12, rtol=1e-10)
    assert (early.usage.depth <= full.usage.depth).all()
    if model.read is not None:
        assert (early.usage.depth < full.usage.depth).any()
        read_depth = full.usage.depth[:, : model.read].amax(dim=1, keepdim=True)
        assert torch.equal(early.usage.depth, full.usage.depth.minimum(read_depth))


def test_a_class_token_that_stays_is_read_from_the_last_block() -> None:
    vit = small_vit().eval()
    model = AViTConfig(**GATE, class_token="stays").build(vit)
    usage = model(images(vit), detailed=True).usage
    assert (usage.depth[:, 0] == 4).all()
    assert usage.depth[:, 1:].min() < 4


@pytest.mark.parametrize("divergence", ["target||model", "model||target"])
@pytest.mark.parametrize("count", [1, 3])
def test_loss_terms_by_hand(count: int, divergence: str) -> None:
    vit = small_vit(dtype=torch.float64).train()
    config = AViTConfig(**GATE, ponder_weight=0.5, prior_weight=0.25, divergence=divergence, prior_depth=3)
    model = config.build(vit)
    batch = images(vit, count, dtype=torch.float64)
    output = model(batch, detailed=True)

    scores, rho = torch.zeros(4, dtype=torch.float64), torch.zeros(count, 17, dtype=torch.float64)
    for image in range(count):
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(batch[image : image + 1])))
        before, used = torch.arange(17), torch.zeros(17, dtype=torch.float64)
        for number, block in enumerate(vit.blocks):
            slots = output.usage.live[image, number].nonzero().flatten()
            x = block(x[:, torch.isin(before, slots)])
            before = slots
            score = torch.ones(len(slots)).double() if number == 3 else torch.sigmoid(4.0 * x[0, :, 0] - 2.0)
            scores[number] += score[slots > 0].sum()
            halts = output.usage.depth[image, slots] == number + 1
            rho[image, slots] = number + 1 + (1 - used[slots]) * halts
            used = used.index_add(0, slots, score)
    model_distribution = scores / scores.sum()
    goal = halting_prior("gaussian", 4, 3.0)
    ratio = goal.log() - model_distribution.log()
    expected = (goal * ratio).sum() if divergence == "target||model" else -(model_distribution * ratio).sum()
    torch.testing.assert_close(output.terms["prior"], 0.25 * expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(output.terms["ponder"], 0.5 * rho[:, 1:].mean())


def test_ponder_pushes_earlier_scores_up_and_the_prior_reaches_the_gate() -> None:
    vit = small_vit().train()
    output = AViTConfig(**GATE, prior_weight=1.0).build(vit)(images(vit), detailed=True)
    for term in output.terms.values():
        gradient = torch.autograd.grad(term, vit.blocks[0].mlp.fc2.bias, retain_graph=True)[0]
        assert gradient.abs().sum() > 0
    assert torch.autograd.grad(output.terms["ponder"], vit.blocks[0].mlp.fc2.bias, retain_graph=True)[0][0] < 0


@LAYOUTS
def test_the_task_tells_patches_that_would_be_missed_to_halt_later(layout: type) -> None:
    vit = small_vit(dtype=torch.float64).train()
    model = AViTConfig(**GATE, class_token="stays", ponder_weight=0.0, prior_weight=0.0).build(vit)
    seen: list[Tensor] = []

    def note(x: Tensor, *rest: object) -> Tensor:
        score = halting_score(x, *rest)
        score.retain_grad()
        seen.append(score)
        return score

    halting_score, model.halting_score = model.halting_score, note
    batch = images(vit, dtype=torch.float64)
    logits = model(batch, layout)
    logits.square().sum().backward()
    assert len(seen) == 3
    assert all(score.grad is not None and score.grad.any() for score in seen)
    model.eval()
    torch.testing.assert_close(model(batch, layout, early_exit=False), logits, atol=1e-12, rtol=1e-10)


def test_evaluation_that_leaves_early_has_no_loss_terms() -> None:
    vit = small_vit().eval()
    model = AViTConfig(**GATE).build(vit)
    assert model(images(vit), detailed=True).terms == {}
    assert set(model(images(vit), early_exit=False, detailed=True).terms) == {"ponder", "prior"}


def test_a_later_gate_computes_more() -> None:
    vit = small_vit().eval()
    executed = []
    for center in (0.0, 1.0, 2.0, 4.0, 8.0, 100.0):
        model = AViTConfig(gate_scale=4.0, gate_center=center).build(vit)
        usage = model(images(vit, count=8), detailed=True).usage
        executed.append(macs(usage, model.shape).double().mean().item() / dense_macs(model.shape, usage.grid))
    assert executed == sorted(executed)
    assert executed[0] < 0.5 < 0.8 < executed[-1]


def test_a_gate_that_halts_everything_says_so() -> None:
    vit = small_vit().eval()
    with pytest.warns(UserWarning, match="gate_center=-100 halts every token after block 1"):
        AViTConfig(gate_center=-100).build(vit)(images(vit))


def test_a_sequence_of_batches_leaves_nothing_behind() -> None:
    vit = small_vit().eval()
    model = AViTConfig(**GATE).build(vit)
    first = model(images(vit, 2))
    model(images(vit, 5, seed=1))
    assert torch.equal(model(images(vit, 2)), first)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epsilon": 0.0}, r"epsilon must lie in \(0, 1\), got 0.0"),
        ({"epsilon": 1.5}, r"epsilon must lie in \(0, 1\), got 1.5"),
        ({"gate_scale": -1.0}, r"gate_scale must lie in \(0, 1e6\], got -1.0"),
        ({"ponder_weight": -1.0}, "ponder_weight must be 0 or more, got -1.0"),
        ({"prior_weight": float("nan")}, "prior_weight must be 0 or more, got nan"),
        ({"prior": "cubic"}, r"prior must be one of .*gaussian.*, got 'cubic'"),
        ({"prior_scale": 0.0}, r"prior_scale must lie in \[0.001, 1000\], got 0.0"),
        ({"prior_weights": (0.7, 0.0)}, r"prior_weights must lie in \(0, 1e6\], got \(0.7, 0.0\)"),
        ({"prior_depth": (2, 10)}, "prior_depth has 2 values, but prior_weights has 0"),
        ({"prior": ("cauchy",), "prior_weights": (1, 2)}, "prior has 1 values, but prior_weights has 2"),
        (
            {"prior": ("cauchy", "cubic"), "prior_weights": (1, 2)},
            r"prior must be some of .*, got \('cauchy', 'cubic'\)",
        ),
        ({"class_token": "goes"}, "class_token must be one of .*stays.*, got 'goes'"),
        ({"divergence": "both"}, "divergence must be one of .*, got 'both'"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=f"AViTConfig.{said}"):
        AViTConfig(**settings)


def test_a_prior_outside_the_depth_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must lie in 1\.\.4, the blocks of this ViT, got 9"):
        AViTConfig(prior_depth=9).build(small_vit())


def test_no_class_token_can_stay_where_there_is_none() -> None:
    with pytest.raises(TypeError, match=r"A-ViT needs a class token, but .* pools all its tokens"):
        AViTConfig(class_token="stays").build(small_vit("average pool"))


@pytest.mark.parametrize("depth", [2.5, 1])
def test_the_released_target_peaks_at_a_whole_block_from_the_second_on(depth: float) -> None:
    with pytest.raises(ValueError, match=f"prior_depth must be a whole block from the second on, got {depth}"):
        ReleasedAViTConfig(prior_depth=depth)


def test_official_losses_are_not_to_be_had_packed() -> None:
    vit = small_vit().train()
    with pytest.raises(ValueError, match="layout=Masked or early_exit=True"):
        ReleasedAViTConfig().build(vit)(images(vit), Packed)


def test_divergence_of_a_distribution_from_itself_is_zero() -> None:
    p = halting_prior("laplace", 6, 2.5)
    assert kl_divergence(p, p, "target||model").item() == 0
    assert kl_divergence(p, p, "model||target").item() == 0
    assert kl_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]), "target||model").isfinite()


@pytest.mark.parametrize("direction", ["target||model", "model||target"])
def test_blocks_that_no_patch_enters_cost_a_bounded_divergence_in_any_precision(direction: str) -> None:
    config = AViTConfig(gate_scale=0.5, gate_center=-1.0, divergence=direction, prior_weight=1.0)  # halts after two
    losses = []
    for dtype in (torch.float32, torch.float64):
        model = config.build(small_vit().to(dtype).train())
        output = model(images(model.vit).to(dtype), detailed=True)
        assert output.usage.patch_depth.max() < model.depth
        losses.append(output.terms["prior"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert 0 < losses[0] < -math.log(LEAST_SHARE)


@pytest.mark.parametrize("seed", range(4))
def test_the_divergence_is_the_sum_over_blocks_and_that_of_torch(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model, target = torch.rand(2, 9, dtype=torch.float64, generator=generator).softmax(dim=1)
    for direction, (p, q) in {"target||model": (target, model), "model||target": (model, target)}.items():
        ours = kl_divergence(model, target, direction).item()
        assert ours == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
        assert ours == pytest.approx(kl_div(q.log(), p, reduction="sum").item(), rel=1e-12)
        assert ours > 0


def test_a_mixture_in_the_config_is_the_mixture_of_its_parts() -> None:
    early, late = halting_prior("gaussian", 4, 1.5, 0.5), halting_prior("gaussian", 4, 4.0, 0.5)
    config = AViTConfig(prior_depth=(1.5, 4.0), prior_scale=0.5, prior_weights=[3, 1])
    torch.testing.assert_close(config.build(small_vit()).prior, (0.75 * early + 0.25 * late).float())
    config = AViTConfig(prior=["cauchy", "laplace"], prior_depth=2, prior_scale=(1, 2), prior_weights=(1, 1))
    expected = 0.5 * halting_prior("cauchy", 4, 2) + 0.5 * halting_prior("laplace", 4, 2, 2)
    torch.testing.assert_close(config.build(small_vit()).prior, expected.float())
    assert hash(config)


def test_a_mixture_travels_with_the_weights(tmp_path: Path) -> None:
    config = AViTConfig(prior=("cauchy", "laplace"), prior_depth=(1, 3), prior_weights=(0.5, 0.5))
    model = config.build(small_vit())
    save(model, tmp_path / "mixture.safetensors")
    again = load(tmp_path / "mixture.safetensors")
    assert again.config == config
    assert torch.equal(again.prior, model.prior)
    assert torch.equal(copy.deepcopy(model).bfloat16().prior, model.prior)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("kind", [AViTConfig, ReleasedAViTConfig])
def test_every_prior_has_a_finite_loss_that_reaches_the_gate(prior: str, kind: type[AViTConfig]) -> None:
    """However far the blocks that a narrow prior all but rules out, which have no mass left in float32."""
    vit = small_vit(depth=12).train()
    model = kind(**GATE, prior=prior, prior_scale=0.4, prior_weight=1.0).build(vit)
    term = model(images(vit), detailed=True).terms["prior"]
    assert term.isfinite()
    gradient = torch.autograd.grad(term, vit.blocks[0].mlp.fc2.bias)[0]
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_released_losses_train_gated_attention_and_its_dropout() -> None:
    vit = small_vit(dtype=torch.float64, attn_drop_rate=0.5)
    for block in vit.blocks:
        gated = Attention(vit.embed_dim, num_heads=2, qkv_bias=True, attn_drop=0.5, gated=True)
        block.attn = gated.to(torch.float64)
    model = ReleasedAViTConfig(gate_center=1e4).build(vit).eval()
    batch = images(vit, dtype=torch.float64)
    torch.testing.assert_close(model(batch, early_exit=False), vit(batch), atol=1e-10, rtol=1e-10)
    model.train()
    one, other = (model(batch) for _ in range(2))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("layout", [Masked, Packed, Slab])
def test_in_half_precision_the_gate_reads_channel_0_as_in_float32(layout: type) -> None:
    vit = small_vit(depth=4)
    with torch.no_grad():
        vit.pos_embed[..., 0] += 3.0  # where steps of bfloat16 are 1/64
    half = copy.deepcopy(vit).bfloat16()
    batch = images(vit, count=6).bfloat16()
    seen: dict[str, list[Tensor]] = {}

    def noted(name: str) -> Callable[..., Tensor]:
        def score(self: AViT, x: Tensor, dtype: torch.dtype, lost: Tensor | None = None) -> Tensor:
            seen.setdefault(name, []).append(x[..., 0].float() + (0 if lost is None else lost))
            if lost is not None:
                seen.setdefault("rounded", []).append(x[..., 0].float())
            return torch.zeros_like(seen[name][-1])

        return score

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        for name, model, given in (("wide", vit, batch.float()), ("half", half, batch)):
            patch.setattr(AViT, "halting_score", noted(name))
            AViTConfig().build(model).eval()(given, layout)
    for wide, kept, rounded in zip(seen["wide"], seen["half"], seen["rounded"], strict=True):
        assert (kept - wide).abs().mean() < 0.7 * (rounded - wide).abs().mean()
