"""A model is named alike wherever one is named: a file, a folder, a repository of the Hub, or timm's name."""

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import adaptvit
from adaptvit import AViTConfig, EViTConfig, FullConfig
from adaptvit.cli import main
from adaptvit.commands.bench import BenchConfig, bench
from adaptvit.commands.compare_variants import Comparison, compare
from adaptvit.data import DataConfig
from adaptvit.training.recipe import Recipe
from adaptvit.training.run import Run, train_run
from adaptvit.weights.opening import open_model, start_from

NAME = "vit_tiny_patch16_224"
PARTS = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SMALL = PARTS | {"img_size": 32, "num_classes": 5}
KINDS = ["file", "checkpoint", "folder", "local-dir", "hf-hub"]


def vit(**changes: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return timm.create_model(NAME, **SMALL | changes).eval()


def stored(folder: Path, kind: str, model: VisionTransformer | None = None) -> str:
    """A ViT in a folder, as `kind` has it, and its name."""
    model = vit() if model is None else model
    if kind == "file":
        adaptvit.save(FullConfig().build(model), folder / "mine.safetensors")
        return str(folder / "mine.safetensors")
    if kind == "checkpoint":
        told = {"model": NAME, "img_size": 32, "model_kwargs": {**PARTS, "patch_size": [8, 8]}}
        torch.save({"state_dict": model.state_dict(), "args": told}, folder / "mine.pth")
        return str(folder / "mine.pth")
    save_for_hf(model, folder / "mine", model_args=SMALL, safe_serialization=True)
    return {"folder": "", "local-dir": "local-dir:", "hf-hub": "hf-hub:"}[kind] + (
        "me/mine" if kind == "hf-hub" else str(folder / "mine")
    )


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's client, which finds the repository me/mine in a folder and no other."""

    def download(repository: str, file: str, revision: str | None = None) -> str:
        assert revision is None
        if repository != "me/mine":
            raise LocalEntryNotFoundError("no network")
        if not (tmp_path / "mine" / file).exists():
            raise EntryNotFoundError(file)
        return str(tmp_path / "mine" / file)

    monkeypatch.setattr(adaptvit.weights.places, "hf_hub_download", download)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes in two splits."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label in "abcde":
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{number}.png")
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_name_opens_the_same_model(kind: str, images: Tensor, tmp_path: Path) -> None:
    name = stored(tmp_path, kind)
    with torch.inference_mode():
        torch.testing.assert_close(open_model(name)(images), vit()(images))
    fresh = timm.create_model(NAME, **SMALL)
    assert start_from(fresh, name)
    assert torch.equal(fresh.head.weight, vit().head.weight)


def words(command: str, model: str, folder: Path, output: Path) -> list[str]:
    """A command line that names a model."""
    few = ["--rounds", "1"]
    return {
        "predict": ["predict", model, str(folder), "--output", f"{output}.csv", "--workers", "0"],
        "evaluate": ["evaluate", model, str(folder), "--workers", "0", "--rounds", "0"],
        "draw": ["draw", model, str(folder / "val" / "a"), "--output", str(output)],
        "adapt": ["adapt", model, str(folder), f"{output}.safetensors", "--target", "0.8", "--method", "tome"],
        "bench": ["bench", model, "--images", "2", "--batch-size", "2", "--threads", "1", "--target", "0.8", *few],
        "compare": [
            *["compare", "methods", model, str(folder), "--output", str(output), "--methods", "[tome]", *few],
            *["--budgets", "[0.8]", "--latencies", "2", "--timed", "2", "--workers", "0", "--pictures", "0"],
        ],
        "train": [
            *["train", "imagenette_dense", "--model", model, "--weights", "null", "--img_size", "null"],
            *["--model_args", "{}", "--data.root", str(folder), "--data.workers", "0", "--recipe.epochs", "1"],
            *["--recipe.warmup_epochs", "0", "--recipe.batch_size", "10", "--output", str(output)],
        ],
    }[command]


COMMANDS = ["predict", "evaluate", "draw", "adapt", "bench", "compare", "train"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_repository_of_the_hub(command: str, folder: Path, tmp_path: Path) -> None:
    assert main(words(command, stored(tmp_path, "hf-hub"), folder, tmp_path / "out")) == 0


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".ckpt"])
def test_a_file_of_weights_alone_is_told_its_model(suffix: str, images: Tensor, tmp_path: Path) -> None:
    kept = timm.create_model("test_vit2", num_classes=5, img_size=96).eval().state_dict()
    path = tmp_path / f"mine{suffix}"
    prefix = "model." if suffix == ".ckpt" else ""  # as Lightning has it
    weights = {f"{prefix}{name}": value for name, value in kept.items()}
    save_file(weights, path) if suffix == ".safetensors" else torch.save({"state_dict": weights}, path)
    opened = open_model(f"test_vit2={path}")
    assert (opened.num_classes, opened.vit.patch_embed.img_size) == (5, (96, 96))
    assert all(torch.equal(value, kept[name]) for name, value in opened.vit.state_dict().items())
    with pytest.raises(ValueError, match="--model"):
        open_model(path)
    adaptvit.save(opened, tmp_path / "ours.safetensors")
    with pytest.raises(ValueError, match="is an adaptvit file already, which says its model"):
        open_model(f"test_vit2={tmp_path / 'ours.safetensors'}")
    with pytest.raises(ValueError, match="does not fit the vit_tiny_patch16_224"):
        open_model(f"{NAME}={path}")


