"""What the fields of a config and the arguments of a function may hold: declared beside them, checked in one place.

    rate: Annotated[float, In("[0, 64]")] = 1.0
    mode: Literal["clean", "official"] = "clean"

    def __post_init__(self) -> None:
        check_fields(self)

What is checked is the type, and what stands beside it. A whole number will do for a number, but neither 3.0 nor a
boolean for a whole one. NaN is refused everywhere, infinity but where an end of the range includes it, a whole number
of more than 64 bits too. Numpy's and torch's numbers and lists come out as Python's, lists as tuples, strings for paths
as paths; where only several numbers are asked for, one stands for itself, and there is
at least one.
"""

import dataclasses
import functools
import inspect
import math
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from adaptvit.terminal import meant

P = ParamSpec("P")
R = TypeVar("R")

MOST = 80
"""Characters of a value that a message shows."""


class Wrong(Exception):
    """What a value must be, in words that follow its name."""


class Unfit(Exception):
    """A value of another type than is declared."""


class In:
    """The range of a number, or of each of several, as intervals are written: `In("(0, 1]")`."""

    def __init__(self, interval: str, what: str = "", hint: str = "", empty: bool = False) -> None:
        """Take an interval; `what` it is a range of is told too, and at the end of a message `hint`.

        Args:
            empty: of several numbers, whether there may be none.
        """
        found = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", interval)
        assert found, interval
        self.interval, self.what = interval, f", {what}" if what else ""
        self.empty = empty
        self.hint = f"; {hint}" if hint else ""
        self.ends = found[2], found[3]
        self.low, self.high = float(found[2]), float(found[3])
        self.with_low, self.with_high = found[1] == "[", found[4] == "]"

    def __repr__(self) -> str:
        return self.interval  # in the command line's help

    def holds(self, value: float) -> bool:
        above = value >= self.low if self.with_low else value > self.low
        below = value <= self.high if self.with_high else value < self.high
        return above and below and not (isinstance(value, int) and abs(value) >= 2**63)

    def words(self, whole: bool) -> str:
        """What is allowed, as it follows "a number"."""
        low, high = self.ends
        if math.isfinite(self.high):
            return f"in {low}..{high}" if whole and math.isfinite(self.low) else f"in {self.interval}"
        if math.isfinite(self.low):
            return f"{low} or more" if self.with_low else f"above {low}"
        return "whole" if whole else "finite"

    def check(self, value: Any) -> None:
        if value == () and not self.empty:
            raise Unfit
        for number in leaves(value):
            if isinstance(number, float | int) and not isinstance(number, bool) and not self.holds(number):
                words = self.words(isinstance(number, int))
                if not math.isfinite(self.high) and math.isfinite(self.low):
                    words += " and finite" if number == math.inf else ""
                    words += " and below 2**63" if isinstance(number, int) and number >= 2**63 else ""
                raise Wrong(f"must {'lie' if words.startswith('in ') else 'be'} {words}{self.what}")


class OneOf:
    """The names that a string, or each of several, is one of."""

    def __init__(self, names: Iterable[str] | Callable[[], Iterable[str]]) -> None:
        """Take the names, or what gives them where they are known later than the config."""
        self.names = names

    @property
    def words(self) -> str:
        return ", ".join(self.names() if callable(self.names) else self.names)

    def __repr__(self) -> str:
        return f"one of {self.words}"

    def hint(self, value: Any) -> str:
        """The name that a wrong one may have been meant for, as a message ends; nothing where none is near."""
        names = [*(self.names() if callable(self.names) else self.names)]
        words = [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, str)]
        return next((meant(word, names) for word in words if word not in names), "")

    def check(self, value: Any) -> None:
        names = self.names() if callable(self.names) else self.names
        for name in leaves(value):
            if name is not None and name not in names:
                raise Wrong(f"must be {'some' if isinstance(value, tuple) else 'one'} of {self.words}")


