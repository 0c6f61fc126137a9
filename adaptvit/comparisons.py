"""Comparisons that have a name: functions that return a `Comparison`, as recipes return a `Run`."""

from collections.abc import Callable
from dataclasses import replace

from adaptvit.compare import Comparison
from adaptvit.recipes import digits


def digits_budgets() -> Comparison:
    """The digits at three budgets: the quick one, minutes on two CPU cores."""
    base = digits()
    return Comparison(
        question="How much accuracy do smaller budgets cost on the digits?",
        variants={
            f"{share:.0%} of the MACs": replace(base, recipe=replace(base.recipe, target=share))
            for share in (0.7, 0.5, 0.3)
        },
    )


COMPARISONS: dict[str, Callable[[], Comparison]] = {comparison.__name__: comparison for comparison in (digits_budgets,)}
"""What `adaptvit compare` knows by name."""
