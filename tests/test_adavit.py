import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import METHODS, flavours, images, small_vit, vary
from torch import Tensor

from adaptvit import AdaViTConfig, Masked, Packed, Slab, dense_macs, macs, measure_plan
from adaptvit.methods.adavit import KINDS, AdaViT, Policies, usage_means, usage_terms
from adaptvit.methods.released import ReleasedAdaViTConfig

LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)
MAPS = ("patch_policy", "head_policy", "sublayer_policy")
FREE = AdaViTConfig(macs_target=None)
RELEASED = ReleasedAdaViTConfig()


def decided(model: AdaViT, batch: Tensor) -> Policies:
    with torch.no_grad():
        return model.decided(model.enter(batch, Masked))[1]


def constant(config: AdaViTConfig, logit: float, **settings: Any) -> AdaViT:
    """A model whose policies all say `logit`, whatever they read."""
    model = config.build(small_vit(**settings))
    for name, parameter in model.named_parameters():
        if name.startswith(MAPS):
            parameter.data.fill_(logit if name.endswith("bias") else 0.0)
    return model


# ---- configs


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"policies": ("patches", "layers")},
            r"policies must be some of patches, heads, sublayers, got \('patches', 'layers'\)",
        ),
        ({"policies": ()}, "policies must be some of"),
        ({"policies": "heads"}, "policies must be some of .*, got 'heads'"),
        ({"minimum_weights": (-1.0,)}, "minimum_weights must be 3 numbers, 0 or more"),
        ({"entropy_weight": 0.1}, "usage_weight is 0, so that no other usage loss has an effect"),
        ({"policies": ("heads", "heads")}, "policies must be some of .* each once"),
        ({"first_block": -1}, "first_block must be 0 or more, got -1"),
        ({"first_patch_block": -1}, "first_patch_block must be 0 or more, got -1"),
        ({"patch_threshold": 1.0}, r"patch_threshold must lie in \(0, 1\), got 1.0"),
        ({"patch_threshold": 0.0}, r"patch_threshold must lie in \(0, 1\), got 0.0"),
        ({"threshold": math.nan}, r"AdaViTConfig.threshold must lie in \(0, 1\), got nan"),
        ({"temperature": 0.0}, r"temperature must lie in \[0.001, 1e6\], got 0.0"),
        ({"macs_target": 1.5}, r"macs_target must lie in \(0, 1\], .*, got 1.5"),
        ({"macs_target": 0.0}, r"macs_target must lie in \(0, 1\]"),
        ({"usage_targets": (0.5, 0.5)}, r"usage_targets must be 3 numbers in \(0, 1\], got \(0.5, 0.5\)"),
        ({"usage_targets": (0.5, 0.5, 0.0)}, r"usage_targets must lie in \(0, 1\], got \(0.5, 0.5, 0.0\)"),
        ({"minimums": (0.5, 0.5, 1.1)}, r"minimums must lie in \[0, 1\]"),
        ({"usage_weight": -1.0}, "usage_weight must be 0 or more, got -1.0"),
        ({"macs_weight": math.nan}, "macs_weight must be 0 or more, got nan"),
        ({"heads_take": "output"}, "heads_take must be one of input, hidden, identity, got 'output'"),
        ({"patches_skip": "mlp"}, "patches_skip must be one of"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        AdaViTConfig(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["first_block", "first_patch_block"])
def test_a_first_block_beyond_the_depth_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=rf"AdaViTConfig.{field} is block 4, but test_vit has blocks 0..3"):
        AdaViTConfig(**{field: 4}).build(small_vit())
    alone = {"first_block": ("patches",), "first_patch_block": ("heads", "sublayers")}[field]
    AdaViTConfig(**{field: 4}, policies=alone, macs_target=None).build(small_vit())  # nobody asks for that block


