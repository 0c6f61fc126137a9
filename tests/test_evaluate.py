import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import METHODS, small_vit
from PIL import Image
from test_usage import kept

from adaptvit import ATSConfig, EViTConfig, FullConfig, Masked, MergeConfig, Packed, cli, dense_macs, macs, save
from adaptvit.commands.evaluate import EvaluateConfig, evaluate_model
from adaptvit.data import Images, Unreadable
from adaptvit.measure.evaluate import evaluate
from adaptvit.measure.speed import measure_speed


@pytest.fixture(scope="module")
def data() -> Images:
    generator = torch.Generator().manual_seed(0)
    return Images(torch.randn(10, 3, 32, 32, generator=generator), torch.arange(10) % 7)


@pytest.mark.parametrize("name", METHODS)
def test_both_layouts_evaluate_alike(name: str, data: Images) -> None:
    model = METHODS[name].build(small_vit())
    masked, packed = (evaluate(model, data, layout, batch_size=4) for layout in (Masked, Packed))
    assert (masked.top1, masked.gmacs, masked.depth_mean) == (packed.top1, packed.gmacs, packed.depth_mean)
    assert masked.loss == pytest.approx(packed.loss, rel=1e-5)


def test_the_figures_are_those_of_one_forward_pass(data: Images) -> None:
    model = METHODS["avit"].build(small_vit())
    result = evaluate(model, data, batch_size=4)
    with torch.inference_mode():
        output = model.eval()(data.images, detailed=True)
    right = [int(row.argmax()) == label for row, label in zip(output.logits, data.labels.tolist(), strict=True)]
    among = [label in row.topk(5).indices.tolist() for row, label in zip(output.logits, data.labels, strict=True)]
    assert result.images == 10
    assert result.top1 == pytest.approx(sum(right) / 10)
    assert result.top5 == pytest.approx(sum(among) / 10)
    assert result.gmacs == pytest.approx(macs(output.usage, model.shape).double().mean().item() / 1e9)
    assert result.gmacs_p10 <= result.gmacs <= result.gmacs_p90
    assert torch.equal(result.usage.live, output.usage.live)
    depth = output.usage.patch_depth
    assert (result.depth_min, result.depth_max) == (depth.min(), depth.max())


def test_a_timm_model_costs_all_its_macs(data: Images) -> None:
    vit = small_vit()
    result, full = evaluate(vit, data), evaluate(FullConfig().build(vit), data)
    assert result.gmacs == pytest.approx(dense_macs(FullConfig().build(vit).shape, (4, 4)) / 1e9)
    assert (result.top1, result.depth_min) == (full.top1, 4)


def test_evaluation_leaves_the_mode_as_it_was(data: Images) -> None:
    model = METHODS["full"].build(small_vit()).train()
    evaluate(model, data)
    assert model.training


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(small_vit(), Images(torch.zeros(0, 3, 32, 32), torch.zeros(0)))


def test_speed_times_all_three(data: Images) -> None:
    vit = small_vit()
    figures = measure_speed(vit, METHODS["avit"].build(vit), data.images, rounds=2)
    assert min(figures.dense, figures.masked, figures.packed, figures.gain) > 0


def test_loss_and_depths_are_those_counted_by_hand(data: Images) -> None:
    model = METHODS["avit"].build(small_vit())
    result = evaluate(model, data, Masked, batch_size=3)
    with torch.inference_mode():
        output = model.eval()(data.images, Masked, detailed=True)
    losses, image_means, image_spreads = [], [], []
    for row, label, live in zip(output.logits.tolist(), data.labels.tolist(), output.usage.live, strict=True):
        losses.append(np.log(np.sum(np.exp(row))) - row[label])
        depth = [int(live[:, slot].sum()) for slot in range(output.usage.prefix, live.shape[1])]  # blocks entered
        image_means.append(np.mean(depth))
        image_spreads.append(np.sqrt(np.mean(np.square(depth - np.mean(depth)))))
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.losses.tolist() == pytest.approx(losses, rel=1e-4)
    assert result.depth_mean == pytest.approx(np.mean(image_means))
    assert result.depth_spread == pytest.approx(np.sqrt(np.mean(np.square(image_means - np.mean(image_means)))))
    assert result.depth_spread_within == pytest.approx(np.mean(image_spreads))
    assert result.depth_spread > 0
    assert result.depth_spread_within > 0


