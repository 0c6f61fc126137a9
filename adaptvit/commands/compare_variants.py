"""Comparisons: runs that differ in one thing, each with several seeds, in one table with means and spreads."""

import math
import multiprocessing
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch

from adaptvit.checks import In, check_fields, checked
from adaptvit.data import DataConfig, open_data, preparation, spread_over
from adaptvit.files import check_output_folder, write_csv
from adaptvit.measure.evaluate import Result
from adaptvit.measure.speed import speeds
from adaptvit.process import as_found, best_device
from adaptvit.records import contents, known, plain, same, version, write_record
from adaptvit.show.pictures import Figure, data_uri, error_bars, write_png
from adaptvit.show.report import Illustration, Report, Section, Table, machine, write_report
from adaptvit.terminal import progress_bar, warn
from adaptvit.training.run import Run, train_run
from adaptvit.weights.checkpoints import load
from adaptvit.weights.places import is_stored, weights_file

ROUNDS, TIMED = 10, 64
"""Timed turns, and images in a timed batch."""
UNFINISHED: dict[str, Any] = {"figures": None, "diverged": None}
"""What a record says of a run before its end: one of the two comes."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared."""

    question: str
    """What it is to answer, in one sentence."""
    variants: Mapping[str, Run]
    """Runs by name, alike but for what is compared; the others are held against the first, seed by seed."""

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.variants) < 2:
            raise ValueError(f"Comparison.variants must be two variants or more, got {list(self.variants)}")
        folders = [_folder_name(name) for name in self.variants]
        if len(set(folders)) < len(folders):
            raise ValueError(f"Comparison.variants must differ in more than punctuation, their folders being {folders}")


@dataclass(frozen=True)
class VariantRow:
    """One variant over its seeds; spreads are standard deviations over seeds."""

    name: str
    runs: list[dict[str, Any]]
    """Figures of the runs that came to their end."""
    diverged: int
    """Runs whose loss did not stay finite."""
    against_first: tuple[float, float] | None
    """Difference in top-1 from the first variant, seed by seed: mean and its standard error; None with fewer than two
    pairs, and of the first variant."""
    speed: dict[str, float]
    """Of the first seed's model: packed images per second, realised and ideal gain; empty where it diverged."""

    def over_seeds(self, figure: str) -> tuple[float, float] | None:
        """Mean and spread of a figure; None where it is not known of two runs."""
        values = [run[figure] for run in self.runs if run.get(figure) is not None]
        return (mean(values), stdev(values)) if len(values) > 1 else None


@checked
@as_found()
def compare(
    comparison: Comparison,
    output: Path,
    seeds: Annotated[int, In("[2, inf)", "for there is no spread over fewer")] = 3,
    processes: Annotated[int, In("[1, 1024]")] = 1,
    tell: Callable[[list[VariantRow]], object] | None = None,
) -> list[VariantRow]:
    """Train every variant with every seed, then measure speeds in turns and write the report.

    Writes `runs.csv`, a line a run, `summary.csv`, a line a variant, plots, `report.html`, and a folder for each run.
    Finished runs of the same version are read back; one that was interrupted goes on after its last epoch.

    Args:
        seeds: how many seeds of each variant, 0, 1, and so on.
        processes: runs at a time, each in a process of its own with its share of the CPU threads; 1 trains here.
        tell: called with what was found, before any of it is written; where a run cannot be, as the disk is full, with
            what was found so far.
    Raises:
        OSError: what cannot be written is named, and with it the figures that it would have held.
        ValueError: fewer than two seeds or one process, or a folder holds a run of other settings or images.
        Exception: what `adaptvit.training.run.train_run` raises; a loss that does not stay finite is counted instead.
    """
    jobs = {
        name: [
            replace(
                config, recipe=replace(config.recipe, seed=seed), output=output / _folder_name(name) / f"seed-{seed}"
            )
            for seed in range(seeds)
        ]
        for name, config in comparison.variants.items()
    }
    check_output_folder(output)
    looked_at = cache(contents)
    settings = {job.output: _settings(job, looked_at) for runs in jobs.values() for job in runs}
    everything = [job for runs in jobs.values() for job in runs]
    waiting = [job for job in everything if _finished(job, settings[job.output]) is None]
    output.mkdir(parents=True, exist_ok=True)
    with progress_bar(
        words="runs", total=len(everything), initial=len(everything) - len(waiting), outer=True, stays=True
    ) as bar:
        try:
            for _ in _trained(waiting, settings, processes):
                bar.update()
        except OSError:
            if tell is not None:
                tell(_variant_rows(_left(jobs, settings), {}))
            raise
    found = _left(jobs, settings)
    speeds = _speeds({name: runs[0] for name, runs in jobs.items() if found[name][0]["figures"]}, settings, output)
    rows = _variant_rows(found, speeds)
    if tell is not None:
        tell(rows)
    lines = [
        {"variant": name, "seed": seed, **(one["figures"] or {}), "diverged": one["diverged"]}
        for name, results in found.items()
        for seed, one in enumerate(results)
    ]
    write_csv(output / "runs.csv", lines)
    write_csv(output / "summary.csv", [summary(row) for row in rows])
    plots = drawn(_spreads(rows))
    for name, (figure, _) in plots.items():
        write_png(figure, output / f"{name}.png")
    write_report(_report(comparison, rows, seeds, plots), output / "report.html")
    return rows


