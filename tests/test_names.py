from dataclasses import fields

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import adaptvit
from adaptvit import MethodConfig
from adaptvit.methods import METHODS
from adaptvit.methods.adavit import AdaViT
from adaptvit.methods.avit import AViT
from adaptvit.weights.names import default_cfgs, method_of

NAMES = {
    "avit_tiny_patch16_224": (10.0, 30.0),
    "avit_small_patch16_224": (10.0, 75.0),
    "avit_base_patch16_224": (10.0, 75.0),
    "avit_tiny_distilled_patch16_224": (10.0, 30.0),
    "avit_small_distilled_patch16_224": (10.0, 75.0),
}
"""Gates: released for tiny and small, lent to the others."""
ADA_NAMES = {
    "ada_step_deit_tiny_patch16_224": "deit_tiny_patch16_224",
    "ada_step_deit_small_patch16_224": "deit_small_patch16_224",
    "ada_step_deit_base_patch16_224": "deit_base_patch16_224",
    "ada_step_t2t_vit_14_lnorm": "t2t_vit_14",
    "ada_step_t2t_vit_19_lnorm": "t2t_vit_19",
}
"""AdaViT's names, and the models inside."""


@pytest.mark.parametrize("name", NAMES)
def test_a_registered_name_is_avit_around_its_deit(name: str) -> None:
    model = timm.create_model(name, img_size=32)
    with torch.device("meta"):
        deit = timm.create_model(name.replace("avit", "deit"), img_size=32)
    assert isinstance(model, AViT)
    assert (model.config.gate_scale, model.config.gate_center) == NAMES[name]
    shapes = {key: value.shape for key, value in model.vit.state_dict().items()}
    assert shapes == {key: value.shape for key, value in deit.state_dict().items()}


@pytest.mark.parametrize("name", ADA_NAMES)
def test_a_registered_name_is_adavit_around_its_backbone(name: str) -> None:
    model = timm.create_model(name, img_size=32, macs_target=1.0)
    with torch.device("meta"):
        inside = timm.create_model(ADA_NAMES[name], img_size=32)
    assert isinstance(model, AdaViT)
    assert model.config == adaptvit.AdaViTConfig(policies=("patches", "heads", "sublayers"), macs_target=1.0)
    shapes = {key: value.shape for key, value in model.vit.state_dict().items()}
    assert shapes == {key: value.shape for key, value in inside.state_dict().items()}
    epsilon = 1e-5 if "t2t" in name else 1e-6
    assert {part.eps for part in model.vit.blocks.modules() if isinstance(part, nn.LayerNorm)} == {epsilon}
    assert model.vit.norm.eps == epsilon


@pytest.mark.parametrize("name", ADA_NAMES)
def test_adavit_is_evaluated_as_published(name: str) -> None:
    settings = resolve_model_data_config(timm.create_model(name, depth=2))
    assert settings == {
        "input_size": (3, 224, 224),
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "crop_pct": 0.9,
        "crop_mode": "center",
    }


def test_timm_lists_the_names() -> None:
    assert set(timm.list_models("avit*")) == set(NAMES)
    assert set(timm.list_models("ada_step*")) == set(ADA_NAMES)
    every = {name: named for kind in METHODS.values() for name, named in kind.published.names.items()}
    assert all(timm.is_model(name) and timm.is_model(named.inside) for name, named in every.items())
    assert set(default_cfgs) == set(every) - {"dynamicvit_256_patch16_224"}  # which nobody has weights of


def test_every_method_has_names() -> None:
    assert all(kind.published.names for kind in METHODS.values() if kind.role in ("method", "reference"))
    assert not any(kind.published.names for kind in METHODS.values() if kind.role in ("control", "dense", "released"))


