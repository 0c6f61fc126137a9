"""Ray beside the plain loop, runs that are killed, growth: python benchmarks/predict_ray.py WHAT MODEL FOLDER

    kills       driver, worker, both, and the node killed at random moments, then the same rows as without
    throughput  images/s of Ray with one actor over those of the in-process loop, in turns
    growth      time and the driver's memory at several numbers of images
    decoding    images/s of a core, by the size of the pictures
    grouping    how batches of like cost differ from batches as they come

FOLDER has a few thousand real images, repeated in parquet files of their bytes. MODEL is `small` for four blocks of
A-ViT at 32 pixels, in which it is Ray that takes the time. A line of JSON for each figure.
"""

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import timm
import torch
from PIL import Image
from pyarrow import parquet

from adaptvit import AViTConfig, save
from adaptvit.commands.predict_ray import InProcess, RayEngine, ScaleConfig, run
from adaptvit.commands.predict_shards import Job, Store, images_of_lot
from adaptvit.data import find_images
from adaptvit.data.sources import Source
from adaptvit.measure.predictor import Predictor, expected_costs

SHARDS = 80
"""Of a run that is killed."""


def small(place: Path) -> str:
    """A file of a model whose tokens stop at random depths."""
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10
    )
    file = place / "small.safetensors"
    save(AViTConfig(gate_scale=4.0, gate_center=2.0).build(vit).eval(), file)
    return str(file)


def repeated(folder: Path, place: Path, images: int, each: int = 2000, side: int | None = None) -> Path:
    """Parquet files with the bytes of so many images, `each` in a file; the command's source.

    Args:
        side: of the shorter side, to which they are scaled first; None leaves them as they are.
    """
    names = find_images(folder)[:images]
    contents = [(folder / name).read_bytes() for name in names]
    if side is not None:
        contents = [_of_side(content, side) for content in contents]
    place.mkdir(parents=True, exist_ok=True)
    for start in range(0, images, each):
        numbers = range(start, min(start + each, images))
        parquet.write_table(
            pyarrow.table({"image": [contents[number % len(contents)] for number in numbers]}),
            place / f"{start // each:05d}.parquet",
        )
    return place


def rows(output: Path) -> dict[str, tuple[int, int]]:
    """Class and MACs by path; each path once."""
    found: dict[str, tuple[int, int]] = {}
    count = 0
    for path in sorted((output / "predictions").glob("*.parquet")):
        table = parquet.read_table(path, columns=["path", "class", "macs"]).to_pydict()
        count += len(table["path"])
        found |= dict(zip(table["path"], zip(table["class"], table["macs"], strict=True), strict=True))
    assert count == len(found), "an image is told twice"
    return found


def tell(**figures: Any) -> None:
    """A line."""
    print(json.dumps(figures), flush=True)


