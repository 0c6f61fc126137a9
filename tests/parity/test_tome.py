"""ToMe against numbers recorded from the released code: logits, tokens, their order and sizes exactly.

With a class token the last block of a model merges nothing, since nothing would read it. To see what it would merge,
each ViT here has one block more than the recorded one, whose two sub-layers add zero.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from recordings import apart, filled, images, terms_of, vit_of

from adaptvit import Masked, Packed, ToMeConfig
from adaptvit.methods.merging import MergingViT, Places, arrange, match

LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)


def recorded_model(case: dict) -> MergingViT:
    given, settings = case["model"], case["settings"]
    pooled = {"global_pool": "avg", "class_token": True, "fc_norm": True} if given["mae_global_pool"] else {}
    vit = vit_of(
        filled(case["weights"]),
        given["img_size"],
        given["num_heads"],
        given["norm_eps"],
        distilled=given["distilled"],
        idle=1,
        **pooled,
    )
    return ToMeConfig(r=settings["r_per_layer"], proportional_attention=settings["prop_attn"]).build(vit).eval()


@LAYOUTS
def test_the_released_groups_and_logits(tome_case: Path, layout: type, monkeypatch: pytest.MonkeyPatch) -> None:
    case, arrays, maps = json.loads(tome_case.read_text()), np.load(tome_case.with_suffix(".npz")), []
    model, given = recorded_model(case), case["input"]
    places = model.places

    def recorded_places(*arguments: object) -> Places:
        maps.append(places(*arguments))
        return maps[-1]

    monkeypatch.setattr(model, "places", recorded_places)
    with torch.inference_mode():
        output = model(images(given, filled(case["weights"])), layout, detailed=True)
    merging = case["effective_r"]
    assert len(maps) >= len(merging)  # the released code does not count blocks that find one patch only
    for number, r in enumerate(merging):
        place, moved = maps[number].place, maps[number].moved
        assert place.tolist() == arrays[f"map_{number}"].tolist(), f"merge {number}"
        assert moved.sum(dim=1).tolist() == [r] * given["batch"]
    groups = arrays["final_group"]
    assert output.usage.groups[:, -1].tolist() == groups[:, model.prefix :].tolist()
    sizes = [np.bincount(row).tolist() for row in groups]
    assert sizes == arrays["final_size"].tolist()
    assert output.usage.attended[:, -1].tolist() == [case["tokens_out"]] * given["batch"]
    atol = apart(arrays["logits"], terms_of(model.vit), case["checks"]["f32_f64_maxabs"])
    torch.testing.assert_close(output.logits, torch.from_numpy(arrays["logits"]), atol=atol, rtol=0)


def test_the_released_schedules(tome_schedules: Path) -> None:
    for row in json.loads(tome_schedules.read_text())["rows"]:
        given = dict(zip(("r", "inflection"), row["r"], strict=True)) if row["form"] == "tuple" else {"r": row["r"]}
        assert list(ToMeConfig(**given).schedule(row["layers"])) == row["out"], row


@LAYOUTS
def test_the_released_matching_and_means(tome_units: Path, layout: type) -> None:
    path = tome_units
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
        atol = apart(mean, unit["tokens"])  # a mean of so many at most
        torch.testing.assert_close(merged.grid(merged.x), mean, atol=atol, rtol=0)
        torch.testing.assert_close(merged.grid(sizes), total[..., 0], atol=0, rtol=0)
        if not unit["distill_token"]:  # the released inverse does not know the order in which it puts these
            unmerged = mean.gather(1, goes[..., None].expand_as(x))
            torch.testing.assert_close(unmerged, arrays[f"{unit['id']}_unmerge"], atol=0, rtol=0)