def test_percentiles_are_numpys(data: Images) -> None:
    model = METHODS["avit"].build(small_vit())
    result = evaluate(model, data, batch_size=4)
    each = macs(result.usage, model.shape).double().numpy() / 1e9
    assert (result.gmacs_p10, result.gmacs_p90) == pytest.approx(tuple(np.percentile(each, (10, 90))))


def test_five_classes_have_no_top_five() -> None:
    vit = small_vit(num_classes=5)
    assert evaluate(vit, Images(torch.randn(2, 3, 32, 32), torch.arange(2))).top5 is None


class Spoiled(Images):
    """Every third image cannot be read."""

    def __getitem__(self, index: int) -> Any:
        return Unreadable(f"{index}.png", "broken") if index % 3 == 0 else super().__getitem__(index)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_unreadable_images_are_listed_and_count_nowhere(data: Images, batch_size: int) -> None:
    model = METHODS["avit"].build(small_vit())
    result = evaluate(model, Spoiled(data.images, data.labels), batch_size=batch_size)
    kept = [index for index in range(10) if index % 3]
    whole = evaluate(model, Images(data.images[kept], data.labels[kept]), batch_size=batch_size)
    assert [name for name, _ in result.unreadable] == ["0.png", "3.png", "6.png", "9.png"]
    assert result.figures["unreadable"] == 4
    for name in ("images", "top1", "top5", "gmacs", "depth_mean"):
        assert getattr(result, name) == getattr(whole, name)
    torch.testing.assert_close(result.losses, whole.losses)


def test_nothing_readable_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image that can be read"):
        evaluate(small_vit(), Spoiled(torch.zeros(1, 3, 32, 32), torch.zeros(1)))


