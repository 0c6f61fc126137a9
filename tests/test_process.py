"""A long call leaves its caller's process as it was."""

import copy
import io
import itertools
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import tarfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from filelock import FileLock
from models import small_vit
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import Dataset, IterableDataset

import adaptvit.commands.demo
from adaptvit import AdaptiveViT, AViTConfig, FullConfig, cli, save
from adaptvit.commands.adapt import set_budget
from adaptvit.commands.bench import BenchConfig, bench
from adaptvit.commands.compare_methods import MethodsConfig, compare_methods
from adaptvit.commands.compare_variants import Comparison, compare
from adaptvit.commands.draw import DrawConfig, draw
from adaptvit.commands.evaluate import EvaluateConfig, evaluate_model
from adaptvit.commands.predict import PredictConfig, predict
from adaptvit.data import Data, DataConfig, Images, Unreadable, open_digits, sets
from adaptvit.measure.evaluate import evaluate
from adaptvit.methods.evit import EViT
from adaptvit.methods.full import Full
from adaptvit.process import as_found, best_device, fault, pins
from adaptvit.training import loop
from adaptvit.training.loop import train
from adaptvit.training.recipe import Recipe
from adaptvit.training.resuming import Checkpoints
from adaptvit.training.run import Run, train_run

SHARED = (PartialState, AcceleratorState, GradientState)
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "in_chans": 1}
RECIPE = Recipe(epochs=1, warmup_epochs=0, batch_size=16, precision="bfloat16")


def state() -> dict[str, Any]:
    """All that a call might change of the process."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [np.asarray(part).tolist() for part in np.random.get_state()],
        "python": random.getstate(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "accelerate": [dict(one._shared_state) for one in SHARED],
        "environment": {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "backend": dict.__getitem__(matplotlib.rcParams, "backend"),  # the public way to read it chooses one
        "folder": Path.cwd(),
    }


@pytest.fixture
def caller() -> Iterator[None]:
    """A process in a state that no call of ours would make."""
    before, shared = state(), [dict(one._shared_state) for one in SHARED]
    for one in SHARED:
        one._shared_state.clear()
    Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=3)
    torch.set_num_threads(2)
    yield
    for one, old in zip(SHARED, shared, strict=True):
        one._shared_state.clear()
        one._shared_state.update(old)
    torch.set_num_threads(before["threads"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain ViT of two classes and images of these."""
    root = tmp_path_factory.mktemp("process")
    save(FullConfig().build(small_vit(img_size=16, depth=3, num_classes=2)), root / "vit.safetensors")
    for label in ("ant", "bee"):
        for split in ("train", "val"):
            (root / "images" / split / label).mkdir(parents=True)
            for number in range(3):
                noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / "images" / split / label / f"{number}.png")
    return root


def few() -> Data:
    whole = open_digits(size=16, margin=2)
    train, test = (Images(part.images[:16], part.labels[:16]) for part in (whole.train, whole.test))
    return replace(whole, train=train, test=test)


def tiny() -> AdaptiveViT:
    return FullConfig().build(small_vit(img_size=16, depth=2, in_chans=1, num_classes=10))


MODEL, DATA = tiny(), few()
VIT = small_vit(img_size=16, depth=3, in_chans=1, num_classes=10)


def a_run(folder: Path, output: Path, workers: int = 0) -> Run:
    data = DataConfig(root=folder / "images", workers=workers)
    vit = TINY | {"in_chans": 3}
    recipe = replace(RECIPE, batch_size=2)
    return Run(
        model="vit_tiny_patch16_224", model_args=vit, method=FullConfig(), data=data, recipe=recipe, output=output
    )


DEMO = adaptvit.commands.demo.DemoConfig(
    size=16,
    dim=24,
    blocks=2,
    heads=2,
    dense=Recipe(epochs=1, warmup_epochs=0, batch_size=480),
    adaptive=Recipe(epochs=1, warmup_epochs=0, batch_size=480),
    method=replace(adaptvit.commands.demo.METHOD, prior_depth=1),
    target=0.8,
    calibration=16,
    batch=8,
    rounds=1,
    threads=1,
)
BENCH = BenchConfig("test_vit", img_size=32, images=2, batch_size=2, rounds=1, threads=1, target=0.8)
QUICK = {"workers": 1, "timed": 2, "rounds": 1, "latencies": 2, "calibration": 2, "pictures": 0}

