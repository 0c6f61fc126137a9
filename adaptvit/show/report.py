"""Reports that people open: one HTML file with its pictures inside, nothing fetched from anywhere."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from adaptvit.extras import needed
from adaptvit.files import write_atomically
from adaptvit.terminal import shown


@dataclass(frozen=True)
class Table:
    """Cells as they are read, the first column naming the row."""

    columns: Sequence[str]
    """Headings."""
    rows: Sequence[Sequence[str]]
    """One cell per heading."""
    note: str
    """What the columns mean, below the table."""

    def text(self) -> str:
        """The same table for a terminal."""
        lines = [[shown(cell) for cell in line] for line in (self.columns, *self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]
        return "\n".join(
            "  ".join(
                [line[0].ljust(widths[0])]
                + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            )
            for line in lines
        )


@dataclass(frozen=True)
class Illustration:
    """An image with the sentence that says how to read it."""

    source: str
    """A data URI, as `adaptvit.show.pictures.data_uri` makes them."""
    caption: str
    """How to read it."""
    wide: bool = False
    """Takes the width of the page; the others stand side by side."""

    @property
    def is_plot(self) -> bool:
        """Whether its colours may be turned for a dark page, as those of photographs may not."""
        return self.source.startswith("data:image/svg")

    def __post_init__(self) -> None:
        if not self.source.startswith("data:"):
            raise ValueError(f"Illustration.source must be a data URI, got {self.source[:40]!r}: use pictures.data_uri")


@dataclass(frozen=True)
class Section:
    """Pictures under a heading."""

    title: str
    """The heading."""
    pictures: Sequence[Illustration]
    """In reading order."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a report says, top to bottom."""

    title: str
    """What was done, in a few words."""
    headline: str
    """The result in one sentence."""
    introduction: Sequence[str]
    """Paragraphs that a newcomer needs before the table."""
    table: Table
    """The results."""
    sections: Sequence[Section]
    """Pictures."""
    facts: Mapping[str, Mapping[str, object]]
    """Heading -> name -> value: settings, machine."""


def write_report(report: Report, path: Path) -> None:
    """Write the report to an HTML file, whole or not at all.

    Raises:
        FileNotFoundError: the folder does not exist.
        MissingLibrary: jinja2 is not there.
    """
    with needed("a report"):
        from jinja2 import Environment, PackageLoader, StrictUndefined
    environment = Environment(
        loader=PackageLoader("adaptvit.show", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    write_atomically(path, environment.get_template("report.html.jinja").render(report=report))


def machine() -> dict[str, object]:
    """What figures of speed depend on; nothing that says whose machine it is."""
    return {
        "processor": platform.machine(),
        "CPU cores": os.cpu_count(),
        "threads of torch": torch.get_num_threads(),
        "load average": f"{os.getloadavg()[0]:.1f}",
        "Python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm", "adaptvit")},
    }
