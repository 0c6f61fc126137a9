"""A module that stands in for another: its parameters, hooks and forward, but for what is told. Nobody's is changed.

So a ViT's own forward runs with something else in the place of its blocks, and a block's own call, with its hooks and
whatever is wrapped around it, with something else in the place of its forward; in every thread by itself.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

from torch import nn


def stand_in(module: nn.Module, forward: Callable[..., Any] | None = None, /, **attributes: Any) -> Any:
    """A module that shares everything with `module`, of which these attributes are others.

    Args:
        forward: in the place of its own; is given the stand-in first, whose attributes hooks may have set.
    """
    stand = object.__new__(type(module))
    vars(stand).update(vars(module), **attributes)
    if forward is not None:
        itself = ref(stand)  # or it would outlive its use, with all that `forward` holds

        def bound(*args: Any, **kwargs: Any) -> Any:
            return forward(itself(), *args, **kwargs)

        vars(stand).update(forward=bound, _compiled_call_impl=None)
    return stand


def with_parts(module: nn.Module, parts: Mapping[str, Any]) -> Any:
    """A stand-in of which these submodules and attributes, by dotted names, are others; a name may not lead to two."""
    inner: dict[str, dict[str, Any]] = defaultdict(dict)
    modules, attributes = dict(module._modules), dict[str, Any]()
    for path, part in parts.items():
        first, _, rest = path.partition(".")
        if rest:
            inner[first][rest] = part
        elif first in modules:
            modules[first] = part
        else:
            attributes[first] = part
    for first, rests in inner.items():
        child = modules[first]
        assert child is not None
        modules[first] = with_parts(child, rests)
    return stand_in(module, _modules=modules, **attributes)
