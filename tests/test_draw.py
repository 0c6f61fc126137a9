import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import METHODS, small_vit, vary
from PIL import Image
from scipy.stats import spearmanr
from timm.data import create_transform, resolve_model_data_config

import adaptvit
from adaptvit.cli import main
from adaptvit.commands import draw as module
from adaptvit.commands.draw import DrawConfig, draw, shortened, spearman
from adaptvit.data import read_image
from adaptvit.methods.avit import AViT
from adaptvit.model import Left
from adaptvit.tokens import Tokens
from adaptvit.usage import Output, Usage


def noise(path: Path, seed: int, contrast: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = 128 + contrast * (np.random.default_rng(seed).integers(0, 256, (40, 40, 3)) - 128)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "avit.safetensors"
    adaptvit.save(METHODS["avit"].build(small_vit().eval()), path)
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `depth_maps` is called with; nothing is rendered."""
    calls: list[dict[str, Any]] = []
    names = ("images", "depth", "blocks", "columns", "captions", "combined", "panel", "groups")

    def record(*values: Any) -> None:
        calls.append(dict(zip(names, values, strict=True)))

    monkeypatch.setattr(module, "depth_maps", record)
    monkeypatch.setattr(module, "write_png", lambda figure, path: path.write_bytes(b"drawn"))
    return calls


def test_a_folder_gives_a_picture_for_each_image_and_a_grid(tmp_path: Path) -> None:
    adaptvit.save(METHODS["avit"].build(small_vit("rectangular").eval()), tmp_path / "model.safetensors")
    for number in (2, 10):
        noise(tmp_path / "own" / f"a{number}.png", number)
    drawing = draw(DrawConfig(str(tmp_path / "model.safetensors"), tmp_path / "own", tmp_path / "new" / "out"))
    assert [file.name for file in drawing.files] == ["grid.png", "a2.png.png", "a10.png.png"]
    assert sorted((tmp_path / "new" / "out").iterdir()) == sorted(drawing.files)
    assert (drawing.unreadable, drawing.beyond_limit) == ((), 0)
    for file in drawing.files:
        assert np.asarray(read_image(file)).std() > 10


@pytest.mark.parametrize("summary", [False, True], ids=["all", "summary"])
def test_merged_patches_are_shown_as_regions(summary: bool, drawn: list[dict[str, Any]], tmp_path: Path) -> None:
    adaptvit.save(METHODS["tome"].build(small_vit().eval()), tmp_path / "model.safetensors")
    noise(tmp_path / "own" / "a.png", 1)
    noise(tmp_path / "own" / "b.png", 2)
    draw(DrawConfig(str(tmp_path / "model.safetensors"), tmp_path / "own", tmp_path / "out", summary=summary))
    assert [len(one.unique()) for one in drawn[0]["groups"]] == [16 - 9] * 2
    assert all("\n7 tokens of 16 patches, " in caption for caption in drawn[0]["captions"])


def test_figures_are_told_as_json(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    noise(tmp_path / "own" / "a.png", 1)
    (tmp_path / "own" / "b.png").write_text("no picture")
    words = ["draw", str(model), str(tmp_path / "own"), "--output", str(tmp_path / "out"), "--json"]
    assert main(words) == 1
    told = json.loads(capsys.readouterr().out)
    assert [Path(file).name for file in told["files"]] == ["grid.png", "a.png.png"]
    (image,) = told["images"]
    assert image["name"] == "a.png"
    assert 0 < image["depth"] <= 4
    assert [one["name"] for one in told["unreadable"]] == ["b.png"]


def test_images_are_shown_as_the_model_saw_them(model: Path, drawn: list[dict[str, Any]], tmp_path: Path) -> None:
    pixels = np.zeros((64, 32, 3), np.uint8)
    pixels[16:32] = (255, 0, 0)  # the upper half of the middle that is cropped out
    pixels[32:48] = (0, 0, 255)
    (tmp_path / "own").mkdir()
    Image.fromarray(pixels).save(tmp_path / "own" / "a.png")
    draw(DrawConfig(str(model), tmp_path / "own", tmp_path / "out"))
    image = drawn[0]["images"][0]
    assert image.shape == (3, 32, 32)
    torch.testing.assert_close(image[:, 8, 16], torch.tensor([1.0, 0.0, 0.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(image[:, 24, 16], torch.tensor([0.0, 0.0, 1.0]), atol=0.02, rtol=0)


def test_depth_is_of_the_full_run_and_cost_of_the_usual_one(
    model: Path, drawn: list[dict[str, Any]], tmp_path: Path
) -> None:
    for number in range(5):
        noise(tmp_path / "own" / f"{number}.png", number)
    seen = []
    looked = module._look
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_look", lambda *values: (seen.append(one) or one for one in looked(*values)))
        draw(DrawConfig(str(model), tmp_path / "own", tmp_path / "out", batch_size=2))
    images, loaded = torch.stack([one.image for one in seen]), adaptvit.load(model).eval()
    with torch.inference_mode():
        full, usual = loaded(images, early_exit=False, detailed=True).usage, loaded(images, detailed=True).usage
    assert not torch.equal(full.patch_depth, usual.patch_depth)
    assert torch.equal(drawn[0]["depth"], full.patch_depth)
    for caption, depth, cost in zip(
        drawn[0]["captions"], full.patch_depth, adaptvit.macs(usual, loaded.shape) / 1e9, strict=True
    ):
        assert f"depth {depth.double().mean():.1f} ± " in caption
        assert caption.endswith(f"{cost:#.3g} GMACs")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_full_run(name: str) -> None:
    model = METHODS[name].build(small_vit()).eval()
    depth = model.to_the_end(torch.randn(2, 3, 32, 32)).usage.patch_depth
    assert depth.shape == (2, 4, 4)


def test_the_most_varied_image_of_each_class_is_drawn(
    model: Path, drawn: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # depths of the upper and the lower half of the patches: deviations 0, 1, 1.5; and 0, 0.5
    depths = {"ant": [(2, 2), (1, 3), (1, 4)], "bee": [(4, 4), (3, 4)]}
    order = [pair for pairs in depths.values() for pair in pairs]
    for kind, pairs in depths.items():
        for number in range(len(pairs)):
            noise(tmp_path / "own" / "val" / kind / f"{number}.png", number)
    noise(tmp_path / "own" / "train" / "cat" / "0.png", 0)

    def output(_: object, images: torch.Tensor) -> Output:
        halves = torch.tensor([order.pop(0) for _ in images]).repeat_interleave(8, dim=1)  # (B, 16)
        tokens = torch.cat([torch.tensor([[1], [4]])[: len(images)], halves], dim=1)  # class tokens, not to be counted
        return Output(torch.zeros(len(images), 3), Usage.of_depth(tokens, heads=[4] * 4, grid=(4, 4), prefix=1))

    monkeypatch.setattr(AViT, "to_the_end", output)
    drawing = draw(DrawConfig(str(model), tmp_path / "own", tmp_path / "out", per_class=True, batch_size=2))
    assert [file.name for file in drawing.files] == ["grid.png", "class-ant.png", "class-bee.png"]
    assert [caption.splitlines()[0] for caption in drawn[0]["captions"]] == ["ant: 2.png", "bee: 1.png"]
    assert "depth 2.5 ± 1.5 of 4, " in drawn[0]["captions"][0]


def test_only_so_many_classes_are_looked_at(model: Path, drawn: list[dict[str, Any]], tmp_path: Path) -> None:
    for kind in "abc":
        noise(tmp_path / "own" / kind / "0.png", 0)
    (tmp_path / "own" / "c" / "0.png").write_text("not looked at")
    drawing = draw(DrawConfig(str(model), tmp_path / "own", tmp_path / "out", per_class=True, limit=2))
    assert [file.name for file in drawing.files] == ["grid.png", "class-a.png", "class-b.png"]
    assert (drawing.unreadable, drawing.beyond_limit) == ((), 1)


def test_a_long_grid_has_pages(model: Path, drawn: list[dict[str, Any]], tmp_path: Path) -> None:
    for number in range(28):
        noise(tmp_path / "own" / f"{number}.png", number)
    drawing = draw(DrawConfig(str(model), tmp_path / "own", tmp_path / "out", limit=26))
    assert [file.name for file in drawing.files[:3]] == ["grid-1.png", "grid-2.png", "0.png.png"]
    assert [len(call["images"]) for call in drawn] == [24, 2, *[1] * 26]
    assert drawing.beyond_limit == 2


@pytest.mark.parametrize("per_class", [False, True])
def test_unreadable_files_are_named_and_left_out(
    per_class: bool, model: Path, drawn: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "own" / "kind"
    for number in (1, 3):
        noise(folder / f"{number}.png", number)
    (folder / "0.jpg").write_text("not an image")
    (folder / "2.png").write_bytes((folder / "1.png").read_bytes()[:500])
    (folder / "notes.txt").write_text("no picture")
    drawing = draw(DrawConfig(str(model), folder.parent if per_class else folder, tmp_path / "out", per_class))
    assert [Path(one.name).name for one in drawing.unreadable] == ["0.jpg", "2.png"]
    assert all(one.reason for one in drawing.unreadable)
    assert len(drawn[0]["images"]) == (1 if per_class else 2)


def test_a_stopped_run_leaves_whole_files(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        noise(tmp_path / "own" / f"{number}.png", number)
    written, write = [], module.write_png

    def stopped(figure: Any, path: Path) -> None:
        if written:
            monkeypatch.setattr(figure, "savefig", lambda partial, **_: (partial.write_bytes(b"half"), 1 / 0))
        written.append(path)
        try:
            write(figure, path)
        except ZeroDivisionError:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(module, "write_png", stopped)
    with pytest.raises(KeyboardInterrupt, match=r"drawn so far is in .*out"):
        draw(DrawConfig(str(model), tmp_path / "own", tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["grid.png"]


SUMMARY = ["usage.png", "gmacs.png", "cheapest.png", "dearest.png", "easiest.png", "hardest.png"]


def names(call: dict[str, Any]) -> list[str]:
    return [caption.splitlines()[0] for caption in call["captions"]]


@pytest.mark.parametrize("name", ["full", "avit", "ats", "adavit"])
def test_a_summary_shows_the_extremes(name: str, drawn: list[dict[str, Any]], tmp_path: Path) -> None:
    model = vary(METHODS[name].build(small_vit()).eval())
    adaptvit.save(model, tmp_path / "model.safetensors")
    for number in range(11):
        noise(tmp_path / "own" / f"{number}.png", number, contrast=1 - number / 12)
    drawing = draw(DrawConfig(str(tmp_path / "model.safetensors"), tmp_path / "own", tmp_path / "out", summary=True))
    assert [file.name for file in drawing.files] == SUMMARY
    assert (drawing.unreadable, drawing.beyond_limit) == ((), 0)

    images = looked_at(model, [tmp_path / "own" / f"{number}.png" for number in range(11)])
    with torch.inference_mode():
        output = model(images, detailed=True)
        depth = model.to_the_end(images).usage.patch_depth
    gmacs = (adaptvit.macs(output.usage, model.shape) / 1e9).tolist()
    sure = output.logits.softmax(dim=1).amax(dim=1).tolist()
    orders = [sorted(range(11), key=key.__getitem__, reverse=up)[:8] for key, up in [(gmacs, False), (gmacs, True)]]
    orders += [sorted(range(11), key=sure.__getitem__, reverse=up)[:8] for up in (True, False)]
    for call, order in zip(drawn, orders, strict=True):
        assert names(call) == [f"{number}.png" for number in order]
        assert torch.equal(call["depth"], depth[order])
        for caption, number in zip(call["captions"], order, strict=True):
            assert f" {gmacs[number]:#.3g} GMACs, " in caption
            assert caption.endswith(f", class {output.logits[number].argmax()} at {sure[number]:.1%}")
    if name == "full":
        assert drawing.finding.endswith("the same for all 11 images")
    else:
        rank = spearmanr(gmacs, [-value for value in sure]).statistic
        assert drawing.finding.endswith(f"class that the model names: Spearman {rank:.2f} over 11 images")


def test_a_summary_runs_images_again_only_where_they_leave_early(
    drawn: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = {name.split(",")[0] for name, config in METHODS.items() if config.build(small_vit()).leaves_early}
    assert early == {"avit"}
    chance = replace(METHODS["adavit"], random=True).build(small_vit()).eval()
    adaptvit.save(chance, tmp_path / "model.safetensors")
    for number in range(3):
        noise(tmp_path / "own" / f"{number}.png", number)
    records, measure = [], module._measure

    def measured(*given: Any) -> Any:
        records.append(measure(*given))
        return records[-1]

    monkeypatch.setattr(module, "_measure", measured)
    draw(DrawConfig(str(tmp_path / "model.safetensors"), tmp_path / "own", tmp_path / "out", summary=True))
    (record,) = records
    for call in drawn:  # the decisions that were counted, not others
        order = [int(Path(name).stem) for name in names(call)]
        assert torch.equal(call["depth"], record.usage.patch_depth[order])


def looked_at(model: adaptvit.AdaptiveViT, files: list[Path]) -> torch.Tensor:
    transform = create_transform(**resolve_model_data_config(model))
    return torch.stack([transform(Image.open(file)) for file in files])


@pytest.mark.parametrize("classes", [7, 6])
def test_class_folders_tell_what_is_hard_where_they_are_the_models(
    classes: int, drawn: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = METHODS["ats"].build(small_vit().eval())
    adaptvit.save(model, tmp_path / "model.safetensors")
    files = [tmp_path / "own" / "val" / f"k{kind}" / f"{number}.png" for kind in range(classes) for number in (1, 2)]
    for number, file in enumerate(files):
        noise(file, number)
    noise(tmp_path / "own" / "train" / "k0" / "0.png", 0)
    drawing = draw(DrawConfig(str(tmp_path / "model.safetensors"), tmp_path / "own", tmp_path / "out", summary=True))
    with torch.inference_mode():
        probabilities = model(looked_at(model, files)).softmax(dim=1)
    given = [own[place // 2 if classes == 7 else own.argmax()].item() for place, own in enumerate(probabilities)]
    for call, up in zip(drawn[2:], (True, False), strict=True):
        order = sorted(range(len(files)), key=given.__getitem__, reverse=up)[:8]
        assert names(call) == [f"{files[place].parent.name}/{files[place].name}" for place in order]
        for caption, place in zip(call["captions"], order, strict=True):
            which = "right class" if classes == 7 else f"class {probabilities[place].argmax()}"
            assert caption.endswith(f", {which} at {given[place]:.1%}")
    assert ("the cross-entropy of the right class" in drawing.finding) == (classes == 7)


def test_a_bounded_summary_spreads_over_all_images(model: Path, drawn: list[dict[str, Any]], tmp_path: Path) -> None:
    for kind in "abc":
        for number in range(4):
            noise(tmp_path / "own" / kind / f"{number}.png", number)
    drawing = draw(DrawConfig(str(model), tmp_path / "own", tmp_path / "out", summary=True, limit=3, batch_size=2))
    for call in drawn:
        assert sorted(names(call)) == ["a/0.png", "b/0.png", "c/0.png"]
    assert drawing.beyond_limit == 9


def test_the_command_names_what_a_summary_left_out(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2, 3, 5):
        noise(tmp_path / "own" / f"{number}.png", number)
    (tmp_path / "own" / "4.png").write_text("not an image")
    (tmp_path / "own" / "kind").mkdir()
    noise(tmp_path / "own" / "kind" / "6.png", 6)
    command = ["draw", str(model), str(tmp_path / "own"), "--summary", "true", "--output", str(tmp_path / "out")]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "over 4 images\n" in said.out
    assert "4.png" in said.err
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(SUMMARY)
    for file in (tmp_path / "out").iterdir():
        assert np.asarray(read_image(file)).std() > 10


def test_rank_correlation_is_that_of_scipy() -> None:
    for ties in (3, 1000):
        one, other = torch.randint(ties, (2, 40), generator=torch.Generator().manual_seed(ties))
        assert spearman(one, one + other) == pytest.approx(spearmanr(one, one + other).statistic)
    assert spearman(torch.arange(5), -torch.arange(5)) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("there", "settings", "error", "said"),
    [
        ([], {}, ValueError, "has no pictures: no file ends in .avif"),
        ([".a.png"], {}, ValueError, "has no pictures: 1 hidden: '.a.png'"),
        (["kind/a.png"], {}, ValueError, "--per-class$"),
        (["a.png"], {"folder": "nowhere"}, FileNotFoundError, "nowhere.* does not exist"),
        (["a.png"], {"per_class": True}, ValueError, "has images, but no folders of classes: 'a.png' lies in none"),
        ([], {"per_class": True}, ValueError, "has no images"),
        (["broken.png"], {}, ValueError, "none of 1 pictures.*'broken.png': not an image"),
        (["a.png"], {"model": "no_such_model"}, ValueError, "no_such_model"),
        (["a.png"], {"limit": 0}, ValueError, "DrawConfig.limit must be 1 or more, got 0"),
        (["a.png"], {"device": "abacus"}, ValueError, "device must be .*'abacus'"),
        (["a.png"], {"output": "own"}, ValueError, "output must lie outside"),
        (["k/a.png"], {"output": "own/out", "per_class": True}, ValueError, "output must lie outside"),
        (["k/a.png"], {"output": "own/out", "summary": True}, ValueError, "output must lie outside"),
        (["k/a.png"], {"summary": True, "per_class": True}, ValueError, "choose one"),
        (["broken.png"], {"summary": True}, ValueError, "none of 1 pictures.*'broken.png': not an image"),
        ([], {"summary": True}, ValueError, "has no images"),
        (["a.png"], {"summary": True, "limit": 0}, ValueError, "DrawConfig.limit must be 1 or more, got 0"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused_and_nothing_written(
    there: list[str], settings: dict[str, Any], error: type[Exception], said: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "own").mkdir()
    for name in there:
        if name == "broken.png":
            (tmp_path / "own" / name).write_text("no")
        else:
            noise(tmp_path / "own" / name, 0)
    before = sorted(tmp_path.rglob("*"))
    arguments = {"model": str(model), "folder": "own", "output": "out"} | settings
    arguments |= {name: tmp_path / arguments[name] for name in ("folder", "output")}
    with pytest.raises(error, match=said):
        draw(DrawConfig(**arguments))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("summary", [False, True])
def test_a_method_without_depth_is_refused(summary: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(tmp_path / "own" / "a.png", 0)

    class Untracked(adaptvit.AdaptiveViT):
        def run(self, tokens: Tokens) -> Left:
            on = torch.ones(tokens.shape[0], 4, dtype=torch.long)
            return self.finish(
                self.read_slots(tokens, tokens.x), Usage(17 * on, 17 * on, 4 * on, on > 0, on > 0, (4, 4), 1)
            )

    monkeypatch.setattr(module, "open_model", lambda name: Untracked(small_vit().eval(), METHODS["full"]))
    with pytest.raises(ValueError, match="'full' does not track token slots"):
        draw(DrawConfig("other", tmp_path / "own", tmp_path / "out", summary=summary))
    assert not (tmp_path / "out").exists()


def test_long_names_are_cut_in_the_middle() -> None:
    assert shortened("cat.jpg") == "cat.jpg"
    assert shortened("a\nb\udcff.jpg") == "a?b?.jpg"
    assert shortened("0123456789", most=7) == "012…789"