@pytest.mark.parametrize("command", ["predict", "bench", "compare"])
def test_a_command_is_told_the_model_of_a_file(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("test_vit2", num_classes=5, img_size=32).state_dict(), "mine.pth")
    assert main([*words(command, "mine.pth", folder, tmp_path / "out"), "--model", "test_vit2"]) == 0


def test_a_timm_model_brings_the_names_of_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = timm.create_model("test_vit")
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: made)
    assert open_model("test_vit").class_names[:2] == ("tench, Tinca tinca", "goldfish, Carassius auratus")


def test_where_there_is_no_way_to_the_hub_a_sentence_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise OSError("no name")

    monkeypatch.setattr(socket, "getaddrinfo", lost)
    monkeypatch.setattr(adaptvit.weights.places, "getproxies", dict)
    with pytest.raises(ValueError, match=r"cannot be downloaded \(there is no way to huggingface\.co from here\)"):
        open_model("vit_large_patch14_clip_336")
    assert not constants.HF_HUB_OFFLINE


def test_convert_takes_a_repository_too(tmp_path: Path) -> None:
    own = timm.create_model(NAME, num_classes=5)
    save_for_hf(own, tmp_path / "mine", safe_serialization=True)
    model = adaptvit.convert("hf-hub:me/mine", tmp_path / "out.safetensors", NAME, num_classes=5)
    assert torch.equal(model.vit.head.weight, own.head.weight)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_stands_for_nothing_is_one_sentence(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "bad.pth").write_bytes(b"bad")
    for name in ("hf-hub:me/other", str(tmp_path / "bad.pth"), "vit_of_nobody"):
        assert main(words(command, name, folder, tmp_path / "out")) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert name in said


def test_a_folder_or_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for call in (open_model, lambda name: start_from(vit(), name)):
        with pytest.raises(FileNotFoundError, match=r"local-dir:nowhere: there is no folder 'nowhere'"):
            call("local-dir:nowhere")
        with pytest.raises(FileNotFoundError, match=r"empty' is a folder without weights: none of model\.safetensors"):
            call(str(tmp_path / "empty"))
        with pytest.raises(FileNotFoundError, match=r"no\.pt does not exist"):
            call("no.pt")


def test_a_repository_without_weights_is_told_from_one_that_cannot_be_reached(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r"hf-hub:me/mine has no weights: none of model\.safetensors"):
        open_model("hf-hub:me/mine")
    with pytest.raises(ValueError, match=r"hf-hub:me/other is not here .*\((no network|there is no way .*)\)"):
        open_model("hf-hub:me/other")


def test_a_folder_that_says_another_pool_than_its_arguments_make_is_refused(images: Tensor, tmp_path: Path) -> None:
    model = vit(global_pool="avg", fc_norm=False)  # whose tensors have the names of one that reads its class token
    name = stored(tmp_path, "folder", model)
    with torch.inference_mode():
        torch.testing.assert_close(open_model(name)(images), model(images))
    config = Path(name) / "config.json"
    told = json.loads(config.read_text())
    del told["model_args"]["global_pool"]
    config.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"config\.json says global_pool 'avg', but its model_args"):
        open_model(name)


# ---- training