def _left(
    jobs: Mapping[str, Sequence[Run]], settings: Mapping[Path, dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """What each run of a variant left, as far as they are finished."""
    return {name: [_finished(job, settings[job.output]) or UNFINISHED for job in runs] for name, runs in jobs.items()}


def _variant_rows(
    found: Mapping[str, Sequence[dict[str, Any]]], speeds: Mapping[str, dict[str, float]]
) -> list[VariantRow]:
    first = next(iter(found.values()))
    return [
        VariantRow(
            name,
            [one["figures"] for one in results if one["figures"]],
            sum(one["diverged"] is not None for one in results),
            None if results is first else _paired_by_seed(results, first),
            speeds.get(name, {}),
        )
        for name, results in found.items()
    ]


def variants_table(rows: Sequence[VariantRow]) -> Table:
    """What was found, a line a variant."""
    columns = ["", "top-1, %", "against the first", "loss", "GMACs", "depth", "images/s", "realised / ideal gain"]
    terms = list(dict.fromkeys(name for row in rows for one in row.runs for name in one if name.startswith("term ")))
    cells = []
    for row in rows:
        speed = row.speed
        diverged = f" ({row.diverged} of {row.diverged + len(row.runs)} diverged)" if row.diverged else ""
        cells.append(
            [
                row.name + diverged,
                _shown(row.over_seeds("top1"), 1, 100),
                "" if row.against_first is None else _shown(row.against_first, 1, 100, "+"),
                _shown(row.over_seeds("loss"), 3),
                _shown(row.over_seeds("gmacs"), 4),
                _shown(row.over_seeds("depth_mean"), 1),
                f"{speed['images_per_s']:.0f}" if speed else "-",
                f"{speed['realised']:.2f} / {speed['ideal']:.2f}" if speed else "-",
                *[_shown(row.over_seeds(name), 4) for name in terms],
            ]
        )
    note = (
        "Mean and standard deviation over seeds; against the first: mean difference of runs with the same seed and its "
        "standard error. Speed of one seed's model, all variants in turns, over its own dense run."
    )
    return Table(columns + [name.removeprefix("term ") + " loss" for name in terms], cells, note)


def _trained(jobs: Sequence[Run], settings: Mapping[Path, dict[str, Any]], processes: int) -> Iterator[None]:
    """Train them, yielding as each ends."""
    if processes == 1:
        for job in jobs:
            _train(job, settings[job.output], None)
            yield
        return
    threads = max(1, torch.get_num_threads() // processes)
    others = {*multiprocessing.active_children()}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _leave_interrupts) as pool:
        futures = [pool.submit(_train, job, settings[job.output], threads) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in {*multiprocessing.active_children()} - others:
                process.terminate()  # what it was at goes on after its last epoch
            raise


def _leave_interrupts() -> None:
    """To the process that started this one: it is told as well, and says so once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _train(job: Run, settings: dict[str, Any], threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    job.output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"settings": plain(settings), **UNFINISHED}
    measured: list[Result] = []
    try:
        try:
            outcome = train_run(job, resume=True, known_by=version(), tell=measured.append)
        except FloatingPointError as error:
            record["diverged"] = str(error)
        else:
            last = outcome.history[-1]
            terms = {f"term {name}": value for name, value in last.terms.items()}
            own = {"seed": job.recipe.seed, "train_accuracy": last.accuracy, **terms}
            record["figures"] = outcome.result.figures | own
        write_record(job.output / "finished.json", record)
    except OSError as error:
        if not measured:
            raise
        told = ", ".join(f"{name} {measured[0].figures[name]:.4g}" for name in ("top1", "loss", "gmacs"))
        raise OSError(error.errno, f"{error.strerror or error}; the run came to {told}") from error


def _finished(job: Run, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What a finished run left; None where it is not finished.

    Raises:
        ValueError: its folder holds the run of other settings.
    """
    record = known(job.output / "finished.json")
    if record is not None and not same(record["settings"], settings):
        raise ValueError(
            f"{str(job.output)!r} holds a run of other settings or images: choose another output, or remove it"
        )
    return record


def _settings(job: Run, contents: Callable[[Path | None], str]) -> dict[str, Any]:
    """What decides a run: all that it was told, but for where its results are, and the state of the files it reads."""
    named = {"weights": job.weights, "teacher": job.teacher}
    if is_stored(job.model):
        named["model"] = job.model
    stored = {name: weights_file(one) if one is not None and is_stored(one) else None for name, one in named.items()}
    names = job.data.class_map if isinstance(job.data, DataConfig) else None
    files = {**stored, "images": job.data.root, "class map": names}
    return {"run": replace(job, output=Path()), **{name: contents(path) for name, path in files.items()}}


def _speeds(
    jobs: Mapping[str, Run], settings: Mapping[Path, dict[str, Any]], output: Path
) -> dict[str, dict[str, float]]:
    """Packed images per second, realised and ideal gain of these models, all in turns; measured once."""
    path, told = output / "speed.json", {name: settings[job.output] for name, job in jobs.items()}
    record = known(path)
    if record is not None and same(record["settings"], told):
        return dict(record["speeds"])
    models = {name: load(job.output / "model.safetensors").eval().to(best_device()) for name, job in jobs.items()}
    images = {}
    for name, model in models.items():
        data = jobs[name].data
        assert isinstance(data, DataConfig)  # as those of every comparison
        split = open_data(data, preparation(model, name)).test
        images[name] = spread_over(split, TIMED).images.to(best_device())
    timed = speeds(models, images, ROUNDS, ("packed",))
    found = {
        name: {"images_per_s": one.packed, "realised": one.gain, "ideal": one.ideal} for name, one in timed.items()
    }
    try:
        write_record(path, {"settings": plain(told), "speeds": found, **machine()})
    except OSError as error:  # what was measured is still to be told
        warn(error.strerror or str(error), stacklevel=2)
    return found


def _paired_by_seed(results: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    pairs = zip(results, first, strict=True)
    gaps = [a["figures"]["top1"] - b["figures"]["top1"] for a, b in pairs if a["figures"] and b["figures"]]
    return (mean(gaps), stdev(gaps) / math.sqrt(len(gaps))) if len(gaps) > 1 else None


def summary(row: VariantRow) -> dict[str, Any]:
    """A line of `summary.csv`."""
    line: dict[str, Any] = {"variant": row.name, "runs": len(row.runs), "diverged": row.diverged}
    for figure in dict.fromkeys(name for one in row.runs for name in one if name != "seed"):
        both = row.over_seeds(figure)
        if both is not None:
            line |= {figure: both[0], f"{figure} spread": both[1]}
    if row.against_first is not None:
        line |= {"top1 against first": row.against_first[0], "its standard error": row.against_first[1]}
    return line | row.speed


def drawn(spreads: Mapping[str, Mapping[str, tuple[float, float]]]) -> dict[str, tuple[Figure, str]]:
    """Figures by file name, each with its caption.

    Args:
        spreads: of each variant, by figure, its mean over seeds and their standard deviation.
    """
    plots = {}
    for figure, label, scale in (("top1", "top-1, %", 100.0), ("gmacs", "GMACs", 1.0), ("depth_mean", "depth", 1.0)):
        points = {name: tuple(scale * part for part in own[figure]) for name, own in spreads.items() if figure in own}
        if points:
            caption = f"{label}: mean over seeds, the bar one standard deviation to each side."
            plots[figure] = (error_bars(points, label), caption)  # type: ignore[arg-type]
    return plots


def _spreads(rows: Sequence[VariantRow]) -> dict[str, dict[str, tuple[float, float]]]:
    """Means and deviations of those that have them."""
    names = ("top1", "gmacs", "depth_mean")
    return {row.name: {name: both for name in names if (both := row.over_seeds(name))} for row in rows}


def _report(
    comparison: Comparison, rows: Sequence[VariantRow], seeds: int, plots: Mapping[str, tuple[Figure, str]]
) -> Report:
    known = [row for row in rows if row.over_seeds("top1")]
    best = max(known, key=lambda row: row.over_seeds("top1") or (0.0, 0.0), default=None)
    headline = "No variant came to its end with two seeds." if best is None else _headline(best, rows[0])
    pictures = [Illustration(data_uri(figure), caption) for figure, caption in plots.values()]
    base = next(iter(comparison.variants.values()))
    return Report(
        title="adaptvit compare",
        headline=headline,
        introduction=[comparison.question, f"{len(rows)} variants, {seeds} seeds each."],
        table=variants_table(rows),
        sections=[Section("Over seeds", pictures)],
        facts={"The first variant": _facts(base), "Machine": machine()},
    )


def _headline(best: VariantRow, first: VariantRow) -> str:
    top1 = _shown(best.over_seeds("top1"), 1, 100)
    if best.against_first is None:
        return f"{best.name} has the best accuracy, {top1} %."
    gap = _shown(best.against_first, 1, 100, "+")
    return f"{best.name} has the best accuracy, {top1} %; against {first.name}, seed by seed, {gap} points."


def _facts(config: Run) -> dict[str, object]:
    parts = {"model": config.model, **config.model_args, "method": config.method.method}
    recipe = config.recipe
    return {
        **parts,
        "epochs": recipe.epochs,
        "batch size": recipe.batch_size,
        "optimizer": recipe.optimizer,
        "learning rate": recipe.learning_rate,
    }


def _shown(both: tuple[float, float] | None, digits: int, scale: float = 1.0, sign: str = "") -> str:
    return "-" if both is None else f"{scale * both[0]:{sign}.{digits}f} ± {scale * both[1]:.{digits}f}"


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name).strip("-")