CALLS: dict[str, Callable[[Path, Path], object]] = {
    "train": lambda folder, output: train(copy.deepcopy(MODEL), DATA, RECIPE, output),
    "run": lambda folder, output: train_run(a_run(folder, output, workers=1)),
    "evaluate": lambda folder, output: evaluate(MODEL, DATA.test, workers=1),
    "evaluate_model": lambda folder, output: evaluate_model(
        EvaluateConfig(str(folder / "vit.safetensors"), folder / "images", workers=1, rounds=1)
    ),
    "predict": lambda folder, output: predict(
        PredictConfig(str(folder / "vit.safetensors"), folder / "images", output.with_suffix(".csv"), top=1, workers=1)
    ),
    "bench": lambda folder, output: bench(BENCH),
    "demo": lambda folder, output: adaptvit.commands.demo.run_demo(output, DEMO),
    "set_budget": lambda folder, output: set_budget(
        str(folder / "vit.safetensors"), folder / "images", output.with_suffix(".safetensors"), 0.9, method="evit"
    ),
    "compare": lambda folder, output: compare(
        Comparison(question="?", variants={name: a_run(folder, output) for name in ("a", "b")}), output, seeds=2
    ),
    "compare_methods": lambda folder, output: compare_methods(
        MethodsConfig(
            str(folder / "vit.safetensors"), folder / "images", methods=(), budgets=(), output=output, **QUICK
        )
    ),
    "draw": lambda folder, output: draw(
        DrawConfig(str(folder / "vit.safetensors"), folder / "images" / "val" / "ant", output)
    ),
}


@pytest.mark.parametrize("name", [name for name in CALLS if name != "compare"])  # which is `run` over and over
@pytest.mark.usefixtures("caller")
def test_the_callers_process_comes_back_as_it_was(name: str, folder: Path, tmp_path: Path) -> None:
    before = state()
    CALLS[name](folder, tmp_path / "output")
    assert state() == before


