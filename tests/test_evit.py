"""EViT: configuration, counts, the fused token, its schedule and its knob."""

from itertools import pairwise

import pytest
import torch
from models import images, small_vit

import adaptvit
from adaptvit import EViTConfig, FullConfig, Masked, Packed, meet_target
from adaptvit.methods.evit import EViT, fuse, keep_rate_at
from adaptvit.tokens import Tokens

LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_rate": 0.0}, r"keep_rate must lie in \(0, 1\], got 0.0"),
        ({"keep_rate": (0.7, 1.2)}, r"keep_rate must lie in \(0, 1\], got \(0.7, 1.2\)"),
        ({"blocks": (3, 1)}, r"blocks must be block numbers from 0 on, ascending, got \(3, 1\)"),
        ({"blocks": (-1,)}, r"blocks must be block numbers from 0 on"),
        ({"tokens": (9, 11, 4)}, r"tokens must not grow from block to block, got \(9, 11, 4\)"),
        ({"tokens": (9, 10), "fuse": False}, r"tokens must not grow from block to block"),
        ({"tokens": 0}, r"tokens must be 1 or more, got 0"),
        (
            {"tokens": 0.5},
            r"tokens must be a whole number or several, 1 or more, or None, got 0.5; keep_rate=0.5 keeps half of them",
        ),
        ({"rate": -1.0}, r"rate must lie in \[0, 1e9\], got -1.0"),
    ],
)
def test_wrong_values_fail_when_the_config_is_made(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EViTConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": (4,)}, r"blocks names block 4, but test_vit has blocks 0..3"),
        ({"blocks": (0, 1), "keep_rate": (0.5,)}, r"keep_rate has 1 numbers for 2 blocks: \(0, 1\)"),
        ({"blocks": (0, 1), "tokens": (5, 4, 3)}, r"tokens has 3 numbers for 2 blocks: \(0, 1\)"),
        ({"blocks": (3,)}, r"is the last block only, of which just the class token is read"),
    ],
)
def test_what_the_vit_does_not_have_is_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EViTConfig(**settings).build(small_vit())


def test_a_keep_rate_out_of_range_is_refused_at_run_time() -> None:
    model = EViTConfig().build(small_vit()).eval()
    with pytest.raises(ValueError, match=r"^keep_rate must lie in \(0, 1\], got 1.5$"):
        model(images(model.vit), keep_rate=1.5)
    with pytest.raises(ValueError, match=r"^keep_rate has 2 numbers for 3 blocks: \(1, 2, 3\)$"):
        model(images(model.vit), keep_rate=(0.5, 0.5))


def test_a_block_that_keeps_all_does_so_at_any_rate() -> None:
    config = EViTConfig(blocks=(0, 1, 2), keep_rate=(0.5, 1.0, 0.5), rate=0.75)
    assert config.build(small_vit()).kept(16) == {0: 6, 2: 3}


@pytest.mark.parametrize(
    ("settings", "counts"),
    [({}, [139, 99, 71]), ({"fuse": False}, [138, 97, 68])],
    ids=["fused", "not fused"],
)
def test_the_published_counts_at_196_patches(settings: dict, counts: list[int]) -> None:
    config = EViTConfig(**settings)
    kept = config.build(small_vit(depth=12, embed_dim=48, num_heads=3)).kept(196)
    assert list(kept) == [3, 6, 9]
    assert [count + config.fuse for count in kept.values()] == counts


