"""The commands on models of other families: one of timm's with rotary positions, and a folder of Hugging Face's."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from samples import picture
from torch import nn

from adaptvit import FullConfig, MergeConfig, adapt, load, save
from adaptvit.backbones.forward import scores
from adaptvit.cli import main
from adaptvit.commands import draw as drawing_module
from adaptvit.commands.bench import BenchConfig, bench
from adaptvit.commands.compare_methods import MethodsConfig, compare_methods
from adaptvit.commands.draw import DrawConfig, draw
from adaptvit.commands.evaluate import EvaluateConfig, evaluate_model
from adaptvit.commands.sessions import Playground, PlaygroundConfig, Session
from adaptvit.data import DataConfig, open_split, preparation
from adaptvit.measure.evaluate import evaluate
from adaptvit.weights.opening import open_model

NO_GATE = re.compile("fitting a gate needs a class token|the residual stream of .* cannot be turned")
SMALL: dict[str, Any] = {"images": 8, "batch_size": 4, "rounds": 1, "threads": 1}
TOLD = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "size": {"height": 64, "width": 64}}


def told_apart(vit: nn.Module) -> Any:
    """Weights with which tokens and images differ."""
    torch.manual_seed(0)
    for weight in vit.parameters():
        if weight.ndim < 2:
            weight.data += 0.2 * torch.randn_like(weight)
        else:
            nn.init.normal_(weight, std=min(0.5, 1.5 / weight[0].numel() ** 0.5))
    return vit.eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes."""
    root = tmp_path_factory.mktemp("images")
    for number in range(12):
        (root / "ab"[number % 2]).mkdir(exist_ok=True)
        picture(number).save(root / "ab"[number % 2] / f"{number}.png")
    return root


@pytest.fixture(scope="module", params=[pytest.param("Eva", marks=pytest.mark.long), "Hugging Face"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A plain ViT of two classes for images of 64 x 64."""
    folder = tmp_path_factory.mktemp("model")
    if request.param == "Eva":
        sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 2}
        vit = told_apart(timm.create_model("vit_small_patch16_dinov3", **sizes))
        save(FullConfig().build(vit), folder / "model.safetensors")
        return str(folder / "model.safetensors")
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=64,
        patch_size=8,
        id2label={0: "ant", 1: "bee"},
        label2id={"ant": 0, "bee": 1},
    )
    told_apart(transformers.ViTForImageClassification(config)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(TOLD))
    return str(folder)


@pytest.fixture(scope="module")
def fast(stored: str, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same at 60 % of its MACs."""
    file = tmp_path_factory.mktemp("fast") / "fast.safetensors"
    assert main(["adapt", stored, str(root), str(file), "--target", "0.6"]) == 0
    return file


def test_a_rotary_name_is_benched() -> None:
    figures = bench(BenchConfig("vit_small_patch16_dinov3", method="merge", target=0.6, img_size=64, **SMALL))
    assert figures["macs_executed"] / figures["macs_dense"] == pytest.approx(0.6, abs=0.03)
    assert figures["tokens_per_block"]["min"][0] == 4 * 4 + 5


@pytest.mark.parametrize("train", [False, True])
def test_what_is_stored_is_benched(train: bool, stored: str) -> None:
    figures = bench(BenchConfig(stored, method="tome", target=0.6, train=train, **SMALL))
    assert figures["macs_executed"] / figures["macs_dense"] == pytest.approx(0.6, abs=0.05)
    assert figures["realised_speedup"] > 0


def test_the_figures_are_those_of_the_vit_itself(stored: str, root: Path) -> None:
    model = open_model(stored)
    data = open_split(DataConfig(root=root), preparation(model), "validation")
    result, figures = evaluate_model(EvaluateConfig(stored, root, workers=0, rounds=1))
    images, labels = zip(*data, strict=True)
    with torch.inference_mode():
        right = scores(model.vit(torch.stack(images)))[0].argmax(dim=1) == torch.tensor(labels)
    assert (result.images, result.top1) == (12, pytest.approx(right.double().mean().item()))
    assert figures["gmacs"] <= figures["gmacs_dense"]
    assert torch.equal(evaluate(model.vit, data).correct, result.correct)


def test_fewer_macs_are_evaluated(fast: Path, root: Path) -> None:
    _, figures = evaluate_model(EvaluateConfig(str(fast), root, workers=0, rounds=1))
    assert figures["gmacs"] / figures["gmacs_dense"] == pytest.approx(0.6, abs=0.04)
    assert figures["packed_images_per_s"] > 0


def test_where_patches_go_is_drawn(fast: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing = draw(DrawConfig(str(fast), root / "a", tmp_path / "drawn", limit=1))
    assert [file.name for file in drawing.files] == ["grid.png", "0.png.png"]
    monkeypatch.setattr(drawing_module, "write_png", lambda figure, path: path.write_bytes(b"drawn"))
    summary = draw(DrawConfig(str(fast), root, tmp_path / "summary", summary=True))
    assert len(summary.files) == 6


def test_answers_are_told(fast: Path, root: Path, tmp_path: Path) -> None:
    told = ["--output", str(tmp_path / "told.csv"), "--workers", "0", "--top", "2"]
    assert main(["predict", str(fast), str(root / "a"), *told]) == 0
    with (tmp_path / "told.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 6
    assert load(fast).class_names in ((), ("ant", "bee"))


def test_methods_are_compared(stored: str, root: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {"workers": 0, "timed": 4, "rounds": 1, "latencies": 2, "calibration": 6, "pictures": 1}
    methods = ("merge", "ats", "evit", "avit")
    outcome = compare_methods(MethodsConfig(stored, root, methods=methods, budgets=(0.7,), output=tmp_path, **few))
    dense, *others, avit = [row.record for row in outcome.rows]
    for record in others:
        assert record["refused"] is None, record
        assert record["gmacs"] / dense["gmacs"] == pytest.approx(0.7, abs=0.1), record["entry"]
    assert NO_GATE.search(avit["refused"])
    assert outcome.report.exists()


def test_the_playground_shows_it(stored: str) -> None:
    playground = Playground(PlaygroundConfig(models=(stored,)))
    session, methods = Session(playground), set(playground.subject(stored).methods)
    for method in methods - {"avit"}:
        view = session.view(stored, method, 0.7)
        assert view.budget.share == pytest.approx(0.7, abs=0.1), method
        assert {name for name, _ in view.dense.top} in ({"class 0", "class 1"}, {"ant", "bee"})
        assert view.dense.gmacs > view.adaptive.gmacs
        assert view.block(4)[0].shape == view.image().shape
    with pytest.raises(ValueError, match=NO_GATE):
        session.view(stored, "avit", 0.7)


def test_the_same_at_other_sizes_is_benched_or_refused_in_a_sentence(stored: str) -> None:
    if Path(stored).is_dir():
        with pytest.raises(ValueError, match=r"ViTForImageClassification cannot be made with \{'img_size': 32\}"):
            bench(BenchConfig(stored, method="full", img_size=32, **SMALL))
    else:
        figures = bench(BenchConfig(stored, method="full", img_size=32, **SMALL))
        assert figures["tokens_per_block"]["max"][0] == 4 * 4 + 5


def test_a_target_is_met_from_python(stored: str) -> None:
    model = adapt(open_model(stored).vit, torch.randn(8, 3, 64, 64), 0.7, MergeConfig(), tolerance=0.05)
    model.compute = 0.8
    assert model.compute == pytest.approx(0.8, abs=0.05)
