"""Layouts for the tokens of a batch whose images keep different numbers of them: `Masked` and `Packed`.

A method is written once against the verbs of `Tokens` and runs in every layout with the same meaning.
"""

from adaptvit.tokens.base import Tokens
from adaptvit.tokens.masked import Masked
from adaptvit.tokens.packed import Packed

LAYOUTS: dict[str, type[Tokens]] = {"masked": Masked, "packed": Packed}

__all__ = ["LAYOUTS", "Masked", "Packed", "Tokens"]
