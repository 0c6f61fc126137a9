"""What timm's tools and people look for in a model."""

import copy
import dataclasses
import gc
import inspect
import json
import pickle
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from models import METHODS, images, small_vit, vary
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import adaptvit
from adaptvit import (
    AViTConfig,
    Dense,
    DropConfig,
    DynamicViTConfig,
    Masked,
    Packed,
    Plan,
    Slab,
    adapt,
    measure_plan,
)
from adaptvit.methods import METHODS as CONFIGS
from adaptvit.methods.released import ReleasedATSConfig, ReleasedAViTConfig
from adaptvit.model import AdaptiveViT
from adaptvit.tokens import choose_layout, kernels

PICTURES = images(small_vit(img_size=64), count=3)


@pytest.mark.parametrize("method", ["full", "avit", "dynamicvit", "merge"])
def test_the_classifier_is_reset_as_timms_is(method: str) -> None:
    model = METHODS[method].build(small_vit()).eval()
    batch = images(model.vit)
    model.reset_classifier(3)
    assert model.num_classes == model.get_classifier().out_features == 3
    output = model(batch, detailed=True)
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


def test_models_and_outputs_are_printed_shortly() -> None:
    vit = small_vit(img_size=64)
    model = adapt(vit, images(vit, count=4), 0.7)
    first, second = repr(model).split("\n")
    assert first.startswith("MergingViT: calibrated merging on test_vit, 4 blocks, rate=")
    assert first.endswith("% of the dense MACs")
    assert second == repr(model.config)
    output = METHODS["avit"].build(small_vit()).train()(images(vit.eval(), count=3)[..., :32, :32], detailed=True)
    assert repr(output).startswith("Output(logits (3, 7), Usage(3 images, 4 blocks, 4 x 4 patches), ponder ")


def test_models_and_outputs_are_copied_and_pickled() -> None:
    vit = small_vit(img_size=64)
    batch = images(vit, count=4)
    model = adapt(vit, batch, 0.7)
    with torch.inference_mode():
        output = model(batch, detailed=True)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert again.dial == model.dial
            assert torch.equal(again(batch), output.logits)
    assert torch.equal(pickle.loads(pickle.dumps(output)).usage.live, output.usage.live)
    assert pickle.loads(pickle.dumps(output)) == output == model(batch, detailed=True)
    assert output != model(batch + 1, detailed=True)
    assert output != output.logits


def test_outputs_are_rebuilt_field_by_field_as_lightning_does() -> None:
    def rebuilt(what: Any) -> Any:
        if isinstance(what, Tensor):
            return what.detach().clone()
        if isinstance(what, dict):
            return {key: rebuilt(value) for key, value in what.items()}
        if isinstance(what, tuple):
            parts = [rebuilt(part) for part in what]
            return type(what)(*parts) if hasattr(what, "_fields") else tuple(parts)
        if dataclasses.is_dataclass(what):
            values = {field.name: getattr(what, field.name) for field in dataclasses.fields(what)}
            again = copy.deepcopy(what, {id(value): value for value in values.values()})
            for name, value in values.items():
                setattr(again, name, rebuilt(value))
            return again
        return what

    for method in ("avit", "tome"):
        output = METHODS[method].build(small_vit()).train()(images(small_vit(), count=3), detailed=True)
        assert rebuilt(output) == output
        kept = dataclasses.replace(output, usage=output.usage.to_keep())
        assert rebuilt(kept).usage.depth.tolist() == output.usage.depth.tolist()


