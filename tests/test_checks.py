"""Configs refuse what they cannot use in one sentence, when they are made; what they take works."""

import dataclasses
import importlib
import inspect
import json
import math
import pickle
import pkgutil
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import images, small_vit

import adaptvit
from adaptvit.backbones.parts import ViTConfig
from adaptvit.checks import Ascending, In, OneOf, check_device, check_fields, checked, quoted
from adaptvit.commands.batches import ServeConfig
from adaptvit.commands.bench import BenchConfig
from adaptvit.commands.compare_methods import MethodsConfig
from adaptvit.commands.compare_variants import Comparison
from adaptvit.commands.demo import DemoConfig
from adaptvit.commands.draw import DrawConfig
from adaptvit.commands.evaluate import EvaluateConfig
from adaptvit.commands.predict import PredictConfig
from adaptvit.commands.predict_ray import ScaleConfig
from adaptvit.commands.sessions import PlaygroundConfig
from adaptvit.data import DataConfig
from adaptvit.data.masks import MasksConfig
from adaptvit.methods import METHODS
from adaptvit.methods.full import FullConfig
from adaptvit.training.recipe import Recipe
from adaptvit.training.run import Run
from adaptvit.video import inflate

RUN = Run(method=FullConfig(), data=DataConfig(), recipe=Recipe(epochs=2))
NEEDED: dict[type, dict[str, Any]] = {
    ViTConfig: {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_classes": 3},
    DataConfig: {},
    Recipe: {"epochs": 2},
    Run: {"method": RUN.method, "data": RUN.data, "recipe": RUN.recipe},
    BenchConfig: {"model": "deit_tiny_patch16_224"},
    EvaluateConfig: {"model": "deit_tiny_patch16_224", "root": Path()},
    PredictConfig: {"model": "deit_tiny_patch16_224", "folder": Path()},
    ScaleConfig: {"model": "deit_tiny_patch16_224", "source": "photos", "output": "out"},
    ServeConfig: {"model": "deit_tiny_patch16_224"},
    MasksConfig: {"root": Path(), "classes": ("road", "sky")},
    DrawConfig: {"model": "deit_tiny_patch16_224", "folder": Path()},
    MethodsConfig: {"model": "deit_tiny_patch16_224", "root": Path()},
    PlaygroundConfig: {},
    Comparison: {"question": "Which?", "variants": {"one": RUN, "other": RUN}},
    DemoConfig: {},
} | {kind: {} for kind in METHODS.values()}
"""Every config, and the fields that it needs to be made."""


def field_types(kind: type) -> list[tuple[str, Any]]:
    return [(field.name, field.type) for field in dataclasses.fields(kind)]


def numeric(kind: Any) -> bool:
    """Whether a type holds numbers of ours to check."""
    origin = get_origin(kind)
    if origin in (dict, Mapping, Literal):
        return False
    return kind in (int, float) or any(map(numeric, get_args(kind)))


def declared(kind: Any) -> bool:
    """Whether every number in a type has its range."""
    if get_origin(kind) is Annotated and any(isinstance(one, In | Ascending) for one in get_args(kind)[1:]):
        return True
    return not numeric(kind) or (bool(get_args(kind)) and all(map(declared, get_args(kind))))


def test_every_config_is_in_the_table() -> None:
    found = set()
    for module in pkgutil.walk_packages(adaptvit.__path__, "adaptvit."):
        if module.name.startswith(("adaptvit.flax", "adaptvit.commands.page", "adaptvit.commands.server")):
            continue  # which need packages that are not always here
        for name, kind in vars(importlib.import_module(module.name)).items():
            if (
                inspect.isclass(kind)
                and dataclasses.is_dataclass(kind)
                and not inspect.isabstract(kind)
                and name.endswith("Config")
            ):
                found.add(kind)
    assert found | {Recipe, Run, Comparison} == set(NEEDED)


@pytest.mark.parametrize("kind", NEEDED, ids=lambda kind: kind.__name__)
def test_every_number_of_a_config_has_its_range_beside_it(kind: type) -> None:
    assert [name for name, one in field_types(kind) if not declared(one)] == []


def test_a_number_without_a_range_is_found() -> None:
    assert not declared(float)
    assert not declared(int | None)
    assert not declared(Annotated[tuple[float, ...], "a note"])
    assert not declared(Annotated[int, In("[0, 1]")] | float)
    assert declared(Annotated[float | Sequence[float], In("[0, 1]")])
    assert declared(Annotated[int, In("[0, 1]")] | None)
    assert declared(tuple[str, ...] | bool | None)


NUMBERS = st.one_of(
    st.integers(-3, 12),
    st.floats(0, 1),
    st.sampled_from(
        [math.nan, math.inf, -math.inf, -0.0, 1e-320, 1e-30, 1e308, -1e308, 2**31, 2**63, 10**30, -(10**400)]
    ),
    st.sampled_from([np.float32(0.5), np.int64(2), np.bool_(True), torch.tensor(0.25), torch.tensor(3), 1.0, 3.0]),
)
ANYTHING = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.sampled_from(
        ["cpu", "0.5", "auto", b"x", 1j, object(), Path("x"), np.zeros(2), torch.ones(1, 2), {"a": math.nan}]
    ),
    st.lists(NUMBERS, max_size=4),
    st.lists(NUMBERS, max_size=4).map(tuple),
    st.lists(st.one_of(st.none(), st.text(max_size=2), st.lists(NUMBERS, max_size=2)), max_size=3),
)