class Ascending:
    """Of block numbers: from 0 on, each above the one before."""

    words = "block numbers from 0 on, ascending"

    def __repr__(self) -> str:
        return "ascending"

    def check(self, value: Any) -> None:
        numbers = leaves(value)
        if not numbers:
            raise Unfit
        if value is not None and (list(numbers) != sorted({*numbers}) or not all(0 <= n < 2**63 for n in numbers)):
            raise Wrong(f"must be {self.words}")


def leaves(value: Any) -> tuple[Any, ...]:
    """The items of a tuple, or the value itself."""
    return value if isinstance(value, tuple) else (value,)


def check_fields(config: Any, leave: Sequence[str] = ()) -> None:
    """Check the fields of a dataclass by what is declared beside them, and put them into their types.

    Args:
        leave: fields that are not looked at.
    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    kind = type(config)
    for field in dataclasses.fields(config):
        if field.name not in leave:
            value = valid(f"{kind.__name__}.{field.name}", getattr(config, field.name), field.type)
            object.__setattr__(config, field.name, value)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A function that checks, before anything else, the arguments that have something declared beside them."""
    signature = inspect.signature(function)
    declared = {name: one.annotation for name, one in signature.parameters.items() if _is_declared(one.annotation)}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments
        found = {name: valid(name, given[name], kind) for name, kind in declared.items() if name in given}
        names = list(signature.parameters)[: len(args)]
        values: Any = [found.get(name, value) for name, value in zip(names, args, strict=True)]
        others: Any = kwargs | {name: value for name, value in found.items() if name in kwargs}
        return function(*values, **others)

    return call


def _is_declared(kind: Any) -> bool:
    return get_origin(kind) in (Annotated, Literal) or any(map(_is_declared, get_args(kind)))


def valid(name: str, value: Any, kind: Any) -> Any:
    """`value` as the type `kind` has it, with what is declared in that.

    Raises:
        ValueError: it is none; the message has `name`, the value and what is allowed.
    """
    try:
        return _fit(value.tolist() if isinstance(value, np.generic | np.ndarray | Tensor) else value, kind)
    except Wrong as wrong:
        words = str(wrong)
    except Unfit:
        words = f"must be {_words(kind)}"
    beside = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    hints = [one.hint for one in beside if isinstance(one, In)]
    hints += [one.hint(value) for one in beside if isinstance(one, OneOf)]
    raise ValueError(f"{name} {words}, got {quoted(value)}{''.join(hints)}")