@LAYOUTS
def test_the_fused_token_is_the_sum_of_the_dropped_patches_by_their_scores(
    layout: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = EViTConfig(blocks=(1, 2)).build(small_vit(dtype=torch.float64)).eval()
    reduce = EViT.reduce

    def checked(self: EViT, tokens: Tokens, score: torch.Tensor, best: torch.Tensor) -> tuple[Tokens, torch.Tensor]:
        (after, last), count = reduce(self, tokens, score, best), best.shape[1] - 1
        slot = self.place(tokens.bare, last)
        features, left = tokens.grid(tokens.x), after.grid(after.x)
        scores = tokens.grid(tokens.of_rows(torch.cat([torch.full_like(score[:, :1], torch.inf), score], dim=1)))
        for image in range(len(score)):
            ranked = [slot for slot in scores[image].argsort(descending=True).tolist() if tokens.live[image, slot]]
            dropped = ranked[count + 1 :]
            assert slot[image].nonzero().flatten().tolist() == dropped[:1]
            assert after.live[image].nonzero().flatten().tolist() == sorted(ranked[: count + 2])
            wanted = sum(scores[image, slot] * features[image, slot] for slot in dropped)
            torch.testing.assert_close(left[image, dropped[0]], wanted)
            for slot_ in ranked[: count + 1]:
                assert torch.equal(left[image, slot_], features[image, slot_])
        return after, last

    monkeypatch.setattr(EViT, "reduce", checked)
    with torch.inference_mode():
        usage = model(images(model.vit, dtype=torch.float64), layout, detailed=True).usage
    assert usage.fused is not None
    assert not (usage.fused & ~usage.live).any()
    assert usage.fused.sum(dim=2).tolist()[0][:3] == [0, 0, 1]


def test_fusing_weights_are_the_scores_as_they_are() -> None:
    x = torch.arange(8.0).view(1, 4, 2)
    score = torch.tensor([[0.1, 0.4, 0.2, 0.05]])
    assert fuse(x, score, torch.tensor([[1, 2]])).tolist() == [pytest.approx([0.05 * 6, 0.1 + 0.05 * 7])]


@LAYOUTS
def test_images_that_keep_as_many_tokens_run_as_a_dense_batch(layout: type) -> None:
    """Without one call of attention for each image: as many calls as blocks."""
    model = EViTConfig(blocks=(0, 1, 2)).build(small_vit()).eval()
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(
            "adaptvit.tokens.kernels.scaled_dot_product_attention",
            lambda *given, **more: calls.append(1) or attention(*given, **more),
        )
        model(images(model.vit), layout)
    assert len(calls) == model.depth


def test_the_knob_meets_a_budget() -> None:
    model = EViTConfig(blocks=(0, 1, 2)).build(small_vit(img_size=128)).eval()
    batch = images(model.vit)
    meet_target(model, batch, 0.6, tolerance=0.02)
    usage = model(batch, detailed=True).usage
    share = adaptvit.macs(usage, model.shape).double().mean() / adaptvit.dense_macs(model.shape, usage.grid)
    assert share.item() == pytest.approx(0.6, rel=0.02)


def test_a_keep_rate_at_run_time_replaces_the_configs() -> None:
    vit = small_vit()
    told, config = EViTConfig(keep_rate=0.9).build(vit).eval(), EViTConfig(keep_rate=(0.5, 0.8, 1.0)).build(vit).eval()
    batch = images(vit)
    with torch.inference_mode():
        assert torch.equal(told(batch, keep_rate=(0.5, 0.8, 1.0)), config(batch))
        plain = FullConfig().build(vit).eval()(batch)
        torch.testing.assert_close(told(batch, keep_rate=1.0), plain)


def test_a_rate_told_leaves_blocks_of_rate_1_and_told_numbers_of_tokens_alone() -> None:
    vit = small_vit()
    rates = EViTConfig(blocks=(0, 1, 2), keep_rate=(0.5, 1.0, 0.5)).build(vit)
    assert rates.kept(16, 0.75).keys() == {0, 2}
    counts = EViTConfig(blocks=(0, 1, 2), tokens=(9, 6, 4)).build(vit)
    assert counts.kept(16, 0.25) == counts.kept(16)


def test_scores_that_are_not_finite_make_no_finite_logits() -> None:
    model = EViTConfig(blocks=(1, 2)).build(small_vit()).eval()
    with torch.no_grad():
        model.vit.blocks[2].attn.qkv.weight[0, 0] = float("nan")
    assert not model(images(model.vit)).isfinite().any()


def test_the_schedule_falls_from_one_to_the_keep_rate() -> None:
    rates = [keep_rate_at(update, 5, 0.6, start=2, end=6) for update in range(40)]
    assert rates[:10] == [1.0] * 10
    assert rates[30:] == [0.6] * 10
    assert all(before >= after for before, after in pairwise(rates))
    assert keep_rate_at(0, 5, 0.6, start=0, end=0) == 0.6
