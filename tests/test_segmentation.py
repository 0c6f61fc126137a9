"""Pixels with classes: masks read, a head on every method's map, IoU, a training from start to end."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from models import METHODS, ONE_OF_EACH, images, small_vit, vary
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode

from adaptvit import FullConfig, Masked, MergeConfig, Packed, ToMeConfig, adapt, load, save
from adaptvit.backbones.segmenting import SegmentingViT
from adaptvit.cli import main
from adaptvit.data import IGNORED, MasksConfig, Unreadable, open_masks, spread_over
from adaptvit.data.masks import find_masks
from adaptvit.measure.segmentation import evaluate_pixels, iou_of
from adaptvit.training.loop import parameter_groups
from adaptvit.training.recipe import Recipe
from adaptvit.training.recipes import camvid_dense
from adaptvit.training.run import Run, train_run
from adaptvit.weights.opening import open_model

SETTINGS: dict[str, Any] = {
    "input_size": (3, 16, 24),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bicubic",
}
RELEASED = "avit, official"
"""Its pass to the end is of `Masked` alone."""


def segmenting(flavour: str = "class token", dtype: torch.dtype = torch.float64) -> SegmentingViT:
    torch.manual_seed(1)
    return SegmentingViT(small_vit(flavour, dtype), classes=3, width=8).eval()


def write_pair(folder: Path, name: str, mask: np.ndarray) -> None:
    """An image as bright as its mask says, so that one can be told from the other."""
    for inside in ("images", "masks"):
        (folder / inside).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.repeat(mask[..., None] * 80, 3, axis=2).astype(np.uint8)).save(folder / "images" / f"{name}.png")
    Image.fromarray(mask).save(folder / "masks" / f"{name}.png")


def halves(value: int, columns: int = 36) -> np.ndarray:
    mask = np.zeros((24, 36), dtype=np.uint8)
    mask[:, : columns // 2] = value
    return mask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            write_pair(tmp_path / "scenes" / split, str(number), halves(1 + number % 2))
    return tmp_path / "scenes"


@pytest.fixture
def config(folder: Path) -> MasksConfig:
    return MasksConfig(root=folder, classes=("road", "sky", "tree"), workers=0)


def test_with_nothing_dropped_pixels_are_those_of_the_vit() -> None:
    for flavour in ("class token", "average pool, no class token", "rectangular"):
        vit = segmenting(flavour)
        batch = images(vit.vit, 2, dtype=torch.float64)
        with torch.no_grad():
            wanted = vit(batch)
            output = FullConfig().build(vit)(batch, detailed=True)
        assert wanted.shape == (2, 3, *batch.shape[-2:])
        torch.testing.assert_close(output.logits, wanted, atol=1e-12, rtol=1e-12)
        assert output.usage.share.tolist() == [1, 1]


@pytest.mark.parametrize("method", [name for name in ONE_OF_EACH if name != RELEASED])
def test_every_method_has_logits_of_all_pixels(method: str) -> None:
    vit = segmenting()
    model = vary(METHODS[method].build(vit)).eval().requires_grad_(False)
    batch = images(vit.vit, 2, dtype=torch.float64)
    masked = model(batch, Masked, detailed=True)
    torch.testing.assert_close(model(batch, Packed), masked.logits, atol=1e-10, rtol=1e-10)
    of_features = interpolate(vit.head(model.features(batch)), size=batch.shape[-2:], mode="bilinear")
    torch.testing.assert_close(of_features, masked.logits, atol=1e-10, rtol=1e-10)
    with FlopCounterMode(display=False) as counter:
        model(batch[:1], Packed)
    assert 2 * masked.usage.macs[0].item() == counter.get_total_flops()


def test_a_budget_is_that_of_pixels_and_a_file_has_the_head(tmp_path: Path) -> None:
    vit = segmenting(dtype=torch.float32)
    batch = images(vit.vit, 4)
    model = adapt(vit, batch, 0.8, ToMeConfig())
    assert model(batch, detailed=True).usage.share.mean() == pytest.approx(0.8, abs=0.03)
    model.class_names = ("road", "sky", "tree")
    save(model, tmp_path / "model.safetensors")
    same = load(tmp_path / "model.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(same(batch), model(batch))
    assert same.class_names == ("road", "sky", "tree")
    with pytest.raises(ValueError, match="tells the class of every pixel, where one of the image is wanted"):
        open_model(tmp_path / "model.safetensors")


def test_a_vit_without_tokens_of_patches_is_refused() -> None:
    with pytest.raises(TypeError, match="has no forward_features, as timm's ViTs have"):
        SegmentingViT(small_vit("transformers, ViT"), 3)


def test_images_and_masks_are_cropped_and_mirrored_alike(config: MasksConfig) -> None:
    data = open_masks(config, SETTINGS)
    assert data.task == "pixels"
    torch.manual_seed(0)
    for split in (data.train, data.calibration, data.test):
        for index in range(len(split)):  # type: ignore[arg-type]
            image, mask = split[index]
            assert (image.shape, mask.shape, mask.dtype) == ((3, 16, 24), (16, 24), torch.int64)
            seen = ((data.pixels(image)[0] * 255) / 80).round()
            assert (seen == mask).double().mean() > 0.8  # but for what is between two classes
    batch = spread_over(data.test, 2)
    assert batch.labels.shape == (2, 16, 24)


def test_pixels_of_no_class_are_not_counted(folder: Path, config: MasksConfig) -> None:
    mask = halves(255)
    write_pair(folder / "train", "0", mask)
    image, told = open_masks(config, SETTINGS).calibration[0]
    assert set(told.unique().tolist()) == {IGNORED, 0}
    assert image.isfinite().all()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (halves(3), r"train/masks/1\.png' has the value 3, but the classes are 0 to 2: name it among `classes` or"),
        (halves(1)[:, :30], r"train/masks/1\.png' has 30 x 24 pixels, but its image 36 x 24"),
        (None, r"train/images/1\.png' has no mask, which would be '.*train/masks/1\.png'"),
        (b"broken", r"train/masks/1\.png' cannot be read: "),
        (np.zeros((24, 36, 3), np.uint8), r"train/masks/1\.png' cannot be read: .* of Pillow's mode RGB"),
    ],
)
def test_a_mask_that_is_not_its_images_is_named(
    folder: Path, config: MasksConfig, value: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = folder / "train" / "masks" / "1.png"
    if isinstance(value, np.ndarray):
        Image.fromarray(value).save(mask)
    elif value is None:
        mask.unlink()
    else:
        mask.write_bytes(value)
    with pytest.raises(ValueError, match=told):
        find_masks(config, "train")
    if value is None:
        assert main(["train", "camvid_dense", "--data.root", str(folder), "--weights", "null"]) == 2
        assert "Traceback" not in (said := capsys.readouterr().err)
        assert "has no mask" in said


def test_folders_that_are_not_there_are_named(folder: Path, config: MasksConfig) -> None:
    with pytest.raises(FileNotFoundError, match="has no folder 'images'"):
        find_masks(replace(config, root=folder / "train"), "images")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        find_masks(replace(config, root=folder / "elsewhere"), "train")
    with pytest.raises(ValueError, match="which is the class 'tree'"):
        replace(config, ignored=(2,))


def test_a_damaged_image_is_left_out(folder: Path, config: MasksConfig) -> None:
    (folder / "val" / "images" / "0.png").write_bytes(b"broken")
    data = open_masks(config, SETTINGS)
    assert isinstance(data.test[0], Unreadable)
    vit = SegmentingViT(timm.create_model("test_vit", img_size=(16, 24), patch_size=8), 3)
    result = evaluate_pixels(vit, data.test)
    assert (result.images, len(result.unreadable)) == (1, 1)


def test_iou_is_that_of_scikit_learn() -> None:
    torch.manual_seed(0)
    truth, found = torch.randint(4, (2, 900)), torch.randint(3, (2, 900))
    truth[:, :100] = IGNORED
    vit = SegmentingViT(timm.create_model("test_vit", img_size=(16, 24), patch_size=8), 3)
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    there = truth != IGNORED
    confusion.index_put_((truth[there], found[there]), torch.ones(int(there.sum()), dtype=torch.int64), accumulate=True)
    wanted = jaccard_score(truth[there], found[there], average=None, labels=range(4))
    torch.testing.assert_close(iou_of(confusion), torch.tensor(wanted))
    labels = torch.randint(3, (16, 24))
    labels[0] = IGNORED
    image = torch.randn(3, 16, 24)
    result = evaluate_pixels(vit, [(image, labels)] * 3)  # type: ignore[arg-type]
    with torch.no_grad():
        told = vit.eval()(image[None]).argmax(dim=1)[0]
    wanted = jaccard_score(labels[1:].flatten(), told[1:].flatten(), average=None, labels=range(3), zero_division=0)
    assert result.iou == pytest.approx(wanted.tolist())
    assert result.miou == pytest.approx(np.mean(wanted))
    assert result.confusion.sum().item() == 3 * 15 * 24


@pytest.fixture
def small(config: MasksConfig, tmp_path: Path) -> Run:
    return Run(
        model="test_vit",
        model_args={"patch_size": 8},
        img_size=(16, 24),
        method=FullConfig(),
        data=config,
        recipe=Recipe(
            epochs=2, batch_size=2, warmup_epochs=0, label_smoothing=0.0, learning_rate=3e-3, head_learning_rate=3.0
        ),
        output=tmp_path / "run",
    )


def test_a_training_learns_and_goes_on_as_if_it_had_not_stopped(small: Run, tmp_path: Path) -> None:
    longer = replace(small, recipe=replace(small.recipe, epochs=20, evaluate_every=0))
    outcome = train_run(longer)
    assert outcome.result.figures["miou"] > 0.8
    assert outcome.history[-1].accuracy > outcome.history[0].accuracy
    whole = train_run(small)
    again = train_run(replace(small, output=tmp_path / "again"))
    assert whole.history[-1].test == again.history[-1].test
    previous = next((tmp_path / "again").glob("previous-*.pt"))
    previous.replace(previous.with_name(previous.name.replace("previous", "checkpoint")))
    resumed = train_run(replace(small, output=tmp_path / "again"), resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_method_is_fine_tuned_from_a_trained_model_at_its_budget(small: Run, tmp_path: Path) -> None:
    dense = train_run(small)
    merging = replace(
        small,
        model=str(dense.file),
        model_args={},
        img_size=None,
        method=MergeConfig(),
        fit=True,
        recipe=replace(small.recipe, target=0.9, steer_every=1),
        output=tmp_path / "merging",
    )
    outcome = train_run(merging)
    figures = outcome.result.figures
    assert figures["gmacs"] / figures["gmacs_dense"] == pytest.approx(0.9, abs=0.06)
    assert outcome.model.class_names == ("road", "sky", "tree")
    with pytest.raises(ValueError, match="has labels of pixels: no mixup"):
        train_run(replace(merging, recipe=replace(merging.recipe, mixup=0.5), output=tmp_path / "mixed"))


def test_the_head_learns_at_a_rate_of_its_own(small: Run) -> None:
    vit = segmenting(dtype=torch.float32)
    groups = parameter_groups(FullConfig().build(vit), small.recipe)
    rates = {id(one): group["lr_scale"] for group in groups for one in group["params"]}
    assert {rates[id(one)] for one in vit.head.parameters()} == {3.0}
    assert {rates[id(one)] for one in vit.vit.parameters()} == {1.0}
    plain = parameter_groups(FullConfig().build(small_vit()), replace(small.recipe, head_learning_rate=2.0))
    assert sum(len(group["params"]) for group in plain if group["lr_scale"] == 2.0) == 2


def test_the_recipe_is_of_eleven_classes() -> None:
    run = camvid_dense()
    assert isinstance(run.data, MasksConfig)
    assert len(run.data.classes) == 11


def test_gradients_reach_all_of_a_segmenting_vit() -> None:
    model = MergeConfig(thresholds=0.35).build(segmenting()).train()
    batch: Tensor = images(model.vit.vit, 2, dtype=torch.float64)
    model(batch).square().mean().backward()
    silent = [name for name, one in model.named_parameters() if one.grad is None]
    assert not silent