@pytest.fixture
def small(folder: Path, tmp_path: Path) -> Run:
    return Run(
        model=NAME,
        method=FullConfig(),
        data=DataConfig(root=folder, scale=(0.5, 1.0), workers=0),
        recipe=Recipe(epochs=1, warmup_epochs=0, batch_size=10),
        output=tmp_path / "run",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_training_a_stored_model_is_training_from_its_weights(kind: str, small: Run, tmp_path: Path) -> None:
    name = stored(tmp_path, kind, vit(num_classes=7) if kind == "file" else None)  # a head of others is left out
    by_name = train_run(replace(small, model=name, drop_path=0.1)).model
    save_file(open_model(name).vit.state_dict(), tmp_path / "plain.safetensors")
    of_timm = replace(small, model_args=PARTS, img_size=32, drop_path=0.1, output=tmp_path / "other")
    by_weights = train_run(replace(of_timm, weights=tmp_path / "plain.safetensors")).model
    assert all(torch.equal(value, by_weights.state_dict()[key]) for key, value in by_name.state_dict().items())


def test_a_stored_model_is_trained_at_another_size_and_prepared_by_its_own_record(small: Run, tmp_path: Path) -> None:
    model = vit()
    model.pretrained_cfg = model.pretrained_cfg | {"mean": (0.1, 0.2, 0.3)}
    trained = train_run(replace(small, model=stored(tmp_path, "file", model), img_size=(40, 24))).model
    assert trained.pretrained_cfg["input_size"] == (3, 40, 24)
    assert tuple(trained.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)


def test_a_stored_method_is_left_out_of_a_training_and_said(
    small: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    adaptvit.save(EViTConfig(rate=0.5).build(vit(depth=4)), tmp_path / "evit.safetensors")
    trained = train_run(replace(small, model=str(tmp_path / "evit.safetensors"), method=AViTConfig()))
    assert isinstance(trained.model.config, AViTConfig)
    assert "the evit in" in capsys.readouterr().out


def test_weights_beside_a_model_that_brings_its_own_are_refused(small: Run, tmp_path: Path) -> None:
    name = stored(tmp_path, "file")
    with pytest.raises(ValueError, match=r"Run\.model '.*mine\.safetensors' brings its weights, and Run\.weights is"):
        replace(small, model=name, weights=Path("other.pth"))
    assert replace(small, model=name, pretrained=True).pretrained


def test_arguments_that_a_stored_model_cannot_have_are_refused(small: Run, tmp_path: Path) -> None:
    name = stored(tmp_path, "file")
    with pytest.raises(ValueError, match=r"does not fit .*missing blocks\.2"):
        train_run(replace(small, model=name, model_args={"depth": 3}))
    with pytest.raises(ValueError, match=r"cannot be made with .*'colour': 3"):
        train_run(replace(small, model=name, model_args={"colour": 3}))


def test_a_changed_model_is_not_taken_for_the_one_that_was_compared(small: Run, tmp_path: Path) -> None:
    name = stored(tmp_path, "file")
    both = {rate: replace(small, model=name, drop_path=rate) for rate in (0.0, 0.1)}
    question = Comparison(question="Does it help?", variants={f"drop {rate:g}": one for rate, one in both.items()})
    rows = compare(question, tmp_path / "out", seeds=2)
    assert [row.diverged for row in rows] == [0, 0]
    stored(tmp_path, "file", vit(depth=1))
    with pytest.raises(ValueError, match="holds a run of other settings"):
        compare(question, tmp_path / "out", seeds=2)


# ---- bench

BENCH: dict[str, Any] = {"images": 2, "batch_size": 2, "rounds": 1, "threads": 1}


def test_a_stored_model_is_measured_under_its_own_method(tmp_path: Path) -> None:
    model = EViTConfig(rate=0.5).build(vit(depth=4))
    adaptvit.save(model, tmp_path / "mine.safetensors")
    name = str(tmp_path / "mine.safetensors")
    for size in (None, 48):
        figures = bench(BenchConfig(name, target=None, img_size=size, **BENCH))
        assert (figures["method"], figures["knob"]) == ("evit", {"rate": 0.5})
    assert bench(BenchConfig(name, target=None, settings={"rate": 0.8}, **BENCH))["knob"] == {"rate": 0.8}
    with pytest.raises(ValueError, match=r"mine\.safetensors is evit already; method 'tome' is for a plain ViT"):
        bench(BenchConfig(name, "tome", **BENCH))
    with pytest.raises(ValueError, match=r"settings of evit must be some of .*, got 'gate_scale'"):
        bench(BenchConfig(name, settings={"gate_scale": 1.0}, **BENCH))


def test_what_a_stored_method_learnt_is_measured_at_another_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adaptvit.AdaViTConfig().build(vit())
    for policy in (part for part in model.modules() if isinstance(part, nn.Linear)):
        nn.init.normal_(policy.weight)
    adaptvit.save(model, tmp_path / "mine.safetensors")
    measured = []
    monkeypatch.setattr(adaptvit.commands.bench, "meet_target", lambda model, *_: measured.append(model))
    bench(BenchConfig(str(tmp_path / "mine.safetensors"), img_size=48, **BENCH))
    own = {key: value for key, value in model.state_dict().items() if key != "vit.pos_embed"}
    assert all(torch.equal(measured[0].state_dict()[key], value) for key, value in own.items())


# ---- names that others gave the tensors


def deit_iii(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): state[key] for key in state}


def dinov2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    position = torch.randn_like(state["cls_token"])
    changed = {"mask_token": torch.zeros(1, 24), "cls_token": state["cls_token"] - position}
    changed |= {"pos_embed": torch.cat([position, state["pos_embed"]], dim=1), "register_tokens": state["reg_token"]}
    return {key: value for key, value in (state | changed).items() if key != "reg_token"}


PUBLISHED: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "DeiT III": ("deit3_small_patch16_224", deit_iii),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", dinov2),
}


