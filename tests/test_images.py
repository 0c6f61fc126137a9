"""One picture: upright, in its true range, of the kinds that are read, within the limit; and its preparation."""

import io
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from adaptvit import FullConfig, load, save
from adaptvit.commands.adapt import set_budget
from adaptvit.commands.bench import BenchConfig, bench_images
from adaptvit.commands.compare_methods import MethodsConfig, compare_methods
from adaptvit.commands.draw import DrawConfig, draw
from adaptvit.commands.evaluate import EvaluateConfig, evaluate_model
from adaptvit.commands.predict import PredictConfig, predict
from adaptvit.commands.sessions import Playground, PlaygroundConfig, Session, open_picture
from adaptvit.data import DataConfig, Renormalise, Samples, Unreadable, decode_image, open_image, open_split, read_image
from adaptvit.data.images import TURNS
from adaptvit.data.libraries import TorchImages
from adaptvit.data.preparation import preparation, preparation_of_name
from adaptvit.training.recipe import Recipe
from adaptvit.training.run import Run, train_run

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
NOISE = np.kron(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
UPRIGHT = Image.fromarray(NOISE)
BACK = {Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90}


def saved(image: Image.Image, kind: str, **how: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **how)
    file.seek(0)
    return file


def values(file: io.BytesIO, channels: int = 1) -> list[list[int]]:
    return np.asarray(read_image(file, channels)).tolist()


def png(
    width: int, height: int, depth: int, kind: int = 0, pixels: bytes = b"\0", transparent: bytes | None = None
) -> bytes:
    """A PNG of bytes that are given as they are, grey unless `kind` is 2: RGB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    hidden = b"" if transparent is None else chunk(b"tRNS", transparent)
    return head + hidden + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_the_camera_says(kind: str, orientation: int, tmp_path: Path) -> None:
    turn = TURNS.get(orientation)
    stored = UPRIGHT if turn is None else UPRIGHT.transpose(BACK.get(turn, turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(stored, kind, exif=exif, quality=95)
    (tmp_path / "a.jpg").write_bytes(file.getvalue())
    for image in (read_image(file), open_picture(tmp_path / "a.jpg").image):
        assert image.size == UPRIGHT.size
        assert np.abs(np.asarray(image).astype(int) - NOISE).mean() < 8


def test_damaged_exif_leaves_a_picture_as_it_is_stored() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\xff\xff\xff\xff\0\0\0\0"
    assert read_image(saved(UPRIGHT, "JPEG", exif=exif)).size == UPRIGHT.size


def test_sixteen_bits_are_rounded_down_to_eight() -> None:
    wide = np.array([[0, 256, 257, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF", "PPM", "JPEG2000"):
        assert values(saved(Image.fromarray(wide), kind)) == [[0, 0, 1, 255]]
    assert values(saved(Image.fromarray(wide), "TIFF", tiffinfo={262: 0})) == [[255, 254, 254, 0]]  # 0 is white
    assert values(io.BytesIO(b"P5 2 1 1023\n" + struct.pack(">2H", 341, 1023))) == [[85, 255]]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_values_of_unknown_range_are_refused_by_their_mode(kind: type, tmp_path: Path) -> None:
    file = saved(Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32).astype(kind)), "TIFF")
    mode = "F" if kind is np.float32 else "I"
    with pytest.raises(
        ValueError, match=rf"mode {mode} \(32 bits a pixel\), whose range is not told: save it with 8 or"
    ):
        read_image(file)
    (tmp_path / "a.tif").write_bytes(file.getvalue())
    with pytest.raises(ValueError, match=f"This picture cannot be used: .*mode {mode}"):
        open_picture(tmp_path / "a.tif")


def test_what_is_transparent_shows_white_whatever_it_hides() -> None:
    colour = np.array([[[200, 10, 10, 0], [10, 200, 10, 255], [0, 0, 0, 51]]], dtype=np.uint8)
    for kind in ("PNG", "TIFF"):
        assert values(saved(Image.fromarray(colour), kind), 3) == [[[255] * 3, [10, 200, 10], [204] * 3]]
    grey = Image.fromarray(np.array([[0, 32, 64]], dtype=np.uint8))
    assert values(saved(grey, "PNG", transparency=32)) == [[0, 255, 64]]
    wide = Image.fromarray(np.array([[0, 8224, 16448]], dtype=np.uint16))
    assert values(saved(wide, "PNG", transparency=8224)) == [[0, 255, 64]]
    palette = UPRIGHT.convert("P")
    assert set(np.asarray(read_image(saved(palette, "PNG", transparency=bytes(256)))).ravel()) == {255}


@pytest.mark.parametrize(("depth", "step"), [(2, 85), (4, 17)])
def test_the_transparent_grey_of_few_bits_is_the_pixels_own(depth: int, step: int) -> None:
    row = {2: b"\0\x1b", 4: b"\0\x01\x23"}[depth]  # of 0, 1, 2 and 3
    hidden = struct.pack(">H", 2)
    assert values(io.BytesIO(png(4, 1, depth, pixels=row))) == [[0, step, 2 * step, 3 * step]]
    assert values(io.BytesIO(png(4, 1, depth, pixels=row, transparent=hidden))) == [[0, step, 255, 3 * step]]


@pytest.mark.parametrize("key", [(300, 0, 0), (16, 8, 0)])
def test_a_transparent_colour_of_sixteen_bits_is_refused(key: tuple[int, ...]) -> None:
    file = png(1, 1, 16, kind=2, pixels=bytes(7), transparent=struct.pack(">3H", *key))
    with pytest.raises(ValueError, match="transparent colour with 16 bits a channel"):
        read_image(io.BytesIO(file))


def test_signed_values_are_refused() -> None:
    with pytest.raises(ValueError, match="its values are signed"):
        read_image(saved(Image.new("L", (4, 4), 200), "TIFF", tiffinfo={339: 2}))


def test_a_strip_that_would_be_scaled_without_bound_is_refused(tmp_path: Path) -> None:
    strip = Image.new("L", (1, 101), 9)
    strip.save(tmp_path / "a.png")
    samples = open_split(DataConfig(root=tmp_path), preparation_of_name("vit_tiny_patch16_224", {}), ".")
    handed = Samples(TorchImages(Pairs([strip]), None, "pairs"), 3, lambda image: image)
    for item in (samples[0], handed[0]):
        assert isinstance(item, Unreadable)
        assert item.reason == "of its 1 x 101 pixels one side is over 100 times the other"
    assert open_picture(tmp_path / "a.png").image.size == (1, 8)  # the page says that it shows the middle
    assert read_image(saved(Image.new("L", (1, 100)), "PNG")).size == (1, 100)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_colour_and_grey_of_any_mode_agree(mode: str) -> None:
    file = saved(UPRIGHT.convert(mode), "TIFF")
    colour = read_image(file)
    file.seek(0)
    assert np.array_equal(np.asarray(read_image(file, 1)), np.asarray(colour.convert("L")))
    assert np.abs(np.asarray(colour).astype(int) - np.asarray(UPRIGHT.convert(mode).convert("RGB"))).max() <= 1


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", b"%PDF-1.4 ", b""])
def test_other_kinds_are_not_decoded(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    with pytest.raises(OSError, match="not an image, or of none of the kinds that are read: JPEG, PNG"):
        read_image(io.BytesIO(content))


@pytest.mark.parametrize(("side", "said"), [(7000, "7000 x 7000 pixels"), (100_000, "10000000000 pixels")])
def test_too_many_pixels_are_refused_by_the_header_everywhere(side: int, said: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=f"its {said} are more than 40 million"):
            read_image(io.BytesIO(png(side, side, 1)))
    (tmp_path / "bomb.png").write_bytes(png(side, side, 1))
    with pytest.raises(ValueError, match=f"{said} are more than 40 million"):
        open_picture(tmp_path / "bomb.png")
    vit = timm.create_model("vit_tiny_patch16_224", **SIZES)
    config = BenchConfig("vit_tiny_patch16_224", data=tmp_path, images=1, batch_size=1)
    with pytest.raises(ValueError, match=rf"bomb\.png' cannot be read as an image: its {said}"):
        bench_images(config, vit)


def test_a_larger_jpeg_is_decoded_smaller() -> None:
    image = open_image(saved(Image.new("L", (7000, 6000), 99), "JPEG"))
    small = decode_image(image)
    assert (small.size, small.getpixel((0, 0))) == ((3500, 3000), (99, 99, 99))


def test_a_model_of_other_channels_is_refused_by_every_command_before_any_work(tmp_path: Path) -> None:
    for kind in ("a", "b"):
        (tmp_path / "train" / kind).mkdir(parents=True)
        UPRIGHT.save(tmp_path / "train" / kind / "0.png")
    file = tmp_path / "four.safetensors"
    save(FullConfig().build(timm.create_model("vit_tiny_patch16_224", in_chans=4, num_classes=2, **SIZES)), file)
    made = Run(
        model_args=SIZES | {"in_chans": 4},
        method=FullConfig(),
        data=DataConfig(root=tmp_path, workers=0),
        recipe=Recipe(epochs=1, warmup_epochs=0),
        output=tmp_path / "out",
    )
    four = timm.create_model("vit_tiny_patch16_224", in_chans=4, **SIZES)
    for call in (
        lambda: train_run(made),
        lambda: train_run(replace(made, data=DataConfig())),  # the digits
        lambda: evaluate_model(EvaluateConfig(str(file), tmp_path, split="train")),
        lambda: predict(PredictConfig(str(file), tmp_path, tmp_path / "a.csv", top=1)),
        lambda: draw(DrawConfig(str(file), tmp_path / "train" / "a", tmp_path / "drawn")),
        lambda: set_budget(str(file), tmp_path, tmp_path / "new.safetensors"),
        lambda: compare_methods(MethodsConfig(str(file), tmp_path, output=tmp_path / "compared", split="train")),
        lambda: bench_images(BenchConfig("vit_tiny_patch16_224"), four),
        lambda: Playground(PlaygroundConfig(models=(str(file),))),
    ):
        with pytest.raises(ValueError, match="takes images of 4 channels"):
            call()
    assert not (tmp_path / "drawn").exists()
    assert not (tmp_path / "new.safetensors").exists()


def both_kinds(root: Path) -> Path:
    """Grey and colour pictures in two classes."""
    rng = np.random.default_rng(0)
    for kind in ("a", "b"):
        (root / kind).mkdir(parents=True)
        for number in range(6):
            shape = (50, 40, 3) if number % 2 else (50, 40)
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(root / kind / f"{number}.png")
    return root


@pytest.mark.parametrize("channels", [1, pytest.param(3, marks=pytest.mark.long)])
def test_every_command_turns_grey_and_colour_into_what_a_rectangular_model_takes(channels: int, tmp_path: Path) -> None:
    size = (32, 16)
    root, file = both_kinds(tmp_path / "images"), str(tmp_path / "model.safetensors")
    sizes = SIZES | {"img_size": size, "patch_size": 4}
    vit = timm.create_model("vit_tiny_patch16_224", in_chans=channels, num_classes=2, **sizes)
    vit.pretrained_cfg = {**vit.pretrained_cfg, "mean": (0.5,) * channels, "std": (0.5,) * channels}
    save(FullConfig().build(vit.eval()), file)
    grid = (8, 4)

    result, _ = evaluate_model(EvaluateConfig(file, root, workers=0, rounds=1))
    assert (result.images, result.unreadable, result.usage.grid) == (12, (), grid)
    assert predict(PredictConfig(file, root, tmp_path / "a.csv", top=1, workers=0)).unreadable == ()
    drawing = draw(DrawConfig(file, root / "a", tmp_path / "drawn", limit=1))
    assert (len(drawing.files), drawing.unreadable) == (2, ())
    set_budget(file, root, tmp_path / "tome.safetensors", 0.8, method="tome")
    merged = load(tmp_path / "tome.safetensors")
    assert merged.vit.patch_embed.grid_size == grid
    assert preparation(merged)["input_size"] == (channels, *size)
    for data in (None, root):
        images = bench_images(BenchConfig("vit_tiny_patch16_224", images=2, batch_size=2, data=data), vit)
        assert images.shape == (2, channels, *size)
        assert vit(images).isfinite().all()
    view = Session(Playground(PlaygroundConfig(models=(file,)))).view(file, "ats", 0.8)
    assert (view.pixels.shape, view.usage.grid) == ((1, channels, *size), grid)
    config = MethodsConfig(file, root, output=tmp_path / "out", split=".", methods=("tome",), budgets=(0.8,), workers=0)
    config = replace(config, timed=2, rounds=1, latencies=2, calibration=4, pictures=1)
    dense, tome = compare_methods(config).rows
    assert (dense.record["images"], tome.record["images"], tome.record["refused"]) == (8, 8, None)
    assert tome.record["gmacs"] < dense.record["gmacs"]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_digits_train_models_of_one_and_of_three_channels(channels: int, tmp_path: Path) -> None:
    made = Run(
        model_args=SIZES | {"img_size": 32, "in_chans": channels},
        method=FullConfig(),
        data=DataConfig(),
        recipe=Recipe(epochs=1, batch_size=128, warmup_epochs=0),
        output=tmp_path / "out",
    )
    outcome = train_run(made)
    assert outcome.result.images == 360
    assert preparation(outcome.model)["input_size"] == (channels, 32, 32)
    assert len(preparation(outcome.model)["mean"]) == channels


class Pairs:
    """A data set of somebody else's: images of any kind."""

    def __init__(self, images: list[object]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.images[index], index


@pytest.mark.parametrize("channels", [1, 3])
def test_data_sets_of_others_go_through_the_same_door(channels: int) -> None:
    grey, wide = Image.new("L", (4, 4), 51), Image.fromarray(np.full((4, 4), 51 * 257, dtype=np.uint16))
    whole = np.full((4, 4), 51, np.uint8)
    pairs = Pairs([grey, wide, grey.convert("RGB"), Image.new("F", (4, 4)), whole, torch.from_numpy(whole)])

    def transform(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.asarray(image).copy())

    handed = Samples(TorchImages(pairs, None, "pairs"), channels, transform)
    items = [handed[i] for i in range(6)]
    assert isinstance(items[3], Unreadable)
    assert items[3].name == "image 3"
    assert items[5] == Unreadable("image 5", "it is a Tensor, neither an image of Pillow's nor an array")
    for index in (0, 1, 2, 4):
        assert items[index][0].unique().tolist() == [51]
        assert items[index][0].ndim == (2 if channels == 1 else 3)


class Recorded(nn.Module):
    """What timm's tools look for."""

    def __init__(self, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, channels: int) -> None:
        super().__init__()
        if mean is not None:
            self.pretrained_cfg = {"mean": mean, "std": std, "input_size": (channels, 8, 8)}


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_a_teacher_sees_the_pixels_normalised_as_its_record_says() -> None:
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    per_channel = [torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD)]
    wanted = (pixels - per_channel[0]) / per_channel[1]
    half = (pixels - 0.5) / 0.5
    torch.testing.assert_close(Renormalise((0.5,) * 3, (0.5,) * 3, Recorded(MEAN, STD, 3))(half), wanted)
    grey = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
    torch.testing.assert_close(
        Renormalise((0.5,) * 3, (0.5,) * 3, Recorded((0.1,), (0.2,), 1))(half), (grey - 0.1) / 0.2
    )
    replicated = (grey.expand(-1, 3, -1, -1) - per_channel[0]) / per_channel[1]
    torch.testing.assert_close(Renormalise((0.5,), (0.5,), Recorded(MEAN, STD, 3))((grey - 0.5) / 0.5), replicated)
    for unknown in (Recorded(None, None, 3), Recorded(MEAN, STD, 1), nn.Identity()):
        assert Renormalise((0.5,) * 3, (0.5,) * 3, unknown)(half) is half


def test_a_rectangular_model_trains_evaluates_and_predicts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("a", "b"):
            (tmp_path / "images" / split / kind).mkdir(parents=True)
            for number in range(2):
                noise = rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path / "images" / split / kind / f"{number}.png")
    root = tmp_path / "images"
    settings = preparation_of_name("vit_tiny_patch16_224", {"img_size": [32, 16]})
    item, _ = open_split(DataConfig(root=root, workers=0), settings, "val")[0]
    assert item.shape == (3, 32, 16)
    made = Run(
        model_args={name: value for name, value in SIZES.items() if name != "img_size"},
        img_size=(32, 16),
        method=FullConfig(),
        data=DataConfig(root=root, workers=0),
        recipe=Recipe(epochs=1, batch_size=4, warmup_epochs=0),
        output=tmp_path / "out",
    )
    outcome = train_run(made)
    assert outcome.result.usage.grid == (4, 2)
    assert preparation(outcome.model)["input_size"] == (3, 32, 16)
    result, _ = evaluate_model(EvaluateConfig(str(outcome.file), root, workers=0, rounds=0))
    assert result.usage.grid == (4, 2)
    assert predict(PredictConfig(str(outcome.file), root, tmp_path / "a.csv", top=1, workers=0)).images == 8
    with pytest.raises(ValueError, match=r"img_size must be a number of pixels.*got \[32\]"):
        preparation_of_name("vit_tiny_patch16_224", {"img_size": [32]})
    images = bench_images(BenchConfig("vit_tiny_patch16_224", images=2, batch_size=2), outcome.model.vit)
    assert images.shape == (2, 3, 32, 16)
