from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import flavours, images, small_vit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adaptvit
from adaptvit import ATSConfig, Masked, Packed, dense_macs, macs, meet_target
from adaptvit.backbones.door import Projected, attention_received
from adaptvit.backbones.fast import project
from adaptvit.backbones.parts import Rotary
from adaptvit.methods.ats import RandomConfig, draw, gumbel_noise, inverse_transform, normalise, random_order
from adaptvit.methods.released import ReleasedATSConfig
from adaptvit.methods.released import ats as ats_released
from adaptvit.tokens import kernels
from adaptvit.tokens.kernels import ROWS

LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)
SEEDS = st.integers(0, 10_000)
CONFIGS = {
    "inverse_transform": ATSConfig(blocks=(0, 1, 2)),
    "gumbel": ATSConfig(blocks=(0, 1, 2), sampler="gumbel"),
    "random": RandomConfig(blocks=(0, 1, 2)),
    **{mode: ReleasedATSConfig(blocks=(0, 1, 2), mode=mode) for mode in ("mask", "single", "prune")},
}
VITS: dict[str, dict[str, Any]] = {
    **{flavour: {"flavour": flavour} for flavour in flavours("ats")},
    "maximum pool": {"flavour": "average pool", "global_pool": "max"},
    "average and maximum pool": {"flavour": "average pool", "global_pool": "avgmax"},
    "pool with prefix": {"reg_tokens": 2, "global_pool": "avg", "pool_include_prefix": True},
}


def random_scores(seed: int, patches: int = 20) -> tuple[Tensor, Tensor]:
    """Scores (B, P), uneven and of dead patches 0, and the live patches (B, P), at least two of each row."""
    generator = torch.Generator().manual_seed(seed)
    live = torch.rand(3, patches, generator=generator) < torch.tensor([[2.0], [0.7], [0.3]])
    live[:, :2] = True
    score = torch.rand(3, patches, dtype=torch.float64, generator=generator) ** 4 * live
    return score / score.sum(dim=1, keepdim=True), live


def slots(marked: Tensor) -> list[int]:
    return marked.nonzero().flatten().tolist()


def quantiles(score: Tensor, points: int) -> list[int]:
    """The slots at which the running sum of one image's score reaches (i + 1/2) / points, i = 0, 1, ..."""
    found = set()
    for point in range(points):
        total, slot = score[0].item(), 0
        while total < (point + 0.5) / points:
            slot += 1
            total += score[slot].item()
        found.add(slot)
    return sorted(found)


@given(SEEDS, st.integers(1, 60))
def test_the_patches_are_those_that_midpoint_quantiles_fall_on(seed: int, points: int) -> None:
    score, _ = random_scores(seed)
    kept = inverse_transform(score, points)
    assert [slots(row) for row in kept] == [quantiles(row, points) for row in score]


@given(SEEDS, st.floats(1, 60))
def test_a_patch_with_more_than_one_kth_of_the_score_is_kept(seed: int, points: float) -> None:
    score, _ = random_scores(seed)
    assert inverse_transform(score, points)[score > (1 + 1e-9) / points].all()


@given(SEEDS, st.integers(1, 60))
def test_one_to_k_live_patches_are_kept(seed: int, points: int) -> None:
    score, live = random_scores(seed)
    score = score.float()
    noise = gumbel_noise((len(score), points, score.shape[1]), score, torch.Generator().manual_seed(seed))
    for kept in (
        inverse_transform(score, points),
        draw(score, noise),
        *(ats_released.sample(score, live, points, mode) for mode in ("mask", "single", "prune")),
    ):
        assert not (kept & ~live).any()
        assert (kept.sum(dim=1) >= 1).all()
        assert (kept.sum(dim=1) <= points).all()


@given(SEEDS, st.integers(1, 40))
def test_half_a_point_is_not_left_to_rounding(seed: int, points: int) -> None:
    """The last of points + 1/2 quantiles would be 1, which a running sum of floats reaches or just misses."""
    score, _ = random_scores(seed)
    kept = [inverse_transform(score * (1 + error), points + 0.5) for error in (-1e-9, 0, 1e-9)]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[1], kept[2])


