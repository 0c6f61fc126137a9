"""Names registered with timm: once adaptvit is imported, `timm.create_model("avit_tiny_patch16_224")` makes an A-ViT.

Which names there are, and the ViTs inside, every method says in its own file (`MethodConfig.published`); those of
packages outside are learnt as their methods become known. They take the arguments of both: fields of the method's
config (among them `class_token` of A-ViT, a word that timm has too), anything else as timm takes it. timm drops
arguments that are None: a config with a None that is not its default has to build around a plain model.
`pretrained=True` loads the weights of the ViT inside, which have not learnt to decide where a method has to be trained:
fine-tune them, or find a gate for A-ViT with `adaptvit.adapt`. T2T-ViT has none to download.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet

from adaptvit.methods import METHODS, MethodConfig, Named

default_cfgs = generate_default_cfgs({})  # timm looks for this name in the module of a registered function


def method_of(name: str) -> type[MethodConfig] | None:
    """The method whose model a name is, timm's tag of weights aside; None of timm's own, and of what is no name."""
    bare = name.partition(".")[0]
    return next((kind for kind in METHODS.values() if bare in kind.published.names), None)


def all_names() -> list[str]:
    """Names of the models of all methods."""
    return [name for kind in METHODS.values() for name in kind.published.names]


def learn(kind: type[MethodConfig]) -> None:
    """Register a method's names with timm."""
    for name, named in kind.published.names.items():
        if not named.arguments:
            weights = timm.models.get_arch_pretrained_cfgs(named.inside).values()
            tagged = {f"{name}.{one.tag}" if one.tag else name: one for one in weights}
            default_cfgs.update(generate_default_cfgs(tagged))
        register_model(_maker(kind, name, named))


def _maker(kind: type[MethodConfig], name: str, named: Named) -> Callable[..., Any]:
    """The function that timm calls for a name, and knows by its own."""

    def make(**options: Any) -> Any:
        if named.arguments and options.get("pretrained"):
            raise ValueError(f"{name} has no weights to download: adaptvit.convert takes its authors' file")
        return around(kind, named, options)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = named.about
    return make


def around(kind: type[MethodConfig], named: Named, options: dict[str, Any]) -> Any:
    """A method around the ViT of a name.

    Args:
        options: what `timm.create_model` was called with; they win over what the name stands for.
    """
    own = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    config = kind(**{**named.fields, **{name: options[name] for name in options.keys() & own}})
    rest = {**named.arguments, **{name: options[name] for name in options.keys() - own}}
    overlay = {**(rest.pop("pretrained_cfg_overlay", None) or {}), "architecture": named.inside}
    maps, blocks = rest.pop("features_only", False), rest.pop("out_indices", 3)
    model = config.build(timm.create_model(named.inside, pretrained_cfg_overlay=overlay, **rest))
    return FeatureGetterNet(model, blocks) if maps else model


METHODS.each(learn)
