"""ATS against numbers recorded from the released code and from vit-pytorch; patches kept and MACs exactly.

With a class token the last block of a model samples nothing, since nothing would read it. To see which patches it would
hand on, each ViT here has one block more than the recorded one, whose two sub-layers add zero.
"""

import json
import math
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import recordings
import torch
from recordings import (
    apart,
    images,
    load_with_idle,
    our_name,
    query_factor,
    set_widths,
    terms_of,
    vit_of,
    with_query_factor,
)
from timm.layers import HybridEmbed, to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adaptvit import ATSConfig, FullConfig, Masked, Packed, dense_macs, macs
from adaptvit.backbones.door import Acts, Projected
from adaptvit.backbones.fast import add_attention, project
from adaptvit.methods import ats
from adaptvit.methods.ats import ATS
from adaptvit.methods.released import ReleasedATSConfig
from adaptvit.methods.released import ats as ats_released
from adaptvit.tokens import Tokens
from adaptvit.usage import Usage

LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)
MODES = pytest.mark.parametrize("mode", ["mask", "single", "prune"])


def load(path: Path) -> SimpleNamespace:
    return SimpleNamespace(case=json.loads(path.read_text()), arrays=dict(np.load(path.with_suffix(".npz"))))


@cache
def official_vit(path: Path) -> VisionTransformer:
    case = load(path).case
    given = case["config"]
    if given.get("HYBRID_BACKBONE") is not None:
        pytest.fail(f"{path} has a HYBRID_BACKBONE, a convolutional network that its weights do not describe")
    state = with_query_factor(filled(case), factor_of(case))
    return vit_of(state, given["IMG_SIZE"], given["NUM_HEADS"], case["layernorm_eps"], idle=1)