def test_with_many_more_points_than_patches_all_that_score_are_kept() -> None:
    score = torch.tensor([[0.3, 0.0, 0.2, 0.001, 0.499]])
    assert inverse_transform(score, 1000).tolist() == [[True, False, True, True, True]]
    assert inverse_transform(score, 100).tolist() == [[True, False, True, False, True]]


def test_where_no_patch_has_a_score_they_are_kept_evenly() -> None:
    live = torch.ones(2, 16, dtype=torch.bool)
    live[1, 8:] = False
    score = normalise(torch.zeros(2, 16), live)
    assert torch.equal(score, live / live.sum(dim=1, keepdim=True))
    assert [slots(row) for row in inverse_transform(score, 4)] == [[1, 5, 9, 13], [0, 2, 4, 6]]


def released_by_hand(score: Tensor, points: int, least_is_lost: bool) -> list[int]:
    """The released code's steps on one image's live patches, positions in `score`."""
    order = sorted(range(len(score)), key=lambda patch: score[patch].item())
    cdf, total = [], 0.0
    for patch in order:
        total += score[patch].item()
        cdf.append(total)
    least = cdf[0] if least_is_lost else 0.0
    cdf = [(value - least) / (cdf[-1] - least) for value in cdf]
    start = min(value for value in cdf if value > 0)
    grid = [start + (1 - start) * step / (points - 1) for step in range(points)]
    listed = range(max(0, len(cdf) - points), len(cdf))  # of a list longer than the grid its end
    return sorted({order[min(listed, key=lambda place: abs(value - cdf[place]))] for value in grid})


@given(SEEDS, st.integers(2, 40), st.sampled_from(["mask", "single", "prune"]))
def test_the_released_grid_by_hand(seed: int, points: int, mode: str) -> None:
    score, live = random_scores(seed)
    kept = ats_released.sample(score, live, points, mode)
    counts = live.sum(dim=1).tolist()
    for row, count in enumerate(counts):
        least_is_lost = {"mask": count == live.shape[1], "single": True, "prune": count == max(counts)}[mode]
        expected = released_by_hand(score[row, live[row]], points, least_is_lost)
        assert slots(kept[row, live[row]]) == expected, f"row {row}"


def test_a_released_grid_of_one_point_keeps_the_best() -> None:
    score, live = random_scores(0)
    for mode in ("mask", "single", "prune"):
        kept = ats_released.sample(score, live, 1, mode)
        assert [slots(row) for row in kept] == [[place] for place in score.argmax(dim=1).tolist()]


@pytest.mark.parametrize("mode", ["mask", "single", "prune"])
def test_of_one_or_two_patches_the_released_grid_keeps_the_better(mode: str) -> None:
    score, live = torch.tensor([[1.0], [1.0]]), torch.ones(2, 1, dtype=torch.bool)
    assert ats_released.sample(score, live, 5, mode).all()
    score, live = torch.tensor([[0.7, 0.3], [0.4, 0.6]]), torch.ones(2, 2, dtype=torch.bool)
    assert torch.equal(ats_released.sample(score, live, 5, mode), score > 0.5)


def test_draws_follow_the_score_and_repeat_with_their_seed() -> None:
    score = torch.tensor([0.0, 0.05, 0.1, 0.15, 0.3, 0.4])
    kept = []
    for seed in (0, 0, 1):
        noise = gumbel_noise((20_000, 1, 6), score, torch.Generator().manual_seed(seed))
        kept.append(draw(score.expand(20_000, 6), noise))
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    drawn = kept[0].sum(dim=0)
    assert drawn[0] == 0
    assert drawn.sum() == 20_000
    expected = 20_000 * score[1:]
    assert ((drawn[1:] - expected) ** 2 / expected).sum() < 13.3  # 1 % of the chi-square distribution, 4 degrees


def watch(block: nn.Module, x: Tensor) -> Tensor:
    """The attention matrix of timm's own block, (B, H, N, N)."""
    seen = {}
    block.attn.fused_attn = False
    hook = block.attn.attn_drop.register_forward_hook(lambda module, given, out: seen.update(weights=out))
    block(x)
    hook.remove()
    return seen["weights"]


