import itertools
from pathlib import Path

import pytest
import torch
from models import flavours, images, small_vit
from torch import Tensor

import adaptvit
from adaptvit import (
    CalibratedConfig,
    GridConfig,
    Masked,
    MergeConfig,
    MethodConfig,
    Packed,
    ToMeConfig,
    dense_macs,
    macs,
    meet_target,
)
from adaptvit.backbones.door import Projected
from adaptvit.methods import METHODS, of_today
from adaptvit.methods.merge import fit_thresholds
from adaptvit.methods.merging import Places, arrange, match

UNEQUAL = ("tokens to token", "rotary")
"""Flavours whose patches overlap, or are turned by their places, so that there are no equal ones."""
LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)


def merged_by_hand(metric: list[Tensor], prefix: int, r: int) -> list[list[int]]:
    """The paper's matching for one image, token by token: which tokens are in which, in the order of the result."""
    patches = range(prefix, len(metric))
    a, b = [n for n in patches if n % 2 == 0], [n for n in patches if n % 2 == 1]
    r = min(r, len(patches) // 2)
    best = {n: max(b, key=lambda other, n=n: float(metric[n] @ metric[other])) for n in a}
    falling = sorted(a, key=lambda n: -float(metric[n] @ metric[best[n]]))
    staying = [n for n in falling if n in falling[r:]]
    order = [*range(prefix), *(sorted(staying) if prefix else staying), *b]
    return [[n, *(n_a for n_a in falling[:r] if best[n_a] == n)] for n in order]


@pytest.mark.parametrize(("prefix", "count", "r"), list(itertools.product(range(4), (2, 7, 12), (1, 3, 9))))
def test_matching_is_that_of_the_paper(prefix: int, count: int, r: int) -> None:
    generator = torch.Generator().manual_seed(100 * prefix + 10 * count + r)
    metric = torch.nn.functional.normalize(torch.randn(2, prefix + count, 5, generator=generator), dim=-1)
    live = torch.ones(metric.shape[:2], dtype=torch.bool)
    score, target = match(metric, live, prefix)
    chosen = ToMeConfig(r=r).choose(score, count, 0, 1)
    place, moved = arrange(chosen, score, target, live, prefix)
    for image in range(2):
        expected = merged_by_hand(list(metric[image]), prefix, r)
        places = [[n for n in range(prefix + count) if place[image, n] == slot] for slot in range(len(expected))]
        assert places == [sorted(group) for group in expected]
        assert moved[image].nonzero().flatten().tolist() == sorted(n for group in expected for n in group[1:])


@LAYOUTS
@pytest.mark.parametrize("flavour", [name for name in flavours("merge") if not name.startswith(UNEQUAL)])
def test_merging_equal_tokens_changes_nothing(flavour: str, layout: type) -> None:
    """Patches of two kinds, without a position."""
    vit = small_vit(flavour, dtype=torch.float64).eval()
    torch.nn.init.zeros_(vit.pos_embed)
    rows, columns = vit.patch_embed.patch_size
    kinds = torch.randn(2, 2, 3, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    down, across = vit.patch_embed.grid_size
    which = torch.rand(2, down, across, generator=torch.Generator().manual_seed(2)) < torch.tensor([[[0.5]], [[0.2]]])
    batch = torch.stack([kind[mask.long()] for kind, mask in zip(kinds, which, strict=True)])
    batch = batch.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    with torch.inference_mode():
        config = MergeConfig(thresholds=1 - 1e-9, relative=0.0, protection=0.0, power=1.0, size_cost=0.0)
        output = config.build(vit)(batch, layout, detailed=True)
        torch.testing.assert_close(output.logits, vit(batch), atol=1e-10, rtol=0)
    assert (output.usage.attended[:, -1] < output.usage.attended[:, 0] // 2).all()
    for groups, mask in zip(output.usage.groups[:, -1], which.flatten(1), strict=True):
        assert not {*groups[mask].tolist()} & {*groups[~mask].tolist()}


@LAYOUTS
@pytest.mark.parametrize(
    "config",
    [ToMeConfig(r=3), MergeConfig(thresholds=0.4, relative=0.0), GridConfig(rate=0.9)],
    ids=lambda config: config.method,
)
@pytest.mark.parametrize("flavour", flavours("tome"))
def test_groups_only_grow_and_are_the_tokens(flavour: str, config: MethodConfig, layout: type) -> None:
    model = config.build(small_vit(flavour)).eval()
    with torch.inference_mode():
        usage = model(images(model.vit), layout, detailed=True).usage
    for image in range(3):
        before = list(range(usage.groups.shape[2]))
        for block in range(model.depth):
            groups = usage.groups[image, block].tolist()
            assert len({*zip(before, groups, strict=True)}) == len({*before})  # what was together stays together
            count = len({*groups}) + model.prefix
            assert {*groups} == {*range(model.prefix, count)}
            if block + 1 < model.depth:
                assert usage.attended[image, block + 1] == count == usage.live[image, block + 1].sum()
            before = groups


def test_a_token_is_live_where_its_first_patch_was() -> None:
    model = MergeConfig(thresholds=0.4, relative=0.0).build(small_vit()).eval()
    usage = model(images(model.vit), detailed=True).usage
    for image in range(3):
        groups = usage.groups[image, 1].tolist()
        first = sorted(groups.index(group) for group in {*groups})
        assert usage.live[image, 2, model.prefix :].nonzero().flatten().tolist() == first


def test_every_image_merges_r_and_attention_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptvit.tokens.packed.attend_ragged", None)
    model = ToMeConfig(r=3).build(small_vit("average pool")).eval()
    with torch.inference_mode():
        usage = model(images(model.vit), detailed=True).usage
    start = usage.attended[0, 0].item()
    assert usage.attended.tolist() == [[start, start - 3, start - 6, start - 9]] * 3


@LAYOUTS
@pytest.mark.parametrize("config", [MergeConfig(thresholds=0.4), ToMeConfig(r=3)], ids=lambda config: config.method)
def test_a_device_merges_what_the_host_does(config: object, layout: type, monkeypatch: pytest.MonkeyPatch) -> None:
    model = config.build(small_vit("rotary, RMS norm, cosine")).eval()
    batch = images(model.vit)
    with torch.inference_mode():
        host = model(batch, layout, detailed=True)
        monkeypatch.setattr("adaptvit.tokens.kernels.on_host", lambda _: False)
        device = model(batch, layout, detailed=True)
    torch.testing.assert_close(device.logits, host.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(device.usage.groups, host.usage.groups)


def test_thresholds_leave_images_different_numbers_of_tokens() -> None:
    model = MergeConfig(thresholds=0.4, relative=0.0).build(small_vit()).eval()
    usage = model(images(model.vit, count=8), detailed=True).usage
    assert len({*usage.attended[:, -1].tolist()}) > 1


def test_a_higher_threshold_merges_less_in_the_first_block() -> None:
    counts = []
    for threshold in (-1.0, 0.3, 0.6, 1.0):
        model = MergeConfig(thresholds=threshold, relative=0.0).build(small_vit()).eval()
        counts.append(model(images(model.vit), detailed=True).usage.attended[:, 1].sum().item())
    assert counts == sorted(counts)
    assert counts[0] < counts[1] < counts[-1]


def test_the_mean_cosine_is_that_of_live_tokens() -> None:
    cosine = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.2, -torch.inf], [-torch.inf] * 3])
    score = MergeConfig(relative=0.5).score(cosine)
    torch.testing.assert_close(score[:2], torch.tensor([[0.65, 0.25, -0.15], [0.55, -0.05, -torch.inf]]))
    assert (score[2] == -torch.inf).all()


def test_a_schedule_of_more_than_half_fits_what_tome_would_do() -> None:
    vit = small_vit("average pool")
    batch = images(vit, count=4)
    model = fit_thresholds(MergeConfig(), vit, batch, ToMeConfig(r=(99, 0, 1)))
    assert (model(batch, detailed=True).usage.attended[:, 1] == model.prefix + 8).all()


def test_fitted_thresholds_merge_what_the_schedule_does_on_average() -> None:
    vit = small_vit("average pool")
    batch = images(vit, count=16)
    model = fit_thresholds(MergeConfig(shift=0.1), vit, batch, ToMeConfig(r=(3, 0, 2)))
    config = model.config
    assert config.shift == 0
    assert config.thresholds[1] == config.thresholds[3] == 1
    with torch.inference_mode():  # as it was fitted, to the last bit of a score
        attended = model(batch, detailed=True).usage.attended
    assert attended.double().mean(dim=0).diff().tolist() == [-3, 0, -2]
    assert len({*attended[:, 1].tolist()}) > 2


def test_sums_and_products_are_taken_off_the_similarity() -> None:
    generator = torch.Generator().manual_seed(0)
    metric = torch.nn.functional.normalize(torch.randn(2, 9, 4, generator=generator, dtype=torch.float64), dim=-1)
    product, total = torch.rand(2, 2, 9, generator=generator, dtype=torch.float64)
    live = torch.arange(9) < torch.tensor([[9], [6]])
    score, target = match(metric, live, 1, product, total)
    for image, count in enumerate((9, 6)):
        odd = range(1, count, 2)
        for place, even in enumerate(range(2, count, 2)):
            scores = [
                metric[image, even] @ metric[image, n]
                - product[image, even] * product[image, n]
                - total[image, even]
                - total[image, n]
                for n in odd
            ]
            torch.testing.assert_close(score[image, place], max(scores))
            assert target[image, place] == scores.index(max(scores))
    assert (score[1, 2:] == -torch.inf).all()


@LAYOUTS
def test_a_merged_token_is_as_long_as_its_parts_and_counts_them_by_importance(layout: type) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    importance, size = torch.rand(2, 5, generator=generator, dtype=torch.float64), torch.tensor([[1.0, 2, 1, 3, 1]] * 2)
    place = torch.tensor([[0, 1, 2, 1, 1], [0, 0, 1, 2, 2]])
    moved = torch.tensor([[False, True, False, True, False], [False, True, False, False, True]])
    model, tokens = CalibratedConfig().build(small_vit(dtype=torch.float64)), layout.of(x)
    decided = Places(place, moved)
    merged, patches, bias = model.join(tokens, decided, tokens.spread(size), tokens.spread(importance), 3)
    assert torch.equal(bias, model.config.power * patches.log())
    found, patches = merged.grid(merged.x), merged.grid(patches)
    for image, slot in itertools.product(range(2), range(3)):
        parts = place[image] == slot
        weight = (size * importance)[image, parts] / (size * importance)[image, parts].sum()
        mean = weight @ x[image, parts]
        length = weight @ x[image, parts].norm(dim=1)
        torch.testing.assert_close(found[image, slot], mean * length / mean.norm())
        assert patches[image, slot] == size[image, parts].sum()


@pytest.mark.parametrize("method", ["merge", "calibrated"])
def test_files_of_before_merge_as_they_did(method: str) -> None:
    _, values = of_today(method, {"power": 0.85})
    config = METHODS[method](**values)
    assert (config.power, config.size_cost, config.weighing, config.keeps_length) == (0.85, 0.0, "patches", False)


def test_a_budget_is_met_and_travels_with_the_model(tmp_path: Path) -> None:
    vit = small_vit()
    batch = images(vit, count=16)
    model = fit_thresholds(MergeConfig(), vit, batch, ToMeConfig(r=2))
    config = meet_target(model, batch, 0.7, tolerance=0.02)
    usage = model(batch, detailed=True).usage
    assert macs(usage, model.shape).double().mean() / dense_macs(model.shape, usage.grid) == pytest.approx(
        0.7, abs=0.02
    )
    adaptvit.save(model, tmp_path / "model.safetensors")
    restored = adaptvit.load(tmp_path / "model.safetensors")
    assert restored.config == config
    assert torch.equal(restored(batch), model(batch))


@pytest.mark.parametrize("r", [5, (1, 2), (4, 0, 3)])
def test_a_schedule_travels_with_the_model(tmp_path: Path, r: int | tuple[int, ...]) -> None:
    model = ToMeConfig(r=r, proportional_attention=False).build(small_vit()).eval()
    adaptvit.save(model, tmp_path / "model.safetensors")
    assert adaptvit.load(tmp_path / "model.safetensors").config == model.config


def test_matching_has_no_gradient_and_means_do() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    place = torch.tensor([[0, 1, 2, 1, 1], [0, 0, 1, 2, 2]])
    moved = torch.tensor([[False, True, False, True, False], [False, True, False, False, True]])
    for layout in (Masked, Packed):

        def means(x: Tensor, layout: type = layout) -> Tensor:
            laid = layout.of(x)
            return laid.merge(place, moved, laid.spread(torch.rand(2, 5, generator=torch.Generator().manual_seed(0))))[
                0
            ].x

        assert torch.autograd.gradcheck(means, x)
    model = ToMeConfig(r=3).build(small_vit(dtype=torch.float64)).train()
    tokens = Packed.of(x)
    projected, size = Projected(*[x[..., None, :].flatten(0, 1)] * 3), torch.ones(10)
    assert not any(out.requires_grad for out in model.places(tokens, size, 0, model.see(tokens, projected))[:2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": -1}, r"ToMeConfig\.r must be 0 or more, got -1"),
        ({"r": (8, -1.0)}, r"ToMeConfig\.r must be .* got \(8, -1\.0\)"),
        ({"r": ()}, r"ToMeConfig\.r must be .* got \(\)"),
        ({"rate": -0.5}, r"ToMeConfig\.rate must lie in \[0, 1e9\], got -0\.5"),
        ({"r": 8, "inflection": 1.5}, r"ToMeConfig\.inflection must lie in \[-1, 1\], got 1\.5"),
        ({"r": (8, 4), "inflection": -1}, r"ToMeConfig\.inflection=-1\.0 is for one number r, but r is \(8, 4\)"),
    ],
)
def test_wrong_schedules_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToMeConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"thresholds": 1.2}, r"MergeConfig\.thresholds must lie in \[-1, 1\], got 1\.2"),
        ({"thresholds": (0.5, float("nan"))}, r"MergeConfig\.thresholds must lie in \[-1, 1\], got \(0\.5, nan\)"),
        ({"relative": 1.5}, r"MergeConfig\.relative must lie in \[0, 1\], got 1\.5"),
        ({"shift": -3.0}, r"MergeConfig\.shift must lie in \[-2, 2\], got -3\.0"),
    ],
)
def test_wrong_thresholds_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MergeConfig(**settings)


