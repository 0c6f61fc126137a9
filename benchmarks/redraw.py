"""Every plot of these tables drawn anew, nothing measured: python benchmarks/redraw.py

Not among them is `ats_usage.png`, which `adaptvit draw --summary` draws of a model: no table has its numbers.
"""

import csv
import json
from pathlib import Path
from typing import Any

import ats_imagenet
import merging_speed
import per_image
import serve_load
import steering

from adaptvit.commands.compare_methods import tradeoffs
from adaptvit.commands.compare_variants import drawn
from adaptvit.show.pictures import write_png

HERE = Path(__file__).parent
TABLES = {
    "methods": ("methods_imagenet", "ViT-Tiny, ImageNet images, nothing trained"),
    "imagenette": ("imagenette_methods", "ViT-Tiny fine-tuned on Imagenette, 128 px"),
}
"""What the names of the plots begin with: the table, and what it is of."""


def number(cell: str) -> Any:
    """A cell as it was before it was text; None where it is empty."""
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell


def table(path: Path) -> list[dict[str, Any]]:
    """The lines of a .csv file."""
    with path.open(newline="") as file:
        return [{name: number(cell) for name, cell in line.items()} for line in csv.DictReader(file)]


def main() -> None:
    """Draw them, each beside its table."""
    for begin, (name, title) in TABLES.items():
        lines = table(HERE / f"{name}.csv")
        tuned = {line["name"]: line["name"].partition("_")[0] for line in lines if line["name"].endswith("safetensors")}
        for end, (figure, _) in tradeoffs(lines, tuned, title).items():
            write_png(figure, HERE / f"{begin}_{end}.png")
    for summary in sorted((HERE / "compare").glob("*/summary.csv")):
        spreads = {
            line["variant"]: {"top1": (line["top1"], line["top1 spread"])} for line in table(summary) if line["top1"]
        }
        figure, _ = drawn(spreads)["top1"]
        write_png(figure, summary.with_name("top1.png"))
    merging_speed.drawn(table(HERE / "merging_speed.csv"), HERE / "merging_speed.png")
    per_image.draw(HERE / "per_image.jsonl", HERE / "per_image.png")
    ats_imagenet.plot(table(HERE / "ats_imagenet.csv"), HERE / "ats_imagenet.png")
    served = json.loads((HERE / "serve_load.json").read_text())
    serve_load.draw(HERE.parent / "docs" / "images" / "serve_load.png", served["rows"], limit_ms=1000)
    steering.main()


if __name__ == "__main__":
    main()
