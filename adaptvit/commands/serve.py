"""`adaptvit serve MODEL`: images in, classes out over HTTP; the budget falls while many wait, and rises again."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from jsonargparse import ArgumentParser, Namespace

from adaptvit.checks import In, check_device, check_fields
from adaptvit.commands.console import config_of

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


def options(_: Sequence[str]) -> ArgumentParser:
    """`adaptvit serve MODEL`."""
    parser = ArgumentParser(
        description="Answer images over HTTP with their classes, at a budget that falls while many wait."
    )
    parser.add_class_arguments(ServeConfig, as_positional=True)
    return parser


def execute(arguments: Namespace) -> None:
    """Answer until stopped."""
    from adaptvit.commands.server import serve_model  # `--help` needs no fastapi

    serve_model(config_of(ServeConfig, arguments))
