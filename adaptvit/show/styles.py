"""How each method is drawn, in every plot: one colour and one marker."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

from adaptvit.methods import IN_PLOTS, METHODS

LOOKS = (
    ("#d55e00", "o"),
    ("#e69f00", "s"),
    ("#0072b2", "^"),
    ("#56b4e9", "v"),
    ("#009e73", "D"),
    ("#cc79a7", "P"),
    ("#332288", "X"),
    ("#882255", "<"),
    ("#999933", ">"),
    ("#117733", "h"),
    ("#777777", "d"),
    ("#44aa99", "p"),
    ("#aa4499", "8"),
    ("#661100", "H"),
    ("#ddaa33", "x"),
    ("#004488", "+"),
    ("#bb5566", "1"),
    ("#6699cc", "2"),
    ("#994f00", "3"),
    ("#40b0a6", "4"),
    ("#ee8866", "*"),
)
"""Okabe and Ito's colours and Tol's muted ones, told apart by the colour-blind; the markers do it in grey."""


@dataclass(frozen=True)
class Style:
    """Of one method."""

    colour: str
    marker: str


def styles(names: Iterable[str]) -> dict[str, Style]:
    """The style of each name: a method's own, by its place in `IN_PLOTS` or after; of others, the next ones.

    A comma and what follows it, as in `evit, tuned`, is no part of a method's name.
    """
    names, known = list(names), list(dict.fromkeys([*IN_PLOTS, *METHODS]))
    places = {name: known.index(_method(name)) for name in names if _method(name) in known}
    free = (place for place in count() if place not in places.values())
    return {name: Style(*LOOKS[(places[name] if name in places else next(free)) % len(LOOKS)]) for name in names}


def _method(name: str) -> str:
    return name.partition(",")[0]
