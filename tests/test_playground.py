"""The playground: what it computes, without a page, and the page in a headless Chromium where there is one."""

import asyncio
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import METHODS, small_vit
from PIL import Image
from timm.data import create_transform
from timm.models.vision_transformer import VisionTransformer

import adaptvit
from adaptvit import ATSConfig, cli
from adaptvit.budget import OutOfReach
from adaptvit.commands import sessions
from adaptvit.commands.sessions import (
    DIGITS,
    PHOTOGRAPHS,
    SEEN,
    SIDE,
    SLIMMEST,
    Playground,
    PlaygroundConfig,
    Session,
    Subject,
    open_picture,
    steer,
)
from adaptvit.methods import untrained


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A plain ViT and one of each method that is no plain ViT's."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("full", "avit", "tome"):
        adaptvit.save(METHODS[name].build(small_vit().eval()), folder / f"{name}.safetensors")
    adaptvit.save(METHODS["full"].build(small_vit("average pool").eval()), folder / "pooled.safetensors")
    return {path.stem: str(path) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def shared(files: dict[str, str]) -> Playground:
    return Playground(PlaygroundConfig(models=tuple(files.values())))


@pytest.fixture
def session(shared: Playground) -> Session:
    return Session(shared)


def noise(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("method", [name for name in untrained() if name != "random"])
def test_both_models_answer_and_cost_what_they_do_alone(method: str, session: Session, files: dict[str, str]) -> None:
    session.add(noise(), files["full"])
    view = session.view(files["full"], method, 0.6)
    assert view.budget.share == pytest.approx(0.6, abs=0.05)
    subject = session.playground.subject(files["full"])
    image = create_transform(**subject.settings)(noise())[None]
    vit, adaptive = subject.opened.vit, session.playground.model(files["full"], method)
    with torch.inference_mode():
        dense, output = vit(image).softmax(dim=1)[0], adaptive(image, detailed=True)
    for answer, expected in ((view.dense, dense), (view.adaptive, output.logits.softmax(dim=1)[0])):
        assert [name for name, _ in answer.top] == [f"class {k}" for k in expected.argsort(descending=True)[:5]]
        assert [p for _, p in answer.top] == pytest.approx(expected.sort(descending=True).values[:5].tolist(), abs=1e-5)
        assert answer.milliseconds > 0
    assert view.dense.gmacs == pytest.approx(adaptvit.dense_macs(adaptive.shape, (4, 4)) / 1e9)
    assert view.adaptive.gmacs == pytest.approx(adaptvit.macs(output.usage, adaptive.shape).item() / 1e9)


def test_a_knob_stays_until_another_budget_is_asked_for(session: Session, files: dict[str, str]) -> None:
    first = session.view(files["full"], "ats", 0.6)
    for seed in range(3):
        session.add(noise(seed=seed), files["full"])
    assert session.view(files["full"], "ats", 0.6).budget is first.budget
    session.view(files["full"], "evit", 0.6)
    lower = session.view(files["full"], "ats", 0.5)
    assert lower.budget.config.rate < first.budget.config.rate
    assert lower.seen_gmacs.tolist() == [*session.view(files["full"], "ats", 0.5).seen_gmacs.tolist()]
    assert len(lower.seen_gmacs) == 4  # the example, and three


def test_sessions_do_not_share_pictures_or_budgets(shared: Playground, files: dict[str, str]) -> None:
    one, other = Session(shared), Session(shared)
    one.add(noise(), files["full"])
    rich = one.view(files["full"], "ats", 0.8)
    poor = other.view(files["full"], "ats", 0.5)
    again = one.view(files["full"], "ats", 0.8)
    assert again.budget is rich.budget
    assert again.adaptive.gmacs == rich.adaptive.gmacs
    assert poor.budget.config.rate < rich.budget.config.rate
    assert not torch.equal(poor.pixels, rich.pixels)


def test_sessions_at_once_wait_for_one_another(shared: Playground, files: dict[str, str]) -> None:
    costs: dict[float, list[float]] = {0.5: [], 0.8: []}

    def look(share: float) -> None:
        own = Session(shared)
        for seed in range(3):
            own.add(noise(seed=seed), files["full"])
            costs[share].append(own.view(files["full"], "ats", share).adaptive.gmacs)

    threads = [threading.Thread(target=look, args=(share,)) for share in costs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = Session(shared)
    for share, found in costs.items():
        for seed in range(3):
            alone.add(noise(seed=seed), files["full"])
        alone.shown[3, None][0].setting = None
        assert len(found) == 3
        assert found[0] == alone.view(files["full"], "ats", share).seen_gmacs[-3].item()


def test_old_pictures_are_let_go(session: Session, files: dict[str, str]) -> None:
    for seed in range(SEEN + 3):
        session.add(noise(seed=seed), files["full"])
    assert len(session.view(files["full"], "ats", 0.6).seen_gmacs) == SEEN


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.01, r"A budget of 1% is out of reach: .*ats reaches \d+% to \d+%"), (1.0, "A budget of 100% is more than can")],
)
def test_a_budget_out_of_reach_is_met_as_nearly_as_can_be(
    share: float, said: str, session: Session, files: dict[str, str]
) -> None:
    budget = session.view(files["full"], "ats", share).budget
    assert re.match(said, budget.note)
    others = [session.view(files["full"], "ats", other).budget.share for other in (0.5, 0.7)]
    assert budget.share < min(others) if share < 0.5 else budget.share > max(others)


