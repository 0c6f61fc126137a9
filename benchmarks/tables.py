"""What benchmarks write beside each other: a table, and the conditions that it was measured under."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptvit.files import as_json


def write_table(rows: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any], output: Path) -> None:
    """Rows to `output`.csv, by the columns of the longest, and conditions to `output`.json."""
    with output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, max(rows, key=len))
        writer.writeheader()
        writer.writerows(rows)
    output.with_suffix(".json").write_text(as_json(conditions, indent=2) + "\n")
