"""The adaptive server beside a dense one under the same load: python benchmarks/serve_load.py FAST DENSE FOLDER

    adaptvit adapt vit_tiny_patch16_224 FOLDER fast.safetensors --target 0.6
    python benchmarks/serve_load.py fast.safetensors vit_tiny_patch16_224 FOLDER --json load.json --picture load.png

Starts `adaptvit serve` for both on 127.0.0.1. What the dense one answers at most is measured first; then both, in
turns, are sent images at random moments (Poisson's), at several multiples of that, with at most `--connections` at a
time: who finds no connection free is not sent, and counted. Then a burst, in which the budget is watched, and SIGTERM
with requests in flight.
"""

import argparse
import asyncio
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from matplotlib.figure import Figure

from adaptvit.commands.batches import ServeConfig
from adaptvit.data import find_images
from adaptvit.show.pictures import INK, write_png
from adaptvit.show.styles import Style, styles

STARTS = "import sys, adaptvit_cli; sys.exit(adaptvit_cli.main())"
LOADS = 0.5, 0.9, 1.2, 1.5
"""Of what the dense server answers at most, what is asked for."""
BURST = (0.4, 3.0), (1.4, 6.0), (0.4, 5.0)
"""The same, and for how many seconds."""


class Server:
    """A process of `adaptvit serve`."""

    def __init__(self, name: str, *words: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTS, "serve", *words, "--port", "0"], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        found = re.match(r"(http://\S+)/predict", self.process.stdout.readline())
        assert found, "the server did not start"
        self.address = found[1]

    def figures(self) -> dict[str, float]:
        """What `/metrics` tells, but for its histograms' parts."""
        lines = httpx2.get(f"{self.address}/metrics").text.splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#") and "{" not in line]
        return {name: float(value) for name, value in pairs}


@contextmanager
def started(name: str, *words: str) -> Iterator[Server]:
    """A server, ended by SIGTERM."""
    server = Server(name, *words)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait(60)


async def asked(client: Any, server: Server, content: bytes, waits: list[float], statuses: list[int]) -> None:
    """One request."""
    start = time.perf_counter()
    try:
        answer = await client.post(f"{server.address}/predict", content=content)
    except httpx2.HTTPError:
        statuses.append(0)
        return
    statuses.append(answer.status_code)
    if answer.status_code == 200:
        waits.append(time.perf_counter() - start)


async def capacity(server: Server, contents: list[bytes], connections: int, seconds: float) -> float:
    """Answers a second to so many clients who ask again as soon as they are answered."""
    waits: list[float] = []
    statuses: list[int] = []
    images = itertools.cycle(contents)
    async with httpx2.AsyncClient(timeout=60) as client:
        end = time.perf_counter() + seconds

        async def again() -> None:
            while time.perf_counter() < end:
                await asked(client, server, next(images), waits, statuses)

        start = time.perf_counter()
        await asyncio.gather(*(again() for _ in range(connections)))
        return len(waits) / (time.perf_counter() - start)


