"""One file per method: config, model, decision functions, own loss; `base` says what a method is."""

from torch import nn

from adaptvit.methods.adavit import AdaViTConfig
from adaptvit.methods.ats import ATSConfig, RandomConfig
from adaptvit.methods.avit import AViTConfig
from adaptvit.methods.base import MethodConfig, Methods, Named, Published, turned
from adaptvit.methods.dynamicvit import DynamicViTConfig
from adaptvit.methods.evit import EViTConfig
from adaptvit.methods.exits import ExitConfig, MergeExitConfig
from adaptvit.methods.full import FullConfig
from adaptvit.methods.grid import GridConfig
from adaptvit.methods.merge import CalibratedConfig, MergeConfig
from adaptvit.methods.released import (
    ReleasedAdaViTConfig,
    ReleasedATSConfig,
    ReleasedAViTConfig,
    ReleasedDynamicViTConfig,
    of_today,
)
from adaptvit.methods.run_length import RunLengthConfig, RunLengthMergeConfig
from adaptvit.methods.tome import ToMeConfig
from adaptvit.model import AdaptiveViT

METHODS = Methods(
    CalibratedConfig,
    MergeConfig,
    ToMeConfig,
    GridConfig,
    ExitConfig,
    MergeExitConfig,
    ATSConfig,
    EViTConfig,
    AViTConfig,
    AdaViTConfig,
    DynamicViTConfig,
    RunLengthConfig,
    RunLengthMergeConfig,
    RandomConfig,
    FullConfig,
    ReleasedAViTConfig,
    ReleasedATSConfig,
    ReleasedAdaViTConfig,
    ReleasedDynamicViTConfig,
)
"""Config types by name."""
DEFAULT = CalibratedConfig.method
"""What a ViT becomes unless told."""
IN_PLOTS = (
    "calibrated",
    "merge",
    "tome",
    "grid",
    "ats",
    "evit",
    "avit",
    "adavit",
    "dynamicvit",
    "runlength",
    "random",
    "exit",
    "merge_exit",
)
"""The methods that have the first looks in plots: one that is drawn keeps its own, whatever comes between these."""


def untrained(clips: bool = False, many: bool = False) -> tuple[str, ...]:
    """Names of the methods that need images alone, the control included; those that need clips, or many, where told."""
    left = {"dense", "released", *(() if clips else ("clips",)), *(() if many else ("many",))}
    return tuple(name for name, config in METHODS.items() if not config.trained and config.role not in left)


def named(role: str) -> str:
    """The method of a role of which there is one: `dense`, `control` or `reference`."""
    return next(name for name, config in METHODS.items() if config.role == role)


def dense(vit: nn.Module) -> AdaptiveViT:
    """A ViT as it is, as a model like the others: nothing is left out."""
    return METHODS[named("dense")]().build(vit)


def is_dense(model: AdaptiveViT) -> bool:
    """Whether a model is a plain ViT, of which nothing is left out."""
    return model.config.role == "dense"


__all__ = [
    "DEFAULT",
    "IN_PLOTS",
    "METHODS",
    "MethodConfig",
    "Named",
    "Published",
    "dense",
    "is_dense",
    "named",
    "of_today",
    "turned",
    "untrained",
]
