"""What is not finite is refused by name, or left out and named; it never becomes a result."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import METHODS, images, small_vit
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from adaptvit import AdaViTConfig, FullConfig, MergeConfig, ToMeConfig, adapt, cli, meet_target, save
from adaptvit.budget import attempt
from adaptvit.commands import draw
from adaptvit.commands import predict as predicting
from adaptvit.commands.adapt import set_budget
from adaptvit.commands.bench import BenchConfig, bench
from adaptvit.commands.predict import PredictConfig, predict
from adaptvit.commands.sessions import DIGITS, Playground, PlaygroundConfig, Session
from adaptvit.data import Images, Unreadable
from adaptvit.files import as_json
from adaptvit.measure.evaluate import evaluate
from adaptvit.methods import METHODS as CONFIGS
from adaptvit.methods import untrained
from adaptvit.methods.adavit import fit_policies
from adaptvit.methods.avit_gate import fit_gate
from adaptvit.methods.merge import fit_thresholds
from adaptvit.model import AdaptiveViT


def spoilt_head(file: Path) -> Path:
    vit = small_vit()
    vit.norm.weight.data.fill_(1e30)  # weights that are not finite would not be opened at all
    vit.head.weight.data[3] = 1e30
    save(FullConfig().build(vit), file)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven classes of one picture each, the first nearly black."""
    random = np.random.default_rng(0)
    for kind in range(7):
        file = tmp_path / "pictures" / "val" / f"class{kind}" / "0.png"
        file.parent.mkdir(parents=True)
        Image.fromarray(random.integers(0, 255 if kind else 9, (32, 32, 3), dtype=np.uint8)).save(file)
    return tmp_path / "pictures"


def fails_on_dark(model: AdaptiveViT) -> AdaptiveViT:
    """The model, with logits of NaN for dark images."""

    def spoil(_: object, given: tuple[Tensor, ...], output: Any) -> Any:
        dark = given[0].mean(dim=(1, 2, 3)) < -0.8
        return replace(output, logits=output.logits.masked_fill(dark[:, None], torch.nan))

    model.register_forward_hook(spoil)
    return model


class Holed(Images):
    """One cannot be read."""

    def __getitem__(self, index: int) -> Any:
        return Unreadable("broken", "truncated") if index == 1 else super().__getitem__(index)


@pytest.mark.parametrize("name", ["full", "avit", "ats", "merge"])
def test_evaluate_names_an_image_that_is_not_finite_and_counts_the_others(name: str) -> None:
    model = METHODS[name].build(small_vit())
    batch, labels = images(model.vit, count=6), torch.arange(6)
    batch[3] = torch.nan
    rest = [0, 2, 4, 5]
    result = evaluate(model, Subset(Holed(batch, labels), range(6)), batch_size=4)
    assert result.unreadable == (
        Unreadable("broken", "truncated"),
        Unreadable("image 3", "the model's logits for it are not finite"),
    )
    sound = evaluate(model, Images(batch[rest], labels[rest]), batch_size=2)
    assert (result.images, result.top1, result.gmacs) == (4, sound.top1, sound.gmacs)
    assert result.loss == pytest.approx(sound.loss, rel=1e-5)
    assert torch.equal(result.usage.live, sound.usage.live)
    assert result.figures["unreadable"] == 2
    json.loads(json.dumps(result.figures, allow_nan=False))


def test_evaluate_counts_no_class_whose_logit_is_nan_as_right(tmp_path: Path) -> None:
    vit = small_vit()
    data = Images(images(vit, count=4), torch.tensor([3, 3, 3, 3]))
    vit.head.weight.data[3, 0] = torch.nan
    for model in (vit, FullConfig().build(vit)):
        with pytest.raises(ValueError, match=r"holds NaN or infinity in (vit\.)?head.weight"):
            evaluate(model, data)
    vit.head.weight.data[3, 0] = 3e38
    vit.norm.weight.data[0] = 3e38
    with pytest.raises(ValueError, match="has none, the first being 'image 0': the model's logits for it are"):
        evaluate(vit, data)


def test_a_weight_that_no_logit_shows_is_named() -> None:
    vit = small_vit()  # of fewer than 16 keys torch's attention on a CPU makes numbers of NaN
    vit.blocks[-1].attn.qkv.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"holds NaN or infinity in vit\.blocks\.3.attn.qkv.weight"):
        evaluate(METHODS["tome"].build(vit), Images(images(vit, count=2), torch.tensor([0, 1])))


def test_predict_names_what_has_no_finite_logits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(FullConfig().build(small_vit()), tmp_path / "model.safetensors")
    opened = predicting.open_model
    monkeypatch.setattr(predicting, "open_model", lambda model: fails_on_dark(opened(model)))
    for ending in ("csv", "jsonl"):
        config = PredictConfig(
            model=str(tmp_path / "model.safetensors"),
            folder=folder,
            output=tmp_path / f"out.{ending}",
            workers=0,
            top=2,
        )
        found = predict(config)
        assert found.images == 6
        dark = Unreadable("val/class0/0.png", "the model's logits for it are not finite")
        assert found.unreadable == predict(config).unreadable == (dark,)
        text = config.output.read_text()
        assert "class0" not in text
        assert "nan" not in text.lower()


def test_predict_of_nothing_but_nan_is_an_error_that_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    model = spoilt_head(tmp_path / "head.safetensors")
    config = PredictConfig(model=str(model), folder=folder, output=tmp_path / "out.csv", workers=0, top=2)
    with pytest.raises(
        ValueError, match=r"the logits are not finite for any image, 'val/class0/0\.png' being the first"
    ):
        predict(config)
    assert not list(tmp_path.glob("out.csv*"))