def kills(model: str, source: Path, images: int, seed: int, place: Path) -> None:
    """Kill the driver; again, and a worker, then another with the driver; again, and the node; again, and compare."""
    draws = random.Random(seed)
    whole, broken = place / "whole", place / "broken"
    more = ["--engine", "ray", "--shard", str(-(-images // SHARDS)), "--device", "cpu"]
    program = "import sys, adaptvit_cli; sys.exit(adaptvit_cli.main())"
    main = [sys.executable, "-c", program, "predict", model, str(source)]

    def start(output: Path) -> subprocess.Popen:
        return subprocess.Popen([*main, str(output), *more], start_new_session=True)

    def reach(process: subprocess.Popen, least: float, most: float) -> None:
        """Wait for a random moment between two shares of the shards."""
        few = draws.uniform(least, most) * SHARDS
        while process.poll() is None and (_finished(broken) < few or not _below(process.pid, "ray::Map")):
            time.sleep(0.05)
        time.sleep(draws.uniform(0, 1))
        assert process.poll() is None, "it ended before it could be killed"

    def kill(kind: str, *victims: int) -> None:
        """All at once."""
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        tell(what="killed", which=kind, shards=_finished(broken), of=SHARDS)

    began = time.time()
    code = start(whole).wait()
    tell(what="whole", images=images, rows=len(rows(whole)), exit=code, seconds=round(time.time() - began, 1))
    began, first = time.time(), start(broken)
    reach(first, 0.05, 0.2)
    kill("driver", first.pid)
    first.wait()
    time.sleep(5)  # in which Ray's own processes see that their driver is gone
    second = start(broken)
    reach(second, 0.25, 0.4)
    kill("worker", draws.choice(_below(second.pid, "ray::Map")))
    reach(second, 0.45, 0.6)
    kill("worker and driver", draws.choice(_below(second.pid, "ray::Map")), second.pid)
    second.wait()
    time.sleep(5)
    third = start(broken)
    reach(third, 0.65, 0.8)
    kill("node", *_below(third.pid, "raylet/raylet "))
    gone = time.time()
    ended = third.wait(120)
    tell(what="without its node", exit=ended, seconds=round(time.time() - gone, 1))
    code = start(broken).wait()
    told, expected = rows(broken), rows(whole)
    same = sum(told.get(name) == row for name, row in expected.items())
    tell(
        what="after kills",
        rows=len(told),
        missing=len(expected.keys() - told.keys()),
        same=same,
        exit=code,
        seconds=round(time.time() - began, 1),
    )


def _finished(output: Path) -> int:
    """Shards in the manifest."""
    return len(list((output / "manifest").glob("*.json"))) if output.exists() else 0


def _below(driver: int, command: str) -> list[int]:
    """Processes below a driver whose command line has a word: `ray::Map` of those that decode or predict."""
    found = []
    below = {driver}
    for path in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if parent in below:
            below.add(int(path.name))
            if command in words:
                found.append(int(path.name))
    return found


def job_of(config: ScaleConfig) -> Job:
    """As the command makes it."""
    predictor = Predictor(config.model, batch_size=config.batch_size, device="cpu")
    shard = images_of_lot(config.shard, predictor)
    return Job(Source(config.source), Store(config.output), predictor, shard, config.tries)


def once(config: ScaleConfig, engine: Any) -> float:
    """Seconds of a whole job."""
    shutil.rmtree(config.output, ignore_errors=True)
    Path(config.output).mkdir(parents=True)
    start = time.perf_counter()
    run(job_of(config), config, engine)
    return time.perf_counter() - start


def throughput(model: str, source: Path, images: int, rounds: int, place: Path) -> None:
    """Ray with one actor and one task beside the loop, with one thread of torch's each, and the loop with two."""
    config = ScaleConfig(model, str(source), str(place / "out"), actors=1, shard=max(32, images // 8), device="cpu")
    engine = RayEngine(config)
    engine.start()
    once(config, engine)  # workers start, and import torch
    for turn in range(rounds):
        seconds = {}
        for name, threads in (("loop", 1), ("ray", 1), ("loop, 2 threads", 2)):
            torch.set_num_threads(threads)
            seconds[name] = once(config, engine if name == "ray" else InProcess())
        tell(
            what="throughput",
            turn=turn,
            images=images,
            **{name: round(images / s, 2) for name, s in seconds.items()},
            over_loop=round(seconds["loop"] / seconds["ray"], 3),
            over_loop_of_two=round(seconds["loop, 2 threads"] / seconds["ray"], 3),
        )
    engine.close()


def growth(model: str, folder: Path, counts: list[int], place: Path) -> None:
    """Seconds for each image, and the driver's memory, as the job grows."""
    config = ScaleConfig(model, "", str(place / "out"), actors=1, shard=256, device="cpu")
    engine = RayEngine(config)
    engine.start()
    warm = repeated(folder, place / "warm", 256, 256)
    once(replace(config, source=str(warm)), engine)
    for images in counts:
        source = repeated(folder, place / f"in{images}", images, 1000)
        seconds = once(replace(config, source=str(source)), engine)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        tell(
            what="growth",
            images=images,
            seconds=round(seconds, 1),
            images_per_s=round(images / seconds, 2),
            driver_mib=round(resident),
            driver_peak_mib=round(peak),
        )
        shutil.rmtree(source)
    engine.close()


def decoding(model: str, folder: Path, images: int) -> None:
    """A core's images/s, from encoded bytes to what the model takes."""
    torch.set_num_threads(1)
    predictor = Predictor(model, device="cpu")
    size = predictor.settings["input_size"][1]
    contents = [(folder / name).read_bytes() for name in find_images(folder)[:images]]
    for side in (0, size, 500, 1000, 2000):
        given = contents if not side else [_of_side(content, side) for content in contents[: images // 4]]
        start = time.process_time()
        for content in given:
            predictor.prepare(content)
        kilobytes = sum(map(len, given)) / len(given) / 1000
        tell(
            what="decoding",
            shorter_side=side or "as they are",
            kilobytes=round(kilobytes, 1),
            images_per_cpu_s=round(len(given) / (time.process_time() - start), 1),
        )


def _of_side(content: bytes, side: int) -> bytes:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    scale = side / min(image.size)
    made = io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC).save(
        made, "JPEG", quality=90
    )
    return made.getvalue()


def grouping(model: str, folder: Path, images: int) -> None:
    """How well the cost of a batch is known, and how alike its images are."""
    torch.set_num_threads(1)
    predictor = Predictor(model, device="cpu")
    names = find_images(folder)
    pixels = np.stack(
        [predictor.prepare((folder / name).read_bytes()) for name in names[:: len(names) // images][:images]]
    )
    costs = np.array(predictor.predict(pixels)["macs"], dtype=float)
    learnt, others = slice(None, 64), slice(64, None)
    expected = expected_costs(pixels[learnt], costs[learnt])
    if expected is None:
        tell(what="grouping", model=Path(model).stem, images=images, expected=None)
        return
    relative = costs[others] / costs[learnt].mean()
    for name, batches in (
        ("as they come", predictor.batches(pixels[others])),
        ("of like cost", replace(predictor, costs=expected).batches(pixels[others])),
    ):
        sums = np.array([relative[batch].sum() for batch in batches[:-1]])
        within = np.mean([relative[batch].std() / relative[batch].mean() for batch in batches])
        longest = np.mean([relative[batch].max() / relative[batch].mean() for batch in batches])
        tell(
            what="grouping",
            model=Path(model).stem,
            images=images - 64,
            batches=name,
            within=round(within, 3),
            dearest_over_mean=round(longest, 3),
            batch_off_32=round(float(np.abs(sums / 32 - 1).mean()), 3),
        )


def main() -> None:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "throughput", "growth", "decoding", "grouping"))
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[20_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place, images = Path(folder), told.images[0]
        model = small(place) if told.model == "small" else told.model
        if told.what == "kills":
            source = repeated(told.folder, place / "in", images, -(-images // 10), 64)
            kills(model, source, images, told.seed, place)
        elif told.what == "throughput":
            throughput(model, repeated(told.folder, place / "in", images), images, told.rounds, place)
        elif told.what == "growth":
            growth(model, told.folder, told.images, place)
        elif told.what == "decoding":
            decoding(model, told.folder, images)
        else:
            grouping(model, told.folder, images)


if __name__ == "__main__":
    main()
