"""Resident memory and open files over long runs: python benchmarks/long_runs.py WHAT [FOLDER]

    forwards    2,000 forward passes of each method in each layout that it has, a small ViT
    evaluate    20,000 images of FOLDER, repeated, through `evaluate` with two processes that decode, twice
    serve       10,000 images to `adaptvit serve`, a hundredth of them broken, by four clients
    playground  10,000 requests for the page of `adaptvit playground`, by four clients

A line of JSON for each case: MB and files after a tenth of the run, in which libraries and caches fill, and at the end.
"""

import argparse
import gc
import http.client
import itertools
import json
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.data import Dataset

from adaptvit import Dense, FullConfig, Masked, Packed, Slab, measure_plan, save
from adaptvit.budget import measure_dial
from adaptvit.data import find_images, read_image
from adaptvit.measure.evaluate import evaluate
from adaptvit.methods import METHODS
from adaptvit.model import AdaptiveViT
from adaptvit.usage import Bits

STARTS = "import sys, adaptvit_cli; sys.exit(adaptvit_cli.main())"
CLIENTS = 4


def memory(process: int | str = "self") -> float:
    """Resident MB of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def files(process: int | str = "self") -> int:
    """Open in a process."""
    return len(os.listdir(f"/proc/{process}/fd"))


def children(process: int | None = None) -> list[int]:
    """Of a process, this one unless told."""
    process = os.getpid() if process is None else process
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        found += [int(number) for number in (task / "children").read_text().split()]
    return found


def tell(**figures: Any) -> None:
    """A line."""
    print(json.dumps(figures), flush=True)


def small_vit() -> torch.nn.Module:
    """Four blocks, 32 pixels."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10
    ).eval()


def of_method(name: str, batches: list[torch.Tensor]) -> AdaptiveViT:
    """A model whose knob, where it has one, spends 0.7 of the dense MACs or the nearest that it can."""
    model = METHODS[name]().build(small_vit()).eval()
    if model.config.knob is not None:
        dial = measure_dial(model, torch.cat(batches))
        model.dial = dial
        model.compute = min(max(0.7, dial.shares[0]), dial.shares[-1])
    return model


def forwards(count: int) -> None:
    """By method and layout."""
    warnings.simplefilter("ignore")
    batches = [torch.randn(2, 3, 32, 32) * (0.5 + number) for number in range(8)]
    for name in METHODS:
        try:
            model = of_method(name, batches)
        except (TypeError, ValueError) as error:
            tell(what="forwards", method=name, left_out=str(error))
            continue
        for layout in (Masked, Dense, Packed, Slab):
            try:
                model.plan = None
                if layout is Slab:
                    model.plan = measure_plan(model, torch.cat(batches))
                with torch.inference_mode():
                    model(batches[0], layout, detailed=True)
            except (NotImplementedError, TypeError, ValueError):
                continue  # which the method has not
            start, images = time.perf_counter(), itertools.cycle(batches)
            with torch.inference_mode():
                for number in range(count):
                    model(next(images), layout, detailed=True)
                    if number == count // 10:
                        gc.collect()
                        before = memory(), files()
            gc.collect()
            tell(
                what="forwards",
                method=name,
                layout=layout.__name__,
                count=count,
                seconds=round(time.perf_counter() - start, 1),
                mb=[round(before[0], 1), round(memory(), 1)],
                files=[before[1], files()],
            )


class Repeated(Dataset):
    """The images of a folder, again and again, small."""

    def __init__(self, folder: Path, count: int) -> None:
        self.names = [str(folder / name) for name in find_images(folder)]
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with open(self.names[index % len(self.names)], "rb") as file:
            image = read_image(file).resize((32, 32))
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 32, 3).permute(
            2, 0, 1
        ) / 255, index % 10


