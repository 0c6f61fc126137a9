"""Vision transformers that spend compute where an image needs it."""

from importlib.metadata import version

from adaptvit.adapt import adapt
from adaptvit.backbones.families import FAMILIES, Family, Parts
from adaptvit.backbones.parts import ViTConfig
from adaptvit.budget import measure_dial, measure_plan, meet_target
from adaptvit.export import export
from adaptvit.macs import Shape, dense_macs, macs
from adaptvit.methods.adavit import AdaViTConfig
from adaptvit.methods.ats import ATSConfig
from adaptvit.methods.avit import AViTConfig
from adaptvit.methods.base import DropConfig, MethodConfig
from adaptvit.methods.dynamicvit import DynamicViTConfig
from adaptvit.methods.evit import EViTConfig
from adaptvit.methods.exits import ExitConfig, MergeExitConfig
from adaptvit.methods.full import FullConfig
from adaptvit.methods.grid import GridConfig
from adaptvit.methods.merge import CalibratedConfig, MergeConfig
from adaptvit.methods.run_length import RunLengthConfig, RunLengthMergeConfig
from adaptvit.methods.tome import ToMeConfig
from adaptvit.model import AdaptiveViT, Knob
from adaptvit.tokens import Dense, Masked, Packed, Plan, Slab, Tokens
from adaptvit.usage import Output, Usage, join
from adaptvit.weights import names as names  # which registers them with timm
from adaptvit.weights.checkpoints import load, save
from adaptvit.weights.published import convert

__version__ = version("adaptvit")

__all__ = [
    "FAMILIES",
    "ATSConfig",
    "AViTConfig",
    "AdaViTConfig",
    "AdaptiveViT",
    "CalibratedConfig",
    "Dense",
    "DropConfig",
    "DynamicViTConfig",
    "EViTConfig",
    "ExitConfig",
    "Family",
    "FullConfig",
    "GridConfig",
    "Knob",
    "Masked",
    "MergeConfig",
    "MergeExitConfig",
    "MethodConfig",
    "Output",
    "Packed",
    "Parts",
    "Plan",
    "RunLengthConfig",
    "RunLengthMergeConfig",
    "Shape",
    "Slab",
    "ToMeConfig",
    "Tokens",
    "Usage",
    "ViTConfig",
    "__version__",
    "adapt",
    "convert",
    "dense_macs",
    "export",
    "join",
    "load",
    "macs",
    "measure_dial",
    "measure_plan",
    "meet_target",
    "save",
]


def __dir__() -> list[str]:
    return sorted(__all__)
