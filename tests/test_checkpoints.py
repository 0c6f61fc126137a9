import argparse
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
import weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import adaptvit
from adaptvit import AdaViTConfig, AViTConfig, FullConfig, Knob
from adaptvit.backbones.t2t import t2t_vit
from adaptvit.methods.avit import gate_in_name
from adaptvit.methods.full import Full
from adaptvit.weights.opening import start_from
from adaptvit.weights.published import resize_positions

TINY = "avit_tiny_patch16_224"
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def by_hand(**changes: Any) -> VisionTransformer:
    return VisionTransformer(**SIZES | changes)


VITS: dict[str, Callable[[], VisionTransformer]] = {
    "by hand": by_hand,
    "named": lambda: timm.create_model("deit_tiny_patch16_224", **SIZES),
    "distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **SIZES),
    "distilled by hand": lambda: VisionTransformerDistilled(**SIZES),
    "registers, LayerScale": lambda: timm.create_model("vit_small_patch14_reg4_dinov2", **SIZES),
    "attention pool": lambda: timm.create_model("vit_base_patch16_siglip_224", **SIZES),
    "pools with its prefix": lambda: by_hand(global_pool="avg", reg_tokens=2, pool_include_prefix=True),
    "tokens to token": lambda: timm.create_model("t2t_vit_t_14", **SIZES | {"patch_size": 16}, token_dim=8),
    "tokens to token by hand": lambda: t2t_vit(**SIZES | {"patch_size": 16}, dynamic_img_size=True),
    "pads images": lambda: by_hand(dynamic_img_size=True, dynamic_img_pad=True),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def deit() -> dict[str, Tensor]:
    """Weights with the names and shapes of DeiT-tiny's, as published."""
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224").state_dict()


@dataclass(frozen=True)
class ScaledConfig:
    """A method kept outside the package, with weights and a buffer of its own."""

    method: ClassVar[str] = "scaled"
    knob: ClassVar[Knob | None] = None
    blocks: Any = (0, (1, 2))

    def build(self, vit: VisionTransformer) -> "Scaled":
        return Scaled(vit, self)


class Scaled(Full):
    def __init__(self, vit: VisionTransformer, config: ScaledConfig) -> None:
        super().__init__(vit, config)
        self.scale = nn.Parameter(torch.rand(3))
        self.register_buffer("seen", torch.tensor(7))


def edited(path: Path, **changes: Any) -> Path:
    """`path` with other entries in its adaptvit record."""
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["adaptvit"])
    save_file(load_file(path), path, {"adaptvit": json.dumps(record | changes)})
    return path


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The error's text, which is one sentence."""
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- save and load


@pytest.mark.parametrize("vit", VITS)
@pytest.mark.parametrize("config", [FullConfig(), AViTConfig(gate_scale=5, gate_center=2.5)], ids=str)
def test_a_saved_model_comes_back(vit: str, config: Any, path: Path, images: Tensor) -> None:
    model = config.build(VITS[vit]()).eval()
    adaptvit.save(model, path)
    loaded = adaptvit.load(path).eval()
    assert type(loaded) is type(model)
    assert loaded.config == config
    assert torch.equal(loaded(images), model(images))
    assert [part.requires_grad for part in loaded.parameters()] == [part.requires_grad for part in model.parameters()]


def test_preprocessing_travels_with_the_weights(path: Path) -> None:
    vit = timm.create_model(
        "deit_tiny_patch16_224", pretrained_cfg_overlay={"mean": (0.5,) * 3, "crop_pct": 1.0}, **SIZES
    )
    model = FullConfig().build(vit)
    adaptvit.save(model, path)
    loaded = adaptvit.load(path)
    assert resolve_model_data_config(loaded.vit) == resolve_model_data_config(vit)
    assert resolve_model_data_config(loaded) == resolve_model_data_config(model)
    assert resolve_model_data_config(loaded)["input_size"] == (3, 32, 32)


def test_a_file_has_timms_own_keys(path: Path) -> None:
    model = AViTConfig().build(by_hand())
    adaptvit.save(model, path)
    assert load_file(path).keys() == model.vit.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision_is_kept(dtype: torch.dtype, path: Path) -> None:
    adaptvit.save(FullConfig().build(by_hand().to(dtype)), path)
    assert {value.dtype for value in adaptvit.load(path).state_dict().values()} == {dtype}


