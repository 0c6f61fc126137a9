"""Clips: image ViTs that take them, and every method on these."""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import DROP_NOTHING, METHODS, ONE_OF_EACH, small_vit, vary
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import adaptvit
from adaptvit import Dense, FullConfig, Masked, Packed, RunLengthConfig, RunLengthMergeConfig, Slab, dense_macs, macs
from adaptvit.backbones.forward import scores
from adaptvit.data import Unreadable, collate
from adaptvit.model import AdaptiveViT
from adaptvit.show.pictures import clip_strip
from adaptvit.video import Clips, SpaceTimeViT, inflate

MEAN = "average pool, no class token"
TUBELETS = {
    "class token": 2,
    "distilled": 4,
    "registers": 2,
    MEAN: 2,
    "attention pool": 2,
    "rectangular": 2,
    "tokens to token": 1,
    "Eva, DINOv3": 2,
    "Eva, learned rotations": 1,
    "transformers, ViT": 2,
    "transformers, rotary": 2,
    "transformers, attention pool": 2,
}
"""Of ViTs that differ in what a clip has to do with: the frames that a patch gets."""


@cache
def clip_vit(flavour: str) -> SpaceTimeViT:
    made = inflate(small_vit(flavour, torch.float64).eval(), frames=4, tubelet=TUBELETS[flavour])
    torch.nn.init.normal_(made.time_embed, std=0.3)
    return made


@cache
def build(method: str, flavour: str = "class token") -> AdaptiveViT:
    return vary(METHODS[method].build(clip_vit(flavour))).eval() if "adavit" not in method else adavit(method, flavour)


def adavit(method: str, flavour: str) -> AdaptiveViT:
    model = METHODS[method].build(clip_vit(flavour)).eval()
    for name, parameter in model.named_parameters():
        if "policy" in name and parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.0, generator=torch.Generator().manual_seed(0))
    return model


def clips(vit: Any, count: int = 3) -> Tensor:
    """Noise, of contrasts that differ from clip to clip."""
    generator = torch.Generator().manual_seed(0)
    size = adaptvit.backbones.base.sample_shape(vit)
    noise = torch.randn(count, *size, generator=generator, dtype=torch.float64)
    return noise * 3 * torch.rand(count, 1, 1, 1, 1, generator=generator)