def queries(vit: nn.Module) -> slice:
    """The tokens that the classifier reads, or all."""
    if hasattr(vit, "dist_token"):
        return slice(2)
    return slice(1) if vit.global_pool == "token" else slice(None)


@LAYOUTS
@pytest.mark.parametrize("flavour", VITS)
def test_logits_and_tokens_are_those_of_timms_blocks_on_the_patches_left(flavour: str, layout: type) -> None:
    """Against a loop over images and blocks that takes the patches that were not kept out of the tensor."""
    vit = small_vit(**VITS[flavour], dtype=torch.float64).eval()
    model = ATSConfig(blocks=(0, 2, 3), tokens=(12, 9, 6)).build(vit)
    points, prefix = {0: 12, 2: 9, 3: 6}, vit.num_prefix_tokens
    batch = images(vit, dtype=torch.float64)
    turns = {part: part.table for part in vit.modules() if isinstance(part, Rotary)}
    with torch.inference_mode():
        output = model(batch, layout, detailed=True)
        for index in range(len(batch)):
            x = vit.norm_pre(vit._pos_embed(vit.patch_embed(batch[index : index + 1])))
            left = torch.arange(x.shape[1])
            for number, block in enumerate(vit.blocks):
                assert slots(output.usage.live[index, number]) == left.tolist()
                kept = list(range(len(left)))
                for part, table in turns.items():
                    part.table = table[left]
                if number in points:
                    attention = watch(block, x)[0, :, queries(vit)].mean(dim=1)  # (H, N)
                    qkv = block.attn.qkv(block.norm1(x))[0].unflatten(-1, (3, block.attn.num_heads, -1))
                    score = (attention.T * qkv[:, 2].norm(dim=-1)).sum(dim=1)[prefix:]
                    kept = kept[:prefix] + [prefix + at for at in quantiles(score / score.sum(), points[number])]
                x, left = block(x)[:, kept], left[kept]
            torch.testing.assert_close(output.logits[index], vit.forward_head(vit.norm(x))[0], atol=1e-10, rtol=1e-8)
    assert output.usage.live[:, -1].sum() < output.usage.live[:, 0].sum()


@LAYOUTS
@pytest.mark.parametrize(
    "flavour", ["class token", "QK norm", "distilled", "registers", "average pool, no class token"]
)
def test_attention_received_is_that_of_the_block_itself(flavour: str, layout: type) -> None:
    vit = small_vit(flavour, torch.float64, img_size=72).eval()  # 81 patches, more than `received` takes at a time
    block, prefix = vit.blocks[1], vit.num_prefix_tokens
    with torch.inference_mode():
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images(vit, dtype=torch.float64))))
        assert x.shape[1] > ROWS
        live = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(0)) < torch.tensor([[2.0], [0.9], [0.2]])
        live[:, : max(1, prefix)] = True
        for alive in (live, torch.ones_like(live)):
            tokens = layout.of(x).keep(alive)
            projected = Projected(*project(block, tokens))
            for count in (prefix, None) if prefix else (None,):
                received = tokens.grid(attention_received(tokens, projected, count))
                assert not received[~alive].any()
                for index, row in enumerate(alive):
                    matrix = watch(block, x[index : index + 1, row])[0]  # (H, n, n)
                    torch.testing.assert_close(received[index, row].T, matrix[:, :count].mean(dim=1))


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        return out


