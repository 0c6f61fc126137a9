import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import adaptvit.commands.demo
from adaptvit.commands.demo import DemoConfig, run_demo, small_vit
from adaptvit.data import open_digits
from adaptvit.training.recipe import Recipe
from adaptvit.weights.checkpoints import load

TINY = DemoConfig(
    size=16,
    patch=4,
    dim=24,
    blocks=3,
    heads=2,
    dense=Recipe(epochs=2, batch_size=96, optimizer="muon", learning_rate=0.02),
    adaptive=Recipe(epochs=2, batch_size=96, learning_rate=1e-4),
    method=replace(adaptvit.commands.demo.METHOD, prior_depth=2),
    target=0.75,
    calibration=32,
    batch=16,
    rounds=2,
    threads=1,
)


def test_the_demo_runs_from_end_to_end_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(adaptvit.commands.demo, "save", stop)
        with pytest.raises(KeyboardInterrupt, match="goes on after the last finished"):
            run_demo(tmp_path, TINY)
    assert not (tmp_path / "report.html").exists()

    logs = {path: path.read_text() for path in tmp_path.rglob("*.jsonl")}
    assert len(logs) == 2
    outcome = run_demo(tmp_path, TINY)
    assert {path: path.read_text() for path in tmp_path.rglob("*.jsonl")} == logs
    assert all(len(text.splitlines()) == 2 and json.loads(text.splitlines()[0]) for text in logs.values())

    assert outcome.masked.top1 == outcome.packed.top1
    assert outcome.packed.gmacs < outcome.dense.gmacs
    assert outcome.ideal > 1
    assert not list(tmp_path.rglob("*.partial"))
    printed = capsys.readouterr().out
    assert "A-ViT, packed" in printed
    assert f"{outcome.packed.top1:.1%}" in outcome.report.read_text()

    image = open_digits(16, margin=2).test[0][0][None]
    model = load(tmp_path / "avit.safetensors").eval()
    with torch.inference_mode():
        assert model(image).shape == (1, 10)


def test_the_starting_weights_follow_the_seed() -> None:
    data = open_digits(16, margin=2)
    one, two = small_vit(TINY, data).state_dict(), small_vit(TINY, data).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