def test_a_trained_model_is_shown_with_its_own_method_first(shared: Playground, files: dict[str, str]) -> None:
    own, *others = shared.subject(files["avit"]).methods
    assert own == "avit"
    assert {"calibrated", "ats"} <= set(others) <= set(shared.subject(files["full"]).methods)
    assert shared.model(files["avit"], "avit") is shared.subject(files["avit"]).opened
    assert shared.model(files["avit"], "ats").vit is shared.subject(files["avit"]).opened.vit
    with pytest.raises(ValueError, match=r"can be shown with avit, calibrated, .*, not with 'adavit'"):
        shared.model(files["avit"], "adavit")


def test_a_model_without_the_token_that_a_method_needs_is_refused_in_a_sentence(
    session: Session, files: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=r"cannot be shown with avit: fitting a gate needs a class token"):
        session.view(files["pooled"], "avit", 0.5)
    assert session.view(files["pooled"], "ats", 0.7).adaptive.top


def test_a_method_is_fitted_at_another_budget_only_where_one_is_out_of_reach(
    shared: Playground, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, faults = [], [OutOfReach("no less"), ValueError("not finite")]

    def fitted(self: ATSConfig, vit: VisionTransformer, images: torch.Tensor, target: float) -> None:
        asked.append(target)
        raise faults[len(asked) - 1]

    monkeypatch.setattr(ATSConfig, "fitted", fitted)
    with pytest.raises(ValueError, match="not finite"):
        shared.subject(files["full"]).adapted("ats")
    assert asked == [0.5, 0.75]


def test_weights_that_cannot_be_downloaded_are_named(shared: Playground, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(sessions, "open_model", fail)
    with pytest.raises(ValueError, match="The weights of deit_tiny_patch16_224 are not here and cannot be downloaded"):
        shared.subject("deit_tiny_patch16_224")
    with pytest.raises(ValueError, match="There is no model 'abacus'"):
        shared.subject("abacus")


def test_the_bundled_digits_model_reads_its_examples(session: Session) -> None:
    subject = session.playground.subject(DIGITS)
    with torch.inference_mode():
        read = subject.opened(subject.calibration).argmax(dim=1)
    assert (read == torch.arange(10)).sum() >= 9
    view = session.view(DIGITS, "ats", 0.6)
    assert view.dense.top[0][0] == "0"
    assert view.image().shape == (448, 448, 3)


def test_what_is_seen_first_is_a_photograph_at_half_of_the_macs() -> None:
    first = Playground(PlaygroundConfig())
    assert first.names[:2] == [PHOTOGRAPHS, DIGITS]
    assert first.subject(PHOTOGRAPHS).methods[0] == "evit"
    view = Session(first).view(PHOTOGRAPHS, "evit", 0.5)
    assert view.dense.top[0][0] == view.adaptive.top[0][0] == "church"  # of a temple
    assert view.adaptive.gmacs / view.dense.gmacs == pytest.approx(0.5, abs=0.03)
    assert sum(file.stat().st_size for file in sessions.BUNDLED.values()) < 9_000_000


def test_a_block_shows_what_is_left(session: Session, files: dict[str, str]) -> None:
    session.add(noise(32, 32), files["full"])
    view = session.view(files["full"], "ats", 0.5)
    assert view.usage.live is not None
    whole, _ = view.block(1)
    np.testing.assert_array_equal(whole, view.image())
    left, said = view.block(view.blocks)
    live = view.usage.live[0, -1, 1:]
    assert said == f"Block 4 of 4 works on {int(live.sum())} of 16 patches."
    same = (left == view.image()).all(axis=2).reshape(4, 112, 4, 112).all(axis=(1, 3))
    np.testing.assert_array_equal(same, live.unflatten(0, (4, 4)).numpy())
    with pytest.raises(ValueError, match=r"block must lie in 1..4, got 5"):
        view.block(5)


def test_a_fused_token_is_tinted_and_said(session: Session, files: dict[str, str]) -> None:
    view = session.view(files["full"], "evit", 0.6)
    assert view.usage.live is not None
    assert view.usage.fused is not None
    picture, said = view.block(4)
    count = int(view.usage.live[0, 3, 1:].sum())
    assert said.startswith(f"Block 4 of 4 works on {count - 1} of 16 patches, and on one token, tinted")
    place = int(view.usage.fused[0, 3, 1:].nonzero()[0])
    tile = picture.reshape(4, 112, 4, 112, 3)[place // 4, :, place % 4].mean(axis=(0, 1))
    assert tile[0] > tile[2] + 50  # orange


def test_merged_patches_have_one_colour_each(session: Session, files: dict[str, str]) -> None:
    view = session.view(files["tome"], "tome", 0.5)
    assert view.usage.groups is not None
    picture, said = view.block(4)
    groups = view.usage.groups[0, 2]
    assert said == f"Block 4 of 4 works on {len(groups.unique())} tokens, which hold all 16 patches."
    middles = picture.reshape(4, 112, 4, 112, 3)[:, 56, :, 56].reshape(16, 3)  # away from the outlines
    for group in groups.unique():
        assert len(np.unique(middles[groups == group], axis=0)) == 1
    assert view.largest == groups.unique(return_counts=True)[1].max()
    assert view.shading().shape == view.image().shape


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK", "RGB"])
@pytest.mark.parametrize("scale", [1, 20])
def test_pictures_of_every_kind_become_small_colour(mode: str, scale: int, tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 60 * scale).astype(np.uint8)[None].repeat(40 * scale, axis=0)
    image = Image.fromarray(ramp)
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    picture = open_picture(path)
    assert picture.image.mode == "RGB"
    assert max(picture.image.size) == min(SIDE, 60 * scale)
    grey = np.asarray(picture.image.convert("L"), dtype=float).mean(axis=0)
    assert grey[:5].mean() < 30
    assert grey[-5:].mean() > 225
    assert ("scaled down" in picture.note) == (scale > 1)
    assert (picture.note == "") == (mode == "RGB" and scale == 1)
    said = {"P": "a palette turned", "1": "black and white turned", "I;16": "16-bit grey turned"}
    assert said.get(mode, "") in picture.note


def test_a_huge_jpeg_is_decoded_small(tmp_path: Path) -> None:
    Image.new("L", (8000, 6000)).save(tmp_path / "huge.jpg")
    picture = open_picture(tmp_path / "huge.jpg")
    assert picture.image.size == (640, 480)
    assert picture.note.startswith("This picture was 8000 x 6000 pixels scaled down to 640 x 480")


@pytest.mark.parametrize("side", [7000, 20000])
def test_a_huge_png_is_refused_before_it_is_decoded(side: int, tmp_path: Path) -> None:
    header = b"IHDR" + struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\1IDAT")
    with pytest.raises(ValueError, match=r"This picture cannot be used: .*(7000 x 7000|400000000) pixels"):
        open_picture(tmp_path / "huge.png")


def test_a_turned_photograph_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for size in ((100, 50), (1000, 500)):
        Image.new("RGB", size).save(tmp_path / "turned.jpg", exif=exif)
        assert open_picture(tmp_path / "turned.jpg").image.size == (
            size[1] * 640 // max(640, size[0]),
            min(640, size[0]),
        )


def test_a_slim_picture_is_cut_to_its_middle(tmp_path: Path) -> None:
    noise(600, 2).save(tmp_path / "slim.png")
    picture = open_picture(tmp_path / "slim.png")
    assert picture.image.size == (2 * SLIMMEST, 2)
    assert "cut to its middle" in picture.note


@pytest.mark.parametrize(("content", "said"), [(b"not an image", "not an image"), (None, "truncated"), (b"", "not an")])
def test_what_is_no_picture_is_refused_in_a_sentence(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    if content is None:
        noise().save(path)
        content = path.read_bytes()[:400]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"This picture cannot be used: .*{said}"):
        open_picture(path)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"port": 0}, ValueError, "port must lie in 1..65535, got 0"),
        ({"class_names": Path("nowhere.txt"), "models": ("a",)}, FileNotFoundError, "'nowhere.txt', which is not"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        PlaygroundConfig(**settings)


def test_classes_have_the_names_of_the_file(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join("abcdefg"))
    config = PlaygroundConfig(models=(files["full"],), class_names=tmp_path / "names.txt")
    assert list(Playground(config).subject(files["full"]).classes) == list("abcdefg")
    with pytest.raises(ValueError, match="class_names is for models of your own"):
        PlaygroundConfig(class_names=tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"full.safetensors: there are names of 2 classes, but the model has 7"):
        Playground(config)


def test_models_of_other_channels_and_without_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="takes images of 4 channels"):
        Subject.of(METHODS["full"].build(small_vit(in_chans=4)))
    with pytest.raises(ValueError, match="has no classes"):
        Subject.of(METHODS["full"].build(small_vit(num_classes=0)))


def test_imagenet_classes_have_their_names() -> None:
    subject = Subject.of(METHODS["full"].build(small_vit(num_classes=1000).eval()))
    assert subject.classes[1].startswith("goldfish")


def test_steering_leaves_the_knob_where_it_says(files: dict[str, str]) -> None:
    model = adaptvit.load(files["avit"]).eval()
    batch = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    budget = steer(model, batch, 0.6)
    assert model.config == budget.config
    assert budget.share == adaptvit.budget.attempt(model, batch).share == pytest.approx(0.6, abs=0.05)
    assert budget.note == ""


def test_without_gradio_the_command_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "adaptvit.commands.page", raising=False)
    assert cli.main(["playground"]) == 2
    assert capsys.readouterr().err == "adaptvit: the playground needs gradio: pip install 'adaptvit[playground]'\n"