@pytest.mark.parametrize("name", ["inverse_transform", "single"])
@pytest.mark.parametrize("flavour", ["class token", "average pool, no class token"])
def test_deciding_takes_no_attention_matrix(flavour: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SHORT", 0)  # or attention itself makes one, an image at a time
    vit = small_vit(flavour, img_size=128).eval()
    model, batch = CONFIGS[name].build(vit), images(vit)
    with torch.no_grad(), Shapes() as shapes:
        usage = model(batch, Packed, detailed=True).usage
    numbers = {int(number) - prefix for number in usage.attended.unique() for prefix in (0, vit.num_prefix_tokens)}
    assert numbers.isdisjoint({64, 192}), "channels of a token or of the MLP would pass for tokens"

    def matrices(seen: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [shape for shape in seen if sum(size in numbers for size in shape) > 1]

    assert matrices(shapes.seen) == []
    with torch.no_grad(), Shapes() as shapes:
        watch(vit.blocks[0], vit._pos_embed(vit.patch_embed(batch)))
    assert len(matrices(shapes.seen)) > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_tokens_kept_are_queries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = small_vit().eval()
    attend, sizes = Packed.attend, []

    def watched(tokens: Packed, q: Tensor, k: Tensor, v: Tensor, *others: object) -> Tensor:
        sizes.append((len(q), len(k), len(v)))
        return attend(tokens, q, k, v, *others)

    monkeypatch.setattr(Packed, "attend", watched)
    with torch.inference_mode():
        usage = CONFIGS[name].build(vit)(images(vit), detailed=True).usage
    attended, updated = usage.attended.sum(dim=0).tolist(), usage.updated.sum(dim=0).tolist()
    assert sizes == list(zip(updated, attended, attended, strict=True))
    assert attended[0] > attended[1] > attended[2] > attended[3] > updated[3] == 3


@LAYOUTS
def test_what_scoring_costs_is_counted_where_it_is_done(layout: type) -> None:
    vit = small_vit().eval()
    usage = ATSConfig(blocks=(0, 2, 3)).build(vit)(images(vit), layout, detailed=True).usage
    dropped = 64 * 64 * (usage.attended - usage.updated)  # queries that come to nothing
    row = 64 * usage.attended  # products of one query with the keys
    sampling = torch.tensor([1, 0, 1, 0])  # nothing reads what the last block would keep
    assert torch.equal(usage.deciding, (dropped + row) * sampling)

    vit = small_vit("average pool, no class token").eval()
    usage = ATSConfig(blocks=(0, 2, 3)).build(vit)(images(vit), layout, detailed=True).usage
    dropped = 64 * 64 * (usage.attended - usage.updated)
    assert torch.equal(usage.deciding, (dropped + 64 * usage.attended**2) * torch.tensor([1, 0, 1, 1]))


def test_by_default_all_but_the_first_quarter_of_the_blocks_sample_by_the_number_of_patches() -> None:
    assert ATSConfig().build(small_vit(depth=12)).points == dict.fromkeys(
        range(3, 11)
    )  # the last keeps the class token
    pooled = small_vit("average pool, no class token", depth=12)
    assert ATSConfig().build(pooled).points == dict.fromkeys(range(3, 12))
    vit = small_vit(dynamic_img_size=True).eval()
    for side, patches in ((32, 16), (48, 36)):
        batch = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
        by_default, by_number = (ATSConfig(tokens=count).build(vit)(batch, detailed=True) for count in (None, patches))
        assert torch.equal(by_default.logits, by_number.logits)


def test_a_last_block_whose_tokens_nothing_reads_is_not_sampled_alone() -> None:
    with pytest.raises(ValueError, match=r"ATSConfig.blocks=\(3,\) is the last block only"):
        ATSConfig(blocks=(3,)).build(small_vit())


def test_an_image_keeps_at_most_k_patches() -> None:
    vit = small_vit().eval()
    usage = ATSConfig(blocks=(0, 1, 2), tokens=(9, 5, 2)).build(vit)(images(vit, count=8), detailed=True).usage
    assert (usage.live[:, 1:, 1:].sum(dim=2) <= torch.tensor([9, 5, 2])).all()
    assert usage.live[:, :, 0].all()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_rate_scales_k(name: str) -> None:
    vit = small_vit().eval()
    batch, config = images(vit), replace(CONFIGS[name], blocks=None)
    halved = replace(config, tokens=12, rate=0.5).build(vit)(batch, detailed=True)
    assert torch.equal(halved.logits, replace(config, tokens=6).build(vit)(batch))
    least = replace(config, blocks=(0,), rate=0.0).build(vit)(batch, detailed=True).usage
    assert (least.live[:, 1].sum(dim=1) == 2).all()


def test_random_patches_are_as_many_as_the_scores_would_keep_and_of_each_image_its_own() -> None:
    vit = small_vit(img_size=64).eval()
    batch = images(vit, count=200)
    by_score, random = (kind(blocks=(1,), tokens=40).build(vit) for kind in (ATSConfig, RandomConfig))
    with torch.inference_mode():
        best, any_ = (model(batch, detailed=True).usage.live[:, 2, 1:] for model in (by_score, random))
    assert torch.equal(any_.sum(dim=1), best.sum(dim=1))
    share = best.double().sum(dim=1).mean() / best.shape[1]
    assert ((any_.double().mean(dim=0) - share).abs() < 5 * (share * (1 - share) / len(batch)) ** 0.5).all()
    assert len({tuple(row) for row in any_.tolist()}) == len(batch)


def test_images_of_the_same_pixels_in_other_places_have_other_orders() -> None:
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    one, mirrored, again = random_order(torch.cat([image, image.flip(3), image]), 30)
    assert not torch.equal(one, mirrored)
    assert torch.equal(one, again)


@LAYOUTS
def test_gumbel_draws_in_training_or_from_a_generator(layout: type) -> None:
    vit = small_vit().eval()
    model, batch = CONFIGS["gumbel"].build(vit), images(vit)
    quantile = CONFIGS["inverse_transform"].build(vit)(batch, layout, detailed=True)
    assert torch.equal(model(batch, layout), quantile.logits)

    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    drawn = [model(batch, layout, detailed=True, generator=one) for one in generators]
    assert torch.equal(drawn[0].logits, drawn[1].logits)
    assert not torch.equal(drawn[0].usage.live, drawn[2].usage.live)
    assert not torch.equal(drawn[0].usage.live, quantile.usage.live)

    model.train()
    torch.manual_seed(0)
    first, second = (model(batch, layout, detailed=True).usage.live for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(model(batch, layout, detailed=True).usage.live, first)


def test_masked_and_packed_training_draw_the_same_patches() -> None:
    vit = small_vit(dtype=torch.float64).train()
    model, batch = CONFIGS["gumbel"].build(vit), images(vit, dtype=torch.float64)
    masked, packed = (
        model(batch, layout, generator=torch.Generator().manual_seed(0), detailed=True) for layout in (Masked, Packed)
    )
    assert torch.equal(masked.usage.live, packed.usage.live)
    torch.testing.assert_close(packed.logits, masked.logits, atol=1e-12, rtol=1e-10)


@LAYOUTS
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(8, 8), (16, 8)], ids=str)
def test_one_or_two_patches_are_enough(size: tuple[int, int], name: str, layout: type) -> None:
    vit = small_vit(img_size=size).eval()
    output = CONFIGS[name].build(vit)(images(vit), layout, detailed=True)
    assert output.logits.isfinite().all()
    assert output.usage.live.any(dim=2).all()
    assert output.usage.live[:, :, 1:].any(dim=2).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_only_prune_depends_on_the_other_images(name: str) -> None:
    vit = small_vit(dtype=torch.float64).eval()
    model, batch = CONFIGS[name].build(vit), images(vit, count=12, dtype=torch.float64)
    with torch.inference_mode():
        together = model(batch, detailed=True).usage.live
        alone = torch.cat([model(image[None], detailed=True).usage.live for image in batch])
    assert torch.equal(together, alone) == (name != "prune")


@LAYOUTS
@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_without_images_has_no_logits(name: str, layout: type) -> None:
    vit = small_vit().eval()
    assert CONFIGS[name].build(vit)(images(vit)[:0], layout).shape == (0, 7)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokens": 0}, r"tokens must lie in 1..65536, got 0; rate=0.5 takes half of them"),
        ({"tokens": (4, 0)}, r"tokens must lie in 1..65536, got \(4, 0\); rate=0.5 takes half of them"),
        ({"tokens": (4, 8)}, r"tokens must not grow from block to block, got \(4, 8\)"),
        ({"blocks": ()}, r"blocks must be block numbers from 0 on, ascending, or None, got \(\)"),
        (
            {"tokens": 0.5},
            r"tokens must be a whole number or several in 1..65536, or None, got 0.5; rate=0.5 takes half of them",
        ),
        ({"blocks": (-1, 2)}, r"blocks must be .* got \(-1, 2\)"),
        ({"blocks": (2, 1)}, r"blocks must be .* ascending, got \(2, 1\)"),
        ({"blocks": (2, 2)}, r"blocks must be .* ascending, got \(2, 2\)"),
        ({"rate": -0.5}, r"rate must lie in \[0, 1e9\], got -0.5"),
        ({"rate": float("inf")}, r"rate must lie in \[0, 1e9\], got inf"),
        ({"rate": float("nan")}, r"rate must lie in \[0, 1e9\], got nan"),
        ({"sampler": "any"}, "sampler must be one of .*gumbel.*, got 'any'"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^ATSConfig.{said}$"):
        ATSConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"blocks": (1, 4)}, r"^ATSConfig.blocks names block 4, but test_vit has blocks 0..3$"),
        ({"blocks": (1, 2), "tokens": (8, 4, 2)}, r"^ATSConfig.tokens has 3 numbers for 2 blocks: \(1, 2\)$"),
        ({"tokens": (8, 4)}, r"^ATSConfig.tokens has 2 numbers for 3 blocks: \(1, 2, 3\)$"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_vit_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ATSConfig(**settings).build(small_vit())


@LAYOUTS
@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_make_no_finite_logits(value: float, part: str, layout: type) -> None:
    vit = small_vit().eval()
    rows = {"keys": slice(64, 128), "values": slice(128, 192)}[part]
    vit.blocks[1].attn.qkv.weight.data[rows] = value
    assert not ATSConfig(blocks=(0, 1, 2)).build(vit)(images(vit), layout).isfinite().any()


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="40 x 32 pixels, but test_vit takes 32 x 32"):
        ATSConfig().build(small_vit())(torch.zeros(1, 3, 40, 32))