def likely(kind: Any) -> st.SearchStrategy:
    """Values of a type, in its range more often than not."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        ranges = [one for one in arguments[1:] if isinstance(one, In)]
        names = [one for one in arguments[1:] if isinstance(one, OneOf)]
        if names:
            names = list(names[0].names() if callable(names[0].names) else names[0].names)
            return st.one_of(st.sampled_from(names), st.lists(st.sampled_from(names), max_size=3).map(tuple))
        wide = [st.floats(max(one.low, -1e12), min(one.high, 1e12)) for one in ranges if "float" in str(arguments[0])]
        ends = [end for one in ranges for end in (one.low, one.high) if math.isfinite(end)]
        return st.one_of(likely(arguments[0]), *wide, *([st.sampled_from([*ends, *map(int, ends)])] if ends else []))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (tuple, Sequence):
        count = (
            {} if ... in arguments or origin is Sequence else {"min_size": len(arguments), "max_size": len(arguments)}
        )
        return st.lists(likely(arguments[0]), **{"max_size": 4, **count}).map(tuple)
    if origin in (typing.Union, type(int | None)):
        return st.one_of(*map(likely, arguments))
    plain: dict[Any, st.SearchStrategy] = {
        int: st.integers(0, 4),
        float: st.floats(0, 1),
        bool: st.booleans(),
        str: st.text(max_size=2),
        Path: st.just(Path("x")),
        type(None): st.none(),
    }
    return plain.get(kind, st.just({}))


@st.composite
def changes(draw: st.DrawFn, kind: type) -> dict[str, Any]:
    """Values for one to three fields of a config."""
    fields = draw(st.lists(st.sampled_from(field_types(kind)), min_size=1, max_size=3, unique_by=lambda one: one[0]))
    return {name: draw(likely(one) if draw(st.integers(0, 3)) else ANYTHING) for name, one in fields}


def check_refusal(error: Exception, kind: type, given: dict[str, Any]) -> None:
    """One sentence that names a field, and the value where it is one field's."""
    text = str(error)
    assert "\n" not in text
    assert any(f"{kind.__name__}.{name}" in text for name, _ in field_types(kind)), text
    if len(given) == 1 and "must" in text:
        ((name, value),) = given.items()
        if f"{kind.__name__}.{name} must" in text and "got" in text and not isinstance(value, dict):
            assert quoted(value) in text or str(value) in text or repr(tuple(value)) in text, text


