"""What `torch.compile` makes of a forward: one graph, which holds for other batches, until the model is turned."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from models import METHODS, images, small_vit, vary
from torch._dynamo.testing import CompileCounterWithBackend

from adaptvit import Dense, FullConfig, Masked, Packed, Plan, Slab, measure_plan
from adaptvit.model import AdaptiveViT

BOTH = {"blocks": (0, 1)}
DROPS = {"evit": BOTH, "dynamicvit": BOTH, "dynamicvit, threshold": BOTH, "ats": {**BOTH, "tokens": (12, 9)}}
"""Settings by which methods drop tokens at both of two blocks, which are enough: tracing takes its time by block."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    torch.compiler.reset()


def build(method: str) -> AdaptiveViT:
    return vary(replace(METHODS[method], **DROPS.get(method, {})).build(small_vit(depth=2))).eval()


@pytest.mark.parametrize(
    ("method", "layout"),
    [("tome", None), ("avit", Masked)]
    + [pytest.param(*case, marks=pytest.mark.long) for case in (("evit", None), ("merge", Masked))],
)
def test_a_forward_is_one_graph_for_batches_of_any_size(method: str, layout: type | None) -> None:
    model, backend = build(method), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.inference_mode():
        for count in (3, 5, 4, 6, 2, 7):
            batch = images(model.vit, count=count)
            torch._dynamo.maybe_mark_dynamic(batch, 0)
            torch.testing.assert_close(compiled(batch, layout=layout), model(batch), atol=1e-5, rtol=1e-5)
    assert backend.frame_count == 1


@pytest.mark.long
def test_what_was_decided_is_part_of_the_graph() -> None:
    model, backend = build("adavit"), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.inference_mode():
        for count in (3, 5):
            batch = images(model.vit, count=count)
            torch._dynamo.maybe_mark_dynamic(batch, 0)
            found, wanted = (call(batch, layout=Masked, detailed=True).usage for call in (compiled, model))
            assert torch.equal(found.executed, wanted.executed)
    assert backend.frame_count == 1


@pytest.mark.parametrize("method", ["ats", pytest.param("adavit", marks=pytest.mark.long)])
def test_a_slab_is_one_graph_whatever_images_keep(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, backend = build(method), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    batch = images(model.vit, count=8)
    with torch.inference_mode():
        model.plan = measure_plan(model, batch)
        for order in (range(8), range(7, -1, -1)):
            some = batch[list(order)]
            torch.testing.assert_close(compiled(some, layout=Slab), model(some), atol=1e-5, rtol=1e-5)
        assert backend.frame_count == 1
        monkeypatch.setattr("adaptvit.tokens.slab.TILE", 1)
        model.plan = Plan(means=[1.0] * len(model.plan.means), spreads=[0.0] * len(model.plan.means), images=9)
        assert compiled(batch, layout=Slab).isnan().all()  # too few rows


def test_a_model_whose_knob_is_turned_is_compiled_anew() -> None:
    model = build("tome")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = images(model.vit)
    with torch.inference_mode():
        before = compiled(batch)
        model.config = replace(model.config, rate=2.0)
        torch.testing.assert_close(compiled(batch), model(batch))
        assert not torch.equal(compiled(batch), before)


def test_a_model_that_changes_its_mode_is_compiled_anew() -> None:
    model = FullConfig().build(small_vit(depth=1, proj_drop_rate=0.5)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = images(model.vit)
    with torch.no_grad():
        assert not torch.equal(compiled(batch, layout=Dense), compiled(batch, layout=Dense))
        model.eval()
        torch.testing.assert_close(compiled(batch, layout=Dense), model(batch), atol=1e-5, rtol=1e-5)


def test_methods_that_keep_what_each_image_needs_run_packed_beside_the_graph() -> None:
    model = build("ats")
    with torch.inference_mode():
        batch = images(model.vit)
        assert torch.equal(torch.compile(model, backend="eager")(batch), model(batch, Packed))


def test_gradients_are_those_of_the_eager_model() -> None:
    model = build("evit").double()
    batch = images(model.vit, dtype=torch.float64)
    found = {}
    for name, call in (("eager", model), ("compiled", torch.compile(model, fullgraph=True, backend="aot_eager"))):
        model.zero_grad()
        call(batch, layout=Dense).square().sum().backward()
        found[name] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in found["eager"].items():
        torch.testing.assert_close(found["compiled"][name], gradient, atol=1e-12, rtol=1e-9)


def test_a_model_whose_terms_scale_is_set_is_compiled_anew() -> None:
    model = METHODS["avit"].build(small_vit(depth=2)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = images(model.vit)
    found: dict[float, list[torch.Tensor]] = {}
    for scale in (1.0, 0.25, 1.0):
        model.terms_scale = scale
        for call in (model, compiled):
            model.zero_grad()
            (0 * call(batch, layout=Masked).sum()).backward()  # so that the terms alone have gradients
            found.setdefault(scale, []).append(model.vit.blocks[0].mlp.fc2.bias.grad.clone())
    assert found[1.0][0].any()
    for scale, gradients in found.items():
        for gradient in gradients:
            torch.testing.assert_close(gradient, scale * found[1.0][0], atol=1e-9, rtol=1e-4)
