"""What timm's tools and people look for in a model."""

import copy
import pickle

import pytest
import timm
import torch
from models import METHODS, images, small_vit
from timm.models import group_parameters
from timm.optim import create_optimizer_v2

import adaptvit
from adaptvit import AViTConfig, DynamicViTConfig, adapt


@pytest.mark.parametrize("method", ["full", "avit", "dynamicvit", "merge"])
def test_the_classifier_is_reset_as_timms_is(method: str) -> None:
    model = METHODS[method].build(small_vit()).eval()
    batch = images(model.vit)
    model.reset_classifier(3)
    assert model.num_classes == model.get_classifier().out_features == 3
    output = model(batch)
    assert output.logits.shape == (len(batch), 3)
    assert model.shape.head == model.num_features * 3
    with pytest.raises(ValueError, match="built for global_pool='token', got 'avg'"):
        model.reset_classifier(3, global_pool="avg")
    tokens = torch.randn(2, 17, model.num_features)
    assert torch.equal(model.forward_head(tokens, pre_logits=True), model.vit.forward_head(tokens, pre_logits=True))


def test_layers_have_timms_groups_and_the_methods_own_parameters_the_last() -> None:
    model = DynamicViTConfig().build(small_vit())
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    theirs = group_parameters(model.vit, model.vit.group_matcher(), reverse=True)
    for name, group in theirs.items():
        assert groups[f"vit.{name}"] == group
    assert {groups[name] for name in groups if not name.startswith("vit.")} == {max(groups.values())}
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, layer_decay=0.7)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) == model.depth + 2


def test_gradient_checkpointing_is_refused_wherever_it_is_set() -> None:
    model = AViTConfig().build(small_vit())
    model.set_grad_checkpointing(False)
    with pytest.raises(NotImplementedError, match="gradient checkpointing"):
        model.set_grad_checkpointing()
    model.vit.set_grad_checkpointing()
    with pytest.raises(NotImplementedError, match="gradient checkpointing"):
        model(images(model.vit))


def test_models_and_outputs_are_printed_shortly() -> None:
    vit = small_vit(img_size=64)
    model = adapt(vit, images(vit, count=4), 0.7)
    first, second = repr(model).split("\n")
    assert first.startswith("MergingViT: merging by similarity on test_vit, 4 blocks, shift=")
    assert first.endswith("% of the dense MACs")
    assert second == repr(model.config)
    output = METHODS["avit"].build(small_vit()).train()(images(vit.eval(), count=3)[..., :32, :32])
    assert repr(output).startswith("Output(logits (3, 7), Usage(3 images, 4 blocks, 4 x 4 patches), ponder ")


def test_models_and_outputs_are_copied_and_pickled() -> None:
    vit = small_vit(img_size=64)
    batch = images(vit, count=4)
    model = adapt(vit, batch, 0.7)
    with torch.inference_mode():
        output = model(batch)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert again.dial == model.dial
            assert torch.equal(again(batch).logits, output.logits)
    assert torch.equal(pickle.loads(pickle.dumps(output)).usage.live, output.usage.live)
    assert output == output
    assert output != model(batch)


def test_the_version_is_that_of_the_package() -> None:
    assert adaptvit.__version__.split(".")[:2] == ["0", "1"]
    assert timm.is_model("avit_tiny_patch16_224")
