from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import images, small_vit
from test_families import cut, naflex
from torch import Tensor

from adaptvit import (
    CalibratedConfig,
    Dense,
    ExitConfig,
    FullConfig,
    Masked,
    MergeExitConfig,
    Packed,
    Slab,
    adapt,
    dense_macs,
    export,
    load,
    measure_plan,
    save,
)
from adaptvit.backbones.forward import final_norm
from adaptvit.methods.exits import RIDGE, ExitViT, _Sums, fit_exits
from adaptvit.tokens import Tokens

TOLD_PLACES = ("rotary, RMS norm, cosine", "Eva, DINOv3", "Eva, learned rotations", "BEiT")
ALONE, MERGING = ExitConfig(), MergeExitConfig(r=2)


def fitted(flavour: str = "class token", config: ExitConfig = ALONE) -> tuple[ExitViT, Tensor]:
    """A model by whose first exit a third of the images leaves, and those images."""
    torch.manual_seed(0)
    settings = {"global_pool": "token"} if flavour in TOLD_PLACES else {}
    vit = small_vit(flavour, torch.float64, **settings).eval()
    batch = images(vit, count=12, dtype=torch.float64)
    model = config.build(vit).eval()
    fit_exits(model, batch)
    model.lenses[1].weight.data *= 2
    model.readout.weight.data *= 3  # or no prediction of a ViT of random weights is clear
    with torch.inference_mode():
        tokens, merged = model.start(model.enter(batch, Masked))
        tokens = model.step(0, tokens, merged)
        model.config = replace(model.config, threshold=model.entropy(model.lens(tokens, 0)).quantile(1 / 3).item())
    return model, batch


@pytest.mark.parametrize("config", [ALONE, MERGING])
@pytest.mark.parametrize("flavour", ["class token", "distilled", "registers", *TOLD_PLACES])
def test_every_layout_leaves_by_the_same_exits(flavour: str, config: ExitConfig) -> None:
    model, batch = fitted(flavour, config)
    with torch.inference_mode():
        packed = model(batch, Packed, detailed=True)
        depths = packed.usage.depth[:, 0]
        assert len(depths.unique()) > 2
        for layout in (Masked, Slab):
            other = model(batch, layout, detailed=True)
            torch.testing.assert_close(other.logits, packed.logits)
            assert other.usage == packed.usage
        alone = Dense if model.drops else Packed
        torch.testing.assert_close(torch.cat([model(one[None], alone) for one in batch]), packed.logits)
        if flavour not in TOLD_PLACES:  # which take no empty batch themselves
            assert model(batch[:0]).shape == (0, packed.logits.shape[1])


@pytest.mark.parametrize("config", [ALONE, MERGING])
@pytest.mark.parametrize("rope", ["none", "axial", "mixed"])
def test_images_of_different_shapes_leave_as_each_alone_does(rope: str, config: ExitConfig) -> None:
    torch.manual_seed(0)
    model = config.build(naflex(rope).double().eval()).eval()
    for part in (*model.lenses, model.readout):
        part.weight.data.normal_(std=0.3)
    batch = cut(((4, 4), (2, 6), (3, 3), (3, 4), (2, 2), (4, 3)))
    with torch.inference_mode():
        tokens, merged = model.start(model.enter(batch, Masked))
        clear = model.entropy(model.lens(model.step(0, tokens, merged), 0))
        model.config = replace(model.config, threshold=clear.quantile(1 / 3).item())
        packed = model(batch, Packed, detailed=True)
        assert len(packed.usage.depth[:, 0].unique()) > 1
        for layout in (Masked, Slab):
            other = model(batch, layout, detailed=True)
            torch.testing.assert_close(other.logits, packed.logits)
            assert other.usage == packed.usage
        alone = [model({name: t[[image]] for name, t in batch.items()}) for image in range(6)]
        torch.testing.assert_close(torch.cat(alone), packed.logits)


