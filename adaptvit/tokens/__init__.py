"""Layouts for the tokens of a batch: `Dense`, whose images keep as many each, `Packed`, `Slab` and `Masked` for all.

A method is written once against the verbs of `Tokens` and runs in every layout with the same meaning.
"""

from adaptvit.tokens.base import Tokens
from adaptvit.tokens.choice import choose_layout
from adaptvit.tokens.dense import Dense
from adaptvit.tokens.kernels import AttentionOptions
from adaptvit.tokens.masked import Masked
from adaptvit.tokens.packed import Packed
from adaptvit.tokens.slab import Plan, Slab

LAYOUTS: dict[str, type[Tokens]] = {"masked": Masked, "packed": Packed}
"""Those that every method runs in."""

__all__ = ["LAYOUTS", "AttentionOptions", "Dense", "Masked", "Packed", "Plan", "Slab", "Tokens", "choose_layout"]