@pytest.mark.parametrize("kind", [kind for kind in METHODS.values() if kind.published.names])
def test_a_name_is_its_method_around_the_vit_of_its_size(kind: type[MethodConfig]) -> None:
    name, named = next(iter(kind.published.names.items()))
    model = timm.create_model(name, img_size=64, depth=4, num_classes=10)
    assert model.config == kind(**named.fields)
    assert model.vit.pretrained_cfg["architecture"] == named.inside
    assert model.forward(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    assert timm.models.model_entrypoint(name).__doc__ == named.about


def test_arguments_go_to_the_config_or_to_timm() -> None:
    model = timm.create_model(
        "avit_tiny_patch16_224", num_classes=10, img_size=64, depth=2, gate_center=20.0, class_token="stays"
    )
    assert model.config == adaptvit.AViTConfig(gate_scale=10.0, gate_center=20.0, class_token="stays")
    assert (model.num_classes, model.shape.depth) == (10, 2)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ats_tiny_patch16_224", adaptvit.ATSConfig(blocks=(0,), tokens=9, rate=0.5)),
        ("tome_small_patch16_224", adaptvit.ToMeConfig(r=4, inflection=-1.0)),
        ("merge_base_patch16_224", adaptvit.MergeConfig(thresholds=(0.6, 0.9), shift=0.1)),
    ],
)
def test_fields_of_the_config_are_options(name: str, config: MethodConfig) -> None:
    options = {field.name: getattr(config, field.name) for field in fields(config)}  # type: ignore[arg-type]
    assert timm.create_model(name, depth=2, img_size=64, **options).config == config


def test_arguments_of_adavit_go_to_the_config_or_to_timm() -> None:
    model = timm.create_model(
        "ada_step_t2t_vit_14_lnorm", num_classes=10, img_size=64, depth=2, policies=("heads",), macs_target=1.0
    )
    assert model.config == adaptvit.AdaViTConfig(policies=("heads",), macs_target=1.0)
    assert (model.num_classes, model.shape.depth) == (10, 2)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)


def test_an_argument_that_nobody_knows_is_refused() -> None:
    with pytest.raises(TypeError, match="gate_centre"):
        timm.create_model("avit_tiny_patch16_224", img_size=32, gate_centre=20.0)


def test_preprocessing_is_deits_at_the_size_of_the_model() -> None:
    expected = resolve_model_data_config(timm.create_model("deit_tiny_patch16_224", depth=2))
    model = timm.create_model("avit_tiny_patch16_224", depth=2, img_size=(64, 32), in_chans=1)
    assert resolve_model_data_config(model) == expected | {"input_size": (1, 64, 32)}


def test_timms_scripts_can_resolve_the_names_first() -> None:
    arguments = timm.models.resolve_model_input_args("avit_tiny_patch16_224", {"img_size": 32}, depth=2)
    model = timm.create_model(**arguments)
    assert resolve_model_data_config(model)["crop_pct"] == 0.9
    assert model.vit.pretrained_cfg["architecture"] == "deit_tiny_patch16_224"  # what adaptvit.save rebuilds


@pytest.mark.parametrize("name", ["avit_tiny_patch16_224", "ada_step_deit_tiny_patch16_224"])
def test_pretrained_loads_deits_weights(name: str) -> None:
    deit = timm.create_model("deit_tiny_patch16_224", depth=2)
    overlay = {"state_dict": deit.state_dict()}  # stands for the download
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, depth=2)
    loaded: dict[str, Tensor] = model.vit.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in deit.state_dict().items())


def test_dynamicvit_256_is_a_deit_of_256_channels() -> None:
    model = timm.create_model("dynamicvit_256_patch16_224", keep_rate=0.8, num_classes=10)
    assert (model.shape.dim, model.heads, model.num_classes) == (256, (4,) * 12, 10)
    assert model.config == adaptvit.DynamicViTConfig(keep_rate=0.8)
    with pytest.raises(ValueError, match="dynamicvit_256_patch16_224 has no weights to download"):
        timm.create_model("dynamicvit_256_patch16_224", pretrained=True)


def test_t2t_vit_has_no_weights_to_download() -> None:
    with pytest.raises(ValueError, match=r"t2t_vit_14 has no weights to download.*adaptvit\.convert"):
        timm.create_model("ada_step_t2t_vit_14_lnorm", pretrained=True)


def test_a_tag_of_weights_does_not_hide_whose_model_a_name_is() -> None:
    assert method_of("avit_tiny_patch16_224.fb_in1k") is adaptvit.AViTConfig
    assert method_of("deit_tiny_patch16_224.fb_in1k") is None