def answered(headers: list[tuple[str, str]], method: str = "GET", path: str = "/config", kind: str = "http") -> bool:
    """Whether a request gets past the page's guard; what does not gets 403 and no CORS header."""
    page = pytest.importorskip("adaptvit.commands.page", reason="gradio is not installed")
    reached, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "method": method, "path": path, "headers": [(k.encode(), v.encode()) for k, v in headers]}
    asyncio.run(page.OwnHost(app, 7860, page.Stored(Path("nowhere")))(scope, receive, send))
    assert bool(reached) != bool(sent)
    if sent and kind == "http":
        assert sent[0]["status"] == 403
        assert not [name for name, _ in sent[0]["headers"] if name.startswith(b"access-control")]
    elif sent:
        assert sent[0]["type"] == "websocket.close"
    return bool(reached)


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/file=a"])
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_the_page_answers_to_its_own_names_only(path: str, kind: str) -> None:
    for host in ("127.0.0.1:7860", "localhost:7860", "LOCALHOST:7860"):
        assert answered([("host", host)], path=path, kind=kind)
        assert answered([("host", host), ("origin", f"http://{host}")], "POST", path, kind)
    for host in ("evil.example", "evil.example:7860", "127.0.0.1", "127.0.0.1:1", "127.0.0.1:7860.evil.example", ""):
        assert not answered([("host", host)], path=path, kind=kind)
    assert not answered([], path=path, kind=kind)
    assert not answered([("host", "127.0.0.1:7860"), ("host", "evil.example")], path=path, kind=kind)


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_the_page_answers_to_its_own_origin_only(method: str) -> None:
    host = ("host", "127.0.0.1:7860")
    for origin in ("http://evil.example", "null", "https://127.0.0.1:7860", "http://127.0.0.1:8000", "http://[", ""):
        assert not answered([host, ("origin", origin)], method)
    for site in ("cross-site", "same-site"):
        assert not answered([host, ("sec-fetch-site", site)], method)
    for site in ("same-origin", "none"):
        assert answered([host, ("sec-fetch-site", site)], method)
    assert answered([host, ("sec-fetch-site", "cross-site")], path="/")  # a link from elsewhere