def made(kind: type, given: dict[str, Any]) -> Any:
    """The config, or None where it is refused as it should be."""
    try:
        return kind(**{**NEEDED[kind], **given})
    except (FileNotFoundError, TypeError, ValueError) as error:
        check_refusal(error, kind, given)
        return None


COMMON = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow]}


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    return small_vit(depth=3).eval()


@pytest.mark.filterwarnings("ignore:.*halts every token")
@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_a_config_of_a_method_is_refused_or_works(kind: Any, vit: Any) -> None:
    pictures = images(vit, 2)
    if kind.role == "clips":
        vit, pictures = inflate(vit, frames=4), pictures[:, None].repeat(1, 4, 1, 1, 1)

    @settings(max_examples=60, **COMMON)
    @given(changes(kind) if dataclasses.fields(kind) else st.just({}))
    def holds(given: dict[str, Any]) -> None:
        config = made(kind, given)
        if config is None:
            return
        try:
            model = config.build(vit)
        except (TypeError, ValueError) as error:
            check_refusal(error, kind, {})
            return
        with torch.inference_mode():
            assert model(pictures).isfinite().all()
        kept = {name: json.loads(json.dumps(value)) for name, value in vars(config).items()}
        assert kind(**kept) == config == pickle.loads(pickle.dumps(config)) == dataclasses.replace(config)

    holds()