def gradients(model: AdaptiveViT, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


def build(method: str) -> AdaptiveViT:
    return vary(CONFIGS[method]().build(small_vit(img_size=64))).train()


OF_IMAGES = [name for name, config in CONFIGS.items() if config.role != "clips"]
WITH_TERMS = [name for name in OF_IMAGES if build(name)(PICTURES, detailed=True).terms]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", WITH_TERMS)
def test_logits_in_training_carry_the_terms_gradients(method: str, dtype: torch.dtype) -> None:
    model = build(method)
    labels = torch.tensor([0, 1, 2])
    for scale in (1.0, 0.25):
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            torch.manual_seed(0)
            output = model(PICTURES, detailed=True)
            loss = cross_entropy(output.logits, labels) + sum(output.terms.values())
            wanted = gradients(model, scale * loss)
            alone = gradients(model, scale * cross_entropy(model(PICTURES, detailed=True).logits, labels))
            torch.manual_seed(0)
            model.terms_scale = scale
            logits = model(PICTURES)
            assert torch.equal(logits, output.logits)
            found = gradients(model, scale * cross_entropy(logits, labels))
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)
        assert any(not torch.allclose(wanted[name], alone[name], atol=1e-6) for name in alone.keys() & wanted.keys())


def test_terms_alone_train_a_method_whose_vit_is_frozen() -> None:
    model = build("dynamicvit")
    model.vit.requires_grad_(False)
    torch.manual_seed(0)
    output = model(PICTURES, detailed=True)
    wanted = gradients(model, sum(output.terms.values(), output.logits.mean()))
    assert wanted
    torch.manual_seed(0)
    found = gradients(model, model(PICTURES).mean())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient)


def test_logits_carry_nothing_in_evaluation_or_without_gradients() -> None:
    model = build("avit")
    assert model(PICTURES, detailed=True).terms
    with torch.no_grad():
        assert not model(PICTURES).requires_grad
    assert model(PICTURES).grad_fn.name() == "_CarriedBackward"
    assert model.eval()(PICTURES).grad_fn.name() != "_CarriedBackward"


def test_terms_in_float16_are_refused_unless_asked_for() -> None:
    model = build("avit")
    with torch.autocast("cpu", torch.float16):
        with pytest.raises(ValueError, match=r"train in bfloat16, or add them yourself, .* detailed=True"):
            model(PICTURES)
        assert model(PICTURES, detailed=True).terms
        with torch.no_grad():
            assert model(PICTURES).isfinite().all()