class Stop(Exception):
    """Raised in the middle of a call."""


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("caller")
def test_the_callers_process_comes_back_as_it_was_where_the_call_raises(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        torch.rand(1), np.random.rand(1), random.random()
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        raise Stop

    for method, call in ((Full, "run"), (EViT, "run"), (VisionTransformer, "forward")):
        monkeypatch.setattr(method, call, stop)
    before = state()
    with pytest.raises(Stop):
        CALLS[name](folder, tmp_path / "output")
    assert state() == before


def test_what_the_block_changes_comes_back_and_what_it_makes_stays() -> None:
    def handler(*_: object) -> None: ...

    before = state()
    with as_found():
        made = torch.rand(2)
        np.random.rand()
        random.random()
        signal.signal(signal.SIGUSR1, handler)
        warnings.simplefilter("ignore")
        torch.set_num_threads(before["threads"] + 1)
    assert state() == before
    assert torch.equal(torch.rand(2), made)


def test_a_call_in_a_thread_leaves_signals_alone() -> None:
    said = []

    @as_found()
    def work() -> None:
        said.append(torch.rand(1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said


class Blank(Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(1, 16, 16), index % 10


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files as Linux lists them")
def test_no_file_stays_open_for_a_batch_that_a_worker_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, forward = [], Full.run

    def count(self: AdaptiveViT, *arguments: Any) -> Any:
        seen.append(len(os.listdir("/proc/self/fd")))
        return forward(self, *arguments)

    monkeypatch.setattr(Full, "run", count)
    result = evaluate(MODEL, Blank(), batch_size=1, workers=1)
    assert (result.images, len(seen)) == (40, 40)
    assert max(seen[-10:]) <= max(seen[:10])


def test_float64_is_asked_of_no_device_but_through_what_knows_those_that_have_none() -> None:
    package = Path(adaptvit.__file__).parent
    for path in package.rglob("*.py"):
        if path != package / "process.py":
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not re.search(r"(?<!cpu\(\))\.double\(\)", line), f"{path}:{number}"


def forks(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that forks processes."""
    fit = hasattr(os, "fork") and not torch.accelerator.is_available()
    there = pytest.mark.skipif(not fit, reason="needs a system that forks processes, and autograd without threads")
    return pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")(there(test))


def two_processes(target: Any, output: Path, count: int) -> list[Any]:
    """What two processes tell, as those that torchrun starts find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    runs = [context.Process(target=target, args=(rank, port, output, told)) for rank in "01"]
    for one in runs:
        one.start()
    try:
        found = [told.get(timeout=60) for _ in range(count)]
        for one in runs:
            one.join(timeout=60)
            assert one.exitcode == 0
    finally:
        for one in runs:
            one.kill()
    return found


def join_as(rank: str, port: str) -> None:
    """Be one of two processes of torchrun."""
    everyone = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= everyone | {"OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank}
    for state in SHARED:
        state._reset_state()


def trained_twice(rank: str, port: str, output: Path, told: Any) -> None:
    """What a sweep over seeds does in a process of torchrun."""
    join_as(rank, port)
    for seed in (0, 1):
        model = copy.deepcopy(MODEL)
        train(model, DATA, replace(RECIPE, batch_size=4, seed=seed), output / str(seed))
        told.put((rank, seed, sum(parameter.sum().item() for parameter in model.parameters())))


@forks
def test_two_trainings_follow_one_another_in_the_processes_of_torchrun(tmp_path: Path) -> None:
    weights = {(rank, seed): found for rank, seed, found in two_processes(trained_twice, tmp_path, 4)}
    assert weights["0", 0] == weights["1", 0] != weights["0", 1] == weights["1", 1]


def losses_in_float64(batch_size: int, output: Path, key: str | None = None) -> list[list[float]]:
    whole = open_digits(size=16, margin=2)
    small = Images(whole.train.images[:48].double(), whole.train.labels[:48])
    vit = small_vit(img_size=16, patch_size=4, depth=3, in_chans=1, num_classes=10, dtype=torch.float64)
    model = AViTConfig(gate_scale=4.0, gate_center=2.0, prior_weight=0.5, ponder_weight=0.1).build(vit)
    recipe = Recipe(epochs=3, batch_size=batch_size, evaluate_every=0, checkpoint_every=2)
    history = train(model, replace(whole, train=small, test=small), recipe, output, key=key)
    return [[epoch.loss, *epoch.terms.values()] for epoch in history]


def half_of_it(rank: str, port: str, output: Path, told: Any) -> None:
    """Stopped after the second epoch's second step, of three, and gone on with."""
    join_as(rank, port)
    step = loop._Training._step

    def stopped(self: Any, number: int, batch: Any) -> Any:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Training, "_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            losses_in_float64(8, output)
    steps: list[int] = []
    loop._Training._step = lambda self, number, batch: steps.append(number) or step(self, number, batch)
    told.put((rank, losses_in_float64(8, output)))
    assert steps == [5, 6, 7, 8]


@forks
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    two = dict(two_processes(half_of_it, tmp_path / "two", 2))
    one = torch.tensor(losses_in_float64(16, tmp_path / "one"))
    torch.testing.assert_close(one, torch.tensor(two["0"]), rtol=1e-6, atol=1e-9)


def half_of_it_stopped(rank: str, port: str, output: Path, told: Any) -> None:
    join_as(rank, port)
    write = Checkpoints.write

    def once(*arguments: Any) -> None:
        write(*arguments)
        raise OSError("full")

    Checkpoints.write = once
    try:
        losses_in_float64(8, output, "stopped")
    except OSError as error:  # in the other a ChildProcessError, which is one
        told.put((rank, str(error)))


@forks
def test_one_process_goes_on_with_what_two_began(tmp_path: Path) -> None:
    told = dict(two_processes(half_of_it_stopped, tmp_path / "two", 2))
    assert told == {"0": "full", "1": "process 0 failed: OSError: full"}
    (log,) = (tmp_path / "two").glob("log-*.jsonl")
    assert log.read_text().count("\n") == 1
    resumed = torch.tensor(losses_in_float64(16, tmp_path / "two", "stopped"))
    whole = torch.tensor(losses_in_float64(16, tmp_path / "one"))
    torch.testing.assert_close(resumed, whole, rtol=1e-6, atol=1e-9)


def spoilt_in_one(rank: str, port: str, output: Path, told: Any) -> None:
    join_as(rank, port)
    model = copy.deepcopy(MODEL)
    if rank == "1":
        model.register_forward_hook(lambda *call: replace(call[2], logits=call[2].logits * torch.nan))
    try:
        train(model, DATA, replace(RECIPE, batch_size=4), output)
    except FloatingPointError as error:
        told.put(str(error))


@forks
def test_a_loss_that_is_not_finite_in_one_process_stops_all_with_one_sentence(tmp_path: Path) -> None:
    sentences = {*two_processes(spoilt_in_one, tmp_path, 2)}
    assert sentences == {
        "the loss is nan at step 1, in epoch 1, in process 1: lower Recipe.learning_rate (0.001); "
        f"0 finished epochs kept in {str(tmp_path)!r}"
    }


class Failing(Dataset):
    """Images, the sixth of which does what ends a process."""

    def __init__(self, end: Callable[[], object]) -> None:
        self.end, self.seen = end, 0

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.seen += 1
        if self.seen == 6:
            self.end()
        return torch.zeros(1, 16, 16), index % 10


def wrong() -> None:
    raise ValueError("this image is cursed")


ENDS: dict[str, tuple[int, Callable[[], object], str]] = {
    "a worker fails": (1, wrong, "ValueError: Caught ValueError in DataLoader worker process 0"),
    "a worker dies": (1, lambda: os.kill(os.getpid(), signal.SIGKILL), "RuntimeError: DataLoader worker"),
    "it is stopped": (0, lambda: os.kill(os.getpid(), signal.SIGINT), "KeyboardInterrupt"),
    "an image fails": (0, wrong, "ValueError: this image is cursed"),
    "a forward fails": (0, lambda: None, "ValueError: this call is cursed"),
    "a loss fails": (0, lambda: None, "ValueError: this call is cursed"),
    "an update fails": (0, lambda: None, "ValueError: this call is cursed"),
    "an average fails": (0, lambda: None, "ValueError: this call is cursed"),
    "a checkpoint fails": (0, lambda: None, "ValueError: this call is cursed"),
    "a log fails": (0, lambda: None, "ValueError: this call is cursed"),
    "another trains there": (0, lambda: None, "FileExistsError: another training is writing to"),
}
CURSED: dict[str, tuple[Any, str]] = {
    "a forward fails": (Full, "run"),
    "a loss fails": (loop, "cross_entropy"),
    "an update fails": (AcceleratedOptimizer, "step"),
    "an average fails": (loop.ModelEmaV3, "update"),
    "a checkpoint fails": (Checkpoints, "write"),
    "a log fails": (Accelerator, "log"),
}
"""What fails the second time that it is called; the first, where that is once a training."""
OF_FIRST = ("a checkpoint fails", "a log fails", "another trains there")
"""What only the process does that writes."""


def cursed(call: Callable[..., Any], number: int) -> Callable[..., Any]:
    """A function whose call of a number fails."""
    calls = itertools.count()

    def called(*given: Any, **more: Any) -> Any:
        if next(calls) == number:
            raise ValueError("this call is cursed")
        return call(*given, **more)

    return called


def ended_in_one(hows: tuple[str, ...], rank: str, port: str, output: Path, told: Any) -> None:
    """A training for each, one after the other in the same processes."""
    join_as(rank, port)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for how in hows:
        workers, end, _ = ENDS[how]
        ends = rank == ("0" if how in OF_FIRST else "1")
        with pytest.MonkeyPatch.context() as patch, ExitStack() as held:
            if how in CURSED and ends:
                owner, name = CURSED[how]
                call, calls = getattr(owner, name), itertools.count()

                def cursed(
                    *given: Any, call: Any = call, calls: Any = calls, first: bool = how in OF_FIRST, **more: Any
                ) -> Any:
                    if next(calls) == (not first):
                        raise ValueError("this call is cursed")
                    return call(*given, **more)

                patch.setattr(owner, name, cursed)
            if how == "another trains there" and ends:
                output.mkdir(exist_ok=True)
                held.enter_context(FileLock(output / ".lock"))
            data = replace(DATA, train=Failing(end if ends else lambda: None), workers=workers)
            try:
                train(copy.deepcopy(MODEL), data, replace(RECIPE, batch_size=4, ema_decay=0.5), output, resume=False)
            except BaseException as error:
                told.put((how, ends, fault(error)))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@forks
@pytest.mark.parametrize("hows", [*zip([*ENDS][:3]), tuple([*ENDS][3:])], ids="; ".join)
def test_a_process_that_fails_ends_all(hows: tuple[str, ...], tmp_path: Path) -> None:
    found = {
        (how, ends): words for how, ends, words in two_processes(partial(ended_in_one, hows), tmp_path, 2 * len(hows))
    }
    dead = "ChildProcessError: a process that decodes images died in epoch 1"
    for how in hows:
        assert found[how, True].startswith(dead if how == "a worker dies" else ENDS[how][2])
        assert re.match(rf"ChildProcessError: process \d failed.*: {re.escape(ENDS[how][2])}", found[how, False]), how


def steered(fails: bool, rank: str, port: str, output: Path, told: Any) -> None:
    join_as(rank, port)
    shares = []
    own = loop.attempt

    def attempt(*arguments: Any) -> Any:
        if fails and rank == "1":
            raise ValueError("these images are cursed")
        trial = own(*arguments)
        shares.append(trial.share)
        return trial

    loop.attempt = attempt
    model = AViTConfig(gate_scale=4.0, gate_center=2.0).build(
        small_vit(img_size=16, depth=3, in_chans=1, num_classes=10)
    )
    recipe = replace(RECIPE, batch_size=4, target=0.7, steer_every=1, precision="float32", evaluate_every=0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(model, replace(DATA, classes=tuple("abcdefghij")), recipe, output)
    told.put((model.config.gate_center, len(shares), shares, [str(one.message) for one in said if "knob" in str(one)]))


@forks
def test_processes_steer_on_the_mean_cost_of_their_images(tmp_path: Path) -> None:
    (one, trials, own, _), (other, others, theirs, _) = two_processes(partial(steered, False), tmp_path, 2)
    assert one == other != 2.0
    assert trials == others > 2
    assert own != theirs  # each looks at images of its own


@forks
def test_steering_that_fails_in_one_process_leaves_the_knob_in_all(tmp_path: Path) -> None:
    found = two_processes(partial(steered, True), tmp_path, 2)
    assert [center for center, *_ in found] == [2.0, 2.0]
    (sentences,) = [said for *_, said in found if said]
    assert sentences == [f"the knob stays as it was at update {n}: these images are cursed" for n in (1, 2)]


class Holed(Images):
    def __getitem__(self, index: int) -> Any:
        return Unreadable(f"{index}.png", "truncated") if index in (2, 13) else super().__getitem__(index)


def evaluated(rank: str, port: str, output: Path, told: Any) -> None:
    join_as(rank, port)
    PartialState(cpu=True)
    test, calls = Holed(DATA.test.images, DATA.test.labels), []
    model = AViTConfig(gate_scale=4.0, gate_center=2.0).build(VIT)
    model.register_forward_hook(lambda *call: calls.append(len(call[1][0])))
    shared = evaluate(model, test, batch_size=3, shared=True)
    here = sum(calls)
    whole = evaluate(model, test, batch_size=3)
    told.put((here, shared.figures == whole.figures, shared.usage == whole.usage, shared.unreadable, shared.figures))


@forks
def test_processes_that_share_an_evaluation_all_have_the_result_of_one(tmp_path: Path) -> None:
    one, other = two_processes(evaluated, tmp_path, 2)
    assert {one[0], other[0]} == {8, 6}  # 16 images in 6 batches, less 2 that cannot be read
    assert one[1] is one[2] is other[1] is other[2] is True
    assert [image.name for image in one[3]] == ["2.png", "13.png"]
    assert one[3:] == other[3:]


def compiled(rank: str, port: str, output: Path, told: Any) -> None:
    join_as(rank, port)
    torch.compile = partial(torch.compile, backend="aot_eager")
    for compiles in (False, True):
        model = AViTConfig(gate_scale=4.0, gate_center=2.0).build(copy.deepcopy(VIT))
        recipe = replace(RECIPE, batch_size=4, precision="float32", optimizer="sgd", compile=compiles, evaluate_every=0)
        train(model, DATA, recipe, output / str(compiles))
        told.put((compiles, [parameter.detach().numpy() for parameter in model.parameters()]))


@pytest.mark.long
@forks
def test_two_processes_train_compiled_as_without(tmp_path: Path) -> None:
    weights: dict[bool, list[Any]] = {False: [], True: []}
    for compiles, found in two_processes(compiled, tmp_path, 4):
        weights[compiles].append(found)
    for eager, one, other in zip(weights[False][0], *weights[True], strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(one, eager, atol=1e-5)


def seen_of_shards(rank: str, port: str, output: Path, told: Any) -> None:
    join_as(rank, port)
    names, opened = [], sets.open_sample

    def look(split: Any, sample: Any) -> Any:
        names.append(sample.name)
        return opened(split, sample)

    sets.open_sample = look
    shards = output / "shards"
    data = DataConfig(
        root=shards,
        dataset="wds/noise",
        train_split="train-{0..3}.tar|16",
        test_split="val.tar",
        class_map=shards / "names.txt",
        workers=0,
    )
    run = a_run(output, output / "run")
    recipe = replace(run.recipe, epochs=2, batch_size=4)
    train_run(replace(run, data=data, recipe=recipe))
    told.put((names[:8], names[8:]))


@forks
def test_two_processes_train_on_different_images_of_a_stream(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "names.txt").write_text("ant\nbee\n")
    for name, first in {"train-0": 0, "train-1": 4, "train-2": 8, "train-3": 12, "val": 16}.items():
        with tarfile.open(shards / f"{name}.tar", "w") as tar:
            for number in range(first, first + 4):
                image = io.BytesIO()
                Image.new("RGB", (16, 16), (number, 0, 0)).save(image, "PNG")
                for ending, content in (("png", image.getvalue()), ("cls", b"%d" % (number % 2))):
                    entry = tarfile.TarInfo(f"{number}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    everything = sorted(f"train-{number // 4}.tar/{number}.png" for number in range(16))
    one, other = two_processes(seen_of_shards, tmp_path, 2)
    for first, second in zip(one, other, strict=True):  # epoch by epoch
        assert sorted(first + second) == everything


class Endless(IterableDataset):
    def __len__(self) -> int:
        return 64

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        return itertools.cycle(Blank())


def on_a_stream_of_all(rank: str, port: str, output: Path, told: Any) -> None:
    join_as(rank, port)
    try:
        train(copy.deepcopy(MODEL), replace(DATA, train=Endless()), RECIPE, output)
    except ValueError as error:
        told.put(str(error))


@forks
def test_a_stream_that_processes_cannot_share_is_refused(tmp_path: Path) -> None:
    for sentence in two_processes(on_a_stream_of_all, tmp_path, 2):
        assert "trains on a stream that 2 processes cannot share: give it set_epoch(seed)" in sentence


@forks
@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_sigterm_to_a_command_and_its_workers_is_told_once(command: str, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "told"
    words = {
        "evaluate": ["evaluate", str(folder / "vit.safetensors"), str(folder / "images"), "--workers", "1"],
        "predict": ["predict", str(folder / "vit.safetensors"), str(folder / "images"), "--workers", "1"],
    }[command]
    words += ["--output", str(tmp_path / "out.csv"), "--top", "1"] if command == "predict" else ["--rounds", "0"]
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        for number in (1, 2):
            os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")

        def stop(*_: object) -> None:  # both at once, as a shell or a service does
            os.killpg(0, signal.SIGTERM)
            time.sleep(30)

        Full.run = stop
        code = cli.main([*words, "--batch-size", "1"])
        sys.stderr.flush()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    lines = map(str.strip, output.read_text().splitlines())
    (only,) = [line for line in lines if line and not re.match("evaluating|predicting", line)]
    assert re.match("adaptvit: interrupted(; the same command goes on|$)", only)


@pytest.mark.parametrize("there", [False, True])
def test_commands_run_on_the_accelerator_where_there_is_one(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    for kind in (BenchConfig, DrawConfig, EvaluateConfig, MethodsConfig, PredictConfig):
        (device,) = (field for field in fields(kind) if field.name == "device")
        assert device.default_factory() == ("cuda" if there else "cpu")


def test_a_budget_is_met_on_the_device_that_is_named(folder: Path, tmp_path: Path) -> None:
    words = [str(folder / "vit.safetensors"), folder / "images", tmp_path / "out.safetensors", 0.9]
    with pytest.raises(
        ValueError, match="device must be cpu, cuda, xpu or mps, or one of these with a number, got 'fridge'"
    ):
        set_budget(*words, device="fridge")
    assert not words[2].exists()
    set_budget(*words, method="ats", device="cpu")
    assert words[2].exists()


@pytest.mark.parametrize(("found", "expected"), [("cuda", "cuda"), ("xpu", "xpu"), ("mps", "cpu"), (None, "cpu")])
def test_commands_run_on_the_accelerator_there_is(
    found: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: found is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(found))
    assert best_device() == expected
    assert pins(torch.device(expected)) == (expected != "cpu")