def test_shared_and_strided_weights_are_saved(path: Path) -> None:
    vit = by_hand()
    vit.blocks[1].norm1.weight = vit.blocks[0].norm1.weight
    vit.head.weight = nn.Parameter(torch.rand(24, 5).T)
    adaptvit.save(FullConfig().build(vit), path)
    loaded = adaptvit.load(path).vit.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in vit.state_dict().items())


def test_a_method_kept_outside_brings_its_config_type(path: Path) -> None:
    model = ScaledConfig().build(by_hand())
    adaptvit.save(model, path)
    assert {"method.scale", "method.seen"} < load_file(path).keys()
    loaded = adaptvit.load(path, ScaledConfig)
    assert loaded.config == model.config
    assert torch.equal(loaded.get_parameter("scale"), model.scale)
    with pytest.raises(ValueError, match="method 'scaled' is none of calibrated, merge, tome") as error:
        adaptvit.load(path)
    assert "config_type" in message(error)


def test_a_config_type_of_another_method_is_refused(path: Path) -> None:
    adaptvit.save(FullConfig().build(by_hand()), path)
    with pytest.raises(ValueError, match="method is 'full', but config_type ScaledConfig is of 'scaled'"):
        adaptvit.load(path, ScaledConfig)


@pytest.mark.parametrize("value", [torch.zeros(2), [1, 2], {"a": (1,)}, float("nan")], ids=str)
def test_a_config_that_would_not_come_back_is_not_saved(value: Any, path: Path) -> None:
    with pytest.raises(ValueError, match=r"ScaledConfig.blocks is .*allowed are numbers, strings"):
        adaptvit.save(ScaledConfig(blocks=value).build(by_hand()), path)
    assert not path.exists()


def test_an_interrupted_save_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FullConfig().build(by_hand())
    adaptvit.save(model, path)
    before = path.read_bytes()

    def fills_the_disk(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fills_the_disk)
    with pytest.raises(OSError, match="No space left"):
        adaptvit.save(model, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_has_ordinary_permissions(path: Path) -> None:
    adaptvit.save(FullConfig().build(by_hand()), path)
    (path.parent / "other").touch()
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode


def test_saving_into_no_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere") as error:
        adaptvit.save(FullConfig().build(by_hand()), tmp_path / "nowhere" / "model.safetensors")
    message(error)


# ---- files that load refuses


def test_a_file_that_is_not_there_is_named(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(path))} does not exist"):
        adaptvit.load(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        adaptvit.load(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_a_truncated_file_is_refused(kept: int, path: Path) -> None:
    adaptvit.save(FullConfig().build(by_hand()), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged or not a safetensors file") as error:
        adaptvit.load(path)
    message(error)


def test_a_text_file_is_refused(path: Path) -> None:
    path.write_text("weights: none\n" * 20)
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        adaptvit.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_somebody_elses_safetensors_are_sent_to_convert(metadata: dict[str, str] | None, path: Path) -> None:
    save_file({"head.weight": torch.zeros(2, 2)}, path, metadata)
    with pytest.raises(ValueError, match=r"no adaptvit configuration.*--model.*adaptvit convert"):
        adaptvit.load(path)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"version": 2}, "has format version 2, and this adaptvit reads version 1"),
        ({"method": "magic"}, "method 'magic' is none of calibrated, merge, tome"),
        ({"config": {"epsilon": 0.1, "gamma": 1}}, "AViTConfig has no field gamma"),
        ({"config": {"epsilon": 3}}, r"AViTConfig.epsilon must lie in \(0, 1\), got 3"),
        ({"vit": {"arguments": {}}}, "lacks 'architecture'"),
    ],
)
def test_a_configuration_that_cannot_be_met_is_refused(changes: dict[str, Any], fault: str, path: Path) -> None:
    adaptvit.save(AViTConfig().build(by_hand()), path)
    with pytest.raises(ValueError, match=fault) as error:
        adaptvit.load(edited(path, **changes))
    assert str(path) in message(error)


def test_a_config_field_younger_than_the_file_takes_its_default(path: Path) -> None:
    adaptvit.save(AViTConfig(epsilon=0.1).build(by_hand()), path)
    assert adaptvit.load(edited(path, config={"epsilon": 0.1})).config == AViTConfig(epsilon=0.1)