def factor_of(case: dict) -> float:
    """What our queries are taken times."""
    width, heads = case["manifest"]["blocks.0.attn.qkv.weight"][0] // 3, case["config"]["NUM_HEADS"]
    return query_factor(case["config"].get("QK_SCALE"), width // heads)


def filled(case: dict) -> dict[str, Tensor]:
    return recordings.filled(case["weights"], case["manifest"])


def batch_of(case: dict) -> Tensor:
    return images({"channels": channels_of(case)} | case["input"])


def channels_of(case: dict) -> int:
    """Channels of the images that the recorded weights take."""
    shapes = case["manifest"]
    if "patch_embed.proj.weight" in shapes:
        return shapes["patch_embed.proj.weight"][1]
    return shapes["to_patch_embedding.1.weight"][0] // math.prod(to_2tuple(case["config"]["patch_size"]))


def official_model(path: Path, mode: str) -> ATS:
    blocks = load(path).case["config"]["ATS_BLOCKS"]
    return ReleasedATSConfig(blocks=blocks, mode=mode).build(official_vit(path)).eval()


def before_the_idle_block(usage: Usage) -> Usage:
    fields = ("attended", "updated", "heads", "attention", "mlp", "live", "deciding")
    return replace(usage, **{field: getattr(usage, field)[:, :-1] for field in fields})


def close(actual: Tensor, expected: np.ndarray, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual.detach(), torch.from_numpy(expected), atol=atol, rtol=rtol, check_dtype=False)


def slots(live: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in live]


@LAYOUTS
@MODES
def test_the_released_tokens_and_logits(ats_official: Path, mode: str, layout: type) -> None:
    recorded, model = load(ats_official), official_model(ats_official, mode)
    with torch.inference_mode():
        output = model(batch_of(recorded.case), layout, detailed=True)
    for layer in recorded.case["layers"][mode]:
        live = output.usage.live[:, layer["block"] + 1]
        assert slots(live) == [sorted(ids) for ids in layer["ids"]], f"block {layer['block']}"
        assert live.sum(dim=1).tolist() == layer["counts"]
    arrays, own = recorded.arrays, 0.0
    if "prune_logits_float64" in arrays:
        own = float(np.abs(arrays["prune_logits"] - arrays["prune_logits_float64"]).max())
    expected = arrays[f"{mode}_logits"]
    close(output.logits, expected, apart(expected, terms_of(model.vit), own))


def test_the_released_scores_and_attention(ats_official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded attention is in the order in which the released code keeps its tokens, padding last."""
    recorded, model = load(ats_official), official_model(ats_official, "prune")
    scores, received = [], []
    sample, attention = ats_released.sample, ats.attention_received
    monkeypatch.setattr(ats_released, "sample", lambda score, *others: scores.append(score) or sample(score, *others))

    def recorded_attention(tokens: Tokens, *given: object) -> torch.Tensor:
        seen = attention(tokens, *given)
        received.append(tokens.grid(seen))
        return seen

    monkeypatch.setattr(ats, "attention_received", recorded_attention)
    with torch.inference_mode():
        model(batch_of(recorded.case))

    layers = recorded.case["layers"]["prune"]
    assert len(scores) == len(received) == len(layers)
    incoming = [list(range(received[0].shape[1]))] * recorded.case["input"]["batch"]
    for layer, score, attended in zip(layers, scores, received, strict=True):
        expected = recorded.arrays[f"prune_block{layer['block']}_scores_sorted"]
        ascending = score.sort(dim=1).values
        assert not ascending[:, : -expected.shape[1]].any()
        # 1e-6 is the epsilon of the released softmax, which weighs most where a score is small
        close(ascending[:, -expected.shape[1] :], expected, atol=1e-6, rtol=recorded.case["tolerance"]["scores_rel"])
        expected = recorded.arrays.get(f"prune_block{layer['block']}_cls_attn")
        for image, ids in enumerate(incoming if expected is not None else []):
            # a softmax: its relative difference is its logits' absolute one, which the recording says for the scores
            rtol = recorded.case["tolerance"]["scores_rel"]
            close(attended[image, ids].T, expected[image, :, : len(ids)], apart(expected, terms_of(model.vit)), rtol)
        incoming = layer["ids"]


def test_the_released_attention_of_the_rows_kept(ats_rows: Path) -> None:
    recorded, model = load(ats_rows), official_model(ats_rows, "prune")
    layer = recorded.case["layers"]["prune"][0]
    before, added = (
        recorded.arrays[f"prune_block{layer['block']}_{part}"]
        for part in ("selected_residual", "attn_out_before_residual")
    )
    with torch.inference_mode():
        tokens = model.enter(batch_of(recorded.case), Packed)
        for number in range(layer["block"]):
            tokens = model.run_block(number, tokens)
        chosen = torch.zeros(tokens.shape, dtype=torch.bool)
        for image, ids in enumerate(layer["ids"]):
            chosen[image, ids] = True
        after, _ = add_attention(model.vit.blocks[layer["block"]], tokens, Acts(chosen))
    atol = apart(before + added, terms_of(model.vit))
    for image, ids in enumerate(layer["ids"]):
        close(tokens.grid(tokens.x)[image, ids], before[image, : len(ids)], atol)
        close(after.grid(after.x)[image, ids], (before + added)[image, : len(ids)], atol)


@LAYOUTS
def test_the_released_gradients(ats_gradients: Path, layout: type) -> None:
    """To 1e-4 of the largest number of each."""
    recorded, model = load(ats_gradients), official_model(ats_gradients, "mask")
    batch, parameters = batch_of(recorded.case).requires_grad_(), dict(model.vit.named_parameters())
    start = "mask_grad__"
    names = [name.removeprefix(start) for name in recorded.arrays if name.startswith(start)]
    loss = (model(batch, layout) * torch.from_numpy(recorded.arrays["mask_grad_cotangent"])).sum()
    by = [batch, *(parameters[our_name(name, parameters)] for name in names)]
    by_image, *by_weight = torch.autograd.grad(loss, by)
    found = {f"_{name}": gradient for name, gradient in zip(names, by_weight, strict=True)}
    for name in names:
        if name.endswith(("qkv.weight", "qkv.bias")):
            gradient = found[f"_{name}"]
            gradient[: len(gradient) // 3] *= factor_of(recorded.case)
    found |= {"image0_ch0": by_image[0, 0], "image_l2": by_image.flatten(1).norm(dim=1)}
    for name, gradient in found.items():
        expected = recorded.arrays[f"mask_grad_{name}"]
        close(gradient, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("mode", "name"), [("single", "single_per_image"), ("prune", "prune_ideal_per_image")])
def test_the_released_macs(ats_official: Path, mode: str, name: str) -> None:
    """Of a block that keeps m of its n tokens the released code makes n x n logits.

    Here they are m x n, and one row more to score by; all else is equal.
    """
    recorded, model = load(ats_official), official_model(ats_official, mode)
    with torch.inference_mode():
        usage = before_the_idle_block(model(batch_of(recorded.case), detailed=True).usage)
    blocks = recorded.case["config"]["ATS_BLOCKS"]
    n, m = usage.attended[:, blocks], usage.updated[:, blocks]
    more = (n - m - 1) * model.shape.each("attention_width", n) * n
    assert (macs(usage, model.shape) + more.sum(dim=1)).tolist() == recorded.case["macs"][name]
    shape = model.shape._replace(blocks=model.shape.blocks[1:])
    assert dense_macs(shape, usage.grid) == recorded.case["macs"]["dense"]


@LAYOUTS
def test_the_released_block(ats_block: Path, layout: type) -> None:
    """Where the released block is called by itself, padding counts as patches lost before, as it does with masks."""
    recorded = load(ats_block)
    case, arrays = recorded.case, recorded.arrays
    vit = VisionTransformer(
        img_size=(1, case["N"] - 1),  # patches in a row, the class token before them
        patch_size=1,
        embed_dim=case["dim"],
        depth=2,
        num_heads=case["heads"],
        mlp_ratio=case["mlp_ratio"],
        qkv_bias=case["qkv_bias"],
        norm_layer=partial(nn.LayerNorm, eps=case["layernorm_eps"]),
    )
    block = vit.blocks[0].eval()
    factor = query_factor(case.get("qk_scale"), case["dim"] // case["heads"])
    block.load_state_dict(with_query_factor(filled(case), factor))
    generator = np.random.Generator(np.random.PCG64([11, case["weights"]["seed"]]))
    x = generator.standard_normal((case["batch"], case["N"], case["dim"])).astype(np.float32)
    for call in case["calls"]:
        live = torch.arange(case["N"]) < torch.tensor(call["valid"])[:, None]
        model = ReleasedATSConfig(blocks=[0], tokens=call["n_ref_tokens"] - 1).build(vit).eval()
        with torch.inference_mode():
            source = model.enter(torch.zeros(len(x), 3, *vit.patch_embed.img_size), layout).source
            tokens = layout.of(torch.from_numpy(x)).of_source(source).keep(live)
            projected = Projected(*project(block, tokens))
            score = model.score(tokens, projected, live)
            chosen = model.sample(score, live, 0, None)
            tokens = model.run_block(0, tokens, chosen)
        expected = arrays[f"call{call['call']}_scores_sorted"]
        close(score.sort(dim=1).values, expected, atol=1e-6, rtol=1e-4)
        assert slots(tokens.live) == [sorted(positions) for positions in call["pos"]], f"call {call['call']}"
        out = arrays[f"call{call['call']}_out"]
        for image, positions in enumerate(call["pos"]):
            kept = tokens.grid(tokens.x)[image, positions]
            close(kept, out[image, : len(positions)], apart(out, terms_of(vit)))


class Stem(nn.Module):
    """Images -> (B, D, rows, columns): patches as vectors, normalised, projected, normalised."""

    def __init__(self, sides: tuple[int, int], channels: int, dim: int) -> None:
        super().__init__()
        self.sides, size = sides, channels * math.prod(sides)
        self.parts = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, dim), nn.LayerNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.sides
        pixels = x.unfold(2, height, height).unfold(3, width, width)  # (B, c, rows, columns, p1, p2)
        return self.parts(pixels.permute(0, 2, 3, 4, 5, 1).flatten(3)).permute(0, 3, 1, 2)


LUCIDRAINS_NAMES = (
    ("pos_embedding", "pos_embed"),
    ("to_patch_embedding.1.", "patch_embed.backbone.parts.0."),
    ("to_patch_embedding.2.", "patch_embed.backbone.parts.1."),
    ("to_patch_embedding.3.", "patch_embed.backbone.parts.2."),
    ("transformer.layers.", "blocks."),
    (".0.norm.", ".norm1."),
    (".0.to_qkv.", ".attn.qkv."),
    (".0.to_out.0.", ".attn.proj."),
    (".1.net.0.", ".norm2."),
    (".1.net.1.", ".mlp.fc1."),
    (".1.net.4.", ".mlp.fc2."),
    ("mlp_head.0.", "norm."),
    ("mlp_head.1.", "head."),
)


def lucidrains_vit(case: dict) -> VisionTransformer:
    given = case["config"]
    channels, state = channels_of(case), {}
    vit = VisionTransformer(
        img_size=given["image_size"],
        patch_size=given["patch_size"],
        in_chans=channels,
        num_classes=given["num_classes"],
        embed_dim=given["dim"],
        depth=given["depth"] + 1,
        num_heads=given["heads"] if given["dim"] % given["heads"] == 0 else 1,
        mlp_ratio=given["mlp_dim"] / given["dim"],
        qkv_bias=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )
    stem = Stem(to_2tuple(given["patch_size"]), channels, given["dim"])
    vit.patch_embed = HybridEmbed(stem, given["image_size"], in_chans=channels, embed_dim=given["dim"], proj=False)
    for key, value in filled(case).items():
        for theirs, ours in LUCIDRAINS_NAMES:
            key = key.replace(theirs, ours)
        state[key] = value
    set_widths(vit, state, given["heads"])
    load_with_idle(vit, state, given["depth"])
    return vit


def spread_noise(noise: np.ndarray, score: Tensor) -> Tensor:
    """Noise recorded for the patches of each image in order, padding last -> noise for their slots."""
    spread = torch.zeros(*noise.shape[:2], score.shape[1])
    for image, alive in enumerate(score > 0):
        spread[image, :, alive] = torch.from_numpy(noise[image, :, : alive.sum()])
    return spread


@LAYOUTS
def test_vit_pytorchs_tokens_logits_and_gradients(
    lucidrains_case: Path, layout: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients to 1e-4 of the largest number of each."""
    recorded = load(lucidrains_case)
    case, arrays, scores = recorded.case, recorded.arrays, []

    def recorded_noise(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = spread_noise(arrays[f"call{len(scores)}_gumbel"], like)
        assert noise.shape == shape
        scores.append(like)
        return noise

    monkeypatch.setattr(ats, "gumbel_noise", recorded_noise)
    calls = case["calls"]  # only where an image has more patches than K; with none of them it is a plain ViT
    config = (
        ATSConfig(blocks=[call["depth"] for call in calls], tokens=[call["K"] for call in calls], sampler="gumbel")
        if calls
        else FullConfig()
    )
    model, batch = config.build(lucidrains_vit(case)).train(), batch_of(case).requires_grad_()
    output = model(batch, layout, detailed=True)

    incoming = torch.arange(output.usage.live.shape[2]).expand(len(batch), -1)
    assert len(scores) == len(calls)
    for number, (call, score) in enumerate(zip(calls, scores, strict=True)):  # recorded ids are places in what came in
        expected = torch.from_numpy(arrays[f"call{number}_prob"])
        for image, alive in enumerate(score > 0):
            # scores add up to 1, and the published code adds 1e-6 where it divides
            torch.testing.assert_close(score[image, alive], expected[image, : alive.sum()], atol=2e-6, rtol=1e-4)
        incoming = incoming.gather(1, torch.from_numpy(arrays[f"call{number}_ids_local"]).long())
        kept = [
            row[valid].tolist()
            for row, valid in zip(incoming, torch.from_numpy(arrays[f"call{number}_mask"]).bool(), strict=True)
        ]
        assert slots(output.usage.live[:, call["depth"] + 1]) == kept
        assert [len(row) for row in kept] == call["counts"]
    left = [[patch for patch in row if patch >= 0] for row in arrays["token_ids"].tolist()]  # from 0, padded with -1
    assert slots(output.usage.live[:, -1, 1:]) == left
    close(output.logits, arrays["logits"], apart(arrays["logits"], terms_of(model.vit)))

    loss = (output.logits * torch.from_numpy(arrays["grad_cotangent"])).sum()
    (gradient,) = torch.autograd.grad(loss, [batch])
    for name, actual in (("grad_image0_ch0", gradient[0, 0]), ("grad_image_l2", gradient.flatten(1).norm(dim=1))):
        close(actual, arrays[name], atol=1e-4 * np.abs(arrays[name]).max())


def test_vit_pytorchs_sampler(lucidrains_sampler: Path) -> None:
    recorded = load(lucidrains_sampler)
    arrays = {name: torch.from_numpy(value) for name, value in recorded.arrays.items()}
    live = arrays["mask"].bool()[:, 1:]
    attention, size = arrays["attn"][:, :, 0].transpose(1, 2), arrays["value"].norm(dim=-1).transpose(1, 2)
    score = ats.normalise(ats.ATS.significance(None, attention, size)[:, 1:] * live, live)
    torch.testing.assert_close(score, arrays["prob"] * live, atol=2e-6, rtol=1e-4)
    kept = ats.draw(score, arrays["gumbel"])
    ids = [[position - 1 for position in row if position > 0] for row in arrays["ids"].tolist()]
    assert slots(kept) == ids
    assert [1 + len(row) for row in ids] == recorded.case["counts"]
