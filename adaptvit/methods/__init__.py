"""One file per method: config, model, decision functions, own loss."""

from typing import Any

from adaptvit.methods.adavit import AdaViTConfig
from adaptvit.methods.ats import ATSConfig
from adaptvit.methods.avit import AViTConfig
from adaptvit.methods.dynamicvit import DynamicViTConfig
from adaptvit.methods.evit import EViTConfig
from adaptvit.methods.full import FullConfig
from adaptvit.methods.tome import MergeConfig, ToMeConfig

METHODS: dict[str, Any] = {
    config.method: config
    for config in (
        FullConfig,
        AViTConfig,
        ATSConfig,
        AdaViTConfig,
        EViTConfig,
        DynamicViTConfig,
        ToMeConfig,
        MergeConfig,
    )
}
"""Config types by name, for checkpoints and the command line."""
