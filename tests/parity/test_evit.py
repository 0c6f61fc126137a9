"""EViT against numbers recorded from the released code; tolerances as the fixtures' description gives them.

With a class token the last block of a model reduces nothing, since nothing would read it. To see what it would keep,
each ViT here has one block more than the recorded one, whose two sub-layers add zero.
"""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import weights
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adaptvit import EViTConfig, Masked, Packed
from adaptvit.checkpoints import resize_positions
from adaptvit.methods.evit import EViT, keep_rate_at
from adaptvit.usage import Output

LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)


@cache
def load(path: Path) -> SimpleNamespace:
    return SimpleNamespace(case=json.loads(path.read_text()), arrays=dict(np.load(path.with_suffix(".npz"))))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a parameter `recorded` runs once for every recorded model."""
    if "recorded" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--fixtures") / "evit"
        found = [path for path in sorted(folder.glob("*.json")) if path.with_suffix(".npz").exists()]
        metafunc.parametrize("recorded", [load(path) for path in found], ids=[path.stem for path in found])


def build(case: dict) -> tuple[EViT, dict[str, object]]:
    """The model, and what its forward is told at run time."""
    given, settings, size = case["model"], case["settings"], case["input"]["size"]
    assert given["norm_eps"] == 1e-6
    vit = VisionTransformer(
        img_size=size,
        patch_size=given["patch_size"],
        num_classes=given["num_classes"],
        embed_dim=given["embed_dim"],
        depth=given["depth"] + 1,
        num_heads=given["num_heads"],
        qkv_bias=given["qkv_bias"],
    )
    filled = weights.fill(case["weights"]["manifest"], case["weights"]["seed"], case["weights"]["scale"])
    state = {key: torch.from_numpy(value) for key, value in filled.items()}
    state["pos_embed"] = resize_positions(state["pos_embed"], size // given["patch_size"], 1)
    missing, unknown = vit.load_state_dict(state, strict=False)
    assert not unknown
    assert all(key.startswith(f"blocks.{given['depth']}.") for key in missing)
    for part in (vit.blocks[-1].attn.proj, vit.blocks[-1].mlp.fc2):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    if settings["runtime_tokens"]:
        tokens = {block: count for block, count in enumerate(settings["runtime_tokens"]) if count}
        return EViTConfig(blocks=list(tokens), tokens=list(tokens.values())).build(vit), {}
    rates = {block: rate for block, rate in enumerate(settings["keep_rate"]) if rate < 1}
    config = EViTConfig(blocks=list(rates), keep_rate=list(rates.values()), fuse=settings["fuse_token"])
    return config.build(vit), {"keep_rate": settings["runtime_keep_rate"]}


def images(case: dict) -> Tensor:
    return torch.from_numpy(weights.images(**case["input"]))


def kept_patches(output: Output, block: int, fused_now: bool) -> list[list[int]]:
    """Patch numbers that a block kept, ascending, and -1 for each older fused token that it kept."""
    live, fused = output.usage.live[:, block + 1, 1:], output.usage.fused[:, block + 1, 1:]
    found = []
    for alive, merged in zip(live, fused, strict=True):
        patches = (alive & ~merged).nonzero().flatten().tolist()
        found.append([-1] * (int(merged.sum()) - fused_now) + patches)
    return found


@LAYOUTS
def test_the_released_patches_and_logits(recorded: SimpleNamespace, layout: type) -> None:
    model, told = build(recorded.case)
    with torch.inference_mode():
        output = model.eval()(images(recorded.case), layout, **told)
    reduced = [int(name.removeprefix("kept_patch_")) for name in recorded.arrays if name.startswith("kept_patch_")]
    assert reduced
    for block in reduced:
        expected = np.sort(recorded.arrays[f"kept_patch_{block}"], axis=1).tolist()
        assert kept_patches(output, block, recorded.case["settings"]["fuse_token"]) == expected, f"block {block}"
    counts = [count + 1 for count in recorded.case["tokens_after_block_excl_cls"]]
    for block, count in enumerate(counts):
        assert (output.usage.live[:, block + 1].sum(dim=1) == count).all(), f"block {block}"
    torch.testing.assert_close(output.logits, torch.from_numpy(recorded.arrays["logits"]), atol=2e-5, rtol=0)


@LAYOUTS
def test_the_released_scores(recorded: SimpleNamespace, layout: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first block that reduces, where the recorded ones are in the order of the patches."""
    model, told = build(recorded.case)
    seen: list[Tensor] = []
    score = EViT.score
    monkeypatch.setattr(EViT, "score", lambda *given: seen.append(score(*given)) or seen[-1])
    with torch.inference_mode():
        model.eval()(images(recorded.case), layout, **told)
    first = min(int(name.removeprefix("cls_attn_")) for name in recorded.arrays if name.startswith("cls_attn_"))
    expected = torch.from_numpy(recorded.arrays[f"cls_attn_{first}"])
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=1e-4)


@LAYOUTS
def test_the_released_gradients(request: pytest.FixtureRequest, layout: type) -> None:
    path = request.config.getoption("--fixtures") / "evit" / "tiny_grad.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    recorded = load(path)
    model, _ = build(recorded.case)
    logits = model.train()(images(recorded.case), layout).logits
    torch.testing.assert_close(logits.detach(), torch.from_numpy(recorded.arrays["train_logits"]), atol=2e-5, rtol=0)
    (logits * torch.from_numpy(recorded.arrays["grad_weights"])).sum().backward()
    parameters = dict(model.vit.named_parameters())
    for name, norm in recorded.case["grad_norms"].items():
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-3), name
    for name, array in (("cls_token", "grad_cls_token"), ("blocks.1.attn.qkv.bias", "grad_block1_qkv_bias")):
        expected = torch.from_numpy(recorded.arrays[array])
        atol = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(parameters[name].grad, expected, atol=atol, rtol=0)


def test_the_released_schedule(request: pytest.FixtureRequest) -> None:
    path = request.config.getoption("--fixtures") / "evit" / "keep_rate_schedule.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    for row in json.loads(path.read_text())["rows"]:
        assert row["columns"] == ["global_iter", "epoch", "keep_rate"]
        for update, epoch, expected in row["points"]:
            assert update // row["iters_per_epoch"] == epoch
            rate = keep_rate_at(
                update,
                row["iters_per_epoch"],
                row["base_keep_rate"],
                row["shrink_start_epoch"],
                row["shrink_end_epoch"],
                row["max_keep_rate"],
            )
            assert rate == pytest.approx(expected, abs=1e-12), (update, epoch)
