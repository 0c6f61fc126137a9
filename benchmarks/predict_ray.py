"""Ray beside the plain loop, runs that are killed, growth: python benchmarks/predict_ray.py WHAT MODEL FOLDER

    kills       driver, worker, both, and the node killed at random moments, then the same rows as without
    throughput  images/s of Ray with one actor over those of the in-process loop, in turns
    growth      time and the driver's memory at several numbers of images
    decoding    images/s of a core, by the size of the pictures
    grouping    how batches of like cost differ from batches as they come

FOLDER has a few thousand real images, repeated in parquet files of their bytes. MODEL is `small` for four blocks of
A-ViT at 32 pixels and images of 64, so that it is Ray that takes the time. A line of JSON for each figure.
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
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
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


def pictures(folder: Path, images: int, side: int | None) -> list[bytes]:
    """The bytes of so many images of a folder or all, as they are, or with the shorter side of `side`."""
    contents = [(folder / name).read_bytes() for name in find_images(folder)[:images]]
    return contents if side is None else [_of_side(content, side) for content in contents]


def repeated(contents: list[bytes], place: Path, images: int, each: int = 2000) -> Path:
    """Parquet files with so many images, `each` in a file; the command's source."""
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
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                found += [process.pid] * (command in " ".join(process.cmdline()))
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


def throughput(model: str, source: Path, images: int, rounds: int, threads: int, place: Path) -> None:
    """Ray with one actor beside the loop, in turns, with as many threads of torch's.

    The start, up to the first shard that is written, is told apart: Ray imports torch in it, and decodes ahead.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)  # which Ray hands on
    torch.set_num_threads(threads)
    config = ScaleConfig(model, str(source), str(place / "out"), actors=1, shard=32, device="cpu")
    engine = RayEngine(config)
    engine.start()
    predictor = job_of(config).predictor
    predictor.predict(np.zeros((64, *predictor.settings["input_size"]), np.uint8))
    for turn in range(rounds):
        told: dict[str, float] = {}
        for name in ("loop", "ray") if turn % 2 else ("ray", "loop"):
            began = time.time()
            once(config, engine if name == "ray" else InProcess())
            written = sorted(path.stat().st_mtime for path in (place / "out" / "manifest").iterdir())
            told[f"{name}_images_per_s"] = round((images - config.shard) / (written[-1] - written[0]), 2)
            told[f"{name}_start_s"] = round(written[0] - began, 1)
            told[f"{name}_whole_s"] = round(written[-1] - began, 1)
        ratio = round(told["ray_images_per_s"] / told["loop_images_per_s"], 3)
        tell(what="throughput", turn=turn, images=images, threads=threads, **told, ray_over_loop=ratio)
    engine.close()


def growth(model: str, contents: list[bytes], counts: list[int], place: Path) -> None:
    """Seconds for each image, and the driver's memory, as the job grows."""
    config = ScaleConfig(model, "", str(place / "out"), actors=1, shard=256, device="cpu")
    engine = RayEngine(config)
    engine.start()
    warm = repeated(contents, place / "warm", 256, 256)
    once(replace(config, source=str(warm)), engine)
    for images in counts:
        source = repeated(contents, place / f"in{images}", images, 1000)
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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place, images = Path(folder), told.images[0]
        model, side = (small(place), 64) if told.model == "small" else (told.model, None)
        if told.what == "kills":
            source = repeated(pictures(told.folder, images, side), place / "in", images, -(-images // 10))
            kills(model, source, images, told.seed, place)
        elif told.what == "throughput":
            source = repeated(pictures(told.folder, images, side), place / "in", images)
            throughput(model, source, images, told.rounds, told.threads, place)
        elif told.what == "growth":
            growth(model, pictures(told.folder, 1000, side), told.images, place)
        elif told.what == "decoding":
            decoding(model, told.folder, images)
        else:
            grouping(model, told.folder, images)


if __name__ == "__main__":
    main()