@pytest.mark.parametrize("policies", [KINDS, ("patches",), ("heads",), ("sublayers",), ("heads", "sublayers")], ids=str)
@pytest.mark.parametrize("takes", ["input", "hidden", "identity"])
def test_a_target_out_of_reach_names_what_cannot_be_left_out(policies: tuple[str, ...], takes: str) -> None:
    config = AdaViTConfig(policies=policies, heads_take=takes, macs_target=None)
    model = replace(config, lean=-30.0).build(small_vit()).eval()
    batch = images(model.vit)
    usage = model(batch, detailed=True).usage
    least = macs(usage, model.shape).double().mean().item() / dense_macs(model.shape, usage.grid)
    assert not decided(model, batch).patches.all() or "patches" not in policies
    with pytest.raises(ValueError, match=rf"macs_target is 0.001, but .* takes {least:.3g} of its MACs$"):
        replace(config, macs_target=0.001).build(small_vit())
    replace(config, macs_target=min(1.0, least + 0.002)).build(small_vit())


def test_a_plan_counts_the_same_whether_or_not_somebody_looks_on() -> None:
    model = vary(FREE.build(small_vit(dtype=torch.float64))).eval()
    batch = images(model.vit, dtype=torch.float64)
    packed, plan = model(batch, Packed), measure_plan(model, batch)
    assert len(plan.means) == 2 * model.depth  # for attention and for the MLP
    hook = model.vit.blocks[1].attn.register_forward_hook(lambda *_: None)
    assert measure_plan(model, batch) == plan
    model.plan = plan
    torch.testing.assert_close(model(batch, Slab), packed, atol=1e-12, rtol=1e-10)
    hook.remove()
    torch.testing.assert_close(model(batch, Slab), packed, atol=1e-12, rtol=1e-10)


# ---- decisions


def test_what_the_policies_read_and_where_they_are() -> None:
    model = vary(AdaViTConfig(first_block=2, first_patch_block=1, macs_target=None).build(small_vit())).eval()
    assert {name: list(getattr(model, name)) for name in MAPS} == {
        "patch_policy": ["1", "2", "3"],
        "head_policy": ["2", "3"],
        "sublayer_policy": ["2", "3"],
    }
    batch, inputs = images(model.vit), []
    hooks = [
        block.norm1.register_forward_hook(lambda norm, given, out: inputs.append((given[0], out)))
        for block in model.vit.blocks
    ]
    found = decided(model, batch)
    for hook in hooks:
        hook.remove()
    for block, (x, normed) in enumerate(inputs[-4:]):
        every = torch.ones(len(batch), 1)
        patches, heads, sublayers = (every.expand(-1, size) for size in (16, 2, 2))
        if block >= 1:
            patches = model.patch_policy[str(block)](normed[:, 1:])[..., 0].sigmoid() > 0.6
        if block >= 2:
            heads = model.head_policy[str(block)](x[:, 0]).sigmoid() > 0.5
            sublayers = model.sublayer_policy[str(block)](x[:, 0]).sigmoid() > 0.5
        for kind, expected in zip(KINDS, (patches, heads, sublayers), strict=True):
            assert torch.equal(getattr(found, kind)[:, block], expected.float()), (block, kind)


@LAYOUTS
@pytest.mark.parametrize("flavour", flavours("adavit"))
def test_heads_and_sublayers_are_decided_by_the_class_token_or_else_the_mean(flavour: str, layout: type) -> None:
    model = FREE.build(small_vit(flavour)).eval()
    tokens = layout.of(torch.randn(3, 9, model.shape.dim, generator=torch.Generator().manual_seed(0)))
    x = tokens.grid(tokens.x)
    pooled = "average" in flavour or "attention pool" in flavour
    torch.testing.assert_close(model.state(tokens), x.mean(dim=1) if pooled else x[:, 0])