@pytest.mark.parametrize(
    "config",
    [
        ATSConfig(),
        ATSConfig(blocks=[1, 3], tokens=[9, 4], rate=0.7),
        ATSConfig(blocks=range(1, 3), tokens=9, sampler="gumbel"),
        ReleasedATSConfig(mode="single"),
        RandomConfig(tokens=9),
    ],
    ids=str,
)
def test_a_saved_model_comes_back_with_its_settings(config: ATSConfig, tmp_path: Path) -> None:
    model = config.build(small_vit(dynamic_img_size=True)).eval()
    adaptvit.save(model, tmp_path / "model.safetensors")
    again = adaptvit.load(tmp_path / "model.safetensors").eval()
    assert again.config == config
    assert hash(again.config) == hash(config)
    assert again.points == model.points
    batch = images(model.vit)
    assert torch.equal(again(batch), model(batch))


@pytest.mark.parametrize("name", ["inverse_transform", "mask"])
@pytest.mark.parametrize("target", [0.5, 0.65])
def test_the_rate_meets_a_budget(target: float, name: str) -> None:
    vit = small_vit(img_size=64).eval()
    batch = images(vit, count=16)
    config = meet_target(CONFIGS[name].build(vit), batch, target)
    model = config.build(vit)
    usage = model(batch, detailed=True).usage
    executed = macs(usage, model.shape).double().mean().item() / dense_macs(model.shape, usage.grid)
    assert executed == pytest.approx(target, abs=0.02)
    assert config.blocks == (0, 1, 2)


@LAYOUTS
def test_the_choice_is_no_part_of_the_gradient(layout: type) -> None:
    """Nothing of the scores is in the graph: with the tokens fixed by hand the gradient is the same."""
    vit = small_vit(dtype=torch.float64).train()
    batch = images(vit, dtype=torch.float64)
    model = ATSConfig(blocks=(1,), tokens=6).build(vit)
    output = model(batch, layout, detailed=True)
    kept = output.usage.live[:, 2]
    gradient = torch.autograd.grad(output.logits.sum(), vit.blocks[0].attn.qkv.weight)[0]

    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(batch)))
    x = vit.blocks[1](vit.blocks[0](x))
    logits = []
    for index, row in enumerate(kept):
        logits.append(vit.forward_head(vit.norm(vit.blocks[3](vit.blocks[2](x[index : index + 1, row])))))
    expected = torch.autograd.grad(torch.cat(logits).sum(), vit.blocks[0].attn.qkv.weight)[0]
    torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=1e-8)