@pytest.mark.parametrize("flavour", TUBELETS)
def test_methods_that_drop_nothing_are_the_space_time_vit(flavour: str) -> None:
    vit = clip_vit(flavour)
    batch = clips(vit)
    with torch.no_grad():
        wanted = scores(vit(batch))[0]
        for method in ("full", "evit", "merge"):
            for layout in (Masked, Packed):
                given = DROP_NOTHING[method].build(vit)(batch, layout)
                torch.testing.assert_close(given, wanted, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(
    ("method", "flavour"),
    [*((method, flavour) for method in ONE_OF_EACH for flavour in ("class token", MEAN)), ("merge", "Eva, DINOv3")],
)
def test_layouts_agree_and_clips_are_alone(method: str, flavour: str) -> None:
    model = build(method, flavour)
    batch = clips(model.vit)
    with torch.inference_mode():
        packed, masked = (model(batch, layout, detailed=True) for layout in (Packed, Masked))
        alone = model(batch[1:2], detailed=True)
    torch.testing.assert_close(packed.logits, masked.logits, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(alone.logits, packed.logits[1:2], atol=1e-12, rtol=1e-10)
    assert packed.usage == masked.usage
    assert packed.usage.grid == (2, 4, 4)
    assert alone.usage == packed.usage.of_images(torch.tensor([1]))
    if method in ("full", "evit", "tome", "grid"):
        with torch.inference_mode():
            torch.testing.assert_close(model(batch, Dense), packed.logits, atol=1e-12, rtol=1e-10)
    elif method in ("ats", "merge"):
        assert len(set(packed.usage.macs.tolist())) > 1
        with torch.inference_mode():
            torch.testing.assert_close(model(batch, Slab), packed.logits, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("flavour", TUBELETS)
def test_macs_are_what_torch_counts(flavour: str) -> None:
    model = build("ats", flavour).requires_grad_(False)
    batch = clips(model.vit, count=1)
    with FlopCounterMode(display=False) as counter:
        usage = model(batch, detailed=True).usage
    assert 2 * macs(usage, model.shape).item() == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        model.vit(batch)
    assert 2 * dense_macs(model.shape, usage.grid) == counter.get_total_flops()


@pytest.mark.parametrize("start", ["mean", "centre"])
def test_a_still_clip_is_its_image_to_a_vit_without_tokens_before_the_patches(start: Any) -> None:
    vit = small_vit(MEAN, torch.float64).eval()
    image = clips(clip_vit(MEAN), count=2)[:, :1]
    with torch.no_grad():
        made = inflate(vit, frames=6, tubelet=3, start=start)
        torch.testing.assert_close(made(image.expand(-1, 6, -1, -1, -1)), vit(image[:, 0]), atol=1e-12, rtol=1e-10)
    moving = torch.cat([image, 2 * image, 9 * image], dim=1)
    instead = {"mean": 4 * image, "centre": 2 * image}[start]
    stem = vit.patch_embed
    with torch.no_grad():
        torch.testing.assert_close(made.vit.patch_embed(moving.flatten(1, 2)), stem(instead[:, 0]))


def test_steps_in_time_are_told_apart_by_their_positions_alone() -> None:
    made = inflate(small_vit(MEAN, torch.float64).eval(), frames=4)
    batch = clips(made, count=1)
    with torch.no_grad():
        turned = batch.unflatten(1, (2, 2)).flip(1).flatten(1, 2)
        torch.testing.assert_close(made(turned), made(batch), atol=1e-12, rtol=1e-10)
        nn.init.normal_(made.time_embed)
        assert (made(turned) - made(batch)).abs().max() > 1e-3


def test_an_image_vit_is_left_as_it_is_and_maps_have_steps() -> None:
    vit = small_vit()
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    model = FullConfig().build(inflate(vit, frames=4)).eval()
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    assert model.features(torch.randn(2, 4, 3, 32, 32)).shape == (2, vit.embed_dim, 2, 4, 4)


def test_gradients_are_the_same_where_they_are_checkpointed() -> None:
    found = []
    for enable in (False, True):
        made = inflate(small_vit(dtype=torch.float64), frames=4).train()
        made.set_grad_checkpointing(enable)
        made(clips(made)).square().sum().backward()
        found.append([parameter.grad for parameter in made.parameters()])
        assert made.time_embed.grad is not None
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("flavour", ["class token", "transformers, ViT"])
def test_files_keep_the_frames(flavour: str, tmp_path: Path) -> None:
    vit = inflate(small_vit(flavour), frames=4)
    nn.init.normal_(vit.time_embed)
    model = METHODS["evit"].build(vit).eval()
    adaptvit.save(model, tmp_path / "clips.safetensors")
    again = adaptvit.load(tmp_path / "clips.safetensors").eval()
    batch = clips(vit).float()
    with torch.no_grad():
        assert torch.equal(again(batch), model(batch))


def test_what_cannot_be_inflated_is_refused_in_one_sentence() -> None:
    with pytest.raises(TypeError, match=r"beit_base_patch16_224 cannot be inflated: its blocks go by the grid"):
        inflate(small_vit("BEiT"))
    with pytest.raises(TypeError, match=r"does not cut patches by one convolution.*: inflate it with tubelet=1"):
        inflate(small_vit("tokens to token"))
    with pytest.raises(ValueError, match=r"frames is 5, which is no whole number of tubelets of 2 frames"):
        inflate(small_vit(), frames=5)
    with pytest.raises(TypeError, match="takes videos already"):
        inflate(clip_vit("class token"))
    with pytest.raises(TypeError, match=r"ResNet .* no list of two or more blocks|ResNet"):
        inflate(timm.create_model("resnet10t"))


def test_clips_of_another_shape_are_refused_in_one_sentence() -> None:
    vit = clip_vit("class token")
    for called in (vit, FullConfig().build(vit)):
        with pytest.raises(ValueError, match=r"channels before frames, but .*: give it clips\.transpose\(1, 2\)"):
            called(clips(vit).transpose(1, 2))
        with pytest.raises(ValueError, match=r"takes \(batch, 4, 3, height, width\)"):
            called(clips(vit)[:, :2])
        with pytest.raises(ValueError, match=r"takes \(batch, 4, 3, height, width\)"):
            called(clips(vit)[:, 0])


def moving(vit: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """Clips whose patches change at the places and steps of `CHANGES`, and are the same otherwise."""
    first = clips(vit, count=2)[:, :1].expand(-1, 4, -1, -1, -1).clone()
    first[1, 2:, :, 8:16, 16:24] += 1.0  # a patch of the second step
    first[1, 3:, :, 0, 0] += 0.5  # of 64 pixels and two frames one: 0.0039 in the mean
    return first.to(dtype)


@pytest.mark.parametrize("flavour", ["class token", MEAN, "attention pool", "Eva, DINOv3", "transformers, ViT"])
def test_runs_of_patches_are_computed_once(flavour: str) -> None:
    vit = clip_vit(flavour)
    model = RunLengthConfig(threshold=0.003).build(vit).eval().requires_grad_(False)
    batch = moving(vit)
    with torch.inference_mode():
        packed, masked = (model(batch, layout, detailed=True) for layout in (Packed, Masked))
        alone = model(batch[1:], detailed=True)
    assert packed.usage.patch_depth[0, 1:].eq(0).all()
    assert packed.usage.patch_depth[1, 1:].nonzero().tolist() == [[0, 0, 0], [0, 1, 2]]
    assert packed.usage.patch_depth[:, 0].eq(model.depth).all()
    torch.testing.assert_close(packed.logits, masked.logits, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(alone.logits, packed.logits[1:], atol=1e-12, rtol=1e-10)
    assert packed.usage == masked.usage
    assert alone.usage == packed.usage.of_images(torch.tensor([1]))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        usage = model(batch[1:], detailed=True).usage
    assert 2 * macs(usage, model.shape).item() == counter.get_total_flops()
    with torch.inference_mode():
        wanted = scores(vit(batch))[0]
        torch.testing.assert_close(
            RunLengthConfig(threshold=0).build(vit).eval()(batch), wanted, atol=1e-12, rtol=1e-10
        )


@pytest.mark.parametrize("flavour", ["class token", MEAN, "attention pool"])
def test_what_repeats_but_for_its_position_in_time_is_not_lost(flavour: str) -> None:
    vit = inflate(small_vit(flavour, torch.float64).eval(), frames=8)  # positions in time are zeros yet
    batch = clips(vit, count=2)[:, :2].repeat(1, 4, 1, 1, 1)
    batch[1, 4:, :, 8:16, 16:24] += 1.0
    model, unweighted = (
        RunLengthConfig(threshold=1e-6, proportional_attention=how).build(vit).eval() for how in (True, False)
    )
    with torch.inference_mode():
        wanted, output = vit(batch), model(batch, detailed=True)
        assert output.usage.attended[:, 0].tolist() == [model.prefix + 16, model.prefix + 17]
        torch.testing.assert_close(output.logits, wanted, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(
            model.features(batch), FullConfig().build(vit).features(batch), atol=1e-12, rtol=1e-9
        )
        if model.prefix:
            assert (unweighted(batch) - wanted).abs().max() > 1e-4


@pytest.mark.parametrize("flavour", ["class token", MEAN, "Eva, DINOv3"])
def test_what_is_left_of_runs_is_merged(flavour: str) -> None:
    vit = clip_vit(flavour)
    whole = clips(vit, count=3)
    whole[1, 2:, :, :, 8:] = whole[1, :2, :, :, 8:]  # patches of three columns of four repeat
    whole[2, 2:] = whole[2, :2]
    model = RunLengthMergeConfig(threshold=0.003, r=2).build(vit).eval()
    with torch.inference_mode():
        packed, masked, slab = (model(whole, layout, detailed=True) for layout in (Packed, Masked, Slab))
        alone = model(whole[1:2], detailed=True)
    assert packed.usage.attended[:, 0].tolist() == [model.prefix + count for count in (32, 20, 16)]
    assert packed.usage.attended[:, 1].tolist() == [model.prefix + count for count in (30, 18, 14)]
    for other in (masked, slab):
        torch.testing.assert_close(packed.logits, other.logits, atol=1e-12, rtol=1e-10)
        assert packed.usage == other.usage
    torch.testing.assert_close(alone.logits, packed.logits[1:2], atol=1e-12, rtol=1e-10)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        usage = model(whole[1:2], detailed=True).usage
    assert 2 * macs(usage, model.shape).item() == counter.get_total_flops()
    with torch.inference_mode():
        runs, none = RunLengthConfig(threshold=0.003), RunLengthMergeConfig(threshold=0.003, r=0, power=1.0)
        wanted, given = (one.build(vit).eval()(whole) for one in (runs, none))
        torch.testing.assert_close(given, wanted, atol=1e-12, rtol=1e-10)


def test_lengths_of_runs_are_told_once_they_are_learned(tmp_path: Path) -> None:
    vit = clip_vit("class token")
    batch = moving(vit)
    plain, told = (RunLengthConfig(threshold=0.003, lengths=how).build(vit).eval() for how in (False, True))
    with torch.no_grad():
        assert torch.equal(told(batch), plain(batch))
        nn.init.normal_(told.length_embed[1])  # of runs of two steps
        whole = (told(batch) - plain(batch)).abs().amax(dim=1)
        still = plain(batch[:, [0, 1, 0, 1]] * torch.tensor([1.0, 1, 2, 2]).view(4, 1, 1, 1))
        assert torch.equal(still, told(batch[:, [0, 1, 0, 1]] * torch.tensor([1.0, 1, 2, 2]).view(4, 1, 1, 1)))
    assert whole.min() > 1e-3
    told.train()(batch).square().sum().backward()
    assert told.length_embed.grad[0].abs().max() > 0
    adaptvit.save(told, tmp_path / "told.safetensors")
    again = adaptvit.load(tmp_path / "told.safetensors")
    assert torch.equal(again.length_embed, told.length_embed)
    vit.zero_grad()


def test_the_threshold_meets_a_budget_and_still_clips_get_less() -> None:
    vit = inflate(small_vit(), frames=8)
    strength = torch.tensor([0.0, 0.1, 0.3, 1.0]).view(4, 1, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(4, 1, 3, 32, 32, generator=generator) + strength * torch.randn(
        4, 8, 3, 32, 32, generator=generator
    )
    model = adaptvit.adapt(vit, batch, 0.6, RunLengthConfig())
    with torch.inference_mode():
        share = model(batch, detailed=True).usage.share
    assert share.mean().item() == pytest.approx(0.6, abs=0.15)  # patches of one clip go nearly together
    assert (share.diff() >= 0).all()
    assert share[0] < share[-1]


def test_run_lengths_need_clips() -> None:
    with pytest.raises(TypeError, match=r"run-length tokens needs steps in time, but test_vit takes images"):
        RunLengthConfig().build(small_vit())
    with pytest.raises(ValueError, match=r"RunLengthConfig\.threshold"):
        RunLengthConfig(threshold=-1)


SETTINGS = {
    "input_size": (3, 32, 32),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def frame(at: int, side: int = 32) -> Image.Image:
    """Grey that tells its place in the clip."""
    return Image.new("RGB", (side, side), (10 * at,) * 3)


def grey(item: Any) -> list[int]:
    """The places of frames that `frame` made, of a prepared clip."""
    return ((item[0].mean(dim=(1, 2, 3)) * 0.5 + 0.5) * 255 / 10).round().int().tolist()


def write_strip(path: Path, count: int = 16, height: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (32, height or 32 * count))
    for at in range(count):
        image.paste(frame(at), (0, 32 * at))
    image.save(path)


def write_frames(folder: Path, sides: list[int]) -> None:
    folder.mkdir(parents=True)
    for at, side in enumerate(sides):
        frame(at, side).save(folder / f"{at}.png")


def write_video(path: Path, count: int, codec: str) -> None:
    av = pytest.importorskip("av", reason="videos are read by PyAV, the extra video")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for at in range(count):
            container.mux(stream.encode(av.VideoFrame.from_image(frame(at)).reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())


def test_strips_in_folders_of_classes_are_read_and_bad_ones_are_named(tmp_path: Path) -> None:
    write_strip(tmp_path / "val" / "a" / "2.png")
    write_strip(tmp_path / "val" / "b" / "10.png")
    write_strip(tmp_path / "val" / "b" / "3.png", height=500)
    write_strip(tmp_path / "val" / "b" / "4.png")
    whole = (tmp_path / "val" / "b" / "4.png").read_bytes()
    (tmp_path / "val" / "b" / "4.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "val" / "b" / "5.png").write_bytes(b"")
    (tmp_path / "val" / "b" / "notes.txt").write_text("none")
    data = Clips(tmp_path, SETTINGS, frames=4, split="val", strip=16)
    batch = collate([data[index] for index in range(len(data))])
    assert data.classes == ("a", "b")
    assert batch.images.shape == (2, 4, 3, 32, 32)
    assert batch.labels.tolist() == [0, 1]
    assert grey(data[0]) == [2, 6, 10, 14]
    said = {Path(one.name).name: one.reason for one in batch.unreadable}
    assert said.keys() == {"3.png", "4.png", "5.png"}
    assert said["3.png"] == "its height of 500 pixels is no whole number of pixels for each of 16 frames"
    assert "truncated" in said["4.png"]
    assert [str(one) for one in data.left_out] == ["1 without the suffix of an image: 'b/notes.txt'"]
    few = Clips(tmp_path, SETTINGS, frames=32, split="val", strip=16)[0]
    assert str(few) == "cannot read a/2.png: it has 16 frames, but 32 are asked for"


def test_folders_of_frames_are_read_and_bad_ones_are_named(tmp_path: Path) -> None:
    write_frames(tmp_path / "clips" / "good", [32] * 11)
    write_frames(tmp_path / "clips" / "uneven", [32, 32, 16, 32])
    write_frames(tmp_path / "clips" / "short", [32] * 3)
    (tmp_path / "clips" / "empty").mkdir()
    write_frames(tmp_path / "clips" / "damaged", [32] * 4)
    (tmp_path / "clips" / "damaged" / "2.png").write_bytes(b"none")
    data = Clips(tmp_path / "clips", SETTINGS, frames=4)
    items = {data.name(index): data[index] for index in range(len(data))}
    assert data.classes == ()
    assert grey(items["good"]) == [1, 4, 6, 9]
    assert items["good"][1] == -1
    assert str(items["short"]) == "cannot read short: it has 3 frames, but 4 are asked for"
    assert str(items["empty"]) == "cannot read empty: it has no frames, but 4 are asked for"
    assert items["uneven"].reason == "its frames are of different sizes: 0.png has 32 x 32 pixels, 2.png has 16 x 16"
    assert items["damaged"].reason.startswith("its frame 2.png: not an image")
    with pytest.raises(ValueError, match=r"has no clips: neither a video \(\.avi"):
        Clips(tmp_path / "clips" / "empty", SETTINGS, frames=4)


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "mpeg4"), ("avi", "mpeg4"), ("gif", "gif")])
def test_videos_are_read_and_bad_ones_are_named(suffix: str, codec: str, tmp_path: Path) -> None:
    write_video(tmp_path / "one" / f"good.{suffix}", 12, codec)
    write_video(tmp_path / "one" / f"short.{suffix}", 2, codec)
    whole = (tmp_path / "one" / f"good.{suffix}").read_bytes()
    (tmp_path / "one" / f"truncated.{suffix}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "one" / f"zero.{suffix}").write_bytes(b"")
    data = Clips(tmp_path, SETTINGS, frames=6)
    items = {Path(data.name(index)).stem: data[index] for index in range(len(data))}
    assert data.classes == ("one",)
    tolerance = 3 if suffix == "gif" else 1  # of whose colours there are few
    assert all(abs(found - at) <= tolerance for found, at in zip(grey(items["good"]), range(1, 12, 2), strict=True))
    assert items["short"].reason == "it has 2 frames, but 6 are asked for"
    assert isinstance(items["zero"], Unreadable)
    if suffix != "gif":  # which does not say how many frames it has
        assert isinstance(items["truncated"], Unreadable)


def test_strips_of_real_clips_are_read_from_a_tar() -> None:
    folder = Path(os.environ.get("ADAPTVIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "pocus-clips16.tar").is_file():
        pytest.skip(f"no pocus-clips16.tar in {folder}: set ADAPTVIT_DATA")
    data = Clips(folder / "pocus-clips16.tar", SETTINGS, frames=16, split="val", strip=16)
    assert (len(data), data.classes) == (28, ("covid", "pneumonia", "regular"))
    clip, label = data[0]
    assert (clip.shape, label) == ((16, 3, 32, 32), 0)
    assert clip.std() > 0.1
    assert (clip.diff(dim=0).abs().mean(dim=(1, 2, 3)) > 0).all()


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for label in ("a", "b"):
        write_strip(tmp_path / "clips" / "val" / label / "1.png")
    (tmp_path / "clips" / "val" / "b" / "2.png").write_bytes(b"none")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    page = (Path(__file__).parents[1] / "docs" / "video.md").read_text()
    told: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, told)
    said = capsys.readouterr().out
    assert "Usage(2 images, 4 blocks, 4 x 4 x 4 patches)" in said
    assert "tensor([17, 65])" in said
    assert len(told["batch"].unreadable) == 1
    assert (tmp_path / "strip.png").stat().st_size > 1000


def test_a_strip_of_a_clip_has_a_frame_for_each_step() -> None:
    figure = clip_strip(torch.rand(6, 3, 32, 32), torch.tensor([4, 0, 1]).view(3, 1, 1).expand(3, 4, 4), 4)
    told = [axes.get_xlabel() for axes in figure.axes if axes.images]
    assert told[:6] == ["frame 1", "frame 3", "frame 5", "100% of patches", "0% of patches", "100% of patches"]
    with pytest.raises(ValueError, match="5 frames are no whole number of frames for each of 3 steps"):
        clip_strip(torch.rand(5, 3, 32, 32), torch.ones(3, 4, 4), 4)
