"""Methods as their published code has them, where that differs from the algorithm: configs of their own.

They reproduce losses, gradients and choices of that code; nothing in `adaptvit.methods` beside knows of them.
"""

from typing import Any

from adaptvit.methods.released.adavit import ReleasedAdaViTConfig
from adaptvit.methods.released.ats import ReleasedATSConfig
from adaptvit.methods.released.avit import ReleasedAViTConfig
from adaptvit.methods.released.dynamicvit import ReleasedDynamicViTConfig

__all__ = [
    "ReleasedATSConfig",
    "ReleasedAViTConfig",
    "ReleasedAdaViTConfig",
    "ReleasedDynamicViTConfig",
    "of_today",
]


def of_today(method: str, values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A method's name and fields as files hold them today, from those of adaptvit 0.1, where some were modes of one."""
    rest = dict(values)
    if method == "ats" and "mode" in values:
        mode, sampler = rest.pop("mode"), rest["sampler"]
        if sampler in ("random", "released"):
            method, rest["sampler"] = {"random": "random", "released": "ats_released"}[sampler], "inverse_transform"
            rest |= {"mode": mode} if sampler == "released" else {}
    elif method in ("avit", "adavit", "dynamicvit") and "mode" in values:
        released = rest.pop("mode") == "official"
        method += "_released" if released else ""
        for field in () if released else ("attention_mask", "mlp_gradient"):
            rest.pop(field, None)
    elif method in ("merge", "calibrated"):
        rest = {"size_cost": 0.0, "weighing": "patches", "keeps_length": False} | rest
    if method == "merge":
        rest = {"compared": "mean key", "protection": 0.0, "power": 1.0} | rest
    return method, rest