@pytest.mark.parametrize("layout", [Packed, Masked, Slab])
@pytest.mark.parametrize("config", [ALONE, MERGING])
def test_a_batch_that_leaves_as_a_whole_is_what_its_images_are(config: ExitConfig, layout: type[Tokens]) -> None:
    model, batch = fitted(config=config)
    with torch.inference_mode():
        whole = model(batch, detailed=True)
        for depth in whole.usage.depth[:, 0].unique().tolist():
            rows = whole.usage.depth[:, 0] == depth
            some = model(batch[rows], layout, detailed=True)
            torch.testing.assert_close(some.logits, whole.logits[rows])
            assert some.usage == whole.usage.of_images(rows)


@pytest.mark.parametrize("config", [ALONE, MERGING])
def test_an_image_that_leaves_is_classified_by_its_lens_and_costs_what_it_ran(config: ExitConfig) -> None:
    model, batch = fitted(config=config)
    inside = (CalibratedConfig(r=2) if config is MERGING else CalibratedConfig(r=0)).build(model.vit).eval()
    with torch.inference_mode():
        output, whole = model(batch, detailed=True), inside(batch, detailed=True).usage
        for image, depth in enumerate(output.usage.depth[:, 0].tolist()):
            tokens, merged = inside.start(inside.enter(batch[image : image + 1], Dense))
            for number in range(depth):
                tokens = inside.step(number, tokens, merged)
            x = tokens.x[:, 0]
            if depth < model.depth:
                x = model.lenses[depth - 1](torch.cat([x, tokens.x[:, 1:].mean(dim=1)], dim=1))
            logits = model.vit.head(final_norm(model.vit, x[:, None])[:, 0])
            torch.testing.assert_close(output.logits[image : image + 1], logits)
    usage, dim = output.usage, model.shape.dim
    ran = usage.depth[:, :1] > torch.arange(model.depth)
    assert len(usage.depth[:, 0].unique()) > 2
    assert torch.equal(usage.attended, whole.attended * ran)
    assert torch.equal(usage.mlp, ran)
    exits = usage.depth[:, 0].clamp(max=model.depth - 1) * dim * (2 * dim + model.num_classes)
    assert torch.equal(usage.deciding.sum(dim=1), exits + (whole.deciding * ran).sum(dim=1))
    to_the_end = exits + whole.macs - ((whole.executed + whole.deciding) * ~ran).sum(dim=1)
    assert torch.equal(usage.macs, to_the_end)


def test_nobody_leaves_before_exits_are_fitted_or_below_0() -> None:
    vit = small_vit().eval()
    batch = images(vit)
    with torch.inference_mode():
        for threshold in (1.0, 0.0):
            torch.testing.assert_close(ExitConfig(threshold=threshold).build(vit)(batch), vit(batch))
            both = MergeExitConfig(threshold=threshold, r=2).build(vit)
            torch.testing.assert_close(both(batch), CalibratedConfig(r=2).build(vit)(batch))


def test_exits_are_ridge_regressions() -> None:
    torch.manual_seed(0)
    seen, wanted, sums = torch.randn(30, 5) * torch.tensor([1.0, 2, 3, 4, 5]) + 3, torch.randn(30, 2), _Sums()
    for rows in (slice(None, 20), slice(20, None)):
        sums.add(seen[rows], wanted[rows])
    weight, bias = sums.solve()
    x, y = seen.double() - seen.double().mean(0), wanted.double() - wanted.double().mean(0)
    penalty = (RIDGE * 5 / 30 * x.square().sum(0)).sqrt().diag()
    least = torch.linalg.lstsq(torch.cat([x, penalty]), torch.cat([y, torch.zeros(5, 2, dtype=y.dtype)])).solution
    torch.testing.assert_close(weight, least.mT)
    torch.testing.assert_close(seen.double().mean(0) @ weight.mT + bias, wanted.double().mean(0))


