"""A long call leaves its caller's process as it was."""

import copy
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from models import small_vit
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import Dataset

import adaptvit.commands.demo
from adaptvit import AdaptiveViT, FullConfig, cli, save
from adaptvit.commands.bench import BenchConfig, bench
from adaptvit.commands.budget import set_budget
from adaptvit.commands.compare_methods import MethodsConfig, compare_methods
from adaptvit.commands.compare_variants import Comparison, compare
from adaptvit.commands.draw import DrawConfig, draw
from adaptvit.commands.evaluate import EvaluateConfig, evaluate_model
from adaptvit.commands.predict import PredictConfig, predict
from adaptvit.data import Data, DataConfig, Images, open_digits
from adaptvit.measure.evaluate import evaluate
from adaptvit.methods.evit import EViT
from adaptvit.methods.full import Full
from adaptvit.process import as_found
from adaptvit.training.loop import train
from adaptvit.training.recipe import Recipe
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


def two_processes(target: Any, output: Path, count: int) -> list[Any]:
    """What two processes tell, as those that torchrun starts find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    runs = [context.Process(target=target, args=(rank, port, output, told), daemon=True) for rank in "01"]
    for one in runs:
        one.start()
    found = [told.get(timeout=60) for _ in range(count)]
    for one in runs:
        one.join(timeout=60)
        assert one.exitcode == 0
    return found


def trained_twice(rank: str, port: str, output: Path, told: Any) -> None:
    """What a sweep over seeds does in a process of torchrun."""
    everyone = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= everyone | {"OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank}
    for state in SHARED:
        state._reset_state()
    for seed in (0, 1):
        model = copy.deepcopy(MODEL)
        train(model, DATA, replace(RECIPE, batch_size=4, seed=seed), output / str(seed))
        told.put((rank, seed, sum(parameter.sum().item() for parameter in model.parameters())))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks processes")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_trainings_follow_one_another_in_the_processes_of_torchrun(tmp_path: Path) -> None:
    weights = {(rank, seed): found for rank, seed, found in two_processes(trained_twice, tmp_path, 4)}
    assert weights["0", 0] == weights["1", 0] != weights["0", 1] == weights["1", 1]


def spoilt_in_one(rank: str, port: str, output: Path, told: Any) -> None:
    everyone = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= everyone | {"OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank}
    for state in SHARED:
        state._reset_state()
    model = copy.deepcopy(MODEL)
    if rank == "1":
        model.register_forward_hook(lambda *call: replace(call[2], logits=call[2].logits * torch.nan))
    try:
        train(model, DATA, replace(RECIPE, batch_size=4), output)
    except FloatingPointError as error:
        told.put(str(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks processes")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_loss_that_is_not_finite_in_one_process_stops_all_with_one_sentence(tmp_path: Path) -> None:
    sentences = {*two_processes(spoilt_in_one, tmp_path, 2)}
    assert sentences == {
        "the loss is nan at step 1, in epoch 1, in process 1: lower Recipe.learning_rate (0.001); "
        f"0 finished epochs kept in {str(tmp_path)!r}"
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks processes")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
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
    with pytest.raises(ValueError, match="device must be cpu, cuda or cuda with a number, got 'fridge'"):
        set_budget(*words, device="fridge")
    assert not words[2].exists()
    set_budget(*words, method="ats", device="cpu")
    assert words[2].exists()