def test_schedules_of_another_depth_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ToMeConfig\.r has 5 numbers for 4 blocks"):
        ToMeConfig(r=(1, 1, 1, 1, 1)).build(small_vit())
    with pytest.raises(ValueError, match=r"MergeConfig\.thresholds has 3 numbers for 4 blocks"):
        MergeConfig(thresholds=(0.5, 0.5, 0.5)).build(small_vit())


def test_blank_images_can_be_fitted() -> None:
    vit = small_vit().eval()
    torch.nn.init.zeros_(vit.pos_embed)
    batch = torch.ones(4, 3, 32, 32)
    model = fit_thresholds(MergeConfig(relative=0.0), vit, batch, ToMeConfig(r=2))
    assert max(model.config.thresholds[:3]) < 1
    assert (model(batch, detailed=True).usage.attended[:, 1] <= model.prefix + 14).all()


def test_the_rate_multiplies_what_has_been_merged_up_to_each_block() -> None:
    assert ToMeConfig(r=8, rate=0.6).schedule(4) == (5, 5, 4, 5)
    assert ToMeConfig(r=(8, 0, 4), rate=2.0).schedule(4) == (16, 0, 8, 0)
    assert ToMeConfig(r=7, inflection=-0.3).schedule(12) == ToMeConfig(r=7, inflection=-0.3, rate=1.0).schedule(12)
    for rate in (0.0, 0.37, 1.9):
        assert sum(ToMeConfig(r=9, rate=rate).schedule(12)) == round(rate * 108)