def test_tensors_that_do_not_fit_are_named_and_counted(path: Path) -> None:
    adaptvit.save(FullConfig().build(by_hand()), path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), file.get_tensors()
    tensors = {key: value for key, value in tensors.items() if not key.startswith("blocks.1.")}
    tensors["head.weight"] = torch.zeros(7, 24)
    tensors["gate.weight"] = torch.zeros(1)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="does not fit its own configuration") as error:
        adaptvit.load(path)
    assert "missing blocks.1.norm1.weight, blocks.1.norm1.bias, blocks.1.attn.qkv.weight and 9 more" in message(error)
    assert "unexpected gate.weight" in message(error)
    assert "misshaped head.weight (7, 24) instead of (5, 24)" in message(error)


# ---- convert


def test_a_released_avit_file_converts(deit: dict[str, Tensor], tmp_path: Path) -> None:
    source, target = tmp_path / "tiny-12-34.5.pth", tmp_path / "tiny.safetensors"
    training = argparse.Namespace(gate_scale=100.0, gate_center=3.0, lr=5e-4, output_dir="runs")
    torch.save({"model": deit, "optimizer": {"state": {}}, "epoch": 99, "args": training}, source)
    written = adaptvit.convert(source, target, TINY)
    loaded = adaptvit.load(target)
    assert loaded.config == written.config == AViTConfig(gate_scale=12.0, gate_center=34.5)
    assert load_file(target).keys() == deit.keys()
    assert all(torch.equal(value, deit[key]) for key, value in load_file(target).items())


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("tiny-10-30.pth", (10.0, 30.0)),
        ("runs/small-10-75.5.pth", (10.0, 75.5)),
        ("a-b-2.5-4.safetensors", (2.5, 4.0)),
        ("deit_tiny_patch16_224-a1311bcf.pth", None),
        ("visualization-tiny.pth", None),
        ("tiny-10-30", None),
    ],
)
def test_a_gate_is_read_from_the_file_name(name: str, gate: tuple[float, float] | None) -> None:
    assert gate_in_name(name) == ({} if gate is None else {"gate_scale": gate[0], "gate_center": gate[1]})


