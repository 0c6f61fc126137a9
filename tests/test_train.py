import errno
import json
import os
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from models import small_vit
from torch import Tensor
from torch._dynamo import lookup_backend
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import IterableDataset

import adaptvit.training.loop
import adaptvit.training.resuming
from adaptvit import AdaptiveViT, AdaViTConfig, AViTConfig, DynamicViTConfig, FullConfig
from adaptvit.data import Data, Images, Unreadable, open_digits
from adaptvit.measure.evaluate import evaluate
from adaptvit.model import Dial
from adaptvit.training.loop import fingerprint, train
from adaptvit.training.products import Products
from adaptvit.training.recipe import Recipe

RECIPE = Recipe(epochs=3, batch_size=16, learning_rate=1e-3)
AVIT = AViTConfig(gate_scale=4.0, gate_center=2.0)


@pytest.fixture(scope="module")
def data() -> Data:
    whole = open_digits(size=16, margin=2)
    train = Images(whole.train.images[:48], whole.train.labels[:48], whole.train.augment)
    test = Images(whole.test.images[:40], whole.test.labels[:40])
    return replace(whole, train=train, test=test, name="48 digits")


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
        patch.setattr(adaptvit.training.resuming, "write_atomically", stopping_after(epochs=1))
        with pytest.raises(KeyboardInterrupt):
            train(model(config), data, recipe, tmp_path / "resumed")
    torch.manual_seed(99)
    resumed = model(config)
    torch.rand(7)
    again = train(resumed, data, recipe, tmp_path / "resumed")

    assert same_weights(resumed, whole)
    assert [replace(epoch, seconds=0) for epoch in again] == [replace(epoch, seconds=0) for epoch in history]


class Signed(Images):
    """Who decodes an image is written down."""

    book: Path

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with self.book.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return super().__getitem__(index)