def test_policies_read_a_token_normalised_by_their_own_norm() -> None:
    model = vary(replace(FREE, norm_policies=True).build(small_vit())).eval()
    assert list(model.policy_norm) == ["1", "2", "3"]
    tokens = model.enter(images(model.vit), Masked)
    tokens = tokens.with_x(torch.randn(3, 17, 64, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        model.policy_norm["2"].weight.mul_(3.0)
        found = model.decide(2, tokens)[0].head_logits
        normed = torch.nn.functional.layer_norm(tokens.x[:, 0], (64,), eps=model.vit.blocks[0].norm1.eps)
        torch.testing.assert_close(found, model.head_policy["2"](3.0 * normed))
    assert not replace(FREE, norm_policies=True, policies=("patches",)).build(small_vit()).policy_norm


def test_a_patch_that_was_passed_over_may_return() -> None:
    model = vary(METHODS["adavit, patches"].build(small_vit())).eval()
    live = model(images(model.vit, count=8), detailed=True).usage.live
    assert (live[:, 1:] & ~live[:, :-1]).any()
    assert live[:, :, 0].all()


def test_a_block_that_is_off_does_not_score_its_patches() -> None:
    model = vary(FREE.build(small_vit())).eval()
    usage = model(images(model.vit, count=8), detailed=True).usage
    off = ~(usage.attention | usage.mlp)
    assert off.any()
    assert not usage.live[off].any()
    by_class_token = 64 * torch.tensor([0, 4, 4, 4])  # 2 heads and 2 sub-layers
    assert torch.equal(usage.deciding, by_class_token + 64 * 17 * ~off)
    assert (usage.executed[off] == 0).all()


@pytest.mark.parametrize(("lean", "everything"), [(-30.0, False), (30.0, True)])
@LAYOUTS
def test_lean_goes_from_nothing_to_everything(lean: float, everything: bool, layout: type) -> None:
    model = vary(replace(FREE, lean=lean).build(small_vit())).eval()
    usage = model(images(model.vit), layout, detailed=True).usage
    assert (usage.attention[:, 1:] == everything).all()
    assert (usage.mlp[:, 1:] == everything).all()
    assert (usage.heads[:, 1:] == 2 * everything).all()
    assert (usage.live[:, 0, 1:] == everything).all()
    assert usage.attention[:, 0].all()  # the first block has a policy over patches alone


def test_evaluation_is_that_of_the_released_code_in_both_modes() -> None:
    clean = vary(FREE.build(small_vit())).eval()
    official = RELEASED.build(small_vit()).eval()
    official.load_state_dict(clean.state_dict())
    batch = images(clean.vit)
    assert torch.equal(clean(batch), official(batch))
    assert torch.equal(clean(batch, Masked), official(batch, Masked))


@pytest.mark.parametrize("lean", [0.0, 1.0, -2.0])
def test_random_decisions_ignore_the_image_and_are_on_with_the_probability_of_lean(lean: float) -> None:
    vit = small_vit()
    model = vary(replace(FREE, random=True, lean=lean).build(vit)).eval()
    kept = []
    for seed in (0, 1):
        torch.manual_seed(5)
        kept.append(decided(model, images(vit, count=256, seed=seed)))
    for kind in KINDS:
        assert torch.equal(getattr(kept[0], kind), getattr(kept[1], kind))
    rate = 1 / (1 + math.exp(-lean))  # a half at 0, whatever the thresholds are
    assert FREE.patch_threshold != FREE.threshold
    assert kept[0].patches.mean().item() == pytest.approx(rate, abs=0.02)
    assert kept[0].heads[:, 1:].mean().item() == pytest.approx(rate, abs=0.05)
    assert kept[0].sublayers[:, 1:].mean().item() == pytest.approx(rate, abs=0.05)


@pytest.mark.parametrize(("lean", "share"), [(-1000.0, 0.0), (1000.0, 1.0)])
def test_random_decisions_are_all_off_and_all_on_at_the_ends(lean: float, share: float) -> None:
    vit = small_vit()
    patches = replace(FREE, policies=("patches",), random=True, lean=lean)
    assert decided(patches.build(vit).eval(), images(vit)).patches.mean().item() == share


# ---- training


def test_packed_training_is_refused() -> None:
    model = FREE.build(small_vit()).train()
    with pytest.raises(ValueError, match="AdaViT trains with layout=Masked"):
        model(images(model.vit), Packed)
    assert model(images(model.vit)).requires_grad


@pytest.mark.parametrize("logit", [-0.5, 1.0])
def test_training_keeps_what_the_probabilities_say_but_for_the_released_patches(logit: float) -> None:
    torch.manual_seed(0)
    rates = {}
    for config in (FREE, RELEASED):
        model = constant(config, logit).train()
        found = decided(model, images(model.vit, count=256))
        rates[config.method] = [t.mean().item() for t in (found.patches, found.heads[:, 1:], found.sublayers[:, 1:])]
    even = 1 / (1 + math.exp(-logit))
    patches = 1 / (1 + 1.5 * math.exp(-logit))
    released = 1 / (1 + 1.5**5 * math.exp(-logit))
    assert rates["adavit"] == pytest.approx([patches, even, even], abs=0.05)
    assert rates["adavit_released"] == pytest.approx([released, even, even], abs=0.05)
    assert rates["adavit_released"][0] < rates["adavit"][0] - 0.1


def gradients_of(model: AdaViT, batch: Tensor, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(batch, detailed=True)
    (output.logits.square().sum() + sum(output.terms.values())).backward()
    return output.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_temperature_changes_gradients_alone() -> None:
    found = {}
    for temperature in (1.0, 5.0):
        model = vary(AdaViTConfig(temperature=temperature).build(small_vit())).train()
        found[temperature] = gradients_of(model, images(model.vit))
    assert torch.equal(found[1.0][0], found[5.0][0])
    for name in ("patch_policy.1.bias", "head_policy.2.weight", "sublayer_policy.1.weight"):
        assert not torch.allclose(found[1.0][1][name], found[5.0][1][name], rtol=0.1)


def test_stochastic_depth_acts_in_every_block_but_in_the_released_code() -> None:
    for config, moves in ((FREE, True), (RELEASED, False), (replace(RELEASED, policies=("patches", "heads")), True)):
        model = constant(config, 1000.0, drop_path_rate=0.5).train()  # all on, whatever the noise
        batch = images(model.vit)
        with torch.no_grad():
            drawn = [model(batch) for _ in range(4)]
            dense = model.eval()(batch, Masked)
        assert all(torch.allclose(logits, dense, atol=1e-5) for logits in drawn) != moves


@pytest.mark.parametrize("policies", [KINDS, ("patches",), ("heads",), ("sublayers",)], ids=str)
def test_the_term_on_macs_is_that_of_the_usage_and_reaches_every_policy(policies: tuple[str, ...]) -> None:
    base = AdaViTConfig(policies=policies, macs_target=None)
    for target, sign in ((1.0, -1), (0.8, 1)):
        model = constant(replace(base, macs_target=target, macs_weight=3.0), 6.0).train()
        torch.manual_seed(0)
        output = model(images(model.vit, count=8), detailed=True)
        share = macs(output.usage, model.shape).double().mean() / dense_macs(model.shape, output.usage.grid)
        assert 0.8 < share < 1
        assert output.terms.keys() == {"macs"}
        assert output.terms["macs"].item() == pytest.approx(3 * (share.item() - target) ** 2, rel=1e-4, abs=1e-7)
        output.terms["macs"].backward()
        for name, kind in zip(MAPS, KINDS, strict=True):
            assert bool(getattr(model, name)) == (kind in policies)
            for block, policy in getattr(model, name).items():
                assert (policy.bias.grad * sign > 0).all(), (name, block)  # over the target every logit is to fall


def test_packed_logits_have_no_gradients_and_say_so() -> None:
    model = AdaViTConfig(macs_target=None).build(small_vit()).eval()
    batch = images(model.vit)
    assert model(batch, Masked).requires_grad
    assert not model(batch, Packed).requires_grad


def test_attention_is_dropped_out_in_training() -> None:
    model = AdaViTConfig(macs_target=None, lean=30.0).build(small_vit(attn_drop_rate=0.5)).train()
    batch = images(model.vit)
    assert not torch.equal(model(batch), model(batch))


def test_evaluation_has_no_loss_terms() -> None:
    model = AdaViTConfig(usage_weight=1.0).build(small_vit()).eval()
    assert model(images(model.vit), Masked, detailed=True).terms == {}


def test_usage_losses_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    patches, heads, sublayers = (
        (torch.rand(5, 3, size, dtype=torch.float64, generator=generator) < 0.4).double() for size in (6, 2, 2)
    )
    logits = [torch.randn(5, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2)]
    config = AdaViTConfig(
        usage_weight=1.0,
        usage_targets=(0.3, 0.6, 0.7),
        diversity_weight=0.2,
        entropy_weight=0.1,
        minimums=(0.5, 0.4, 0.3),
        minimum_weights=(2.0, 3.0, 4.0),
    )
    found = usage_terms(usage_means(Policies(patches, heads, sublayers, *logits), config, (0, 1, 1)), config)
    own = [patches[image, block].mean().item() for image in range(5) for block in range(3)]
    expected = {
        "patches": (sum(own) / 15 - 0.3) ** 2 + 2 * sum(max(0, 0.5 - value) for value in own) / 15,
    }
    for kind, t, logit, target, least, weight in (
        ("heads", heads, logits[0], 0.6, 0.4, 3),
        ("sublayers", sublayers, logits[1], 0.7, 0.3, 4),
    ):
        own = [t[:, block, place].mean().item() for block in (1, 2) for place in (0, 1)]
        spread = sum((value - target) ** 2 for value in own) / 4
        chance = torch.distributions.Bernoulli(logits=logit).entropy().mean().item()
        short = sum(max(0, least - value) for value in own) / 4
        expected[kind] = (sum(own) / 4 - target) ** 2 + 0.2 * spread + weight * short - 0.1 * chance
    assert found.keys() == expected.keys()
    for kind, value in expected.items():
        assert found[kind].item() == pytest.approx(value), kind


def test_usage_losses_are_weighted_and_of_the_policies_there_are() -> None:
    terms = {}
    for weight in (1.0, 2.0):
        config = AdaViTConfig(policies=("heads", "sublayers"), usage_weight=weight, macs_target=None)
        torch.manual_seed(0)
        model = config.build(small_vit()).train()
        terms[weight] = model(images(model.vit), detailed=True).terms
    assert terms[1.0].keys() == {"heads", "sublayers"}
    assert all(torch.equal(terms[2.0][kind], 2 * terms[1.0][kind]) for kind in ("heads", "sublayers"))


def test_heads_of_identity_train_beside_patches_but_in_the_released_code() -> None:
    for config, reached in ((FREE, True), (RELEASED, False)):
        model = vary(replace(config, heads_take="identity", policies=("patches", "heads")).build(small_vit())).train()
        _, gradients = gradients_of(model, images(model.vit))
        assert gradients["patch_policy.1.weight"].any()
        assert ("head_policy.1.weight" in gradients and gradients["head_policy.1.weight"].any()) == reached


def test_policies_begin_alike_and_where_they_are_told() -> None:
    for bias in (0.0, 3.0):
        model = replace(FREE, initial_bias=bias).build(small_vit())
        for name in MAPS:
            for policy in getattr(model, name).values():
                assert (policy.bias == bias).all()
                assert 0.01 < policy.weight.std() < 0.03


def test_names_of_the_parameters() -> None:
    model = replace(FREE, first_block=3, first_patch_block=2, norm_policies=True).build(small_vit())
    own = {name for name in model.state_dict() if not name.startswith("vit.")}
    assert own == {
        f"{name}.{part}"
        for name in ("patch_policy.2", "patch_policy.3", "head_policy.3", "sublayer_policy.3", "policy_norm.3")
        for part in ("weight", "bias")
    }
