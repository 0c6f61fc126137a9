"""ATS against numbers recorded from the released code and from vit-pytorch; tolerances as the fixtures give them.

With a class token the last block of a model samples nothing, since nothing would read it. To see which patches it would
hand on, each ViT here has one block more than the recorded one, whose two sub-layers add zero.
"""

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import weights
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adaptvit import ATSConfig, FullConfig, Masked, Packed, dense_macs, macs
from adaptvit.methods import ats, ats_released
from adaptvit.methods.ats import ATS
from adaptvit.tokens import Tokens
from adaptvit.usage import Usage
from adaptvit.vit import add_attention, embed, project, run_block

LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)
MODES = pytest.mark.parametrize("mode", ["mask", "single", "prune"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a parameter `official` runs once for every recorded model of the released code, and so on."""
    folder = metafunc.config.getoption("--fixtures") / "ats"
    for name in {"official", "lucidrains"} & set(metafunc.fixturenames):
        found = [path for path in sorted(folder.glob(f"{name}_*.json")) if load(path).case["kind"] == f"{name}_model"]
        metafunc.parametrize(name, found, ids=[path.stem for path in found])


def load(path: Path) -> SimpleNamespace:
    return SimpleNamespace(case=json.loads(path.read_text()), arrays=dict(np.load(path.with_suffix(".npz"))))


def find(request: pytest.FixtureRequest, name: str) -> Path:
    path = request.config.getoption("--fixtures") / "ats" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def images(case: dict) -> Tensor:
    given = case["input"]
    return torch.from_numpy(weights.images(given["batch"], given["size"], given["seed"], given.get("channels", 3)))


def with_idle_block(vit: VisionTransformer, state: dict[str, Tensor]) -> VisionTransformer:
    """`vit` with the recorded weights, and a last block that adds zero."""
    missing, unknown = vit.load_state_dict(state, strict=False)
    last = len(vit.blocks) - 1
    assert not unknown
    assert all(key.startswith(f"blocks.{last}.") for key in missing)
    for part in (vit.blocks[last].attn.proj, vit.blocks[last].mlp.fc2):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    return vit


def filled(case: dict) -> dict[str, Tensor]:
    state = weights.fill(case["manifest"], case["weights"]["seed"], case["weights"]["scale"])
    return {key: torch.from_numpy(value) for key, value in state.items()}


@cache
def official_vit(path: Path) -> VisionTransformer:
    case = load(path).case
    given = case["config"]
    vit = VisionTransformer(
        img_size=given["IMG_SIZE"],
        patch_size=given["PATCH_SIZE"],
        num_classes=given["NUM_CLASSES"],
        embed_dim=given["EMBED_DIM"],
        depth=given["DEPTH"] + 1,
        num_heads=given["NUM_HEADS"],
        mlp_ratio=given["MLP_RATIO"],
        qkv_bias=given["QKV_BIAS"],
    )
    return with_idle_block(vit, filled(case))


def official_model(path: Path, mode: str) -> ATS:
    blocks = load(path).case["config"]["ATS_BLOCKS"]
    return ATSConfig(blocks=blocks, sampler="released", mode=mode).build(official_vit(path)).eval()


def before_the_idle_block(usage: Usage) -> Usage:
    fields = ("attended", "updated", "heads", "attention", "mlp", "live", "deciding")
    return replace(usage, **{field: getattr(usage, field)[:, :-1] for field in fields})


def close(actual: Tensor, expected: np.ndarray, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual.detach(), torch.from_numpy(expected), atol=atol, rtol=rtol, check_dtype=False)


def slots(live: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in live]


@LAYOUTS
@MODES
def test_the_released_tokens_and_logits(official: Path, mode: str, layout: type) -> None:
    recorded, model = load(official), official_model(official, mode)
    with torch.inference_mode():
        output = model(images(recorded.case), layout)
    for layer in recorded.case["layers"][mode]:
        live = output.usage.live[:, layer["block"] + 1]
        assert slots(live) == [sorted(ids) for ids in layer["ids"]], f"block {layer['block']}"
        assert live.sum(dim=1).tolist() == layer["counts"]
    close(output.logits, recorded.arrays[f"{mode}_logits"], recorded.case["tolerance"]["logits_abs"])


def test_the_released_scores_and_attention(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded attention is in the order in which the released code keeps its tokens, padding last."""
    recorded, model = load(official), official_model(official, "prune")
    scores, received = [], []
    sample, attention = ats_released.sample, ats.attention_received
    monkeypatch.setattr(ats_released, "sample", lambda score, *others: scores.append(score) or sample(score, *others))

    def recorded_attention(tokens: Tokens, *given: object) -> torch.Tensor:
        seen = attention(tokens, *given)
        received.append(tokens.grid(seen))
        return seen

    monkeypatch.setattr(ats, "attention_received", recorded_attention)
    with torch.inference_mode():
        model(images(recorded.case))

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
            close(attended[image, ids].T, expected[image, :, : len(ids)], atol=5e-6)
        incoming = layer["ids"]


@pytest.mark.parametrize("name", ["official_small", "official_sharp", "official_sparse_layers"])
def test_the_released_attention_of_the_rows_kept(request: pytest.FixtureRequest, name: str) -> None:
    path = find(request, name)
    recorded, model = load(path), official_model(path, "prune")
    layer = recorded.case["layers"]["prune"][0]
    before, added = (
        recorded.arrays[f"prune_block{layer['block']}_{part}"]
        for part in ("selected_residual", "attn_out_before_residual")
    )
    with torch.inference_mode():
        tokens = Packed.of(embed(model.vit, images(recorded.case))[0])
        for block in model.vit.blocks[: layer["block"]]:
            tokens = run_block(block, tokens)
        chosen = torch.zeros(tokens.shape, dtype=torch.bool)
        for image, ids in enumerate(layer["ids"]):
            chosen[image, ids] = True
        after = add_attention(model.vit.blocks[layer["block"]], tokens, chosen)
    for image, ids in enumerate(layer["ids"]):
        close(tokens.grid(tokens.x)[image, ids], before[image, : len(ids)], atol=5e-5)
        close(after.grid(after.x)[image, ids], (before + added)[image, : len(ids)], atol=5e-5)


@LAYOUTS
def test_the_released_gradients(request: pytest.FixtureRequest, layout: type) -> None:
    """To 1e-4 of the largest number of each."""
    path = find(request, "official_small")
    recorded, model = load(path), official_model(path, "mask")
    batch, weight = images(recorded.case).requires_grad_(), model.vit.blocks[2].attn.qkv.weight
    loss = (model(batch, layout).logits * torch.from_numpy(recorded.arrays["mask_grad_cotangent"])).sum()
    by_image, by_weight = torch.autograd.grad(loss, [batch, weight])
    for name, gradient in (
        ("image0_ch0", by_image[0, 0]),
        ("image_l2", by_image.flatten(1).norm(dim=1)),
        ("_blocks.2.attn.qkv.weight", by_weight),
    ):
        expected = recorded.arrays[f"mask_grad_{name}"]
        close(gradient, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("mode", "name"), [("single", "single_per_image"), ("prune", "prune_ideal_per_image")])
def test_the_released_macs(official: Path, mode: str, name: str) -> None:
    """Of a block that keeps m of its n tokens the released code makes n x n logits.

    Here they are m x n, and one row more to score by; all else is equal.
    """
    recorded, model = load(official), official_model(official, mode)
    with torch.inference_mode():
        usage = before_the_idle_block(model(images(recorded.case)).usage)
    blocks = recorded.case["config"]["ATS_BLOCKS"]
    n, m = usage.attended[:, blocks], usage.updated[:, blocks]
    more = (n - m - 1) * model.shape.dim * n
    assert (macs(usage, model.shape) + more.sum(dim=1)).tolist() == recorded.case["macs"][name]
    shape = replace(model.shape, depth=model.shape.depth - 1)
    assert dense_macs(shape, usage.grid) == recorded.case["macs"]["dense"]


@LAYOUTS
def test_the_released_block(request: pytest.FixtureRequest, layout: type) -> None:
    """Where the released block is called by itself, padding counts as patches lost before, as it does with masks."""
    recorded = load(find(request, "official_block"))
    case, arrays = recorded.case, recorded.arrays
    vit = VisionTransformer(img_size=64, patch_size=8, embed_dim=case["dim"], depth=2, num_heads=case["heads"])
    block = vit.blocks[0].eval()
    block.load_state_dict(filled(case))
    generator = np.random.Generator(np.random.PCG64([11, case["weights"]["seed"]]))
    x = generator.standard_normal((case["batch"], case["N"], case["dim"])).astype(np.float32)
    for call in case["calls"]:
        live = torch.arange(case["N"]) < torch.tensor(call["valid"])[:, None]
        model = ATSConfig(blocks=[0], tokens=call["n_ref_tokens"] - 1, sampler="released").build(vit).eval()
        with torch.inference_mode():
            tokens = layout.of(torch.from_numpy(x)).keep(live)
            projected = project(block, tokens)
            score = model.score(tokens, projected, live)
            chosen = model.sample(score, live, 0, None)
            tokens = run_block(block, tokens, chosen, projected)
        expected = arrays[f"call{call['call']}_scores_sorted"]
        close(score.sort(dim=1).values, expected, atol=1e-6, rtol=1e-4)
        assert slots(tokens.live) == [sorted(positions) for positions in call["pos"]], f"call {call['call']}"
        out = arrays[f"call{call['call']}_out"]
        for image, positions in enumerate(call["pos"]):
            kept = tokens.grid(tokens.x)[image, positions]
            close(kept, out[image, : len(positions)], case["tolerance"]["out_abs"])


class Stem(nn.Module):
    """Images -> (B, D, rows, columns): patches as vectors, normalised, projected, normalised."""

    def __init__(self, side: int, dim: int) -> None:
        super().__init__()
        self.side = side
        self.parts = nn.Sequential(nn.LayerNorm(3 * side**2), nn.Linear(3 * side**2, dim), nn.LayerNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.unfold(2, self.side, self.side).unfold(3, self.side, self.side)  # (B, c, rows, columns, p1, p2)
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
    assert given["heads"] * given["dim_head"] == given["dim"]
    vit = VisionTransformer(
        img_size=given["image_size"],
        patch_size=given["patch_size"],
        num_classes=given["num_classes"],
        embed_dim=given["dim"],
        depth=given["depth"] + 1,
        num_heads=given["heads"],
        mlp_ratio=given["mlp_dim"] / given["dim"],
        qkv_bias=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )
    stem = Stem(given["patch_size"], given["dim"])
    vit.patch_embed = HybridEmbed(stem, given["image_size"], embed_dim=given["dim"], proj=False)
    state = {}
    for key, value in filled(case).items():
        for theirs, ours in LUCIDRAINS_NAMES:
            key = key.replace(theirs, ours)
        state[key] = value
    return with_idle_block(vit, state)


def spread_noise(noise: np.ndarray, score: Tensor) -> Tensor:
    """Noise recorded for the patches of each image in order, padding last -> noise for their slots."""
    spread = torch.zeros(*noise.shape[:2], score.shape[1])
    for image, alive in enumerate(score > 0):
        spread[image, :, alive] = torch.from_numpy(noise[image, :, : alive.sum()])
    return spread


@LAYOUTS
def test_vit_pytorchs_tokens_logits_and_gradients(
    lucidrains: Path, layout: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients to 1e-4 of the largest number of each."""
    recorded = load(lucidrains)
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
    model, batch = config.build(lucidrains_vit(case)).train(), images(case).requires_grad_()
    output = model(batch, layout)

    incoming = torch.arange(output.usage.live.shape[2]).expand(len(batch), -1)
    assert len(scores) == len(calls)
    for number, (call, score) in enumerate(zip(calls, scores, strict=True)):  # recorded ids are places in what came in
        expected = torch.from_numpy(arrays[f"call{number}_prob"])
        for image, alive in enumerate(score > 0):
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
    close(output.logits, arrays["logits"], case["tolerance"]["logits_abs"])

    loss = (output.logits * torch.from_numpy(arrays["grad_cotangent"])).sum()
    (gradient,) = torch.autograd.grad(loss, [batch])
    for name, actual in (("grad_image0_ch0", gradient[0, 0]), ("grad_image_l2", gradient.flatten(1).norm(dim=1))):
        close(actual, arrays[name], atol=1e-4 * np.abs(arrays[name]).max())


def test_vit_pytorchs_sampler(request: pytest.FixtureRequest) -> None:
    recorded = load(find(request, "lucidrains_sampler"))
    arrays = {name: torch.from_numpy(value) for name, value in recorded.arrays.items()}
    live = arrays["mask"].bool()[:, 1:]
    attention, size = arrays["attn"][:, :, 0].transpose(1, 2), arrays["value"].norm(dim=-1).transpose(1, 2)
    score = ats.normalise(ats.significance(attention, size)[:, 1:] * live, live)
    torch.testing.assert_close(score, arrays["prob"] * live, atol=2e-6, rtol=1e-4)
    kept = ats.draw(score, arrays["gumbel"])
    ids = [[position - 1 for position in row if position > 0] for row in arrays["ids"].tolist()]
    assert slots(kept) == ids
    assert [1 + len(row) for row in ids] == recorded.case["counts"]
