import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor

import adaptvit
from adaptvit.methods.avit import AViT
from adaptvit.names import default_cfgs

NAMES = {
    "avit_tiny_patch16_224": (10.0, 30.0),
    "avit_small_patch16_224": (10.0, 75.0),
    "avit_base_patch16_224": (10.0, 75.0),
    "avit_tiny_distilled_patch16_224": (10.0, 30.0),
    "avit_small_distilled_patch16_224": (10.0, 75.0),
}
"""Gates: released for tiny and small, lent to the others."""


@pytest.mark.parametrize("name", NAMES)
def test_a_registered_name_is_avit_around_its_deit(name: str) -> None:
    model = timm.create_model(name, img_size=32)
    with torch.device("meta"):
        deit = timm.create_model(name.replace("avit", "deit"), img_size=32)
    assert isinstance(model, AViT)
    assert (model.config.gate_scale, model.config.gate_center) == NAMES[name]
    shapes = {key: value.shape for key, value in model.vit.state_dict().items()}
    assert shapes == {key: value.shape for key, value in deit.state_dict().items()}


def test_timm_lists_the_names() -> None:
    assert set(timm.list_models("avit*")) == set(NAMES) == set(default_cfgs)


def test_arguments_go_to_the_config_or_to_timm() -> None:
    model = timm.create_model(
        "avit_tiny_patch16_224", num_classes=10, img_size=64, depth=2, gate_center=20.0, class_token="stays"
    )
    assert model.config == adaptvit.AViTConfig(gate_scale=10.0, gate_center=20.0, class_token="stays")
    assert (model.num_classes, model.shape.depth) == (10, 2)
    assert model(torch.zeros(2, 3, 64, 64)).logits.shape == (2, 10)


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


def test_pretrained_loads_deits_weights() -> None:
    deit = timm.create_model("deit_tiny_patch16_224", depth=2)
    overlay = {"state_dict": deit.state_dict()}  # stands for the download
    model = timm.create_model("avit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, depth=2)
    loaded: dict[str, Tensor] = model.vit.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in deit.state_dict().items())
