"""Images that wait for one model: how many of them run together, and at what budget. asyncio's own queue and executor.

    batches = Batches(predictor, (0.4, 0.8), latency=0.1)
    asyncio.create_task(batches.run())
    row = await batches.answer(pixels)

Nothing here knows of HTTP: that is `adaptvit.commands.server`.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np

from adaptvit.checks import In, check_device, check_fields
from adaptvit.measure.predictor import Predictor

FALLS = 0.25, 0.5
"""Of the latency, what those who wait may take at the highest budget before it falls, and from where it is lowest."""
BATCH = 0.25
"""Of the latency, what a batch may take."""
RECENT = 0.2
"""Weight of the last batch in the mean of what images take."""
UNITS = {"ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class ServeConfig:
    """Which model answers, where, how soon, and what an image may cost meanwhile."""

    model: str
    """A file, folder, repository (`hf-hub:OWNER/NAME`) or timm name of a ViT."""
    budget: str | None = None
    """Share of the dense MACs that images cost, by the curve in the model's file: 0.6, or 0.4..0.8, which goes by how
    many wait. None leaves the model as it is."""
    latency: str = "100ms"
    """What most requests are to be answered in, by which the budget falls and batches are cut: 100ms, or 2s."""
    batch_size: Annotated[int, In("[1, inf)")] = 64
    """Images in a forward pass at most; fewer where they would take more than a quarter of the latency."""
    waiting: Annotated[int, In("[1, 65536]")] = 256
    """Requests that are taken at a time; who comes when there are as many gets 503."""
    top: Annotated[int, In("[1, inf)")] = 5
    """Classes told, the most probable first."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every one of this machine."""
    port: Annotated[int, In("[0, 65535]")] = 8000
    """To listen at; 0 takes a free one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and features."""
    device: Literal["cpu", "cuda"] | None = None
    """Where the model runs; None takes cuda where there is one."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_device("ServeConfig.device", self.device or "cpu")
        self.shares  # noqa: B018  # which refuse what they cannot read
        self.seconds  # noqa: B018

    @cached_property
    def shares(self) -> tuple[float, float] | None:
        """The least and the most of the budget; None where the model is left as it is."""
        if self.budget is None:
            return None
        ends = self.budget.split("..")
        try:
            least, most = float(ends[0]), float(ends[-1])
        except ValueError:
            least, most = 1.0, 0.0
        if len(ends) > 2 or not 0 < least <= most <= 1:
            raise ValueError(
                "ServeConfig.budget must be a share of the dense MACs above 0 and up to 1, as 0.6, or two of them, as "
                f"0.4..0.8, got {self.budget!r}"
            )
        return least, most

    @cached_property
    def seconds(self) -> float:
        """The latency."""
        found = re.fullmatch(r"(\d+\.?\d*|\.\d+)(ms|s)", self.latency)
        seconds = float(found[1]) * UNITS[found[2]] if found else 0.0
        if not 0 < seconds <= 3600:
            raise ValueError(
                f"ServeConfig.latency must be a time of at most an hour, as 100ms or 2s, got {self.latency!r}"
            )
        return seconds


def budget_for(wait: float, latency: float, shares: tuple[float, float]) -> float:
    """The budget, by the seconds that those who wait would take at the highest one: a straight fall within `FALLS`."""
    least, most = shares
    return float(np.interp(wait / latency, FALLS, (most, least)))


class Batches:
    """The queue before a model. What runs is whatever waited while the batch before it ran.

    Attributes:
        budget: share of the dense MACs that the next batch costs; None where the model is left as it is.
        pace: seconds for each share of an image's dense MACs, lately.
    """

    def __init__(
        self,
        predictor: Predictor,
        shares: tuple[float, float] | None,
        latency: float,
        executor: Executor | None = None,
        tell: Callable[[Sequence[dict[str, Any]]], object] = lambda rows: None,
    ) -> None:
        """Take the model.

        Args:
            shares: the least and the most of the budget.
            latency: seconds.
            executor: where it runs, with one thread; None is asyncio's own.
            tell: called with the rows of each batch.
        Raises:
            ValueError: the model cannot be steered to these budgets.
        """
        self.predictor, self.shares, self.latency = predictor, shares, latency
        self.executor, self.tell = executor, tell
        self.queue: asyncio.Queue[tuple[np.ndarray, asyncio.Future[dict[str, Any]]]] = asyncio.Queue()
        for share in shares or ():
            predictor.opened.compute = share
        self.budget = None if shares is None else shares[1]
        self.pace = 0.0

    async def answer(self, pixels: np.ndarray) -> dict[str, Any]:
        """What the model says of an image, (channels, height, width) uint8: a row of `Predictor.predict`'s columns.

        Raises:
            Exception: what it raised of the batch.
        """
        told: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((pixels, told))
        return await told

    async def run(self) -> None:
        """Take what waits, again and again, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            taken = [await self.queue.get()]
            most = self.steer(len(taken) + self.queue.qsize())
            while len(taken) < most and not self.queue.empty():
                taken.append(self.queue.get_nowait())
            start = loop.time()
            try:
                pixels = np.stack([image for image, _ in taken])
                rows = await loop.run_in_executor(self.executor, self.compute, pixels)
            except Exception as error:  # whatever a model raises: these are told, the next may fare better
                for _, told in taken:
                    if not told.done():
                        told.set_exception(error)
                continue
            self.measured(rows, loop.time() - start)
            for (_, told), row in zip(taken, rows, strict=True):
                if not told.done():
                    told.set_result(row)
            self.tell(rows)

    def steer(self, waiting: int) -> int:
        """Set the budget by how many images wait; how many of them may run together."""
        if self.shares is not None:
            wait = waiting * self.pace * self.shares[1]
            self.budget = self.predictor.opened.compute = budget_for(wait, self.latency, self.shares)
        each = self.pace * (self.budget or 1.0)
        return max(1, min(self.predictor.batch_size, int(BATCH * self.latency / each) if each else 1))

    def compute(self, pixels: np.ndarray) -> list[dict[str, Any]]:
        """Rows of what the model says of images (B, channels, height, width) uint8."""
        columns = self.predictor.predict(pixels)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def measured(self, rows: Sequence[dict[str, Any]], seconds: float) -> None:
        """Take a batch into the mean of what images take."""
        spent = sum(int(row["macs"]) for row in rows) / self.predictor.dense_macs if self.shares else len(rows)
        pace = seconds / spent if spent else 0.0
        self.pace = (1 - RECENT) * self.pace + RECENT * pace if self.pace else pace
