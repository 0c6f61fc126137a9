"""What the README shows runs as it stands, and so do the examples of a method, a prior and parts kept elsewhere."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from models import images, small_vit

from adaptvit import AViTConfig, FullConfig, Masked, Packed, meet_target
from adaptvit.backbones.parts import BLOCKS, NORMS
from adaptvit.methods.priors import PRIORS, halting_prior

ROOT = Path(__file__).parents[1]


def test_the_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    torch.manual_seed(0)
    exec("\n".join(blocks), {})
    assert (tmp_path / "mine.safetensors").exists()


def test_the_links_of_the_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_a_method_kept_elsewhere_packs_and_steers(capsys: pytest.CaptureFixture) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "your_own_method.py"))
    vit = small_vit(dtype=torch.float64).eval()
    batch = images(vit, dtype=torch.float64)
    model = example["NormConfig"]().build(vit)
    meet_target(model, batch, 0.8)
    packed, masked = model(batch, Packed, detailed=True), model(batch, Masked, detailed=True)
    torch.testing.assert_close(packed.logits, masked.logits)
    assert torch.equal(packed.usage.live, masked.usage.live)
    assert packed.usage.live[:, -1].sum() < packed.usage.live[:, 0].sum()
    example["main"]()
    assert "70% of dense MACs" in capsys.readouterr().out


def test_a_prior_kept_elsewhere_is_a_prior(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRIORS, "logistic", PRIORS["gaussian"])  # so that it is taken out again
    example = runpy.run_path(str(ROOT / "examples" / "your_own_prior.py"))
    example["main"]()
    prior = halting_prior("logistic", 12, 9.0, 2.0)
    places = (torch.arange(1, 13, dtype=torch.float64) - 9) / 4
    expected = 1 / places.cosh() ** 2  # the same density by another formula
    torch.testing.assert_close(prior, expected / expected.sum())
    assert capsys.readouterr().out.count("loss") == 2


def test_parts_kept_elsewhere_pack_and_steer(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptvit.backbones.parts.NORMS", {**NORMS})  # the rows go when the test ends
    monkeypatch.setattr("adaptvit.backbones.parts.BLOCKS", {**BLOCKS})
    example = runpy.run_path(str(ROOT / "examples" / "your_own_part.py"))
    for block in ("attention", "pool"):
        settings = {"model_name": "parts_vit", "norm": "scale", "block": block, "embed_dim": 48}
        vit = small_vit(dtype=torch.float64, **settings, dynamic_img_size=None).eval()
        batch = images(vit, dtype=torch.float64)
        model = AViTConfig(gate_scale=4.0, gate_center=2.0).build(vit)
        packed, masked = model(batch, Packed, detailed=True), model(batch, Masked, detailed=True)
        torch.testing.assert_close(packed.logits, masked.logits)
        assert not packed.usage.live.all()
        torch.testing.assert_close(FullConfig().build(vit)(batch), vit(batch))
    example["main"]()
    shares = re.findall(r"(\d+)% of dense MACs", capsys.readouterr().out)
    assert [abs(int(share) - 60) <= 1 for share in shares] == [True, True]