def test_both_calls_pass_through_ddp(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = build("avit")
        parallel = DistributedDataParallel(model)
        output = parallel(PICTURES, detailed=True)
        wanted = gradients(model, output.logits.square().mean() + sum(output.terms.values()))
        found = gradients(model, parallel(PICTURES).square().mean())
    finally:
        dist.destroy_process_group()
    assert output.usage == model(PICTURES, detailed=True).usage
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("method", METHODS)
def test_others_may_write_what_they_write_into_every_config(method: str) -> None:
    """Hugging Face's Trainer does."""
    config = METHODS[method]
    written = dataclasses.replace(config)
    written.use_cache = False
    assert written == config
    assert "use_cache" not in {**written.to_dict(), **json.loads(written.to_json_string())}
    for name in ("gate_centre", *(field.name for field in dataclasses.fields(config))):
        with pytest.raises(dataclasses.FrozenInstanceError, match=name):
            setattr(written, name, 1)


@pytest.mark.filterwarnings("ignore:.*(trace|tensor):Warning")  # of torch: what is deprecated, what is a constant
@pytest.mark.parametrize("method", METHODS)
def test_a_trace_holds_for_other_images_or_is_refused(method: str) -> None:
    model = vary(METHODS[method].build(small_vit())).eval()
    first, others = images(model.vit, count=4), 2 * images(model.vit, count=5, seed=5)
    said = "packed tokens" if model.traces else "what .* decides"
    calls = [
        partial(model, layout=layout) for layout in (Packed, Dense, Slab, *(() if model.traces else (None, Masked)))
    ]
    for call in (*calls, model.by_plan, *(() if model.traces else (model.features,))):
        with pytest.raises(NotImplementedError, match=rf"torch\.jit\.trace would freeze {said}"):
            torch.jit.trace(lambda batch, call=call: call(batch), first)
    if model.traces:
        traced = torch.jit.trace(model, first, check_trace=False)
        torch.testing.assert_close(traced(others), model(others), atol=1e-5, rtol=1e-5)


def test_whatever_looks_at_all_attributes_of_a_model_can() -> None:
    for config in METHODS.values():
        inspect.getmembers(config.build(small_vit()))


def test_training_in_any_loop_takes_the_dial_away() -> None:
    model = adapt(small_vit(img_size=64), PICTURES, 0.8, AViTConfig())
    for train, gradients in ((False, True), (True, False)):
        with torch.set_grad_enabled(gradients):
            model.train(train)(PICTURES)
        assert model.compute == pytest.approx(0.8, abs=0.02)
    model.train()(PICTURES)
    assert model.compute is None


def test_logits_in_training_can_be_changed_in_place() -> None:
    model = build("avit")
    logits = model(PICTURES)
    logits /= 2
    logits[:, 0].mul_(3)
    logits.sum().backward()


def test_on_a_device_a_model_takes_the_layout_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[type] = []
    even, ragged, learning = (METHODS[name].build(small_vit()).eval() for name in ("tome", "ats", "tome"))
    learning.train()
    for model in (even, ragged, learning):
        monkeypatch.setattr(model, "run", lambda tokens, run=model.run: (taken.append(type(tokens)), run(tokens))[1])
    batch = images(even.vit)
    models = (even, ragged, learning)

    def layouts() -> list[type]:
        taken.clear()
        with torch.no_grad():
            for model in models:
                model(batch)
        return taken

    assert layouts() == [Packed, Packed, Packed]
    monkeypatch.setattr(kernels, "on_host", lambda device: False)
    assert layouts() == [Dense, Packed, Dense]
    with torch.inference_mode():
        ragged.plan = measure_plan(ragged, batch)
    assert layouts() == [Dense, Slab, Dense]
    with torch.no_grad():
        ragged(batch, Packed)
    assert taken[3:] == [Packed]


def test_rows_in_reserve_are_weighed_against_a_wait() -> None:
    plan = Plan(means=(100.0,) * 6, spreads=(12.0,) * 6, images=1000)

    def taken(dim: int, batch: int, dtype: torch.dtype = torch.bfloat16, plan: Plan | None = plan) -> type:
        return choose_layout(torch.device("meta"), dtype, False, plan, batch, 12 * dim**2)

    assert taken(384, 8) is taken(384, 256) is taken(1024, 8) is Slab
    assert taken(1024, 256) is taken(384, 8, plan=None) is Packed
    assert taken(384, 256, torch.float32) is Packed
    assert choose_layout(torch.device("meta"), torch.bfloat16, True, plan, 256, 12 * 1024**2) is Dense
    assert choose_layout(torch.device("cpu"), torch.bfloat16, True, plan, 8, 12 * 384**2) is Packed


def test_a_layout_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match=r"layout must be adaptvit\.Packed, Dense, Slab, Masked or None, got True"):
        build("full")(PICTURES, True)


def test_a_config_without_the_name_of_its_method_is_refused() -> None:
    class Nameless(DropConfig):
        def decide(self, before: Any, after: Any, block: int) -> None: ...

    with pytest.raises(TypeError, match="Nameless must be a frozen dataclass with the name of its method"):
        Nameless().build(small_vit())


def test_released_configs_refuse_fields_that_they_do_not_read() -> None:
    with pytest.raises(ValueError, match=r"ReleasedATSConfig\.sampler is the released one, got 'gumbel'"):
        ReleasedATSConfig(sampler="gumbel")
    with pytest.raises(ValueError, match=r"ReleasedAViTConfig\.divergence is the released one"):
        ReleasedAViTConfig(divergence="model||target")


def test_the_version_is_that_of_the_package() -> None:
    assert adaptvit.__version__.split(".")[:2] == ["0", "2"]
    assert timm.is_model("avit_tiny_patch16_224")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_a_forward_outlives_it(method: str, training: bool) -> None:
    model = METHODS[method].build(small_vit()).train(training)
    batch = images(model.vit)
    left = weakref.ref(batch)
    gc.collect()
    gc.disable()
    try:
        model(batch)
        del batch
        assert left() is None
    finally:
        gc.enable()
