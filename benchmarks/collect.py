"""Put speed/*.json into speed.csv and print them as a table: python benchmarks/collect.py"""

import csv
import json
from pathlib import Path

HERE = Path(__file__).parent
COLUMNS = (
    "method",
    "training_step",
    "batch_size",
    "macs_executed",
    "macs_dense",
    "dense_images_per_s",
    "masked_images_per_s",
    "packed_images_per_s",
    "ideal_speedup",
    "realised_speedup",
    "ratio",
    "packed_over_masked",
    "load_average",
    "rounds",
    "threads",
    "dtype",
    "device",
    "torch",
)


def main() -> None:
    """Write the csv, print the markdown."""
    runs = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "speed").glob("*.json"))}
    with (HERE / "speed.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("run", *COLUMNS))
        rows.writerows((name, *(figures[column] for column in COLUMNS)) for name, figures in runs.items())
    print("| run | batch | MACs left | ideal | realised | ratio | packed / masked |\n| --- " + "| ---: " * 6 + "|")
    for name, figures in runs.items():
        print(
            f"| {name} | {figures['batch_size']} | {figures['macs_executed'] / figures['macs_dense']:.0%} | "
            f"{figures['ideal_speedup']:.2f} | {figures['realised_speedup']:.2f} | {figures['ratio']:.2f} | "
            f"{figures['packed_over_masked']:.2f} |"
        )


if __name__ == "__main__":
    main()
