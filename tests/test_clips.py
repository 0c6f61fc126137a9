"""Clips through the commands and through training."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import small_vit
from PIL import Image
from torch import nn

import adaptvit
from adaptvit import FullConfig, RunLengthConfig
from adaptvit.cli import main
from adaptvit.commands.bench import BenchConfig, bench
from adaptvit.commands.compare_methods import MethodsConfig, compare_methods
from adaptvit.commands.sessions import Playground, PlaygroundConfig, Session
from adaptvit.data import Clips, DataConfig, collate, open_data, preparation
from adaptvit.measure.predictor import Predictor
from adaptvit.training.recipe import Recipe
from adaptvit.training.run import Run, train_run
from adaptvit.video import inflate

FRAMES = 4


def write_strip(path: Path, seed: int, strength: float) -> None:
    """Noise that changes from frame to frame so much, more and more to the right: frames of 32 x 32 pixels."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(1, 32, 32, 3, generator=generator)
    right = torch.arange(32).view(1, 1, 32, 1) / 16
    frames = first + strength * right * torch.randn(FRAMES, 32, 32, 3, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((255 * frames.clamp(0, 1)).byte().flatten(0, 1).numpy()).save(path)


def write_gif(path: Path, count: int) -> None:
    frames = [Image.effect_noise((32, 32), 40 + 20 * at) for at in range(count)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, disposal=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Strips of two classes, 8 to train and 8 to test, and two bad ones."""
    root = tmp_path_factory.mktemp("clips")
    for split in ("train", "val"):
        for number in range(8):
            write_strip(root / split / "ab"[number % 2] / f"{number}.png", number, 0.05 * number)
        (root / split / "a" / "empty.png").write_bytes(b"")
        Image.new("RGB", (32, 32 * FRAMES + 1)).save(root / split / "b" / "uneven.png")
    return root


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A plain ViT of two classes for clips of 4 frames of 32 x 32 pixels."""
    torch.manual_seed(0)
    vit = inflate(small_vit(num_classes=2), FRAMES, 1)
    for weight in vit.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=min(0.5, 1.5 / weight[0].numel() ** 0.5))
    path = tmp_path_factory.mktemp("model") / "clips.safetensors"
    adaptvit.save(FullConfig().build(vit.eval()), path)
    return str(path)


def test_predict_tells_of_each_clip_and_names_the_bad(root: Path, stored: str, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "told.csv"
    words = ["predict", stored, str(root / "val"), "--strip", "4", "--top", "1", "--output", str(output)]
    words += ["--workers", "0"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert (
        "cannot read b/uneven.png: its height of 129 pixels is no whole number of pixels for each of 4 frames" in said
    )
    assert "cannot read a/empty.png" in said
    assert "clips could not be read and are left out" in said
    lines = list(csv.DictReader(output.read_text().splitlines()))
    assert [line["file"] for line in lines] == [f"{'ab'[at % 2]}/{at}.png" for at in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert lines[0]["tokens_1"] == str(1 + FRAMES * 16)
    one = str(root / "val" / "a" / "2.png")
    assert main(["predict", stored, one, "--strip", "4", "--top", "1", "--output", str(tmp_path / "one.csv")]) == 0
    (line,) = csv.DictReader((tmp_path / "one.csv").read_text().splitlines())
    assert {**line, "file": "a/2.png"} == lines[1]


def test_a_video_that_is_none_or_was_cut_off_is_said_to_be_that(stored: str, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("av", reason="videos are read by PyAV, the extra video")
    (tmp_path / "text.avi").write_text("no video")
    words = ["--top", "1", "--workers", "0", "--output", str(tmp_path / "told.csv")]
    assert main(["predict", stored, str(tmp_path / "text.avi"), *words]) == 1
    assert "cannot read text.avi: it is no video, or truncated or damaged: Invalid data" in capsys.readouterr().err


def test_pictures_of_frames_without_classes_are_told_of_strips(root: Path, stored: str, capsys: Any) -> None:
    assert main(["evaluate", stored, str(root / "val")]) == 2
    assert "has clips, but no folders of classes: 'a' lies in none; where its pictures" in capsys.readouterr().err
    assert main(["export", stored, str(root / "a.onnx"), "--data", str(root / "val" / "a")]) == 2
    assert "the model takes clips of 4 frames" in capsys.readouterr().err


def test_a_clip_that_is_named_itself_is_a_video_or_a_folder(stored: str, tmp_path: Path, capsys: Any) -> None:
    for at in range(5):
        Image.effect_noise((32, 32), 50).save(tmp_path / f"{at}.png")
    words = ["--top", "1", "--workers", "0", "--output"]
    assert main(["predict", stored, str(tmp_path), *words, str(tmp_path / "told.csv")]) == 0
    for name, said in (("short", "it has 2 frames, but 4 are asked for"), ("empty", "it is empty")):
        if name == "short":
            pytest.importorskip("av", reason="videos are read by PyAV, the extra video")
            write_gif(tmp_path / "short.gif", 2)
        else:
            (tmp_path / "empty.gif").write_bytes(b"")
        assert main(["predict", stored, str(tmp_path / f"{name}.gif"), *words, str(tmp_path / f"{name}.csv")]) == 1
        assert f"cannot read {name}.gif: {said}" in capsys.readouterr().err
    assert main(["predict", stored, str(tmp_path / "0.png"), *words, str(tmp_path / "no.csv")]) == 2
    assert "0.png' is no clip: it is neither a video" in capsys.readouterr().err


def test_strips_are_refused_for_images(root: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "images.safetensors"
    adaptvit.save(FullConfig().build(small_vit(num_classes=2)), path)
    for words in (["predict", "--top", "1"], ["draw"], ["evaluate"]):
        assert main([words[0], str(path), str(root / "val"), "--strip", "4", *words[1:]]) == 2
        assert "takes images" in capsys.readouterr().err


def test_what_takes_pictures_refuses_a_model_of_clips(stored: str) -> None:
    with pytest.raises(ValueError, match=r"takes clips, and a Predictor, .* takes pictures"):
        Predictor(stored)


@pytest.mark.filterwarnings("ignore:.*clips cannot be read")
def test_a_budget_is_met_on_clips_and_evaluated(root: Path, stored: str, tmp_path: Path, capsys: Any) -> None:
    file = str(tmp_path / "fast.safetensors")
    assert main(["adapt", stored, str(root), file, "--target", "0.7", "--method", "runlength", "--strip", "4"]) == 0
    model = adaptvit.load(file)
    assert isinstance(model.config, RunLengthConfig)
    assert model.dial is not None
    capsys.readouterr()
    assert main(["evaluate", file, str(root), "--strip", "4", "--rounds", "1", "--workers", "0", "--json"]) == 1
    said = capsys.readouterr()
    figures = json.loads(said.out)
    assert figures["images"] == 8
    assert figures["gmacs"] < figures["gmacs_dense"]
    assert "cannot read b/uneven.png" in said.err


def test_pictures_of_clips_are_sheets_of_frames(root: Path, stored: str, tmp_path: Path, capsys: Any) -> None:
    told = ["--limit", "1", "--strip", "4", "--output", str(tmp_path / "drawn")]
    assert main(["draw", stored, str(root / "val" / "a"), *told]) == 0
    assert {one.name for one in (tmp_path / "drawn").iterdir()} == {"grid.png", "0.png.png"}
    assert main(["draw", stored, str(root), "--per-class", *told]) == 1
    assert (tmp_path / "drawn" / "class-a.png").is_file()
    assert main(["draw", stored, str(root / "val"), *told]) == 2
    assert "pass --per-class" in capsys.readouterr().err


def test_methods_are_compared_on_clips(root: Path, stored: str, tmp_path: Path) -> None:
    config = MethodsConfig(
        model=stored,
        root=root,
        strip=4,
        methods=("tome", "runlength"),
        budgets=(0.7,),
        output=tmp_path,
        workers=0,
        calibration=4,
        timed=2,
        rounds=1,
        latencies=2,
        pictures=1,
    )
    rows = compare_methods(config).rows
    assert [row.entry.label for row in rows] == ["dense", "tome 0.7", "runlength 0.7"]
    assert all(row.record["refused"] is None for row in rows)
    assert 0.5 < rows[2].record["gmacs"] / rows[0].record["gmacs"] < 0.9
    assert len(list((tmp_path / "records").iterdir())) == 3


def test_benches_take_clips(root: Path, stored: str) -> None:
    small: dict[str, Any] = {"images": 4, "batch_size": 2, "rounds": 1, "threads": 1, "target": 0.7}
    found = bench(BenchConfig(stored, method="runlength", data=root / "val" / "b", strip=4, **small | {"images": 2}))
    assert found["ideal_speedup"] > 1
    moving = bench(BenchConfig("test_vit", method="tome", frames=4, img_size=32, **small))
    assert moving["macs_executed"] < moving["macs_dense"]


def test_the_playground_takes_clips(stored: str, tmp_path: Path) -> None:
    session = Session(Playground(PlaygroundConfig(models=(stored,))))
    still, lively = (session.playground.subject(stored).examples[at] for at in (0, 1))
    gmacs = []
    for clip in (still, lively):
        session.add(clip, stored)
        view = session.view(stored, "runlength", 0.7)
        gmacs.append(view.adaptive.gmacs)
    assert gmacs[0] < gmacs[1] <= view.dense.gmacs
    assert view.pixels.shape == (1, 3, 64, 64)  # 2 x 2 frames
    assert view.image().shape == view.shading().shape == view.block(1)[0].shape
    assert "of 64 patches" in view.block(1)[1]
    merged = session.view(stored, "tome", 0.7)
    assert "which hold all 64 patches" in merged.block(4)[1]
    pytest.importorskip("av", reason="videos are read by PyAV, the extra video")
    subject = session.playground.subject(stored)
    write_gif(tmp_path / "clip.gif", 6)
    session.add(subject.opened_picture(tmp_path / "clip.gif").image, stored)
    assert session.view(stored, "runlength", 0.7).pixels.std() > 0.01
    (tmp_path / "none.mp4").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"This clip cannot be used: .*\."):
        subject.opened_picture(tmp_path / "none.mp4")


def recipe(root: Path, output: Path, **changed: Any) -> Run:
    return Run(
        model="test_vit",
        model_args={"patch_size": 8, "dynamic_img_size": False},
        img_size=32,
        frames=FRAMES,
        tubelet=1,
        method=FullConfig(),
        data=DataConfig(root=root, strip=FRAMES, mean=(0.5,) * 3, std=(0.5,) * 3, workers=0),
        recipe=Recipe(epochs=2, batch_size=4, warmup_epochs=0, **changed),
        output=output,
    )


def test_a_training_on_clips_goes_on_and_leaves_out_what_is_bad(root: Path, tmp_path: Path) -> None:
    run = recipe(root, tmp_path / "run")
    with pytest.warns(UserWarning, match=r"'b/uneven\.png' cannot be read, another took its place: its height"):
        outcome = train_run(run)
    assert [epoch.unreadable > 0 for epoch in outcome.history] == [True, True]
    assert {one.name for one in outcome.result.unreadable} == {"a/empty.png", "b/uneven.png"}
    assert outcome.result.images == 8
    assert outcome.model.class_names == ("a", "b")
    again = train_run(run, resume=True)
    assert again.history == outcome.history
    assert again.result.losses.equal(outcome.result.losses)
    tuned = replace(
        run,
        model=str(outcome.file),
        frames=None,
        model_args={},
        img_size=None,
        method=RunLengthConfig(),
        recipe=replace(run.recipe, epochs=1, target=0.8),
        output=tmp_path / "tuned",
    )
    with pytest.warns(UserWarning, match="another took its place"):
        model = train_run(tuned).model
    assert isinstance(model.config, RunLengthConfig)
    assert model.pretrained_cfg["frames"] == FRAMES
    with pytest.raises(ValueError, match=r"Recipe\.cutmix is 1, but .* has clips, which mixup alone mixes"):
        train_run(recipe(root, tmp_path / "cut", cutmix=1.0))


def test_frames_of_a_clip_are_augmented_alike(root: Path, stored: str) -> None:
    settings = preparation(adaptvit.load(stored))
    assert settings["frames"] == FRAMES
    config = DataConfig(root=root, strip=FRAMES, auto_augment="rand-m9-mstd0.5", re_prob=1.0, workers=0)
    data = open_data(config, settings)
    assert (data.shape, data.classes) == ((FRAMES, 3, 32, 32), ("a", "b"))
    at = data.train.samples.index(("a/0.png", 0))  # whose frames are the same
    first, second = data.train[at][0], data.train[at][0]
    assert (first == first[:1]).all()
    assert (first != second).any()
    still = data.test[data.test.samples.index(("a/0.png", 0))][0]
    assert torch.equal(still, data.calibration[at][0])


def test_class_map_numbers_folders_of_clips(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        for number in range(FRAMES):
            (tmp_path / name / "1").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32)).save(tmp_path / name / "1" / f"{number}.png")
    settings = {"input_size": (3, 32, 32), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    clips = Clips(tmp_path, settings, FRAMES, names=("c", "none", "a"))
    assert collate([clips[at] for at in range(len(clips))]).labels.tolist() == [2, 0]
    assert clips.classes == ("c", "none", "a")
    assert [str(one) for one in clips.left_out] == ["1 folders that class_map does not name: 'b'"]