@pytest.mark.parametrize(
    ("name", "training", "given", "gate"),
    [
        ("a-1-2.pth", {"gate_scale": 3.0, "gate_center": 4.0}, {"gate_scale": 5.0, "gate_center": 6.0}, (5.0, 6.0)),
        ("a-1-2.pth", {"gate_scale": 3.0, "gate_center": 4.0}, {"gate_center": 0.0}, (1.0, 0.0)),
        ("a.pth", {"gate_scale": 3.0, "gate_center": 4.0}, {}, (3.0, 4.0)),
    ],
)
def test_a_gate_is_the_argument_else_the_names_else_the_trainings(
    name: str,
    training: dict[str, float],
    given: dict[str, float],
    gate: tuple[float, float],
    deit: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    torch.save({"model": deit, "args": argparse.Namespace(**training)}, tmp_path / name)
    config = adaptvit.convert(tmp_path / name, tmp_path / "out.safetensors", TINY, **given).config
    assert (config.gate_scale, config.gate_center) == gate


def test_plain_weights_become_a_plain_model(deit: dict[str, Tensor], tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    with torch.no_grad():
        deit = {key: value.clone() for key, value in deit.items()}
        deit["pos_embed"][:, 1::2, 0] = 5.0  # channel 0 tells half of the patches to halt, but nobody made it do so
    torch.save({"model": deit, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "in.pth")
    plain = timm.create_model("deit_tiny_patch16_224").eval()
    plain.load_state_dict(deit)
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    adaptvit.convert(tmp_path / "in.pth", target, "deit_tiny_patch16_224")
    model = adaptvit.load(target).eval()
    assert model.config == FullConfig()
    with torch.inference_mode():
        torch.testing.assert_close(model(image), plain(image))


@pytest.mark.parametrize("given", [{"gate_scale": 4.0, "gate_center": 2.0}, {}])
def test_a_gate_told_makes_plain_weights_an_avit(given: dict, deit: dict[str, Tensor], tmp_path: Path) -> None:
    source = tmp_path / ("in.pth" if given else "in-4-2.pth")
    torch.save(deit, source)
    model = adaptvit.convert(source, tmp_path / "out.safetensors", "deit_tiny_patch16_224", **given)
    assert model.config == AViTConfig(gate_scale=4.0, gate_center=2.0)


def test_a_gate_that_nobody_fitted_is_said(deit: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"model": deit, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "in.pth")
    with pytest.warns(UserWarning, match=r"in\.pth has no gate that was fitted or trained"):
        model = adaptvit.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", TINY)
    assert (model.config.gate_scale, model.config.gate_center) == (10.0, 30.0)


def test_every_wrapping_of_the_same_weights_converts_alike(deit: dict[str, Tensor], tmp_path: Path) -> None:
    parallel = {f"module.{key}": value for key, value in deit.items()}
    wrappings = {"bare": deit, "model": {"model": deit}, "parallel": parallel, "nested": {"state_dict": parallel}}
    for name, content in wrappings.items():
        torch.save(content, tmp_path / f"{name}.pth")
    save_file(deit, tmp_path / "timm.safetensors")
    target = tmp_path / "out.safetensors"
    for source in [*(tmp_path / f"{name}.pth" for name in wrappings), tmp_path / "timm.safetensors"]:
        adaptvit.convert(source, target, "deit_tiny_patch16_224")
        assert all(torch.equal(value, deit[key]) for key, value in load_file(target).items())


def test_a_file_that_wants_code_to_run_is_refused(deit: dict[str, Tensor], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": deit, "args": Evil()}, tmp_path / "evil-10-30.pth")
    with pytest.raises(ValueError, match=r"evil-10-30.pth is refused: reading its posix.mkdir could run code") as error:
        adaptvit.convert(tmp_path / "evil-10-30.pth", tmp_path / "out.safetensors", TINY)
    message(error)
    assert [path.name for path in tmp_path.iterdir()] == ["evil-10-30.pth"]


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 not a zip file", b"\x80\x02}q\x00."])
def test_a_file_that_torch_did_not_write_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "in.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged or was not written by torch\.save") as error:
        adaptvit.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", TINY)
    message(error)


def test_a_truncated_torch_file_is_refused(deit: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(deit, tmp_path / "in.pth")
    os.truncate(tmp_path / "in.pth", 1_000_000)
    with pytest.raises(ValueError, match=r"is damaged or was not written by torch\.save"):
        adaptvit.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", TINY)


@pytest.mark.parametrize("content", [[1, 2], {"model": {"a": 1}}, {"epoch": 3}, {"model": torch.zeros(1)}], ids=str)
def test_a_file_without_a_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "in.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        adaptvit.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", TINY)


def test_our_own_file_is_not_converted_again(path: Path) -> None:
    adaptvit.save(AViTConfig().build(by_hand()), path)
    with pytest.raises(ValueError, match=r"adaptvit file already, .*: read it with adaptvit\.load"):
        adaptvit.convert(path, path, TINY)


def test_a_missing_source_and_an_unknown_name_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"in\.pth does not exist"):
        adaptvit.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", TINY)
    with pytest.raises(
        ValueError, match=r"model_name must be a timm ViT or one of .*, avit_tiny_patch16_224, .*, got 'deit_tiny'"
    ):
        adaptvit.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", "deit_tiny")


def test_another_number_of_classes_has_to_be_named(deit: dict[str, Tensor], tmp_path: Path) -> None:
    head = {"head.weight": torch.rand(7, 192), "head.bias": torch.rand(7)}
    torch.save({"model": deit | head}, tmp_path / "in.pth")
    target = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="has a head of 7 classes, not 1000: pass num_classes=7"):
        adaptvit.convert(tmp_path / "in.pth", target, TINY)
    assert not target.exists()
    adaptvit.convert(tmp_path / "in.pth", target, TINY, num_classes=7, gate_scale=10.0)
    assert adaptvit.load(target).num_classes == 7