@pytest.mark.parametrize(
    "kind", [kind for kind in NEEDED if kind not in METHODS.values()], ids=lambda one: one.__name__
)
def test_any_other_config_is_refused_or_made(kind: type) -> None:
    @settings(max_examples=60, **COMMON)
    @given(changes(kind))
    def holds(given: dict[str, Any]) -> None:
        config = made(kind, given)
        if config is not None:
            assert dataclasses.replace(config) == config
        if isinstance(config, ViTConfig) and config.embed_dim * config.mlp_ratio * math.prod(config.img_size) < 1e6:
            vit = config.build().eval()
            with torch.inference_mode():
                assert vit(torch.zeros(1, config.in_chans, *config.img_size)).isfinite().all()

    holds()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One field of every kind."""

    number: Annotated[float, In("(0, 1]", "a share", "60 % is 0.6")] = 0.5
    count: Annotated[int, In("[1, inf)")] = 1
    open_ended: Annotated[float | None, In("(0, inf]")] = None
    one_or_several: Annotated[float | Sequence[float], In("[-1, 1]")] = 0.0
    several: Annotated[tuple[float, ...] | None, In("[0, inf)")] = None
    three: Annotated[tuple[float, float, float], In("[0, 1]")] = (0.0, 0.0, 0.0)
    blocks: Annotated[Sequence[int] | None, Ascending()] = None
    name: Annotated[str, OneOf(("a", "b"))] = "a"
    mode: Literal["x", "y"] = "x"
    flag: bool = False
    path: Path | None = None
    names: tuple[str, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("number", 2, "must lie in (0, 1], a share, got 2; 60 % is 0.6"),
        ("number", math.nan, "must lie in (0, 1], a share, got nan; 60 % is 0.6"),
        ("number", "0.5", "must be a number in (0, 1], a share, got '0.5'; 60 % is 0.6"),
        ("number", True, "must be a number in (0, 1], a share, got True; 60 % is 0.6"),
        ("number", None, "must be a number in (0, 1], a share, got None; 60 % is 0.6"),
        ("count", 0, "must be 1 or more, got 0"),
        ("count", 3.0, "must be a whole number, 1 or more, got 3.0"),
        ("count", 2**63, "must be 1 or more and below 2**63, got 9223372036854775808"),
        ("open_ended", 0, "must be above 0, got 0"),
        ("open_ended", math.nan, "must be above 0, got nan"),
        ("one_or_several", (0.5, -2), "must lie in [-1, 1], got (0.5, -2)"),
        ("one_or_several", (), "must be a number or several in [-1, 1], got ()"),
        ("several", [1, math.inf], "must be 0 or more and finite, got [1, inf]"),
        ("several", [1, "2"], "must be numbers, 0 or more, or None, got [1, '2']"),
        ("three", (1, 1), "must be 3 numbers in [0, 1], got (1, 1)"),
        ("three", 0.5, "must be 3 numbers in [0, 1], got 0.5"),
        ("blocks", (2, 1), "must be block numbers from 0 on, ascending, got (2, 1)"),
        ("blocks", (-1,), "must be block numbers from 0 on, ascending, got (-1,)"),
        ("blocks", "3", "must be block numbers from 0 on, ascending, or None, got '3'"),
        ("name", "c", "must be one of a, b, got 'c'"),
        ("name", 1, "must be one of a, b, got 1"),
        ("mode", "z", "must be one of x, y, got 'z'"),
        ("flag", 1, "must be true or false, got 1"),
        ("path", 3, "must be a path, or None, got 3"),
        ("path", "a\0b", r"must be a path, or None, got 'a\x00b'"),
        ("names", "ab", "must be strings, got 'ab'"),
        ("options", {"rate": math.nan}, "must be finite, got {'rate': nan}"),
        ("options", {1: 2}, "must be values by name, got {1: 2}"),
    ],
)
def test_a_wrong_value_is_refused_with_its_field_and_what_is_allowed(field: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=r"^Example") as caught:
        Example(**{field: value})
    assert str(caught.value) == f"Example.{field} {said}"


@pytest.mark.parametrize(
    ("field", "value", "held"),
    [
        ("number", 1, 1.0),
        ("number", np.float32(0.5), 0.5),
        ("number", torch.tensor(0.25), 0.25),
        ("count", np.int64(3), 3),
        ("open_ended", math.inf, math.inf),
        ("one_or_several", np.array([0.5, 1.0]), (0.5, 1.0)),
        ("one_or_several", 1, 1.0),
        ("several", 2, (2.0,)),
        ("three", [0, 1, 0], (0.0, 1.0, 0.0)),
        ("blocks", range(3), (0, 1, 2)),
        ("blocks", 3, (3,)),
        ("path", "x/y", Path("x/y")),
        ("names", ["a"], ("a",)),
    ],
)
def test_a_value_comes_out_in_its_type(field: str, value: Any, held: Any) -> None:
    got = getattr(Example(**{field: value}), field)
    assert got == held
    assert type(got) is type(held)


def test_arguments_are_checked_before_anything_is_done() -> None:
    calls = []

    @checked
    def call(
        first: str, count: Annotated[int, In("[1, inf)")] = 2, *, share: Annotated[float, In("(0, 1]")] = 1
    ) -> None:
        calls.append((first, count, share))

    call("a")
    call("b", np.int64(3), share=np.float64(0.5))
    with pytest.raises(ValueError, match=r"^count must be 1 or more, got 0$"):
        call("c", 0)
    with pytest.raises(ValueError, match=r"^share must lie in \(0, 1\], got nan$"):
        call("d", share=math.nan)
    assert calls == [("a", 2, 1), ("b", 3, 0.5)]


@pytest.mark.parametrize("device", ["fridge", "meta", ""])
def test_what_is_no_device_is_refused(device: str) -> None:
    with pytest.raises(
        ValueError,
        match=f"^Example.device must be cpu, cuda, xpu or mps, or one of these with a number, got '{device}'$",
    ):
        check_device("Example.device", device)


def test_a_value_is_shown_on_one_line_and_not_at_length() -> None:
    assert quoted("a\nb") == r"'a\nb'"
    assert quoted(Path("x")) == "'x'"
    assert len(quoted(list(range(1000)))) <= 81
    assert quoted(10**5000) == "a number of thousands of digits"
