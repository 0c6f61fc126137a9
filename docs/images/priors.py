"""Draw every prior of the halting depth: python docs/images/priors.py docs/images/priors.png"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from adaptvit.methods.priors import PRIORS, halting_prior, mixture
from adaptvit.show.pictures import ACCENT, INK

BLOCKS = 12
SCALES = {1.0: INK, 2.0: ACCENT}


def main(output: Path) -> None:
    """Each prior over 12 blocks, peaking at block 9, at two scales; and a mixture of two."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(2, 4, sharex=True, sharey=True).flat
    blocks = range(1, BLOCKS + 1)
    for name, axes in zip([*PRIORS, "mixture"], panels, strict=True):
        for scale, colour in SCALES.items():
            if name == "mixture":
                parts = [halting_prior("gaussian", BLOCKS, target, scale) for target in (2, 10)]
                prior = mixture(parts, (0.7, 0.3))
            else:
                prior = halting_prior(name, BLOCKS, 9, scale)
            axes.plot(blocks, prior, color=colour, marker=".", label=f"scale {scale:g}")
        axes.set_title("two gaussians, 70 % at 2" if name == "mixture" else name, fontsize=9)
        axes.set_xticks([1, 3, 6, 9, 12])
        axes.grid(axis="y", linewidth=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("block", fontsize=9)
    figure.supylabel("share of the halting scores", fontsize=9)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