def test_a_resumed_run_of_processes_that_decode_and_stay_is_the_uninterrupted_one(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = Signed(data.train.images, data.train.labels, data.train.augment)
    signed.book = tmp_path / "book"
    data = replace(data, train=signed, workers=2)
    recipe = replace(RECIPE, evaluate_every=0)
    whole, resumed = model(), model()
    train(whole, data, recipe, tmp_path / "whole")
    signatures = signed.book.read_text().split()
    assert (len(signatures), len({*signatures})) == (3 * 48, 2)
    assert str(os.getpid()) not in signatures
    with monkeypatch.context() as patch:
        patch.setattr(adaptvit.training.resuming, "write_atomically", stopping_after(epochs=1))
        with pytest.raises(KeyboardInterrupt):
            train(model(), data, recipe, tmp_path / "resumed")
    train(resumed, data, recipe, tmp_path / "resumed")
    assert same_weights(resumed, whole)


def test_a_finished_run_is_read_back(data: Data, tmp_path: Path) -> None:
    first, second = model(), model()
    history = train(first, data, RECIPE, tmp_path)
    assert train(second, data, RECIPE, tmp_path) == history
    assert same_weights(first, second)


def test_a_dial_of_other_weights_is_gone(data: Data, tmp_path: Path) -> None:
    trained, kept = model(), Dial((20.0, 40.0), (0.5, 0.9))
    trained.dial = kept
    with pytest.raises(ValueError, match="which no parameter matches"):
        train(trained, data, replace(RECIPE, freeze=("nothing",)), tmp_path)
    assert trained.dial is kept  # no weight has changed
    train(trained, data, RECIPE, tmp_path)
    assert trained.dial is None


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


@pytest.mark.parametrize("precision", [pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
def test_a_compiled_training_is_the_eager_one(
    precision: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, knobs = [], []
    compiler, steer = torch.compile, adaptvit.training.loop.meet_target

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    def meet(one: AdaptiveViT, *arguments: Any, **more: Any) -> None:
        steer(one, *arguments, **more)
        knobs.append(one.config.gate_center)

    monkeypatch.setattr(torch, "compile", partial(compiler, backend=backend, fullgraph=True))
    monkeypatch.setattr(adaptvit.training.loop, "meet_target", meet)
    recipe = replace(RECIPE, optimizer="sgd", epochs=1, warmup_epochs=0, precision=precision)
    recipe = replace(recipe, target=0.7, steer_every=2)
    eager, compiled = model(), model()
    (history,) = train(eager, data, recipe, tmp_path / "eager")
    assert not graphs
    knobs.clear()
    (again,) = train(compiled, data, replace(recipe, compile=True), tmp_path / "compiled")
    assert len(graphs) == len(set(knobs))
    near = 1e-5 if precision == "float32" else 1e-2
    assert again.loss == pytest.approx(history.loss, abs=near)
    assert again.terms == pytest.approx(history.terms, abs=near)
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=near, rtol=near)
    with pytest.raises(ValueError, match="would compile every update anew"):
        replace(recipe, compile=True, final_gate_temperature=1.0)


class Waits(TorchFunctionMode):
    """Counts what would wait for a device, by the line that does."""

    KINDS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.KINDS:
            place = next(one for one in reversed(traceback.extract_stack()) if one.filename != __file__)
            self.count[f"{Path(place.filename).name}:{place.lineno} {func.__name__}"] += 1
        return func(*args, **(kwargs or {}))


class Names(TorchDispatchMode):
    """Which operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "config", [FullConfig(), DynamicViTConfig(blocks=(1,)), AVIT], ids=lambda config: config.method
)
def test_a_step_waits_for_the_device_less_than_once(config: Any, data: Data, tmp_path: Path) -> None:
    data = replace(data, workers=1)  # a worker's own waits are for no device
    recipe = replace(RECIPE, epochs=1, warmup_epochs=0, optimizer="sgd", evaluate_every=0, mixup=0.5)
    waits = {}
    for batch_size in (24, 2):  # 2 steps and 24
        with Waits() as seen:
            train(model(config), data, replace(recipe, batch_size=batch_size), tmp_path / str(batch_size))
        waits[batch_size] = seen.count
    more = waits[2] - waits[24]
    for line in [line for line in more if line.startswith(("packed.py", "avit.py"))]:
        del more[line]  # of the layout, and of a warning that is for CPUs alone
    assert more.total() < 22, more
    assert more.total() > 0, waits  # the tally is read


@pytest.mark.parametrize(
    "mask", [None, torch.tensor([[True, False, True, True, True]]), torch.arange(5.0)[None]], ids=str
)
def test_attention_by_products_is_torchs(mask: Tensor | None) -> None:
    exact = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
    grad = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    found = []
    for dtype, mode in ((torch.float64, nullcontext()), (torch.bfloat16, Products())):
        given = exact.detach().to(dtype).requires_grad_()
        with mode, Names() as seen:
            out = scaled_dot_product_attention(
                *given, mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
            )
        out.backward(grad.to(dtype))
        found.append((out, given.grad, set(seen.names)))
    (out, gradient, _), (half, half_gradient, names) = found
    assert not any("scaled_dot_product" in name for name in names)
    torch.testing.assert_close(half.double(), out, atol=0.03, rtol=0.03)
    torch.testing.assert_close(half_gradient.double(), gradient, atol=0.06, rtol=0.03)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_attends_by_products_in_half_precision_alone(precision: str, data: Data, tmp_path: Path) -> None:
    with Names() as seen:
        train(
            model(FullConfig()),
            data,
            replace(RECIPE, epochs=1, warmup_epochs=0, evaluate_every=0, precision=precision),
            tmp_path,
        )
    torchs = any("scaled_dot_product" in name for name in seen.names)
    assert torchs == (precision == "float32")


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
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.name != ".lock") == [".jsonl", ".pt", ".pt"]


def interrupted(data: Data, output: Path, epochs: int) -> tuple[Path, Path]:
    """A training stopped after so many epochs: its last two checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptvit.training.resuming, "write_atomically", stopping_after(epochs))
        with pytest.raises(KeyboardInterrupt):
            train(model(), data, RECIPE, output)
    (last,) = output.glob("checkpoint-*.pt")
    (before,) = output.glob("previous-*.pt") if epochs > 1 else (None,)
    return last, before


def flipped(path: Path) -> None:
    """One bit of a weight is another, which torch reads without a word."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    torch.load(path)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(data: Data, tmp_path: Path) -> None:
    whole, resumed = model(), model()
    history = train(whole, data, RECIPE, tmp_path / "whole")
    last, before = interrupted(data, tmp_path / "resumed", epochs=2)
    flipped(last)
    with pytest.warns(UserWarning, match=rf"{last.name}' is damaged: the checksum .* {before.name}, after epoch 1"):
        again = train(resumed, data, RECIPE, tmp_path / "resumed")
    assert same_weights(resumed, whole)
    assert [replace(epoch, seconds=0) for epoch in again] == [replace(epoch, seconds=0) for epoch in history]
    (log,) = (tmp_path / "resumed").glob("log-*.jsonl")
    assert [json.loads(line) for line in log.read_text().splitlines()] == [asdict(epoch) for epoch in again]
    assert [len(torch.load(path)["history"]) for path in (before, last)] == [2, 3]


def test_a_checkpoint_alone_is_gone_on_from_whatever_its_name(data: Data, tmp_path: Path) -> None:
    last, before = interrupted(data, tmp_path, epochs=2)
    before.unlink()  # as an earlier version left it
    assert len(train(model(), data, RECIPE, tmp_path)) == 3
    os.replace(last, before)  # as a process that is killed between two names leaves it
    assert len(train(model(), data, RECIPE, tmp_path)) == 3


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 no zip", bytes(5000), None], ids=str)
def test_damaged_checkpoints_are_named(content: bytes | None, data: Data, tmp_path: Path) -> None:
    last, before = interrupted(data, tmp_path, epochs=2)
    whole = last.read_bytes()
    for path in (last, before):
        path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=rf"{last.name}' is damaged.*{before.name}' is damaged.*remove") as error:
        train(model(), data, RECIPE, tmp_path)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)


def test_a_finished_training_whose_checkpoint_is_damaged_is_not_trained_again_unasked(
    data: Data, tmp_path: Path
) -> None:
    trained, again = model(), model()
    train(trained, data, RECIPE, tmp_path)
    (last,) = tmp_path.glob("checkpoint-*.pt")
    flipped(last)
    with pytest.raises(ValueError, match=rf"{last.name}' is damaged.*was finished.*epoch 3 again from previous-"):
        train(model(), data, RECIPE, tmp_path)
    last.unlink()
    train(again, data, RECIPE, tmp_path)
    assert same_weights(again, trained)


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


def test_a_training_that_old_settings_began_is_left_and_said(data: Data, tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=1, warmup_epochs=0)
    train(model(FullConfig()), data, recipe, tmp_path)
    (old,) = tmp_path.glob("checkpoint-*.pt")
    before = old.read_bytes()
    with pytest.warns(UserWarning, match=f"is of this very run, which begins afresh: {old.name} is of other settings"):
        history = train(model(FullConfig()), data, replace(recipe, clip_grad=2), tmp_path)
    assert len(history) == 1
    assert old.read_bytes() == before
    assert len([*tmp_path.glob("checkpoint-*.pt")]) == 2


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
    with pytest.raises(ValueError, match="batch_size is 64, more than the training set of 48 digits"):
        train(model(), data, replace(RECIPE, batch_size=64), tmp_path)


def test_ema_is_what_is_evaluated_and_left(data: Data, tmp_path: Path) -> None:
    recipe = replace(RECIPE, ema_decay=0.5)
    averaged = model(FullConfig())
    history = train(averaged, data, recipe, tmp_path / "ema")
    (checkpoint,) = (tmp_path / "ema").glob("checkpoint-*.pt")
    saved = torch.load(checkpoint)
    assert all(torch.equal(value, saved["ema"][name]) for name, value in averaged.state_dict().items())
    assert not all(torch.equal(value, saved["model"][name]) for name, value in averaged.state_dict().items())
    assert history[-1].test["top1"] == evaluate(averaged, data.test, batch_size=recipe.batch_size).top1
    assert history[-1].test["loss"] == pytest.approx(evaluate(averaged, data.test).loss, rel=1e-5)


def test_an_averaged_run_resumes_exactly(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(
        RECIPE, ema_decay=0.9, mixup=0.8, cutmix=1.0, accumulate=2, batch_size=8, target=0.7, ease_epochs=1
    )
    recipe = replace(recipe, steer_every=2)
    whole, resumed = model(), model()
    history = train(whole, data, recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(adaptvit.training.resuming, "write_atomically", stopping_after(epochs=2))
        with pytest.raises(KeyboardInterrupt):
            train(model(), data, recipe, tmp_path / "resumed")
    again = train(resumed, data, recipe, tmp_path / "resumed")
    assert same_weights(resumed, whole)
    assert resumed.config == whole.config
    assert [replace(epoch, seconds=0) for epoch in again] == [replace(epoch, seconds=0) for epoch in history]


def test_accumulated_gradients_are_those_of_a_large_batch(data: Data, tmp_path: Path) -> None:
    still = replace(data, train=Images(data.train.images, data.train.labels))
    recipe = replace(RECIPE, optimizer="sgd", clip_grad=None, evaluate_every=0)

    def build() -> AdaptiveViT:
        return FullConfig().build(
            small_vit(img_size=16, patch_size=4, depth=3, in_chans=1, num_classes=10, dtype=torch.float64)
        )

    double = Images(still.train.images.double(), still.train.labels)
    still = replace(still, train=double, test=double)
    large, small = build(), build()
    train(large, still, recipe, tmp_path / "large")
    train(small, still, replace(recipe, batch_size=8, accumulate=2), tmp_path / "small")
    for one, other in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_frozen_parameters_stay(data: Data, tmp_path: Path) -> None:
    before = model(FullConfig())
    after = model(FullConfig())
    train(after, data, replace(RECIPE, freeze=("patch_embed.*", "blocks.0.*")), tmp_path)
    moved = {
        name
        for (name, one), other in zip(before.vit.named_parameters(), after.vit.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert not any(name.startswith(("patch_embed.", "blocks.0.")) for name in moved)
    assert {"head.weight", "blocks.1.attn.qkv.weight", "pos_embed"} <= moved


@pytest.mark.parametrize(("pattern", "words"), [("blocks.9.*", "no parameter matches"), ("*", "nothing to train")])
def test_patterns_that_freeze_nothing_or_all_are_refused(pattern: str, words: str, data: Data, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        train(model(), data, replace(RECIPE, freeze=(pattern,)), tmp_path)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_teacher_is_followed(kind: str, data: Data, tmp_path: Path) -> None:
    class Stubborn(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 8 * torch.nn.functional.one_hot(torch.full((len(images),), 3), 10).float()

    pupil = model(FullConfig())
    recipe = replace(RECIPE, epochs=8, learning_rate=3e-3, distillation=kind, distillation_weight=1.0, evaluate_every=0)
    train(pupil, data, recipe, tmp_path, teacher=Stubborn())
    with torch.inference_mode():
        answers = pupil.eval()(data.train.images).argmax(dim=1)
    assert (answers == 3).float().mean() > 0.9


def test_dynamicvit_learns_from_a_teachers_patches(data: Data, tmp_path: Path) -> None:
    size = {"img_size": 16, "patch_size": 4, "depth": 3, "in_chans": 1, "num_classes": 10}
    teacher = small_vit(**size)
    with torch.no_grad():
        teacher.norm.weight.zero_()
        teacher.norm.bias.fill_(30.0)  # all its patches are that, and the pupil's are far from it
    recipe = replace(RECIPE, epochs=1, warmup_epochs=0, learning_rate=1e-6, evaluate_every=0)
    pupil = model(DynamicViTConfig(token_weight=0.5))
    (epoch,) = train(pupil, data, recipe, tmp_path / "taught", teacher=teacher)
    assert epoch.terms["tokens"] == pytest.approx(0.5 * 30**2, rel=0.02)
    (epoch,) = train(model(DynamicViTConfig(token_weight=0.0)), data, recipe, tmp_path / "0", teacher=teacher)
    assert epoch.terms.keys() == {"ratio"}
    with pytest.raises(TypeError, match="learns from a teacher's patches, which Full does not give: set"):
        train(pupil, data, recipe, tmp_path, teacher=FullConfig().build(teacher))
    with pytest.raises(ValueError, match="with token_weight=0 it learns its logits alone"):
        train(pupil, data, recipe, tmp_path / "wide", teacher=small_vit(**{**size, "patch_size": 8}))


@pytest.mark.parametrize("config", [DynamicViTConfig(), FullConfig()], ids=lambda config: config.method)
def test_a_teacher_of_another_size_is_refused_in_a_sentence(config: Any, data: Data, tmp_path: Path) -> None:
    pupil, teacher = model(config), small_vit(img_size=24, patch_size=4, in_chans=1, num_classes=10)
    lessons = teacher if pupil.learns_patches else FullConfig().build(teacher)
    with pytest.raises(ValueError, match=r"images are 16 x 16 pixels, but .* takes 24 x 24"):
        train(pupil, data, RECIPE, tmp_path, teacher=lessons)


def test_the_knob_is_steered_to_the_target(data: Data, tmp_path: Path) -> None:
    recipe = replace(RECIPE, target=0.6, ease_epochs=2, steer_every=1, evaluate_every=1)
    trained = model()
    history = train(trained, data, recipe, tmp_path)
    knobs = [epoch.knob for epoch in history]
    assert knobs[0] > knobs[-1] == trained.config.gate_center
    shares = [epoch.test["gmacs"] / epoch.test["gmacs_dense"] for epoch in history]
    assert shares[0] > shares[-1]
    assert shares[-1] == pytest.approx(0.6, abs=0.1)


def test_a_batch_that_cannot_meet_the_target_leaves_the_knob_and_the_run_goes_on(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = model()
    center = trained.config.gate_center

    def out_of_reach(*_: object, **__: object) -> None:
        raise ValueError("no gate_center meets the target")

    monkeypatch.setattr(adaptvit.training.loop, "meet_target", out_of_reach)
    recipe = replace(RECIPE, target=0.6, steer_every=2)
    with pytest.warns(UserWarning, match=r"the knob stays as it was at update \d: no gate_center meets the target"):
        history = train(trained, data, recipe, tmp_path)
    assert [epoch.knob for epoch in history] == [center] * 3


def test_a_target_needs_a_knob(data: Data, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="FullConfig has no knob"):
        train(model(FullConfig()), data, replace(RECIPE, target=0.5), tmp_path)


def test_gates_cool_to_their_last_temperature_and_so_after_a_resume(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AdaViTConfig(temperature=8.0, macs_target=None)
    recipe = replace(RECIPE, final_gate_temperature=1.0)
    whole = model(config)
    train(whole, data, recipe, tmp_path / "whole")
    assert whole.config.temperature == pytest.approx(1.0)
    resumed = model(config)
    with monkeypatch.context() as patch:
        patch.setattr(adaptvit.training.resuming, "write_atomically", stopping_after(1))
        with pytest.raises(KeyboardInterrupt):
            train(resumed, data, recipe, tmp_path / "resumed")
    resumed = model(config)
    train(resumed, data, recipe, tmp_path / "resumed")
    assert resumed.config == whole.config
    assert same_weights(resumed, whole)
    with pytest.raises(ValueError, match="AViTConfig has no temperature"):
        train(model(AVIT), data, recipe, tmp_path / "avit")


def test_the_methods_own_parameters_learn_at_a_rate_of_their_own(data: Data, tmp_path: Path) -> None:
    config = AdaViTConfig(macs_target=None)
    still, moved = model(config), model(config)
    before = {name: value.clone() for name, value in still.named_parameters()}
    for adaptive, scale in ((still, 1e-9), (moved, 5.0)):
        train(adaptive, data, replace(RECIPE, epochs=2, method_learning_rate=scale), tmp_path / str(scale))
    for name, value in still.named_parameters():
        unchanged = torch.allclose(value, before[name], atol=1e-7, rtol=0)
        assert unchanged == (not name.startswith("vit.")), name
    own = [name for name in before if name.startswith("sublayer_policy")]
    assert not any(torch.allclose(dict(moved.named_parameters())[name], before[name], atol=1e-4) for name in own)


def test_half_precision_learns_like_full(data: Data, tmp_path: Path) -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        history = train(model(), data, replace(RECIPE, precision=precision, epochs=4), tmp_path / precision)
        losses[precision] = history[-1].loss
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)


def test_a_checkpoint_is_not_gone_on_from_unasked(data: Data, tmp_path: Path) -> None:
    train(model(), data, RECIPE, tmp_path)
    with pytest.raises(FileExistsError, match="resume it, or choose another folder"):
        train(model(), data, RECIPE, tmp_path, resume=False)


def test_two_trainings_into_one_folder_are_refused(data: Data, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(FileExistsError, match="another training is writing"):
        train(model(), data, RECIPE, tmp_path)


def test_a_dead_worker_is_said(data: Data, tmp_path: Path) -> None:
    class Deadly(Images):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    deadly = replace(data, train=Deadly(data.train.images, data.train.labels), workers=1)
    with pytest.raises(ChildProcessError, match="a process that decodes images died in epoch 1"):
        train(model(), deadly, RECIPE, tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(adaptvit.training.resuming, "write_atomically", stopping_after(epochs=1))
        with pytest.raises(KeyboardInterrupt):
            train(model(), data, RECIPE, tmp_path)
    (checkpoint,) = tmp_path.glob("checkpoint-*.pt")
    before = checkpoint.read_bytes()

    def full(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        train(model(), data, RECIPE, tmp_path)
    assert checkpoint.read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_unreadable_training_images_are_counted_and_named(data: Data, tmp_path: Path) -> None:
    class Holed(Images):
        def __getitem__(self, index: int) -> Any:
            return Unreadable("broken.jpg", "truncated") if index == 5 else super().__getitem__(index)

    holed = replace(data, train=Holed(data.train.images, data.train.labels))
    with pytest.warns(UserWarning, match=r"'broken.jpg' cannot be read, another took its place: truncated"):
        history = train(model(), holed, RECIPE, tmp_path)
    assert [epoch.unreadable for epoch in history] == [1, 1, 1]


class Short(IterableDataset):
    """A stream of as many images as it has, whatever it promises."""

    def __init__(self, images: Images, count: int) -> None:
        self.images, self.count = images, count

    def __len__(self) -> int:
        return 48

    def __iter__(self) -> Iterator[Any]:
        return (self.images[index] for index in range(self.count))


def test_a_stream_that_ends_too_early_begins_again(data: Data, tmp_path: Path) -> None:
    taught = model(FullConfig())
    recipe = replace(RECIPE, epochs=1, warmup_epochs=0)
    seen = []
    taught.register_forward_hook(lambda *call: seen.append(len(call[1][0])) if taught.training else None)
    train(taught, replace(data, train=Short(data.train, 20)), recipe, tmp_path / "20")
    assert seen == [16, 16, 16]
    with pytest.raises(ValueError, match="gives no whole batch of 16 training images"):
        train(model(FullConfig()), replace(data, name="short", train=Short(data.train, 10)), recipe, tmp_path / "10")


def test_tensorboard_gets_every_epoch(data: Data, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(model(), data, replace(RECIPE, tensorboard=True), tmp_path)
    assert list(tmp_path.rglob("events.out.tfevents.*"))
