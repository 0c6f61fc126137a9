"""ToMe against numbers recorded from the released code: logits to 2e-5, tokens, their order and sizes exactly.

With a class token the last block of a model merges nothing, since nothing would read it. To see what it would merge,
each ViT here has one block more than the recorded one, whose two sub-layers add zero.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import weights
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adaptvit import Masked, Packed, ToMeConfig
from adaptvit.methods.tome import MergingViT, arrange, match

LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)
LOGITS = 2e-5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a parameter `recorded` runs once for every recorded model."""
    if "recorded" in metafunc.fixturenames:
        files = sorted((metafunc.config.getoption("--fixtures") / "tome").glob("*.json"))
        found = [path for path in files if "model" in json.loads(path.read_text())]
        metafunc.parametrize("recorded", found, ids=[path.stem for path in found])


def find(request: pytest.FixtureRequest, name: str) -> Path:
    path = request.config.getoption("--fixtures") / "tome" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def recorded_model(case: dict) -> MergingViT:
    given, depth = case["model"], case["model"]["depth"]
    pooled = {"global_pool": "avg", "class_token": True, "fc_norm": True} if given["mae_global_pool"] else {}
    vit = (VisionTransformerDistilled if given["distilled"] else VisionTransformer)(
        img_size=given["img_size"],
        patch_size=given["patch_size"],
        num_classes=given["num_classes"],
        embed_dim=given["embed_dim"],
        depth=depth + 1,
        num_heads=given["num_heads"],
        qkv_bias=given["qkv_bias"],
        **pooled,
    )
    state = weights.fill(case["weights"]["manifest"], case["weights"]["seed"], case["weights"]["scale"])
    missing, unknown = vit.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=False)
    assert not unknown
    assert all(key.startswith(f"blocks.{depth}.") for key in missing)
    for part in (vit.blocks[depth].attn.proj, vit.blocks[depth].mlp.fc2):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    r = case["settings"]["r_per_layer"]
    return ToMeConfig(r=r, proportional_attention=case["settings"]["prop_attn"]).build(vit).eval()


@LAYOUTS
def test_the_released_groups_and_logits(recorded: Path, layout: type, monkeypatch: pytest.MonkeyPatch) -> None:
    case, arrays, maps = json.loads(recorded.read_text()), np.load(recorded.with_suffix(".npz")), []
    model, given = recorded_model(case), case["input"]
    places = model.places

    def recorded_places(*arguments: object) -> tuple[Tensor, Tensor]:
        maps.append(places(*arguments))
        return maps[-1]

    monkeypatch.setattr(model, "places", recorded_places)
    with torch.inference_mode():
        output = model(torch.from_numpy(weights.images(given["batch"], given["size"], given["seed"])), layout)
    merging = case["effective_r"]
    assert len(maps) >= len(merging)  # the released code does not count blocks that find one patch only
    for number, r in enumerate(merging):
        place, moved = maps[number]
        assert place.tolist() == arrays[f"map_{number}"].tolist(), f"merge {number}"
        assert moved.sum(dim=1).tolist() == [r] * given["batch"]
    groups = arrays["final_group"]
    assert output.usage.groups[:, -1].tolist() == groups[:, model.prefix :].tolist()
    sizes = [np.bincount(row).tolist() for row in groups]
    assert sizes == arrays["final_size"].tolist()
    assert output.usage.attended[:, -1].tolist() == [case["tokens_out"]] * given["batch"]
    torch.testing.assert_close(output.logits, torch.from_numpy(arrays["logits"]), atol=LOGITS, rtol=0)


def test_the_released_schedules(request: pytest.FixtureRequest) -> None:
    for row in json.loads(find(request, "r_schedules").read_text())["rows"]:
        given = dict(zip(("r", "inflection"), row["r"], strict=True)) if row["form"] == "tuple" else {"r": row["r"]}
        assert list(ToMeConfig(**given).schedule(row["layers"])) == row["out"], row


@LAYOUTS
def test_the_released_matching_and_means(request: pytest.FixtureRequest, layout: type) -> None:
    path = find(request, "unit_matching")
    arrays = {name: torch.from_numpy(value) for name, value in np.load(path.with_suffix(".npz")).items()}
    for unit in json.loads(path.read_text())["units"]:
        prefix = unit["class_token"] + unit["distill_token"]
        x, size, metric, place, mean, total = (
            arrays[f"{unit['id']}_{name}"] for name in ("x", "size", "metric", "map", "wavg", "wavg_size")
        )
        live = torch.ones(x.shape[:2], dtype=torch.bool)
        score, target = match(torch.nn.functional.normalize(metric, dim=-1), live, prefix)
        config = ToMeConfig(r=unit["r"])
        assert config.merges(0, 1) == (unit["r"] > 0)
        if not unit["r"]:
            continue
        chosen = config.choose(score, unit["tokens"] - prefix, 0, 1)
        assert chosen.sum(dim=1).tolist() == [unit["effective_r"]] * unit["batch"]
        goes, moved = arrange(chosen, score, target, live, prefix)
        assert torch.equal(goes, place.long()), unit["id"]
        tokens = layout.of(x)
        merged, sizes = tokens.merge(goes, moved, tokens.spread(size[..., 0]))
        torch.testing.assert_close(merged.grid(merged.x), mean, atol=1e-6, rtol=0)
        torch.testing.assert_close(merged.grid(sizes), total[..., 0], atol=0, rtol=0)
        if not unit["distill_token"]:  # the released inverse does not know the order in which it puts these
            apart = mean.gather(1, goes[..., None].expand_as(x))
            torch.testing.assert_close(apart, arrays[f"{unit['id']}_unmerge"], atol=0, rtol=0)