def evaluated(folder: Path, count: int) -> None:
    """`evaluate` with two workers, and again: what the first run left for the second is no part of it.

    Memory is that of this process; the workers' is summed. `record_mb` is what the result holds of its images.
    """
    model = METHODS["avit"](gate_scale=4.0, gate_center=2.0).build(small_vit()).eval()
    for turn in range(2):
        seen: list[tuple[float, int, float]] = []

        def look(*_: Any, seen: list[tuple[float, int, float]] = seen) -> None:
            seen.append((memory(), files(), sum(memory(one) for one in children())))

        hook = model.register_forward_hook(look)
        start = time.perf_counter()
        result = evaluate(model, Repeated(folder, count), batch_size=50, workers=2)
        hook.remove()
        early, last = seen[len(seen) // 10], seen[-1]
        kept = [result.losses, result.correct, *vars(result.usage).values()]
        tensors = [part.packed if isinstance(part, Bits) else part for part in kept]
        tell(
            what="evaluate",
            turn=turn,
            images=result.images,
            seconds=round(time.perf_counter() - start, 1),
            mb=[round(early[0], 1), round(last[0], 1)],
            record_mb=round(sum(one.nbytes for one in tensors if isinstance(one, torch.Tensor)) / 1e6, 1),
            workers_mb=[round(early[2], 1), round(last[2], 1)],
            files=[early[1], last[1]],
            files_after=files(),
            processes_after=len(children()),
        )
        del result, kept, tensors


@contextmanager
def started(pattern: str, *words: str) -> Iterator[tuple[int, int]]:
    """A command that serves: its process and its port, once its line tells it."""
    process = subprocess.Popen([sys.executable, "-c", STARTS, *words], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.match(pattern, process.stdout.readline())
        assert found, "it did not start"
        yield process.pid, int(found[1])
    finally:
        process.terminate()
        process.wait(90)


def asked(
    what: str, process: int, count: int, ask: Callable[[http.client.HTTPConnection, int], int], port: int
) -> None:
    """So many requests by a few clients, and what the server has then."""
    statuses: dict[int, int] = {}
    lock, start = threading.Lock(), time.perf_counter()

    def some(numbers: range) -> None:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
            for number in numbers:
                try:
                    status = ask(connection, number)
                except (ConnectionError, http.client.HTTPException):  # of a connection that was idle for too long
                    connection.close()
                    status = ask(connection, number)
                with lock:
                    statuses[status] = statuses.get(status, 0) + 1

    def all_of(numbers: range) -> None:
        clients = [threading.Thread(target=some, args=(numbers[own::CLIENTS],)) for own in range(CLIENTS)]
        for one in clients:
            one.start()
        for one in clients:
            one.join()

    all_of(range(count // 10))
    time.sleep(1)
    before = memory(process), files(process)
    all_of(range(count // 10, count))
    time.sleep(1)
    tell(
        what=what,
        requests=count,
        seconds=round(time.perf_counter() - start, 1),
        statuses=statuses,
        mb=[round(before[0], 1), round(memory(process), 1)],
        files=[before[1], files(process)],
    )


def served(folder: Path, count: int, place: Path) -> None:
    """`adaptvit serve` with a small model."""
    path = place / "small.safetensors"
    save(FullConfig().build(small_vit()), path)
    contents = [(folder / name).read_bytes() for name in find_images(folder)[:100]]
    contents[-1] = contents[-1][: len(contents[-1]) // 2]

    def ask(connection: http.client.HTTPConnection, number: int) -> int:
        connection.request("POST", "/predict", contents[number % len(contents)])
        answer = connection.getresponse()
        answer.read()
        return answer.status

    with started(r"http://\S+?:(\d+)/predict", "serve", str(path), "--port", "0") as (process, port):
        asked("serve", process, count, ask, port)


def paged(count: int) -> None:
    """`adaptvit playground`: the page, and what it fetches first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def ask(connection: http.client.HTTPConnection, number: int) -> int:
        connection.request("GET", ("/", "/config", "/theme.css")[number % 3])
        answer = connection.getresponse()
        answer.read()
        return answer.status

    with started(r"http://\S+?:(\d+) shows", "playground", "--port", port) as (process, found):
        asked("playground", process, count, ask, found)


def main() -> None:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("forwards", "evaluate", "serve", "playground"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--count", type=int)
    told = parser.parse_args()
    torch.set_num_threads(1)
    if told.what in ("evaluate", "serve") and told.folder is None:
        parser.error(f"{told.what} takes a folder of images")
    if told.what == "forwards":
        forwards(told.count or 2000)
    elif told.what == "evaluate":
        evaluated(told.folder, told.count or 20_000)
    elif told.what == "playground":
        paged(told.count or 10_000)
    else:
        with tempfile.TemporaryDirectory() as place:
            served(told.folder, told.count or 10_000, Path(place))


if __name__ == "__main__":
    main()
