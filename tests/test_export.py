"""Files of models: what they compute in their runtimes, what they say of themselves, and what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from models import METHODS, images, small_vit, vary
from samples import picture
from torch import Tensor, nn
from torch._inductor.exc import InvalidCxxCompiler

import adaptvit
from adaptvit import FullConfig, Masked, Packed, Plan, Slab, ToMeConfig, cli, save
from adaptvit.data import list_folder, open_pictures, preparation
from adaptvit.model import AdaptiveViT

PAGE = Path(__file__).parents[1] / "docs" / "export.md"
LONG = pytest.mark.long


def of(method: str, **settings: Any) -> AdaptiveViT:
    config = METHODS[method]
    blocks = {"blocks": (0,), "keep_rate": 0.5} if method in ("evit", "dynamicvit") else {}
    blocks = {"blocks": (0,), "tokens": 9} if method.startswith("ats") else blocks
    config = type(config)(**blocks) if blocks else config
    return vary(config.build(small_vit(depth=2, **settings))).eval()


def run(path: Path, batch: Tensor, output: str = "logits") -> Tensor:
    session = onnxruntime.InferenceSession(path)
    return torch.as_tensor(session.run([output], {"images": batch.numpy()})[0])


def hugging() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    names = dict(enumerate(("cat", "dog", "owl")))
    config = transformers.ViTConfig(**sizes, intermediate_size=96, id2label=names)
    return transformers.ViTForImageClassification(config).eval()


def dinov3() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 5}
    vit = timm.create_model("vit_small_patch16_dinov3", **sizes).eval()
    nn.init.normal_(vit.head.weight)
    return vit


@pytest.mark.parametrize("method", ["tome", pytest.param("evit", marks=LONG), pytest.param("dynamicvit", marks=LONG)])
def test_an_onnx_file_takes_any_batch(method: str, tmp_path: Path) -> None:
    model, path = of(method), tmp_path / "model.onnx"
    found = adaptvit.export(model, path)
    others = images(model.vit, count=5, seed=5)
    torch.testing.assert_close(run(path, others), model(others), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run(path, others[:1]), model(others[:1]), atol=1e-5, rtol=1e-5)
    assert (found.equal, found.images, found.size) == (4, 4, path.stat().st_size)
    assert found.difference < 1e-5
    usage = model(others, detailed=True).usage
    share = adaptvit.macs(usage, model.shape).double().mean().item() / adaptvit.dense_macs(model.shape, usage.grid)
    assert found.facts["share"] == pytest.approx(share)
    assert b"/adaptvit/" not in path.read_bytes()  # where this machine has its files


@pytest.mark.parametrize("host", [pytest.param(hugging, marks=LONG), dinov3])
def test_hosts_of_others_are_exported(host: Any, tmp_path: Path) -> None:
    model, path = ToMeConfig(r=4).build(host()), tmp_path / "model.onnx"
    found = adaptvit.export(model, path)
    others = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(run(path, others), model(others), atol=1e-5, rtol=1e-5)
    assert found.facts["classes"] == (["cat", "dog", "owl"] if host is hugging else [])


@pytest.mark.parametrize("method", [pytest.param("tome", marks=LONG), "evit"])
def test_a_program_of_torch_takes_any_batch_and_says_the_same(method: str, tmp_path: Path) -> None:
    model, path = of(method), tmp_path / "model.pt2"
    found = adaptvit.export(model, path, "torch", classes=list("abcdefg"))
    others, told = images(model.vit, count=5, seed=5), {"adaptvit.json": ""}
    loaded = torch.export.load(path, extra_files=told)
    torch.testing.assert_close(loaded.module()(others), model(others), atol=1e-5, rtol=1e-5)
    assert json.loads(told["adaptvit.json"]) == found.facts
    assert b"/adaptvit/" not in path.read_bytes()


def test_a_file_says_how_images_are_prepared_and_what_was_made_of_the_model(tmp_path: Path) -> None:
    model, path = of("tome").train(), tmp_path / "model.onnx"
    found = adaptvit.export(model, path, batch=2, dtype="float16", classes=list("abcdefg"))
    assert model.training
    assert next(model.parameters()).dtype == torch.float32
    (said,) = onnx.load(path).metadata_props
    assert (said.key, json.loads(said.value)) == ("adaptvit", found.facts)
    settings = json.loads(json.dumps(preparation(model)))
    assert found.facts["preparation"] == settings
    assert found.facts["classes"] == list("abcdefg")
    assert found.facts["method"] == json.loads(model.config.to_json_string())
    assert [found.facts[name] for name in ("layout", "dtype", "batch")] == ["Dense", "float16", 2]
    (taken,), (given,) = (
        onnxruntime.InferenceSession(path).get_inputs(),
        onnxruntime.InferenceSession(path).get_outputs(),
    )
    assert (taken.name, taken.shape, taken.type) == ("images", [2, 3, 32, 32], "tensor(float)")
    assert (given.name, given.shape, given.type) == ("logits", [2, 7], "tensor(float)")


@LONG
def test_masked_is_exact_for_what_each_image_needs_and_saves_nothing(tmp_path: Path) -> None:
    model, path = of("merge"), tmp_path / "model.onnx"
    found = adaptvit.export(model, path, layout=Masked)
    others = images(model.vit, count=5, seed=5)
    torch.testing.assert_close(run(path, others), model(others), atol=1e-5, rtol=1e-5)
    assert found.facts["share"] == 1


@pytest.mark.parametrize("method", ["avit", pytest.param("merge", marks=LONG)])
def test_one_image_at_a_time_drops_what_it_does_not_need(method: str, tmp_path: Path) -> None:
    model, path = of(method), tmp_path / "model.onnx"
    others = images(model.vit, count=6, seed=5)
    found = adaptvit.export(model, path, batch=1, images=others[:3])
    ran = torch.cat([run(path, one) for one in others.split(1)])
    torch.testing.assert_close(ran, model(others), atol=1e-5, rtol=1e-5)
    assert found.facts["share"] < 0.95
    assert "NonZero" in {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("method", ["avit", pytest.param("adavit", marks=LONG)])
def test_a_slab_tells_that_its_rows_are_too_few(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptvit.tokens.slab.TILE", 1)
    model, path = of(method), tmp_path / "model.onnx"
    others = images(model.vit, count=12, seed=5)
    counts = model.counts(others).double()
    order = counts.sum(dim=0).argsort()
    few, many = others[order[:4]], others[order[-4:]]
    means = counts[:, order[:4]].mean(dim=1)
    model.plan = Plan(means=means.tolist(), spreads=[0.0] * len(means), images=9)
    found = adaptvit.export(model, path, batch=4, layout=Slab, images=torch.cat([few, many]))
    assert (found.images, found.equal, found.overflowed) == (4, 4, 4)
    assert found.facts["rows"] == [round(4 * mean) for mean in means.tolist()]
    torch.testing.assert_close(run(path, few), model(few, Packed), atol=1e-5, rtol=1e-5)
    assert not run(path, few, "overflow")
    assert run(path, many, "overflow")
    assert run(path, many).isnan().all()


@pytest.mark.parametrize(
    ("method", "how", "said"),
    [
        ("merge", {}, "keeps what each .* choose batch 1, one image at a time; layout slab with a batch"),
        ("adavit", {"batch": 1}, "keeps what each .* choose layout slab with a batch, by a plan; or layout masked"),
        ("merge", {"layout": Slab}, "choose its batch, such as 8"),
        ("merge", {"layout": Slab, "batch": 8}, r"model\.plan: set it to adaptvit\.measure_plan"),
        ("ats, random", {"batch": 1}, "random patches cannot be exported"),
    ],
)
def test_what_no_file_can_do_is_refused_with_what_can(
    method: str, how: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        adaptvit.export(of(method), tmp_path / "model.onnx", **how)


def test_without_a_compiler_none_is_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise InvalidCxxCompiler

    monkeypatch.setattr(sys.modules["adaptvit.export"], "get_cpp_compiler", missing)
    with pytest.raises(ValueError, match="format aoti takes a C\\+\\+ compiler, and none is here"):
        adaptvit.export(of("full"), tmp_path / "model.pt2", "aoti")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"path": "model.pt2"}, "ends in .onnx, got 'model.pt2'"),
        ({"layout": Packed}, "layout of a file must be adaptvit.Dense, adaptvit.Slab or adaptvit.Masked"),
        ({"classes": ["a"]}, "has 7 classes, but there are 1 names"),
        ({"batch": 0}, "batch must be dynamic or a whole number, 1 or more, got 0|batch must be"),
        ({"dtype": "int8"}, "dtype must be one of float32, float16"),
        ({"batch": 2, "images": torch.zeros(3, 3, 32, 32)}, "multiple of the file's batch, 2, got 3"),
        ({"images": torch.full((2, 3, 32, 32), torch.nan)}, "not finite"),
    ],
)
def test_what_cannot_be_is_said_before_any_file_is_written(wrong: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / wrong.pop("path", "model.onnx")
    with pytest.raises(ValueError, match=said):
        adaptvit.export(of("tome"), path, **wrong)
    assert not path.exists()


def test_a_plain_vit_and_weights_beyond_one_onnx_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TypeError, match=r"takes an adaptive model, got a VisionTransformer: FullConfig\(\)"):
        adaptvit.export(small_vit(), tmp_path / "model.onnx")
    monkeypatch.setattr(sys.modules["adaptvit.export"], "ONNX_LIMIT", 1000)
    with pytest.raises(ValueError, match="one ONNX file holds 2: choose float16, or torch"):
        adaptvit.export(of("full"), tmp_path / "model.onnx")


def test_a_file_with_other_logits_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["adaptvit.export"]
    monkeypatch.setattr(module, "_torch", lambda *_: (b"", lambda batch: [torch.ones(len(batch), 7)]))
    with pytest.raises(ValueError, match=r"is not written: of 4 images it predicts \d otherwise than the model"):
        adaptvit.export(of("full"), tmp_path / "model.pt2", "torch")
    assert not any(tmp_path.iterdir())


def test_an_image_of_which_rounding_turns_a_decision_is_counted_and_others_are_not_let_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, model, path = sys.modules["adaptvit.export"], of("tome"), tmp_path / "model.pt2"
    batch = images(model.vit, count=6)
    with torch.no_grad():
        wanted = model(batch)

    def off(rows: int) -> Any:
        made = wanted.clone()
        made[:rows] += 0.1 * wanted.abs().max()
        return lambda *_: (b"", lambda given: [made])

    monkeypatch.setattr(module, "_program", lambda *_: None)
    monkeypatch.setattr(module, "_torch", off(1))
    found = adaptvit.export(model, path, "torch", images=batch)
    assert (found.turned, found.equal, found.images) == (1, 6, 6)
    assert found.difference < 1e-5
    nowhere = wanted.clone()
    nowhere[0, 0] = torch.nan
    monkeypatch.setattr(module, "_torch", lambda *_: (b"", lambda given: [nowhere]))
    with pytest.raises(ValueError, match="is not written"):
        adaptvit.export(model, path, "torch", images=batch)
    monkeypatch.setattr(module, "_torch", off(2))
    with pytest.raises(ValueError, match="logits differ by up to"):
        adaptvit.export(model, path, "torch", images=batch)


def test_the_command_meets_a_target_compares_on_images_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save(FullConfig().build(small_vit(depth=2)).eval(), tmp_path / "plain.safetensors")
    names = tmp_path / "names.txt"
    names.write_text("\n".join("abcdefg"))
    for seed in range(3):
        picture(seed).save(tmp_path / f"{seed}.png")
    words = ["export", str(tmp_path / "plain.safetensors"), str(tmp_path / "out.onnx"), "--data", str(tmp_path)]
    assert cli.main([*words, "--target", "0.8"]) == 2
    assert "is a plain ViT, which costs what it costs: choose its method" in capsys.readouterr().err
    assert cli.main([*words, "--method", "tome", "--target", "0.8", "--class-names", str(names)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"out\.onnx: \d\.\d MB, \d\.\d+ GMACs, ([1-7]\d|80)\.\d% of the dense MACs\n", said)
    assert "as the model on 3 of 3 images, logits differ by" in said
    serve(tmp_path, "abcdefg")


def serve(folder: Path, names: str) -> None:
    """The page's lines serve the file without this library, and prepare a picture as it does."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (code,) = (block for block in blocks if "onnxruntime" in block)
    (folder / "model.onnx").write_bytes((folder / "out.onnx").read_bytes())
    (folder / "picture.png").write_bytes((folder / "1.png").read_bytes())
    blocked = "import sys\nsys.modules |= dict.fromkeys(['adaptvit', 'timm', 'torch'])\n"
    told = code + "\nnp.save('logits.npy', logits)\n"
    done = subprocess.run([sys.executable, "-c", blocked + told], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = ToMeConfig().build(small_vit(depth=2)).eval()
    only = folder / "only"
    only.mkdir()
    picture(1).save(only / "1.png")
    batch = open_pictures(list_folder(only, "data"), preparation(model))[0][0][None]
    expected = run(folder / "model.onnx", batch)
    torch.testing.assert_close(torch.from_numpy(np.load(folder / "logits.npy")), expected, atol=1e-4, rtol=1e-4)
    assert done.stdout.strip() == repr([names[int(expected.argmax())]])


def test_the_command_refuses_what_each_image_needs_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    save(of("merge"), tmp_path / "merge.safetensors")
    assert cli.main(["export", str(tmp_path / "merge.safetensors"), str(tmp_path / "out.onnx")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "keeps what each image needs" in said
    assert not (tmp_path / "out.onnx").exists()