def _fit(value: Any, kind: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = _fit(value, arguments[0])
        for constraint in arguments[1:]:
            constraint.check(value)
        return value
    if origin in (Union, types.UnionType):
        for arm in sorted(arguments, key=lambda arm: get_origin(arm) in (tuple, Sequence)):  # one stays one
            try:
                return _fit(value, arm)
            except Unfit:
                pass
        raise Unfit
    if origin in (tuple, Sequence):
        return _fit_several(value, arguments, fixed=origin is tuple and arguments[-1] is not ...)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise Unfit
        return {key: _fit(item, arguments[1]) for key, item in value.items()}
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise Unfit
        return value
    if kind is Any:
        _check_finite(value)
        return value
    if kind is float and isinstance(value, float | int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if kind is int and isinstance(value, bool):
        raise Unfit
    if kind is Path and isinstance(value, str | os.PathLike):
        if "\0" in os.fspath(value):
            raise Unfit
        return Path(value)
    if value is None and kind is types.NoneType:
        return value
    if isinstance(kind, type) and kind is not float and isinstance(value, kind) and not isinstance(value, type):
        return value
    raise Unfit


def _fit_several(value: Any, kinds: tuple[Any, ...], fixed: bool) -> tuple[Any, ...]:
    numbers = _noun(kinds[0]) in (NOUNS[int], NOUNS[float])
    if isinstance(value, int | float) and numbers and not fixed:
        value = (value,)
    if isinstance(value, str | bytes | Mapping | Set) or not isinstance(value, Iterable):
        raise Unfit
    value = tuple(value.tolist() if isinstance(value, np.ndarray | Tensor) else value)
    if fixed and len(value) != len(kinds):
        raise Unfit
    items = [item.tolist() if isinstance(item, np.generic | Tensor) else item for item in value]
    return tuple(_fit(item, kinds[place] if fixed else kinds[0]) for place, item in enumerate(items))


def _check_finite(value: Any) -> None:
    """Of what is handed on as it is: a number within it that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise Wrong("must be finite")
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        _check_finite(item)


NOUNS = {
    float: ("a number", "numbers"),
    int: ("a whole number", "whole numbers"),
    str: ("a string", "strings"),
    bool: ("true or false", "booleans"),
    Path: ("a path", "paths"),
    types.NoneType: ("None", "None"),
}


def _noun(kind: Any) -> tuple[str, str]:
    """One of a type and several of it, in words."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (dict, Mapping):
        return ("values by name", "values by name")
    if get_origin(kind) is Literal:
        names = ", ".join(get_args(kind))
        return (f"one of {names}", f"some of {names}")
    name = getattr(kind, "__name__", str(kind))
    return NOUNS.get(kind, (f"{'an' if name[0] in 'AEIOU' else 'a'} {name}", f"{name}s"))


def _words(kind: Any) -> str:
    """What a declaration allows."""
    said = []
    if get_origin(kind) is Annotated:
        kind, *constraints = get_args(kind)
        words = _words(kind)
        for constraint in constraints:
            if isinstance(constraint, In):
                limits = constraint.words("whole" in words)
                said.append((f" {limits}" if limits.startswith("in ") else f", {limits}") + constraint.what)
            elif isinstance(constraint, OneOf):
                words = words.replace("strings", f"some of {constraint.words}")
                words = words.replace("a string", f"one of {constraint.words}")
            elif isinstance(constraint, Ascending):
                words = words.replace("whole numbers", constraint.words)
        none = ", or None" if words.endswith(", or None") else ""
        return words.removesuffix(", or None") + "".join(said) + none
    if get_origin(kind) in (Union, types.UnionType):
        arms = [arm for arm in get_args(kind) if arm is not types.NoneType]
        singles = [arm for arm in arms if get_origin(arm) not in (tuple, Sequence) or len(arms) == 1]
        words = " or ".join(map(_words, singles))
        if len(singles) < len(arms):
            several = next(arm for arm in arms if arm not in singles)
            words += f" or {_words(several)}" if _is_fixed(several) else " or several"
        return words + (", or None" if types.NoneType in get_args(kind) else "")
    if get_origin(kind) in (tuple, Sequence):
        several = _noun(get_args(kind)[0])[1]
        return f"{len(get_args(kind))} {several}" if _is_fixed(kind) else several
    return _noun(kind)[0]


def _is_fixed(kind: Any) -> bool:
    return get_origin(kind) is tuple and get_args(kind)[-1] is not ...


def quoted(value: Any) -> str:
    """A value in a message, on one line and not too long."""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        value = value.tolist()
    try:
        text = repr(str(value) if isinstance(value, Path) else value)
    except ValueError:  # a whole number of more than 4300 digits
        return "a number of thousands of digits"
    text = " ".join(text.split())
    return text if len(text) <= MOST else f"{text[: MOST // 2]}…{text[-MOST // 2 :]}"


def check_device(name: str, device: str) -> None:
    """Refuse what is no device, or not here.

    Raises:
        ValueError: naming the device.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda", "mps", "xpu"):
        raise ValueError(f"{name} must be cpu, cuda, xpu or mps, or one of these with a number, got {device!r}")
    if found.type == "cpu":
        return
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if here is None or here.type != found.type:
        raise ValueError(f"{name} is {device!r}, but torch finds no {found.type.upper()} here; use cpu")
    if (found.index or 0) >= torch.accelerator.device_count():
        count = torch.accelerator.device_count()
        raise ValueError(f"{name} is {device!r}, but there are {count}, counted from 0")
