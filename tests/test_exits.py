from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import images, small_vit
from torch import Tensor

from adaptvit import Dense, ExitConfig, FullConfig, Masked, Packed, Slab, adapt, dense_macs, export, load, save
from adaptvit.backbones.forward import final_norm
from adaptvit.methods.exits import RIDGE, ExitViT, _Sums, fit_exits
from adaptvit.tokens import Tokens


def fitted(flavour: str = "class token") -> tuple[ExitViT, Tensor]:
    """A model by whose first exit a third of the images leaves, and those images."""
    torch.manual_seed(0)
    vit = small_vit(flavour, torch.float64).eval()
    batch = images(vit, count=12, dtype=torch.float64)
    model = ExitConfig().build(vit).eval()
    fit_exits(model, batch)
    model.lenses[1].weight.data *= 2
    model.readout.weight.data *= 3  # or no prediction of a ViT of random weights is clear
    with torch.inference_mode():
        tokens = model.run_block(0, model.enter(batch, Masked))
        model.config = replace(model.config, threshold=model.entropy(model.lens(tokens, 0)).quantile(1 / 3).item())
    return model, batch


@pytest.mark.parametrize("flavour", ["class token", "distilled", "registers"])
def test_every_layout_leaves_by_the_same_exits(flavour: str) -> None:
    model, batch = fitted(flavour)
    with torch.inference_mode():
        packed = model(batch, Packed, detailed=True)
        depths = packed.usage.depth[:, 0]
        assert len(depths.unique()) > 2
        for layout in (Masked, Slab):
            other = model(batch, layout, detailed=True)
            torch.testing.assert_close(other.logits, packed.logits)
            assert other.usage == packed.usage
        torch.testing.assert_close(torch.cat([model(one[None], Dense) for one in batch]), packed.logits)
        assert model(batch[:0]).shape == (0, packed.logits.shape[1])


def test_an_image_that_leaves_is_classified_by_its_lens_and_costs_what_it_ran() -> None:
    model, batch = fitted()
    plain = FullConfig().build(model.vit).eval()
    with torch.inference_mode():
        output = model(batch, detailed=True)
        for image, depth in enumerate(output.usage.depth[:, 0].tolist()):
            tokens: Tokens = plain.enter(batch[image : image + 1], Masked)
            for number in range(depth):
                tokens = plain.run_block(number, tokens, every=True)
            x = tokens.x[:, 0]
            if depth < model.depth:
                x = model.lenses[depth - 1](torch.cat([x, tokens.x[:, 1:].mean(dim=1)], dim=1))
            logits = model.vit.head(final_norm(model.vit, x[:, None])[:, 0])
            torch.testing.assert_close(output.logits[image : image + 1], logits)
    left, dim = output.usage.depth[:, 0] < model.depth, model.shape.dim
    exits = output.usage.depth[:, 0].clamp(max=model.depth - 1)
    assert torch.equal(output.usage.deciding.sum(dim=1), exits * dim * (2 * dim + model.num_classes))
    assert ((output.usage.attended > 0).sum(dim=1) == output.usage.depth[:, 0]).all()
    assert (output.usage.macs[left] < dense_macs(model.shape, output.usage.grid)).all()


def test_nobody_leaves_before_exits_are_fitted_or_below_0() -> None:
    vit = small_vit().eval()
    batch = images(vit)
    with torch.inference_mode():
        for config in (ExitConfig(threshold=1.0), ExitConfig(threshold=0.0)):
            torch.testing.assert_close(config.build(vit)(batch), vit(batch))


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


def test_a_budget_is_met_on_images_that_no_exit_was_fitted_to(tmp_path: Path) -> None:
    vit = small_vit(img_size=64).eval()
    with pytest.warns(UserWarning, match="fitted to 18 images, and see 128 numbers of each: with fewer than 512"):
        model = adapt(vit, images(vit, count=24), 0.7, ExitConfig())
    assert model.compute == pytest.approx(0.7, abs=0.05)
    save(model, tmp_path / "exits.safetensors")
    batch = images(vit, count=5)
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "exits.safetensors").eval()(batch), model(batch))
    with pytest.raises(ValueError, match="4 images or more, got 3"):
        adapt(vit, images(vit, count=3), 0.7, ExitConfig())


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


def test_training_runs_every_block_and_brings_lenses_to_what_the_last_one_leaves() -> None:
    vit = small_vit()
    batch, model = images(vit), ExitConfig().build(vit).train()
    optimizer = torch.optim.SGD(model.lenses.parameters(), lr=0.1)
    errors = []
    for _ in range(5):
        output = model(batch, detailed=True)
        errors.append(output.terms["lens"].item())
        optimizer.zero_grad()
        output.terms["lens"].backward()
        optimizer.step()
    torch.testing.assert_close(output.logits, vit(batch))
    assert errors[0] == pytest.approx(1)  # of lenses that tell nothing
    assert errors[-1] < 0.9
    assert (output.usage.depth == model.depth).all()


def test_a_file_of_one_image_leaves_where_the_model_does(tmp_path: Path) -> None:
    session = pytest.importorskip("onnxruntime").InferenceSession
    model, batch = fitted()
    model, batch, path = model.float(), batch.float(), tmp_path / "exits.onnx"
    export(model, path, batch=1)
    with torch.inference_mode():
        wanted = model(batch, detailed=True)
    assert len(wanted.usage.depth[:, 0].unique()) > 2
    run = session(path)
    found = [torch.as_tensor(run.run(["logits"], {"images": one[None].numpy()})[0]) for one in batch]
    torch.testing.assert_close(torch.cat(found), wanted.logits, atol=1e-4, rtol=1e-4)