@pytest.mark.parametrize("config", [ExitConfig(), MergeExitConfig()])
def test_a_budget_is_met_on_images_that_no_exit_was_fitted_to(config: ExitConfig, tmp_path: Path) -> None:
    vit = small_vit(img_size=64).eval()
    with pytest.warns(UserWarning, match="fitted to 18 images, and see 128 numbers of each: with fewer than 512"):
        model = adapt(vit, images(vit, count=24), 0.7, config)
    assert model.compute == pytest.approx(0.7, abs=0.05)
    save(model, tmp_path / "exits.safetensors")
    batch = images(vit, count=5)
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "exits.safetensors").eval()(batch), model(batch))
    with pytest.raises(ValueError, match="4 images or more, got 3"):
        adapt(vit, images(vit, count=3), 0.7, config)


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_merging_makes_its_part_of_the_saving(part: float) -> None:
    vit = small_vit(img_size=64).eval()
    model = MergeExitConfig(merging=part, threshold=0.0).fitted(vit, images(vit, count=24), 0.64)
    with torch.inference_mode():
        usage = model(images(vit, count=4), detailed=True).usage
    asked = len(model.exits) * model.exit_macs
    assert ((usage.macs - asked) / dense_macs(model.shape, usage.grid)).mean() == pytest.approx(0.64**part, abs=0.05)


def test_an_image_that_is_not_finite_stays_and_has_no_logits() -> None:
    model, batch = fitted()
    batch[1, 0, 0, 0] = torch.nan
    with torch.inference_mode():
        logits = model(batch)
    assert logits[1].isnan().all()
    assert logits[[0, 2]].isfinite().all()


def test_what_has_no_exits_is_refused() -> None:
    vit = small_vit(num_classes=7)
    with pytest.raises(ValueError, match=r"ExitConfig\.blocks names block 3, but .* has blocks 0\.\.2 to leave"):
        ExitConfig(blocks=(1, 3)).build(vit)
    with pytest.raises(ValueError, match="has 0 classes, but images leave by how clear their class is"):
        ExitConfig().build(small_vit(num_classes=0))
    with pytest.raises(TypeError, match="early exit needs a class token"):
        ExitConfig().build(small_vit("average pool"))


@pytest.mark.parametrize("config", [ALONE, MERGING])
def test_training_runs_every_block_and_brings_lenses_to_what_the_last_one_leaves(config: ExitConfig) -> None:
    vit = small_vit()
    batch, model = images(vit), config.build(vit).train()
    optimizer = torch.optim.SGD(model.lenses.parameters(), lr=0.1)
    errors = []
    for _ in range(5):
        output = model(batch, detailed=True)
        errors.append(output.terms["lens"].item())
        optimizer.zero_grad()
        output.terms["lens"].backward()
        optimizer.step()
    inside = CalibratedConfig(r=2) if config is MERGING else FullConfig()
    torch.testing.assert_close(output.logits, inside.build(vit)(batch))
    assert errors[0] == pytest.approx(1)  # of lenses that tell nothing
    assert errors[-1] < 0.9
    assert (output.usage.depth[:, 0] == model.depth).all()


@pytest.mark.parametrize("config", [ALONE, MERGING])
def test_a_plan_counts_every_exit_whether_anybody_leaves_or_not(config: ExitConfig) -> None:
    model, batch = fitted(config=config)
    plan = measure_plan(model, batch)
    model.config = replace(model.config, threshold=0.0)
    assert len(measure_plan(model, batch).rows(4)) == len(plan.rows(4)) >= len(model.exits)


@pytest.mark.parametrize(
    ("config", "layout", "size"),
    [(ALONE, Dense, 1), *(pytest.param(config, Slab, 4, marks=pytest.mark.long) for config in (ALONE, MERGING))],
)
def test_images_leave_a_file_where_they_leave_the_model(
    config: ExitConfig, layout: type[Tokens], size: int, tmp_path: Path
) -> None:
    session = pytest.importorskip("onnxruntime").InferenceSession
    model, batch = fitted(config=config)
    model, batch, path = model.float(), batch.float(), tmp_path / "exits.onnx"
    model.plan = measure_plan(model, batch)
    export(model, path, batch=size, layout=layout)
    with torch.inference_mode():
        wanted = model(batch, detailed=True)
    assert len(wanted.usage.depth[:, 0].unique()) > 2
    run = session(path)
    found = [torch.as_tensor(run.run(["logits"], {"images": some.numpy()})[0]) for some in batch.split(size)]
    torch.testing.assert_close(torch.cat(found), wanted.logits, atol=1e-4, rtol=1e-4)


def test_one_image_that_merges_and_leaves_goes_to_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"merging and early exit .* choose layout slab with a batch, by a plan"):
        export(fitted(config=MERGING)[0].float(), tmp_path / "exits.onnx", batch=1)
