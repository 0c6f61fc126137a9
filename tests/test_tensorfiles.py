"""Files of weights that are damaged, foreign or hostile: one sentence with the name, whatever is in them."""

import argparse
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import adaptvit
from adaptvit import AViTConfig, FullConfig
from adaptvit.weights.opening import open_model, start_from

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
NAMED = "vit_tiny_patch16_224"


def vit(**changes: Any) -> VisionTransformer:
    return timm.create_model(NAMED, **SMALL | changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    adaptvit.save(AViTConfig().build(vit()), path)
    return path.read_bytes()


def parts(saved: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header, record and body of a file."""
    size = struct.unpack("<Q", saved[:8])[0]
    header = json.loads(saved[8 : 8 + size])
    return header, json.loads(header["__metadata__"]["adaptvit"]), saved[8 + size :]


def written(path: Path, header: dict[str, Any] | bytes, body: bytes) -> Path:
    told = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(told)) + told + body)
    return path


def refused(path: Path) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        open_model(path)
    told = str(error.value)
    assert str(path) in told
    assert "\n" not in told
    assert "weights_only" not in told
    return told


WRONG: list[Any] = [None, [], {}, [1], "x", -1, 0, 10**9, 10**30, 1.5, True, [[]], {"a": 1}, "é" * 5000]
ARGUMENTS = ["img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads"]


@pytest.mark.parametrize("field", ARGUMENTS)
def test_a_wrong_argument_is_one_sentence(field: str, saved: bytes, tmp_path: Path) -> None:
    header, record, body = parts(saved)
    for number, value in enumerate([*WRONG[1:], 7, [16, 32], 2**16]):  # None is what is not told
        record["vit"]["arguments"][field] = value
        header["__metadata__"]["adaptvit"] = json.dumps(record)
        refused(written(tmp_path / f"{number}.safetensors", header, body))


PLACES = [
    ((), ()),
    (("version",), (True,)),  # which is 1
    (("method",), ()),
    (("config",), ({},)),  # all its fields have defaults
    (("config", "epsilon"), ()),
    (("config", "more"), ()),
    (("vit",), ()),
    (("vit", "architecture"), ()),
    (("vit", "arguments"), ()),
    (("vit", "arguments", "checkpoint_path"), (None,)),
    (("vit", "arguments", "pretrained_cfg"), (None,)),
    (("vit", "data"), ({},)),
    (("vit", "data", "mean"), (None, [1])),
    (("vit", "data", "crop_pct"), (None, 1.5)),
    (("vit", "data", "interpolation"), (None,)),
]


@pytest.mark.parametrize(("place", "right"), PLACES, ids=[".".join(place) for place, _ in PLACES])
def test_a_record_of_wrong_kinds_is_one_sentence(
    place: tuple[str, ...], right: tuple[Any, ...], saved: bytes, tmp_path: Path
) -> None:
    for number, value in enumerate(WRONG):
        if any(type(value) is type(one) and value == one for one in right):
            continue
        header, record, body = parts(saved)
        inside = record
        for key in place[:-1]:
            inside = inside[key]
        if place:
            inside[place[-1]] = value
        header["__metadata__"]["adaptvit"] = json.dumps(record if place else value)
        refused(written(tmp_path / f"{number}.safetensors", header, body))


NO_JSON = ["", "{", "[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"version": NaN}', '{"version": 1e999}', "null"]
NO_JSON += ["\x00", '{"version": 1, "version": 1, "method": "full"}', '{"version": ' + "9" * 5000 + "}"]


@pytest.mark.parametrize("text", NO_JSON, ids=range(len(NO_JSON)))
def test_a_record_that_is_no_json_is_one_sentence(text: str, saved: bytes, tmp_path: Path) -> None:
    header, _, body = parts(saved)
    header["__metadata__"]["adaptvit"] = text
    refused(written(tmp_path / "in.safetensors", header, body))


def test_a_header_that_lies_is_one_sentence(saved: bytes, tmp_path: Path) -> None:
    header, _, body = parts(saved)
    size = len(saved) - len(body)
    for number, changed in enumerate(
        [
            saved[:8] + b"\xff" * 20 + saved[28:],
            struct.pack("<Q", 2**63) + saved[8:],
            struct.pack("<Q", size + 10**6) + saved[8:],
            saved[: size - 8] + b"{" * 8 + body,
        ]
    ):
        (tmp_path / f"{number}.safetensors").write_bytes(changed)
        assert "is damaged" in refused(tmp_path / f"{number}.safetensors")
    own = header["head.bias"]
    for number, entry in enumerate(
        [
            own | {"shape": [10**9]},
            own | {"data_offsets": [0, 2**62]},
            own | {"dtype": "F77"},
            own | {"dtype": "I32"},
            own | {"dtype": "BOOL", "shape": [20]},
            {},
            None,
        ]
    ):
        refused(written(tmp_path / f"entry{number}.safetensors", header | {"head.bias": entry}, body))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    broken = vit()
    broken.blocks[1].mlp.fc1.bias.data[3] = value
    torch.save(broken.state_dict(), tmp_path / "in.pth")
    adaptvit.save(FullConfig().build(broken), tmp_path / "in.safetensors")
    for call in (
        lambda: adaptvit.load(tmp_path / "in.safetensors"),
        lambda: start_from(vit(), tmp_path / "in.safetensors"),
        lambda: start_from(vit(), tmp_path / "in.pth"),
    ):
        with pytest.raises(ValueError, match=r"in\.\w+ holds NaN or infinity in blocks\.1\.mlp\.fc1\.bias$"):
            call()


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


def of_another_kind(kind: str) -> dict[str, Any]:
    state: dict[Any, Any] = vit().state_dict()
    bias = state["norm.bias"]
    odd: dict[str, Any] = {
        "integers": bias.int(),
        "booleans": bias.bool(),
        "complex": bias.to(torch.complex64),
        "meta": bias.to("meta"),
        "sparse": bias.to_sparse(),
        "a list": [1.0],
        "nothing": None,
        "huge": bias[:1].expand(10**15),
    }
    return state | ({3: bias} if kind == "a number for a name" else {"norm.bias": odd[kind]})


KINDS = ["integers", "booleans", "complex", "meta", "sparse", "a list", "nothing", "huge", "a number for a name"]


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_another_kind_are_refused(kind: str, tmp_path: Path) -> None:
    torch.save(of_another_kind(kind), tmp_path / "in.pth")
    with pytest.raises(ValueError, match=r"in\.pth") as error:
        start_from(vit(), tmp_path / "in.pth")
    assert "\n" not in str(error.value)


def test_a_name_of_a_tensor_is_shown_on_one_line_and_not_at_any_length(tmp_path: Path) -> None:
    torch.save(vit().state_dict() | {"a\nb\x1b[31m": torch.zeros(1), "x" * 10**5: torch.zeros(1)}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match=r"unexpected a\\nb\\x1b\[31m, xxx") as error:
        start_from(vit(), tmp_path / "in.pth")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"head.weight": torch.zeros(1).expand(10**9, 24)}, r"holds head\.weight, of 96000000000 bytes, few of which"),
        ({"pos_embed": torch.zeros(1, 1, 24)}, "misshaped pos_embed"),
        ({"pos_embed": torch.zeros(1, 14, 24)}, "positions of 13 patches, which do not make a square"),
        ({"pos_embed": torch.zeros(1, 26, 24, dtype=torch.int64)}, "misshaped pos_embed"),
    ],
    ids=["stored in part", "no patches", "no square", "integers"],
)
def test_tensors_of_impossible_sizes_are_refused_with_the_files_name(
    changes: dict[str, Tensor], fault: str, tmp_path: Path
) -> None:
    torch.save(vit().state_dict() | changes, tmp_path / "in.pth")
    with pytest.raises(ValueError, match=rf"in\.pth.*{fault}") as error:
        start_from(vit(), tmp_path / "in.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "told",
    [
        {"model": "vit_giant_patch14_224"},
        {"model": NAMED, "model_kwargs": {"depth": 60000}},
        {"model": NAMED, "model_kwargs": {"embed_dim": 60000, "num_heads": 1}},
        {"model": NAMED, "img_size": 60000, "model_kwargs": {key: SMALL[key] for key in ("embed_dim", "depth")}},
    ],
    ids=["a giant", "deep", "wide", "many patches"],
)
def test_a_checkpoint_that_claims_a_large_model_is_refused_before_memory_is_taken(
    told: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"state_dict": vit(patch_size=16).state_dict(), "args": told}, tmp_path / "in.pth")
    made = timm.create_model

    def on_meta(*names: Any, **arguments: Any) -> Any:
        assert torch.empty(0).is_meta
        return made(*names, **arguments)

    monkeypatch.setattr(timm, "create_model", on_meta)
    refused(tmp_path / "in.pth")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_what_is_no_file_of_weights_is_one_sentence(suffix: str, tmp_path: Path) -> None:
    torch.save(vit().state_dict(), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    contents = [
        b"",
        b"hello",
        b"PK\x03\x04",
        bytes(1000),
        whole[: len(whole) // 2],
        whole[:100],
        whole[-5000:],
        b"\x80\x02}q\x00.",
    ]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}{suffix}").write_bytes(content)
        refused(tmp_path / f"{number}{suffix}")
    for number, value in enumerate([Code(), {"args": Code()}, [1, 2], {}, 3, torch.zeros(2), {"state_dict": None}]):
        torch.save(value, tmp_path / f"value{number}{suffix}")
        refused(tmp_path / f"value{number}{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    refused(tmp_path / f"folder{suffix}")
    os.mkfifo(tmp_path / f"pipe{suffix}")
    refused(tmp_path / f"pipe{suffix}")
    assert "adaptvit convert" in refused(tmp_path / "whole")


# ---- models by the names that users have for them


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("suffix", [".pth.tar", ".pt", ".bin"])
def test_a_checkpoint_of_timms_training_says_its_model(suffix: str, images: Tensor, tmp_path: Path) -> None:
    trained = vit().eval()
    kwargs = {key: SMALL[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")}
    kwargs["patch_size"] = [8, 8]
    told = argparse.Namespace(model=NAMED, img_size=32, in_chans=None, gp=None, model_kwargs=kwargs, mean=[0.1] * 3)
    torch.save({"arch": NAMED, "state_dict": trained.state_dict(), "args": told}, tmp_path / f"in{suffix}")
    model = open_model(tmp_path / f"in{suffix}")
    assert model.config == FullConfig()
    assert tuple(model.pretrained_cfg["mean"]) == (0.1,) * 3
    with torch.inference_mode():
        torch.testing.assert_close(model(images), trained(images))
    for changes in ({"model": "magic"}, {"mean": "grey"}, {"model_kwargs": {"checkpoint_path": "x"}}):
        torch.save(
            {"state_dict": trained.state_dict(), "args": argparse.Namespace(**vars(told) | changes)},
            tmp_path / "no.pth",
        )
        refused(tmp_path / "no.pth")


def test_a_folder_in_the_hubs_format_opens(images: Tensor, tmp_path: Path) -> None:
    trained = vit().eval()
    save_for_hf(trained, tmp_path / "mine", model_args=SMALL, safe_serialization=True)
    for name in (f"local-dir:{tmp_path / 'mine'}", tmp_path / "mine"):
        model = open_model(name)
        assert model.config == FullConfig()
        with torch.inference_mode():
            torch.testing.assert_close(model(images), trained(images))
    told = json.loads((tmp_path / "mine" / "config.json").read_text())
    odd = [{"architecture": None}, *({"model_args": SMALL | {key: 10**6}} for key in ("depth", "embed_dim"))]
    for number, changed in enumerate(["[" * 100_000, "[]", *(json.dumps(told | change) for change in odd)]):
        (tmp_path / "mine" / "config.json").write_text(changed)
        with pytest.raises(ValueError, match="mine") as error:
            open_model(tmp_path / "mine")
        assert "\n" not in str(error.value), number
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        open_model("local-dir:nowhere")


def test_a_repository_that_is_not_here_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no network\nat all")

    monkeypatch.setattr(adaptvit.weights.places, "hf_hub_download", fail)
    with pytest.raises(
        ValueError, match=r"hf-hub:me/mine is not here and cannot be downloaded \(.+\): .*local-dir:FOLDER"
    ) as error:
        open_model("hf-hub:me/mine")
    assert "\n" not in str(error.value)


# ---- positions


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_a_vit_whose_positions_leave_out_the_prefix_starts_from_its_own(name: str, tmp_path: Path) -> None:
    patch = 14 if "patch14" in name else 16
    small = {"depth": 1, "num_classes": 5, "img_size": 4 * patch}
    own = timm.create_model(name, **small)
    own.pos_embed.data.normal_()
    save_file(own.state_dict(), tmp_path / "own.safetensors")
    fresh = timm.create_model(name, **small)
    assert start_from(fresh, tmp_path / "own.safetensors")
    assert torch.equal(fresh.pos_embed, own.pos_embed)
    larger = timm.create_model(name, **small | {"img_size": 8 * patch})
    start_from(larger, tmp_path / "own.safetensors")
    wanted = resample_abs_pos_embed(own.pos_embed, [8, 8], num_prefix_tokens=0, antialias=False)
    torch.testing.assert_close(larger.pos_embed, wanted)


def test_positions_go_by_the_grid_that_they_were_made_for(tmp_path: Path) -> None:
    square, wide, odd = vit(), vit(img_size=(64, 16)), vit(img_size=(48, 32))
    for name, model in (("square", square), ("wide", wide), ("odd", odd)):
        model.pos_embed.data.normal_()
        adaptvit.save(FullConfig().build(model), tmp_path / f"{name}.safetensors")
        save_file(model.state_dict(), tmp_path / f"bare-{name}.safetensors")
    for source, old in ((square, (4, 4)), (wide, (8, 2)), (odd, (6, 4))):
        for shape in ((4, 4), (8, 2), (6, 4), (2, 8)):
            target = vit(img_size=(8 * shape[0], 8 * shape[1]))
            name = {(4, 4): "square", (8, 2): "wide", (6, 4): "odd"}[old]
            start_from(target, tmp_path / f"{name}.safetensors")
            wanted = resample_abs_pos_embed(source.pos_embed, list(shape), list(old), antialias=False)
            torch.testing.assert_close(target.pos_embed, wanted)
    again = vit(img_size=(48, 32))
    start_from(again, tmp_path / "bare-odd.safetensors")
    assert torch.equal(again.pos_embed, odd.pos_embed)
    with pytest.raises(ValueError, match="whether its 16 positions are for 4 x 4 patches or for the 8 x 2"):
        start_from(vit(img_size=(64, 16)), tmp_path / "bare-square.safetensors")
    with pytest.raises(ValueError, match="24 patches, which do not make a square"):
        start_from(vit(), tmp_path / "bare-odd.safetensors")
