"""The training example: the loss falls, and a run that was interrupted ends where an uninterrupted one does."""

import runpy
from pathlib import Path

import pytest

for needed in ("jax", "optax", "orbax.checkpoint"):
    pytest.importorskip(needed, reason="the JAX side needs adaptvit[flax]")

EXAMPLE = Path(__file__).parents[2] / "examples" / "flax_digits.py"


def test_the_loss_falls_and_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = runpy.run_path(str(EXAMPLE))
    train, vit = example["train"], example["VIT"]
    small = {"depth": 1, "max_tokens_per_depth": (12,), "heads": 2}
    monkeypatch.setitem(train.__globals__, "VIT", vit.clone(**small))
    whole, accuracy = train(tmp_path / "whole", epochs=2)
    first, _ = train(tmp_path / "parts", epochs=1)
    rest, resumed_accuracy = train(tmp_path / "parts", epochs=2)
    assert whole[1] < whole[0]
    assert first + rest == whole
    assert resumed_accuracy == accuracy > 0.3
    printed = capsys.readouterr().out
    assert "resumed after epoch 1" in printed
    assert f"test accuracy {accuracy:.1%}" in printed