def test_what_gradio_fails_on_is_refused_in_a_sentence(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradio.routes import App
    from starlette.testclient import TestClient

    from adaptvit.commands import page

    async def serve() -> Any:  # in a loop, or gradio leaves one of its own open
        return App.create_app(built.queue(api_open=False))

    monkeypatch.setattr(built, "is_running", True)
    guard = page.OwnHost(asyncio.run(serve()), 7860, page.Stored(Path("nowhere")))
    client = TestClient(guard, base_url="http://127.0.0.1:7860")
    value = {"data": [], "session_hash": "own", "event_data": None, "trigger_id": None}
    for path, number in (("queue/join", 999), ("queue/join", -1), ("run/look", 999), ("run/predict", 10**30)):
        answer = client.post(f"/gradio_api/{path}", json={**value, "fn_index": number})
        assert (answer.status_code, answer.text) == (
            400,
            "This request is none that the playground's page sends.\n",
        )
    assert client.post("/gradio_api/call/nothing", json=value).status_code == 400
    assert client.post("/gradio_api/queue/join", content=b"{").status_code == 422
    assert client.get("/config").status_code == 200


def test_the_oldest_stored_pictures_are_deleted_first(tmp_path: Path) -> None:
    page = pytest.importorskip("adaptvit.commands.page", reason="gradio is not installed")

    def write(name: str, age_s: float) -> None:
        (tmp_path / name).mkdir()
        path = tmp_path / name / "a.png"
        path.write_bytes(b"x" * 100)
        os.utime(path, (time.time() - age_s,) * 2)

    stored = page.Stored(tmp_path)
    write("example", 9000)
    stored.spare()
    for number in range(4):
        write(str(number), 4000 - 1000 * number)
    write("waiting", 1)
    assert stored.tidy(250)
    assert {path.parent.name for path in tmp_path.rglob("*.png")} == {"example", "3", "waiting"}
    assert not stored.tidy(50)
    assert {path.parent.name for path in tmp_path.rglob("*.png")} == {"example", "waiting"}


def test_an_upload_for_which_there_is_no_room_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = pytest.importorskip("adaptvit.commands.page", reason="gradio is not installed")
    monkeypatch.setattr(page.Stored, "tidy", lambda self: False)
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1:7860")]
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": headers}
    asyncio.run(page.OwnHost(None, 7860, page.Stored(tmp_path))(scope, None, send))
    assert sent[0]["status"] == 503
    assert sent[1]["body"].startswith(b"The playground has no room for more pictures at the moment")


def test_what_a_killed_server_left_is_deleted_and_what_others_use_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = pytest.importorskip("adaptvit.commands.page", reason="gradio is not installed")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, other = tmp_path / f"{page.FOLDER}dead", tmp_path / "other"
    for folder in (dead, other):
        folder.mkdir()
        (folder / ".lock").touch()
        (folder / "a.png").write_bytes(b"x")
    (tmp_path / f"{page.FOLDER}link").symlink_to(other)
    with page.stored_pictures() as one, page.stored_pictures() as two:
        assert not dead.exists()
        assert (other / "a.png").exists()
        assert one.folder.is_dir()
        assert two.folder.is_dir()
    assert not one.folder.exists()


@pytest.fixture(scope="module")
def built(shared: Playground, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page, not served."""
    page = pytest.importorskip("adaptvit.commands.page", reason="gradio is not installed")
    with pytest.MonkeyPatch.context() as patched:
        folder = tmp_path_factory.mktemp("stored")
        patched.setenv("GRADIO_TEMP_DIR", str(folder))

        async def build() -> Any:  # gradio makes an event loop of its own, and leaves it open, where none runs
            return page.build(shared, page.Stored(folder))

        yield asyncio.run(build())


def told(built: Any, function: str, values: list[Any]) -> str:
    """What the page says to values that a client sends; empty where it takes them."""
    import gradio

    dependency = next(one for one in built.fns.values() if one.api_name == function)
    error = None
    try:
        asyncio.run(built.preprocess_data(dependency, values, None))
    except gradio.Error as raised:
        error = raised
    assert error is None or not error.print_exception  # which would log a traceback
    return "" if error is None else error.message


def test_what_a_session_holds_is_let_go_when_its_page_is_closed(built: Any) -> None:
    from gradio.state_holder import StateHolder

    holder = StateHolder()
    holder.set_blocks(built)
    functions = {one.api_name: one for one in built.fns.values()}
    session = functions["look"].inputs[0]._id
    for name in ("leaves", "stays"):
        holder[name][session] = f"pictures of who {name}"
    assert [event for _, event in functions["leave"].targets] == ["unload"]
    functions["leave"].fn(SimpleNamespace(session_hash="leaves"))
    assert holder["leaves"].state_data == {}
    assert holder["stays"].state_data == {session: "pictures of who stays"}


NOT_NUMBERS = ["50", [50], None, {}, True, float("nan"), float("inf"), 4, 101, "x" * 10_000]


@pytest.mark.parametrize("wrong", NOT_NUMBERS, ids=lambda value: str(value)[:9])
def test_a_value_of_the_wrong_kind_gets_a_sentence(wrong: Any, built: Any, shared: Playground) -> None:
    model = shared.names[0]
    method = shared.subject(model).methods[0]
    right = [None, None, 12, model, method, 50]
    assert told(built, "look", right) == ""
    said = told(built, "look", [*right[:5], wrong])
    assert said.startswith("Budget, % of dense MACs must be a number from 5 to 100, got ")
    assert len(said) < 200
    if wrong != 4:
        assert "Block must be a number from 1 to 12, got " in told(built, "look", [*right[:2], wrong, *right[3:]])
    assert "Model must be one of " in told(built, "look", [*right[:3], wrong, *right[4:]])
    assert f"Method must be one of {method}" in told(built, "look", [*right[:4], wrong, right[5]])
    assert told(built, "look", right[:3]) == told(built, "look", [*right, 1]) == "This takes 6 values."


@pytest.mark.parametrize(
    "wrong",
    [
        "a.png",
        "a\0b",
        {"path": "a\0b", "meta": {"_type": "gradio.FileData"}},
        3,
        ["a.png"],
        {},
        {"path": 3},
        {"path": None},
        {"path": "/etc/passwd"},
        {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
        {"path": "http://127.0.0.1:1/a.png", "meta": {"_type": "gradio.FileData"}},
        {"path": "../a.png", "meta": {"_type": "gradio.FileData"}},
    ],
    ids=str,
)
def test_a_file_that_was_not_uploaded_gets_a_sentence(wrong: Any, built: Any, shared: Playground) -> None:
    model = shared.names[0]
    said = told(built, "take", [wrong, None, None, 12, model, shared.subject(model).methods[0], 50])
    assert "must be one file that was uploaded here" in said


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_visitors_at_once_are_served_in_turn_and_nothing_is_left_behind() -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    script = Path(__file__).parents[1] / "benchmarks" / "playground_load.py"
    command = [sys.executable, str(script), "--sessions", "4", "--pictures", "1", "--seconds", "240"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (found["served"], found["lost"], found["faults"]) == (4, 0, [])
    assert found["exit_code"] == 143
    assert found["errors"] == "adaptvit: interrupted\n"
    assert found["left_behind"] == []


NOTE_WHAT_IS_SAID = """() => {
    window.said = [];
    new MutationObserver(() => document.querySelectorAll(".toast-body").forEach(told => said.push(told.innerText)))
        .observe(document.body, {childList: true, subtree: true});
}"""
"""In a page, what it says is gone again after some seconds."""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(files: dict[str, str]) -> Iterator[Any]:
    """The page that the command serves, in a browser that notes where it asks for anything: `page.asked`."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    pytest.importorskip("gradio", reason="gradio is not installed")
    browsers = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    start = "from adaptvit.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", start, "playground", files["full"], "--port", port]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
        browsers.sync_playwright() as driver,
        driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == f"http://127.0.0.1:{port} shows the playground; Ctrl+C stops it\n"
            opened = browser.new_page()
            opened.set_default_timeout(120_000)
            opened.asked = []
            opened.on("request", lambda request: opened.asked.append(request.url))
            opened.goto(f"http://127.0.0.1:{port}")
            opened.wait_for_selector("#answers .best")
            opened.evaluate(NOTE_WHAT_IS_SAID)
            yield opened
        finally:
            server.terminate()


def wait_until_said(page: Any, told: str) -> None:
    """Wait for a sentence to have been said since the last time."""
    page.wait_for_function("told => said.some(sentence => sentence.match(told))", arg=told)
    page.evaluate("() => { said.length = 0; }")


def changed(page: Any, selector: str, before: str) -> str:
    """The source of a picture of the page, once it is another than before."""
    page.wait_for_function("([s, b]) => document.querySelector(s)?.src !== b", arg=[f"{selector} img", before])
    return source(page, selector)


def source(page: Any, selector: str) -> str:
    return page.locator(f"{selector} img").first.get_attribute("src")


def test_the_page_shows_what_is_asked_for(page: Any, tmp_path: Path) -> None:
    seen, kept = source(page, "#seen"), source(page, "#kept")
    noise().save(tmp_path / "own.png")
    page.set_input_files("#file input[type=file]", tmp_path / "own.png")
    seen, kept = changed(page, "#seen", seen), changed(page, "#kept", kept)

    budget = page.locator("#share input[type=number]")
    budget.fill("65")
    budget.press("Tab")
    kept = changed(page, "#kept", kept)
    assert source(page, "#seen") == seen
    assert re.search(r"rate = .*: 6\d% of the dense MACs", page.inner_text("#said"))

    block = page.locator("#block input[type=number]")
    block.fill("1")
    block.press("Enter")
    changed(page, "#kept", kept)
    page.get_by_text("Block 1 of 4 works on 16 tokens, which hold all 16 patches.").wait_for()

    page.locator("#examples button img").nth(1).click()
    changed(page, "#seen", seen)


def test_the_page_says_what_it_cannot_do(page: Any, tmp_path: Path) -> None:
    (tmp_path / "own.png").write_text("not an image")
    page.set_input_files("#file input[type=file]", tmp_path / "own.png")
    wait_until_said(page, "This picture cannot be used: not an image")
    budget = page.locator("#share input[type=number]")
    budget.fill("5")
    budget.press("Tab")
    wait_until_said(page, "A budget of 5% is out of reach: .* reaches")
    assert page.locator("#answers .best").count() == 2


def test_visitors_at_once_each_see_what_they_asked_for(page: Any, tmp_path: Path) -> None:
    (tmp_path / "own.png").write_text("not an image")
    shares = (45, 74)  # of what this model reaches
    visitors = [page.context.browser.new_page() for _ in shares]
    for visitor in visitors:
        visitor.set_default_timeout(120_000)
        visitor.goto(page.url)
    for visitor, share in zip(visitors, shares, strict=True):
        visitor.wait_for_selector("#answers .best")
        budget = visitor.locator("#share input[type=number]")
        budget.fill(str(share))
        budget.press("Tab")
        page.set_input_files("#file input[type=file]", tmp_path / "own.png")  # the first visitor, in between
    for visitor, share in zip(visitors, shares, strict=True):
        visitor.wait_for_function(
            """share => {
                const said = document.querySelector("#said").innerText.match(/: (\\d+)% of the dense MACs/);
                return said && Math.abs(said[1] - share) <= 2;
            }""",
            arg=share,
        )
        assert visitor.locator("#answers .best").count() == 2
        visitor.close()
    wait_until_said(page, "This picture cannot be used: not an image")


@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_has_no_sideways_scroll(width: int, page: Any) -> None:
    before = page.viewport_size
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size(before)


def test_the_page_asks_this_machine_only(page: Any) -> None:
    assert {url.split("/")[2].split(":")[0] for url in page.asked if url.startswith(("http", "ws"))} == {"127.0.0.1"}
