"""The training example: the loss falls, and a run that was interrupted ends where an uninterrupted one does."""

import runpy
from pathlib import Path

import pytest

for needed in ("jax", "optax", "orbax.checkpoint"):
    pytest.importorskip(needed, reason="the JAX side needs adaptvit[flax]")

EXAMPLE = Path(__file__).parents[2] / "examples" / "flax_digits.py"


def test_the_loss_falls_and_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train = runpy.run_path(str(EXAMPLE))["train"]
    whole, accuracy = train(tmp_path / "whole", epochs=3)
    first, _ = train(tmp_path / "parts", epochs=2)
    rest, resumed_accuracy = train(tmp_path / "parts", epochs=3)
    assert whole[2] < whole[1] < whole[0]
    assert first + rest == whole
    assert resumed_accuracy == accuracy > 0.3
    printed = capsys.readouterr().out
    assert "resumed after epoch 2" in printed
    assert f"test accuracy {accuracy:.1%}" in printed
