import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from adaptvit.cli import main
from adaptvit.commands.bench import BenchConfig, bench
from adaptvit.methods import METHODS

SMALL = {"img_size": 64, "images": 8, "batch_size": 4, "rounds": 2, "threads": 1}
FIGURES = {
    "dense_images_per_s",
    "masked_images_per_s",
    "packed_images_per_s",
    "ideal_speedup",
    "realised_speedup",
    "ratio",
    "macs_dense",
    "macs_executed",
    "tokens_per_block",
    "threads",
    "load_average",
    "rounds",
}


@pytest.mark.parametrize("train", [False, True])
def test_bench_meets_its_target_and_reports_ratios(train: bool) -> None:
    figures = bench(BenchConfig("deit_tiny_patch16_224", target=0.6, train=train, **SMALL))
    assert figures.keys() >= FIGURES
    assert figures["macs_executed"] / figures["macs_dense"] == pytest.approx(0.6, abs=0.03)
    assert figures["ideal_speedup"] == pytest.approx(figures["macs_dense"] / figures["macs_executed"])
    assert figures["ratio"] == pytest.approx(figures["realised_speedup"] / figures["ideal_speedup"])
    tokens = figures["tokens_per_block"]
    assert all(
        low <= mean <= high for low, mean, high in zip(tokens["min"], tokens["mean"], tokens["max"], strict=True)
    )
    assert tokens["min"][0] == tokens["max"][0] == 17
    assert json.loads(json.dumps(figures)) == figures


def test_the_knob_is_told_as_it_was_set() -> None:
    figures = bench(BenchConfig("deit_tiny_patch16_224", method="evit", target=0.7, **SMALL))
    assert figures["knob"]["rate"] != METHODS["evit"]().rate


def test_a_name_of_a_method_is_measured_as_it_is() -> None:
    figures = bench(BenchConfig("tome_tiny_patch16_224", settings={"r": 2}, target=None, **SMALL))
    assert figures["method"] == "tome"
    assert figures["tokens_per_block"]["max"] == [17, 15, 13, 11, 9, 7, 5, 3, 2, 2, 2, 2]
    with pytest.raises(ValueError, match=r"settings of tome must be some of .*, r, .*, got 'shift'"):
        BenchConfig("tome_tiny_patch16_224", settings={"shift": 0.1})


def test_full_drops_nothing() -> None:
    figures = bench(BenchConfig("deit_tiny_patch16_224", method="full", **SMALL))
    assert figures["tokens_per_block"]["min"] == [17] * 12
    assert figures["knob"] is None


def test_real_images_are_read_from_a_folder(tmp_path: Path) -> None:
    for index in range(8):
        picture = Image.new("RGB", (80, 70), (30 * index, 90, 200))
        (tmp_path / f"class{index % 2}").mkdir(exist_ok=True)
        picture.save(tmp_path / f"class{index % 2}" / f"{index}.png")
    figures = bench(BenchConfig("deit_tiny_patch16_224", method="full", data=tmp_path, **SMALL))
    assert figures["images"] == 8


def test_the_command_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "figures.json"
    options = "--method avit --target 0.5 --img-size 64 --images 4 --batch-size 2 --rounds 1 --threads 1"
    assert main(["bench", "deit_tiny_patch16_224", *options.split(), "--json", str(target)]) == 0
    assert json.loads(target.read_text()).keys() >= FIGURES
    assert "realised_speedup" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("resnet18", "resnet18 is a ResNet, of no family that is known, and has no convolution"),
        ("samvit_base_patch16_224", "is not supported: its attention goes by windows of the grid"),
        ("deit_tiny", "no model named 'deit_tiny'; did you mean 'deit_tiny_patch16_224'?"),
        (
            "deit_tiny_patch16_224 --method turbo",
            "method must be one of calibrated, merge, tome, grid, exit, merge_exit, ats, evit, avit, adavit,",
        ),
        ("deit_tiny_patch16_224 --target 0", r"target must lie in (0, 1], the share of the dense MACs, got 0"),
        ("deit_tiny_patch16_224 --target half", "half"),
        ("deit_tiny_patch16_224 --batch-size 0", "BenchConfig.batch_size must be 1 or more, got 0"),
        ("deit_tiny_patch16_224 --batch-size 5", "images must be a multiple of batch_size, got 32 and 5"),
        ("deit_tiny_patch16_224 --dtype float8", "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        ("deit_tiny_patch16_224 --data /nowhere/at/all", "data folder '/nowhere/at/all' does not exist"),
        ("deit_tiny_patch16_224 --json /nowhere/at/all.json", "there is no folder '/nowhere/at'"),
        ("deit_tiny_patch16_224 --speed fast", "--speed"),
        ("", "no MODEL"),
    ],
    ids=lambda value: value[:40],
)
def test_mistakes_end_in_one_sentence_and_exit_code_2(arguments: str, said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.startswith("adaptvit: ")
    assert captured.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_absent_cuda_is_said(capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "deit_tiny_patch16_224", "--device", "cuda"]) == 2
    assert "device is 'cuda', but torch finds no CUDA here" in capsys.readouterr().err


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    for index in range(8):
        (tmp_path / f"{index}.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"0\.jpg.*cannot be read as an image"):
        bench(BenchConfig("deit_tiny_patch16_224", data=tmp_path, **SMALL))


def test_a_folder_with_too_few_images_is_said(tmp_path: Path) -> None:
    (tmp_path / ".hidden.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"BenchConfig.data is .*, which holds no images: 1 hidden: '.hidden.png'"):
        bench(BenchConfig("deit_tiny_patch16_224", data=tmp_path, **SMALL))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="holds 1 images, but the bench wants 8"):
        bench(BenchConfig("deit_tiny_patch16_224", data=tmp_path, **SMALL))


def test_a_device_that_is_none_is_refused() -> None:
    with pytest.raises(
        ValueError, match="device must be cpu, cuda, xpu or mps, or one of these with a number, got 'fridge'"
    ):
        BenchConfig("test_vit", device="fridge")