@pytest.mark.parametrize("wrapping", ["model", "state_dict", "model_ema", None])
@pytest.mark.parametrize("family", PUBLISHED)
def test_weights_as_their_authors_name_them_start_a_vit(
    family: str, wrapping: str | None, images: Tensor, tmp_path: Path
) -> None:
    name, theirs = PUBLISHED[family]
    torch.manual_seed(0)
    own = timm.create_model(name, **SMALL).eval()
    for parameter in own.parameters():
        nn.init.normal_(parameter, std=0.1)
    content = {f"module.{key}": value for key, value in theirs(own.state_dict()).items()}
    torch.save({wrapping: content, "epoch": 3} if wrapping else content, tmp_path / "theirs.pth")
    fresh = timm.create_model(name, **SMALL).eval()
    assert start_from(fresh, tmp_path / "theirs.pth")
    torch.testing.assert_close(fresh(images), own(images))


def test_weights_are_those_that_the_training_itself_evaluates(tmp_path: Path) -> None:
    first, second = vit().state_dict(), {key: value + 1 for key, value in vit().state_dict().items()}
    for names in (("state_dict_ema", "state_dict"), ("model", "model_ema")):
        torch.save(dict(zip(names, (first, second), strict=True)), tmp_path / "in.pth")
        fresh = timm.create_model(NAME, **SMALL)
        start_from(fresh, tmp_path / "in.pth")
        assert torch.equal(fresh.norm.bias, first["norm.bias"])


def test_a_representation_layer_of_old_timm_comes_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = timm.create_model(NAME, num_classes=5, depth=1).eval()
    fc = nn.Linear(plain.embed_dim, 16)
    head = nn.Linear(16, 5)
    theirs = {key: value for key, value in plain.state_dict().items() if not key.startswith("head.")}
    theirs |= {f"pre_logits.fc.{key}": value for key, value in fc.state_dict().items()}
    theirs |= {f"head.{key}": value for key, value in head.state_dict().items()}
    told = {"model": NAME, "model_kwargs": {"depth": 1}}
    torch.save({"state_dict": theirs, "args": told}, tmp_path / "old.pth")
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        wanted = head(torch.tanh(fc(plain.forward_head(plain.forward_features(images), pre_logits=True))))
        torch.testing.assert_close(open_model(tmp_path / "old.pth")(images), wanted)
    adaptvit.save(open_model(tmp_path / "old.pth"), tmp_path / "ours.safetensors")
    assert torch.equal(open_model(tmp_path / "ours.safetensors")(images), open_model(tmp_path / "old.pth")(images))
    left = timm.create_model(NAME, num_classes=3, depth=1)
    assert not start_from(left, tmp_path / "old.pth")
    assert torch.equal(left.norm.bias, plain.norm.bias)


def test_convert_takes_a_representation_layer_or_refuses_it_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(NAME, num_classes=5).state_dict()
    fc = nn.Linear(192, 192)
    theirs |= {f"pre_logits.fc.{key}": value for key, value in fc.state_dict().items()}
    save_file(theirs, tmp_path / "old.safetensors")
    model = adaptvit.convert(tmp_path / "old.safetensors", tmp_path / "out.safetensors", NAME, num_classes=5)
    assert torch.equal(adaptvit.load(tmp_path / "out.safetensors").vit.head.pre_logits.fc.weight, fc.weight)
    assert torch.equal(model.vit.head.fc.weight, theirs["head.weight"])
    given = {"num_classes": 5, "gate_scale": 1.0, "gate_center": 2.0}
    avit = adaptvit.convert(
        tmp_path / "old.safetensors", tmp_path / "out.safetensors", "avit_tiny_patch16_224", **given
    )
    assert torch.equal(avit.vit.head.pre_logits.fc.weight, fc.weight)
    with pytest.raises(ValueError, match=r"old\.safetensors .*representation layer"):
        adaptvit.convert(
            tmp_path / "old.safetensors", tmp_path / "o.safetensors", "deit_tiny_distilled_patch16_224", num_classes=5
        )
    with pytest.raises(ValueError, match="has a head of 5 classes, not 1000"):
        adaptvit.convert(tmp_path / "old.safetensors", tmp_path / "o.safetensors", NAME)