@pytest.mark.parametrize(
    ("model_name", "fault"),
    [
        ("avit_small_patch16_224", r"misshaped cls_token \(1, 1, 192\) instead of \(1, 1, 384\).* and \d+ more"),
        ("avit_tiny_distilled_patch16_224", "missing dist_token, head_dist.weight, head_dist.bias"),
    ],
)
def test_weights_of_another_model_are_refused(
    model_name: str, fault: str, deit: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save({"model": deit}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match=f"in.pth does not fit {model_name}: {fault}"):
        adaptvit.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", model_name)
    assert not (tmp_path / "out.safetensors").exists()


# ---- convert AdaViT

ADA = "ada_step_deit_tiny_patch16_224"


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """AdaViT around DeiT-tiny in the published layout: that of the published DeiT-small, half as wide."""
    recorded = Path(__file__).parent / "parity" / "adavit" / "eval_full_deit_small.json"
    half = {384: 192, 1536: 768, 6: 3}
    manifest = json.loads(recorded.read_text())["manifest"]
    filled = weights.fill({key: [half.get(size, size) for size in shape] for key, shape in manifest.items()}, seed=0)
    return {key: torch.from_numpy(value) for key, value in filled.items()}


def test_every_wrapping_of_an_adavit_converts_alike(published: dict[str, Tensor], tmp_path: Path) -> None:
    parallel, other = {f"module.{key}": value for key, value in published.items()}, {"head.weight": torch.zeros(1, 1)}
    wrappings = {
        "averaged": {"state_dict_ema": parallel, "state_dict": other, "model": other},
        "trained-10-30": {"state_dict": parallel, "model": other, "args": argparse.Namespace(gate_scale=1.0)},
        "model": {"model": published},
        "bare": published,
    }
    for name, content in wrappings.items():
        torch.save(content, tmp_path / f"{name}.pth")
    save_file(published, tmp_path / "timm.safetensors")
    target = tmp_path / "out.safetensors"
    for source in [*(tmp_path / f"{name}.pth" for name in wrappings), tmp_path / "timm.safetensors"]:
        adaptvit.convert(source, target, ADA)
        assert adaptvit.load(target).config == AdaViTConfig()
        found = load_file(target)
        own, method = "blocks.11.attn.", "method."
        joined = torch.cat([published[f"{own}{part}.weight"] for part in ("query", "key", "value")])
        assert torch.equal(found[own + "qkv.weight"], joined)
        for key, name in (
            (own + "token_select.mlp_head", "patch_policy.11"),
            ("blocks.11.head_select.mlp_head", "head_policy.11"),
            ("blocks.11.layer_select.mlp_head", "sublayer_policy.11"),
        ):
            assert torch.equal(found[f"{method}{name}.weight"], published[f"{key}.weight"])
            assert torch.equal(found[f"{method}{name}.bias"], published[f"{key}.bias"])
        kept = {key for key in found if "qkv" not in key and not key.startswith(method)}
        assert kept < published.keys()
        assert all(torch.equal(found[key], published[key]) for key in kept)


def test_an_adavit_is_what_its_training_arguments_say(published: dict[str, Tensor], tmp_path: Path) -> None:
    arguments = {"ada_head": True, "ada_head_v2": True, "ada_token": True, "ada_layer": True, "keep_layers": 1}
    given = argparse.Namespace(**arguments, ada_token_with_mlp=False, norm_policy=False, ada_token_start_layer=0)
    torch.save({"state_dict": published, "args": given}, tmp_path / "all.pth")
    model = adaptvit.convert(tmp_path / "all.pth", tmp_path / "all.safetensors", ADA)
    assert model.config == AdaViTConfig(heads_take="hidden", patches_skip="attention")

    some = {key: value for key, value in published.items() if "token_select" not in key and "blocks.1.head" not in key}
    some = {key: value for key, value in some.items() if "blocks.1.layer" not in key}
    given = argparse.Namespace(ada_head=True, ada_layer=True, ada_token=False, keep_layers=2)
    torch.save({"state_dict": some, "args": given}, tmp_path / "some.pth")
    model = adaptvit.convert(tmp_path / "some.pth", tmp_path / "some.safetensors", ADA)
    assert model.config == AdaViTConfig(policies=("heads", "sublayers"), first_block=2)


@pytest.mark.parametrize(
    ("taken", "given", "fault"),
    [
        ("blocks.3.head_select.mlp_head.bias", {}, "missing method.head_policy.3.bias"),
        ("blocks.3.norm2.bias", {}, "missing blocks.3.norm2.bias"),
        (
            "blocks.3.attn.query.bias",
            {},
            "missing blocks.3.attn.qkv.bias; unexpected blocks.3.attn.key.bias, blocks.3.attn.value.bias",
        ),
        (None, {"blocks.0.head_select.mlp_head.bias": torch.zeros(3)}, "unexpected method.head_policy.0.bias"),
        (None, {"blocks.0.norm3.bias": torch.zeros(3)}, "unexpected blocks.0.norm3.bias"),
        (
            None,
            {"blocks.1.layer_select.mlp_head.bias": torch.zeros(3)},
            r"misshaped method.sublayer_policy.1.bias (3,) instead of (2,)",
        ),
    ],
)
def test_an_adavit_with_a_tensor_too_few_or_too_many_is_refused(
    taken: str | None, given: dict[str, Tensor], fault: str, published: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save({key: value for key, value in published.items() if key != taken} | given, tmp_path / "in.pth")
    with pytest.raises(ValueError, match="does not fit") as error:
        adaptvit.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", ADA)
    assert message(error) == f"{tmp_path / 'in.pth'} does not fit {ADA}: {fault}"
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_of_another_kind_of_model_is_refused(
    published: dict[str, Tensor], deit: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(published, tmp_path / "ada.pth")
    torch.save(deit, tmp_path / "deit.pth")
    for source, name, fault in (
        ("deit", ADA, r"does not fit.*: missing method\.patch_policy\.0\.weight, .* and 65 more$"),
        ("ada", "ada_step_deit_small_patch16_224", r"misshaped cls_token \(1, 1, 192\) instead of \(1, 1, 384\), "),
        ("ada", "ada_step_t2t_vit_14_lnorm", r"missing patch_embed\.attention1\.w, .*; unexpected patch_embed\.proj"),
        ("ada", TINY, r"unexpected method\.patch_policy\.0\.weight, .* and 65 more$"),
        ("ada", "deit_tiny_patch16_224", r"unexpected method\.patch_policy\.0\.weight, .* and 65 more$"),
    ):
        with pytest.raises(ValueError, match=fault) as error:
            adaptvit.convert(tmp_path / f"{source}.pth", tmp_path / "out.safetensors", name)
        message(error)
    with pytest.raises(ValueError, match=f"^{ADA} has no gate_scale: leave out"):
        adaptvit.convert(tmp_path / "ada.pth", tmp_path / "out.safetensors", ADA, gate_scale=1.0)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_vit_can_start_from_a_published_adavit(published: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": published}, tmp_path / "ada.pth")
    vit = timm.create_model("deit_tiny_patch16_224")
    assert start_from(vit, tmp_path / "ada.pth")
    values = [published[f"blocks.2.attn.{part}.bias"] for part in ("query", "key", "value")]
    assert torch.equal(vit.blocks[2].attn.qkv.bias, torch.cat(values))


def test_a_saved_adavit_keeps_its_policies(path: Path, images: Tensor) -> None:
    config = AdaViTConfig(first_block=0, norm_policies=True, heads_take="hidden", macs_target=None)
    model = config.build(by_hand()).eval()
    for name, parameter in model.named_parameters():
        if "policy" in name:
            nn.init.normal_(parameter)
    adaptvit.save(model, path)
    expected = {
        f"method.{kind}_policy.{block}.{part}"
        for kind in ("patch", "head", "sublayer")
        for block in (0, 1)
        for part in ("weight", "bias")
    }
    expected |= {f"method.policy_norm.{block}.{part}" for block in (0, 1) for part in ("weight", "bias")}
    assert {key for key in load_file(path) if key.startswith("method.")} == expected
    loaded = adaptvit.load(path).eval()
    assert loaded.config == config
    assert torch.equal(loaded(images), model(images))
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())


# ---- positions


def test_a_converted_position_table_has_the_size_asked_for(deit: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(deit, tmp_path / "in.pth")
    target = tmp_path / "out.safetensors"
    adaptvit.convert(tmp_path / "in.pth", target, "deit_tiny_patch16_224", img_size=64)
    loaded = adaptvit.load(target)
    assert torch.equal(loaded.vit.state_dict()["pos_embed"], resize_positions(deit["pos_embed"], 4, prefix=1))
    assert resolve_model_data_config(loaded)["input_size"] == (3, 64, 64)


def test_positions_that_are_no_square_are_refused() -> None:
    with pytest.raises(ValueError, match="12 patches, which do not make a square"):
        resize_positions(torch.zeros(1, 13, 8), 4, prefix=1)
