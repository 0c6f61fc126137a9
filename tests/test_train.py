import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from models import small_vit
from torch import Tensor

import adaptvit.train
from adaptvit import AdaptiveViT, AViTConfig, FullConfig
from adaptvit.data import Data, Images, digits
from adaptvit.train import Recipe, fingerprint, train

RECIPE = Recipe(epochs=3, batch_size=16, learning_rate=1e-3)
AVIT = AViTConfig(gate_scale=4.0, gate_center=2.0)


@pytest.fixture(scope="module")
def data() -> Data:
    whole = digits(size=16, margin=2)
    train = Images(whole.train.images[:48], whole.train.labels[:48], whole.train.augment)
    return replace(whole, train=train, name="48 digits")


def model(config: AViTConfig | FullConfig = AVIT) -> AdaptiveViT:
    return config.build(small_vit(img_size=16, patch_size=4, depth=3, in_chans=1, num_classes=10, drop_path_rate=0.2))


def stopping_after(epochs: int) -> Callable[..., None]:
    """What Ctrl-C does right after the log of the last of `epochs` epochs is written."""
    written = 0

    def write(path: Path, text: str) -> None:
        nonlocal written
        path.write_text(text)
        written += 1
        if written == epochs:
            raise KeyboardInterrupt

    return write


def same_weights(one: AdaptiveViT, other: AdaptiveViT) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("config", [FullConfig(), AVIT], ids=lambda config: config.method)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_uninterrupted_one(
    config: AViTConfig, optimizer: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, optimizer=optimizer)
    whole = model(config)
    history = train(whole, data, recipe, tmp_path / "whole")

    with monkeypatch.context() as patch:
        patch.setattr(adaptvit.train, "write_atomically", stopping_after(epochs=1))
        with pytest.raises(KeyboardInterrupt):
            train(model(config), data, recipe, tmp_path / "resumed")
    torch.manual_seed(99)
    resumed = model(config)
    torch.rand(7)
    again = train(resumed, data, recipe, tmp_path / "resumed")

    assert same_weights(resumed, whole)
    assert [replace(epoch, seconds=0) for epoch in again] == [replace(epoch, seconds=0) for epoch in history]


def test_a_finished_run_is_read_back(data: Data, tmp_path: Path) -> None:
    first, second = model(), model()
    history = train(first, data, RECIPE, tmp_path)
    assert train(second, data, RECIPE, tmp_path) == history
    assert same_weights(first, second)


def test_the_log_has_one_line_per_epoch(data: Data, tmp_path: Path) -> None:
    history = train(model(), data, RECIPE, tmp_path)
    (log,) = tmp_path.glob("log-*.jsonl")
    assert [json.loads(line) for line in log.read_text().splitlines()] == [asdict(epoch) for epoch in history]
    for number, epoch in enumerate(history, start=1):
        assert epoch.epoch == number
        assert set(epoch.terms) == {"ponder", "prior"}
        assert 1 <= epoch.depth_min <= epoch.depth_mean <= epoch.depth_max <= 3
        assert 0 < epoch.macs < 1
        assert all(torch.tensor([epoch.loss, *epoch.terms.values()]).isfinite())


def test_training_learns(data: Data, tmp_path: Path) -> None:
    history = train(model(FullConfig()), data, replace(RECIPE, epochs=8, learning_rate=3e-3), tmp_path)
    assert history[-1].loss < history[0].loss - 0.1


def test_an_interrupted_checkpoint_leaves_the_last_one(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(model(), data, RECIPE, tmp_path)
    (checkpoint,) = tmp_path.glob("checkpoint-*.pt")
    kept = torch.load(checkpoint)
    kept["history"] = kept["history"][:2]
    torch.save(kept, checkpoint)
    before = checkpoint.read_bytes()

    def half(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        train(model(), data, RECIPE, tmp_path)
    assert checkpoint.read_bytes() == before
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.name != ".lock") == [".jsonl", ".pt"]


def test_a_changed_run_starts_afresh_beside_the_old_one(data: Data, tmp_path: Path) -> None:
    runs = {
        fingerprint(model(), data, RECIPE),
        fingerprint(model(), data, replace(RECIPE, learning_rate=2e-3)),
        fingerprint(model(replace(AVIT, gate_center=3.0)), data, RECIPE),
        fingerprint(model(), replace(data, name="others"), RECIPE),
    }
    other = model()
    next(other.parameters()).data += 1
    runs.add(fingerprint(other, data, RECIPE))
    assert len(runs) == 5
    assert fingerprint(model(), data, RECIPE) in runs


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(data: Data, tmp_path: Path) -> None:
    class Poisoned(Images):
        visits = 0

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            Poisoned.visits += 1
            image, label = super().__getitem__(index)
            return (image * float("nan") if Poisoned.visits > 48 + 16 else image), label

    poisoned = replace(data, train=Poisoned(data.train.images, data.train.labels))
    with pytest.raises(FloatingPointError, match="nan at step 5, in epoch 2"):
        train(model(FullConfig()), poisoned, RECIPE, tmp_path)
    (checkpoint,) = tmp_path.glob("checkpoint-*.pt")
    assert len(torch.load(checkpoint)["history"]) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("batch_size", 0), ("learning_rate", 0.0), ("warmup_epochs", 3), ("label_smoothing", 1.0)],
)
def test_wrong_settings_fail_when_the_recipe_is_made(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"Recipe.{field} must"):
        replace(RECIPE, **{field: value})


def test_a_batch_larger_than_the_data_is_refused(data: Data, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size is 64, more than the training images of 48 digits"):
        train(model(), data, replace(RECIPE, batch_size=64), tmp_path)