@pytest.mark.parametrize("label", [7, -1])
def test_a_label_outside_of_the_head_is_refused(label: int) -> None:
    with pytest.raises(ValueError, match=rf"7 classes, 0 to 6, but the data set has the label {label}"):
        evaluate(small_vit(), Images(torch.zeros(2, 3, 32, 32), torch.tensor([1, label])))


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save(METHODS["avit"].build(small_vit(num_classes=3)), path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two images of each of three classes."""
    for label, name in enumerate(("ant", "bee", "cow")):
        (tmp_path / "images" / "val" / name).mkdir(parents=True)
        for i in range(2):
            noise = np.random.default_rng(2 * label + i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / "val" / name / f"{i}.png")
    return tmp_path / "images"


def test_a_file_on_a_folder_has_every_figure(model_file: Path, pictures: Path) -> None:
    result, figures = evaluate_model(EvaluateConfig(str(model_file), pictures, workers=0, rounds=2))
    assert figures.items() >= result.figures.items()
    assert (figures["model"], figures["data"], figures["images"]) == (str(model_file), str(pictures), 6)
    assert figures["timed_batch"] == 6
    assert min(figures[f"{name}_images_per_s"] for name in ("dense", "masked", "packed")) > 0
    assert figures["ratio"] == pytest.approx(figures["realised_speedup"] / figures["ideal_speedup"])
    assert figures["ideal_speedup"] == pytest.approx(figures["gmacs_dense"] / figures["gmacs"])
    assert json.loads(json.dumps(figures)) == figures


def test_the_timed_batch_is_one_that_can_be_read(model_file: Path, pictures: Path) -> None:
    for path in (pictures / "val" / "ant").iterdir():
        path.write_bytes(b"")
    config = EvaluateConfig(str(model_file), pictures, batch_size=2, workers=0, rounds=1)
    assert evaluate_model(config)[1]["timed_batch"] == 2


def test_other_classes_than_the_models_are_refused(model_file: Path, pictures: Path, tmp_path: Path) -> None:
    for path in (pictures / "val" / "cow").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"the model has 3 classes, but '.*images' has 2; .* by --class-names"):
        evaluate_model(EvaluateConfig(str(model_file), pictures, workers=0, rounds=0))
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncow\n")
    config = EvaluateConfig(str(model_file), pictures, class_map=names, workers=0, rounds=0)
    assert evaluate_model(config)[0].images == 4


@pytest.mark.parametrize(("field", "value"), [("batch_size", 0), ("workers", -1), ("rounds", -1)])
def test_a_setting_outside_its_range_is_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"EvaluateConfig.{field} must (be|lie) .*, got {value}"):
        EvaluateConfig("deit_tiny_patch16_224", Path(), **{field: value})


def command(model: Path, root: Path, *more: str) -> list[str]:
    return ["evaluate", str(model), str(root), "--workers", "0", *more]


def test_the_command_prints_and_writes_the_figures(
    model_file: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    written, table = tmp_path / "figures.json", tmp_path / "figures.csv"
    files = ["--json", str(written), "--csv", str(table)]
    assert cli.main(command(model_file, pictures, "--rounds", "0", *files)) == 0
    figures = json.loads(written.read_text())
    assert "packed_images_per_s" not in figures
    shown = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert shown.keys() == figures.keys()
    assert (shown["top1"], shown["top5"]) == (f"{figures['top1']:.4f}", "-")
    assert cli.main(command(model_file, pictures, "--rounds", "1", *files)) == 0
    with table.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert {name: first[name] for name in figures} == {
        name: "" if value is None else str(value) for name, value in figures.items()
    }
    assert first["packed_images_per_s"] == ""
    assert float(second["packed_images_per_s"]) > 0
    assert first["top1"] == second["top1"]


def test_commas_stay_in_their_column(model_file: Path, pictures: Path, tmp_path: Path) -> None:
    root, table = pictures.rename(tmp_path / "ants, bees"), tmp_path / "figures.csv"
    assert cli.main(command(model_file, root, "--rounds", "0", "--csv", str(table))) == 0
    with table.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["data"], row["images"]) == (str(root), "6")


def test_the_command_ends_with_1_where_images_cannot_be_read(
    model_file: Path, pictures: Path, capsys: pytest.CaptureFixture
) -> None:
    (pictures / "val" / "bee" / "0.png").write_bytes(b"broken")
    assert cli.main(command(model_file, pictures, "--rounds", "0")) == 1
    said = capsys.readouterr()
    assert dict(line.split(None, 1) for line in said.out.splitlines())["unreadable"] == "1"
    named, counted = [line for line in said.err.splitlines() if line.startswith("adaptvit: ")]
    assert named.startswith("adaptvit: cannot read bee/0.png: ")
    assert counted.startswith("adaptvit: 1 images could not be read")


def test_a_file_that_cannot_be_written_is_told_before_the_work(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = command(tmp_path / "absent.safetensors", pictures, "--csv", str(tmp_path / "no" / "figures.csv"))
    assert cli.main(arguments) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["avit", "ats", "adavit", "evit", "dynamicvit", "tome", "merge"])
def test_what_is_kept_of_an_image_is_below_1_kb(name: str) -> None:
    config = {"ats": ATSConfig(), "evit": EViTConfig(), "merge": MergeConfig()}.get(name, METHODS[name])
    vit = small_vit(img_size=224, patch_size=16, depth=12, embed_dim=12, num_heads=3)  # the slots and blocks of ViT-B
    data = Images(torch.randn(2, 3, 224, 224), torch.tensor([0, 1]))
    usage = evaluate(config.build(vit), data).usage
    assert usage.live.shape == (2, 12, 197)
    assert usage.groups is usage.fused is None
    assert kept(usage) <= 1000