async def load(
    server: Server, contents: list[bytes], phases: Any, connections: int, seed: int
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Send at so many a second for so many seconds, phase by phase; what came of it, and the health of the server."""
    draws, images = random.Random(seed), itertools.cycle(contents)
    waits: list[float] = []
    statuses: list[int] = []
    seen: list[dict[str, float]] = []
    unsent = 0
    before = server.figures()
    limits = httpx2.Limits(max_connections=connections + 1, max_keepalive_connections=connections + 1)
    async with httpx2.AsyncClient(timeout=60, limits=limits) as client:
        start = time.perf_counter()

        async def watch() -> None:
            while True:
                health = (await client.get(f"{server.address}/health")).json()
                seen.append({"at": time.perf_counter() - start, **{n: health[n] for n in ("waiting", "budget")}})
                await asyncio.sleep(0.1)

        watching = asyncio.create_task(watch()) if len(phases) > 1 else None
        flying: set[asyncio.Task[None]] = set()
        due = 0.0
        for rate, seconds in phases:
            end = due + seconds
            while (due := due + draws.expovariate(rate)) < end:
                await asyncio.sleep(max(0.0, due - (time.perf_counter() - start)))
                if len(flying) >= connections:
                    unsent += 1
                    continue
                task = asyncio.create_task(asked(client, server, next(images), waits, statuses))
                flying.add(task)
                task.add_done_callback(flying.discard)
            due = end
        sent_in = time.perf_counter() - start
        await asyncio.gather(*flying)
        took = time.perf_counter() - start
        if watching is not None:
            watching.cancel()
    after = server.figures()
    moved = {name: after[name] - before.get(name, 0.0) for name in after}
    p50, p95, p99 = (round(1000 * float(np.quantile(waits, q)), 1) if waits else None for q in (0.5, 0.95, 0.99))
    return {
        "server": server.name,
        "asked_per_s": round((len(statuses) + unsent) / sent_in, 1),
        "answered_per_s": round(len(waits) / took, 1),
        "answered": len(waits),
        "refused": statuses.count(503),
        "failed": sum(status not in (200, 503) for status in statuses),
        "not_sent": unsent,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "share": round(moved["adaptvit_macs_total"] / max(1.0, moved["adaptvit_dense_macs_total"]), 3),
        "batch": round(moved["adaptvit_batch_images_sum"] / max(1.0, moved["adaptvit_batch_images_count"]), 2),
    }, seen


async def stopped(server: Server, contents: list[bytes], requests: int) -> dict[str, Any]:
    """SIGTERM with requests in flight."""
    waits: list[float] = []
    statuses: list[int] = []
    async with httpx2.AsyncClient(timeout=60) as client:
        flying = [
            asyncio.create_task(asked(client, server, contents[number % len(contents)], waits, statuses))
            for number in range(requests)
        ]
        while server.figures()["adaptvit_waiting"] < requests / 4:
            await asyncio.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*flying)
    return {
        "what": "SIGTERM",
        "server": server.name,
        "in_flight": requests,
        "answered": len(waits),
        "exit": server.process.wait(60),
    }


def draw(path: Path, told: list[dict[str, Any]], limit_ms: float) -> None:
    """p95 by load, and the budget in the burst."""
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    looks = {"dense": Style(INK, "*"), **styles(["adaptive"])}
    adaptive = looks["adaptive"].colour
    for name, look in looks.items():
        rows = [row for row in told if row["what"] == "load" and row["server"] == name]
        left.plot(
            [row["asked_per_s"] for row in rows],
            [row["p95_ms"] for row in rows],
            color=look.colour,
            marker=look.marker,
            label=name,
        )
        for row in rows:
            if name == "adaptive":
                left.annotate(
                    f"{row['share']:.0%}",
                    (row["asked_per_s"], row["p95_ms"]),
                    xytext=(0, -13),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=adaptive,
                )
    left.axhline(limit_ms, color="grey", linestyle="--", linewidth=1)
    left.text(left.get_xlim()[0], limit_ms * 1.06, f" limit, {limit_ms:g} ms", fontsize=8, color="grey")
    left.set(xlabel="requests a second", ylabel="95 % are answered within, ms", yscale="log")
    left.set(title="Waits by load, and the share of the MACs that they leave")
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.legend(frameon=False, loc="upper left")
    burst = next(row for row in told if row["what"] == "burst")
    at = [one["at"] for one in burst["seen"]]
    right.plot(at, [one["budget"] for one in burst["seen"]], color=adaptive)
    right.set(
        xlabel="seconds", ylabel="share of the dense MACs", ylim=(0, 1), title="The budget in a burst of requests"
    )
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    begin = 0.0
    for (rate, seconds), shade in zip(burst["phases"], ("none", "#eeeeee", "none"), strict=True):
        right.axvspan(begin, begin + seconds, color=shade, zorder=0)
        right.text(begin + seconds / 2, 0.95, f"{rate:.0f}/s", ha="center", fontsize=8)
        begin += seconds
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_size(10)
    write_png(figure, path)


async def measure(told: argparse.Namespace, tell: Any) -> list[dict[str, Any]]:
    """All of it."""
    names = find_images(told.folder)
    contents = [(told.folder / name).read_bytes() for name in names[:: max(1, len(names) // 200)][:200]]
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        tell(row)

    with ExitStack() as stack:
        adaptive = stack.enter_context(
            started("adaptive", told.fast, "--budget", told.budget, "--latency", told.latency, "--device", told.device)
        )
        dense = stack.enter_context(started("dense", told.dense, "--latency", told.latency, "--device", told.device))
        await capacity(adaptive, contents, 8, 1)
        await capacity(dense, contents, 8, 1)
        most = await capacity(dense, contents, 16, told.seconds)
        note({"what": "capacity", "server": "dense", "answered_per_s": round(most, 1)})
        for turn, factor in enumerate(told.loads):
            for server in (dense, adaptive) if turn % 2 else (adaptive, dense):
                row, _ = await load(server, contents, [(factor * most, told.seconds)], told.connections, turn)
                note({"what": "load", "of_dense_capacity": factor, **row})
        phases = [(factor * most, seconds) for factor, seconds in BURST]
        row, seen = await load(adaptive, contents, phases, told.connections, 99)
        note({"what": "burst", "phases": phases, **row, "seen": seen})
        for server in (adaptive, dense):
            note(await stopped(server, contents, 32))
    return rows


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fast", help="a model with a curve")
    parser.add_argument("dense", help="the ViT that it was made of")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--budget", default="0.4..0.8")
    parser.add_argument("--latency", default="1s")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    told = parser.parse_args()
    found = asyncio.run(
        measure(told, lambda row: print(json.dumps({n: v for n, v in row.items() if n != "seen"}), flush=True))
    )
    settings = {name: str(getattr(told, name)) for name in ("budget", "latency", "device", "connections")}
    if told.json:
        told.json.write_text(json.dumps({"settings": settings, "rows": found}, indent=1) + "\n")
    if told.picture:
        draw(told.picture, found, 1000 * ServeConfig(told.fast, latency=told.latency).seconds)


if __name__ == "__main__":
    main()
