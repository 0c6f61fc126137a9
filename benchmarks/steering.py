"""Models steered after training beside models trained at the budget: python benchmarks/steering.py > steering.txt

Reads the .jsonl files beside it, which `imagenette.py` wrote, and draws `steering.png`.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

from adaptvit.show.pictures import write_png
from adaptvit.show.styles import styles

HERE = Path(__file__).parent
CURVES = {
    "ATS trained to 65 %": ("imagenette_adavit", ("ats65/model", "ats65_at_0.5")),
    "ATS trained to 50 %": ("imagenette_8_epochs", ("ats50/model", "ats50_at_0.65")),
    "AdaViT trained to 65 %": ("imagenette_adavit", ("ada65/model", "ada65_at_0.5")),
    "AdaViT trained to 50 %": ("imagenette_adavit", ("ada50/model", "ada50_at_0.65")),
    "A-ViT trained to 65 %": ("imagenette_avit_steered", ("avit65/model", "avit65_at_0.5", "avit65_at_0.8")),
    "A-ViT trained to 50 %, taught": ("imagenette", ("avit_0.5_taught",)),
}
"""File and models, the first as it was trained, the others steered from there."""


def main() -> None:
    """Print and draw the difference from each dense model against MACs."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    looks = styles(("ats", "adavit", "avit"))
    for name, (file, models) in CURVES.items():
        lines = (json.loads(line) for line in (HERE / f"{file}.jsonl").read_text().splitlines())
        rows = {row["model"].removesuffix(".safetensors"): row for row in lines if "model" in row}
        points = []
        for model in models:
            row = rows[model]
            point = (
                100 * row["gmacs"] / row["gmacs_dense"],
                100 * row["top1_minus_dense"],
                100 * row["standard_error"],
            )
            points.append(point)
            print(f"{name:32} {model:24} {point[0]:5.1f} % of the MACs {point[1]:+5.1f} ± {point[2]:.1f}")
        look, ordered = looks[name.split()[0].replace("-", "").lower()], sorted(points)
        style = "-" if "65" in name else ":"
        kind = {"color": look.colour, "marker": look.marker, "linestyle": style, "fillstyle": "none"}
        axes.errorbar(*zip(*ordered, strict=True), capsize=2, label=name, **kind)
        axes.plot(*points[0][:2], look.marker, color=look.colour)
    axes.set(xlabel="MACs, % of the dense ones", ylabel="top-1 against dense, points")
    axes.legend(fontsize="small", title="filled: as trained", title_fontsize="small", frameon=False)
    axes.set_title(
        "ViT-Tiny on Imagenette, steered after training; whiskers: one standard error", fontsize=9, loc="left"
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    write_png(figure, HERE / "steering.png")


if __name__ == "__main__":
    main()