def test_the_command_line_counts_them_and_exits_1(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(FullConfig().build(small_vit()), tmp_path / "model.safetensors")
    opened = predicting.open_model
    monkeypatch.setattr(predicting, "open_model", lambda model: fails_on_dark(opened(model)))
    output = tmp_path / "out.csv"
    model = str(tmp_path / "model.safetensors")
    assert cli.main(["predict", model, str(folder), "--output", str(output), "--workers", "0", "--top", "2"]) == 1
    named, counted = [line for line in capsys.readouterr().err.splitlines() if line.startswith("adaptvit: ")]
    assert named == "adaptvit: val/class0/0.png: the model's logits for it are not finite"
    assert counted == "adaptvit: 1 images have logits that are not finite and are left out"
    with output.open() as file:
        assert len(list(csv.DictReader(file))) == 6


def test_draw_names_what_has_no_finite_logits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(METHODS["avit"].build(small_vit()), tmp_path / "model.safetensors")
    monkeypatch.setattr(draw, "write_png", lambda figure, path: path.write_bytes(b"drawn"))
    opened = draw.open_model
    monkeypatch.setattr(draw, "open_model", lambda model: fails_on_dark(opened(model)))
    for kind in ({"summary": True}, {"per_class": True}):
        config = draw.DrawConfig(str(tmp_path / "model.safetensors"), folder, tmp_path / "drawn", **kind)
        (one,) = draw.draw(config).unreadable
        assert "class0" in one.name
        assert one.reason == "the model's logits for it are not finite"


@pytest.mark.parametrize("method", untrained())
@pytest.mark.parametrize("where", ["image", "weights"])
def test_no_budget_is_met_with_what_is_not_finite(method: str, where: str) -> None:
    vit = small_vit().eval()
    batch = images(vit, count=4)
    if where == "image":
        batch[2, 0, 0, 0] = torch.inf
    else:
        vit.blocks[1].attn.qkv.weight.data[0, 0] = torch.nan
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    first = 2 if where == "image" and method not in ("tome", "merge") else r"\d"
    with pytest.raises(ValueError, match=f"are not finite, image {first} being the first"):
        adapt(vit, batch, 0.7, CONFIGS[method]())
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in vit.state_dict().items())


def test_a_search_that_meets_nan_leaves_the_model_as_it_was() -> None:
    model = METHODS["avit"].build(small_vit()).eval()
    config, batch = model.config, images(model.vit, count=3)
    batch[1] = torch.nan
    for call in (lambda: meet_target(model, batch, 0.6), lambda: attempt(model, batch)):
        with pytest.raises(ValueError, match=r"the logits of 1 of 3 images are not finite, image 1 being the first"):
            call()
    assert model.config == config


def test_nothing_is_fitted_to_what_is_not_finite() -> None:
    vit = small_vit().eval()
    batch = images(vit, count=3)
    batch[1] = torch.nan
    policies = AdaViTConfig(macs_target=None).build(small_vit()).train()
    before = [one.clone() for one in (*vit.parameters(), *policies.parameters())]
    with pytest.raises(ValueError, match="the logits of 1 of 3 images are not finite, image 1"):
        fit_thresholds(MergeConfig(), vit, batch, ToMeConfig(r=2))
    for call in (lambda: fit_gate(vit, batch), lambda: fit_policies(policies, batch, 0.7)):
        with pytest.raises(ValueError, match="the attention weights of 1 of 3 images are not finite, image 1"):
            call()
    assert all(torch.equal(*pair) for pair in zip(before, (*vit.parameters(), *policies.parameters()), strict=True))
    assert policies.training


def test_attention_that_tells_no_patch_from_another_fits_nothing() -> None:
    vit = small_vit().eval()
    for block in vit.blocks:
        block.attn.qkv.weight.data.zero_()
        block.attn.qkv.bias.data.zero_()
    with pytest.raises(ValueError, match="all patches receive the same attention"):
        fit_gate(vit, images(vit))


def test_budget_of_what_is_not_finite_writes_no_file(folder: Path, tmp_path: Path) -> None:
    model = spoilt_head(tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match="the logits of all 7 images are not finite"):
        set_budget(str(model), folder / "val", tmp_path / "out.safetensors", 0.8)
    assert not (tmp_path / "out.safetensors").exists()


def test_bench_times_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(config: BenchConfig, vit: torch.nn.Module) -> Tensor:
        return torch.full((2, 3, 224, 224), torch.nan)

    monkeypatch.setattr("adaptvit.commands.bench.bench_images", spoil)
    config = BenchConfig(model="test_vit", img_size=224, batch_size=1, images=2, rounds=1, target=None, threads=1)
    with pytest.raises(ValueError, match="the logits of all 2 images are not finite"):
        bench(config)


def test_the_playground_says_that_an_answer_is_not_finite(tmp_path: Path) -> None:
    playground = Playground(PlaygroundConfig())
    digits = playground.subjects[DIGITS].opened
    session = Session(playground)
    with torch.no_grad():
        digits.vit.head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        session.view(DIGITS, "ats", 0.6)


def test_json_has_no_nan() -> None:
    told = {"a": [1.5, float("nan")], "b": {"c": (float("inf"), -float("inf"))}, "d": None, "e": True, "f": "nan"}
    assert json.loads(as_json(told)) == {"a": [1.5, None], "b": {"c": [None, None]}, "d": None, "e": True, "f": "nan"}
    assert as_json({"a": 1}, indent=2) == json.dumps({"a": 1}, indent=2)
