"""The page of `adaptvit playground`, made with gradio: what is asked goes to a `Session`, what it says is laid out.

Nothing is fetched from anywhere, and nothing is told to anybody.
"""

import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Literal
from urllib.parse import urlsplit

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
import matplotlib
import numpy as np
from filelock import FileLock, Timeout
from matplotlib.colors import to_hex
from PIL import Image, ImageOps

from adaptvit.commands.sessions import (
    BUNDLED,
    Answer,
    Playground,
    PlaygroundConfig,
    Session,
    Subject,
    View,
)
from adaptvit.extras import MissingLibrary, needed
from adaptvit.methods import METHODS
from adaptvit.show.pictures import COLOURS, macs_unit

with needed("the playground"):
    import gradio as gr
    from anyio.to_thread import run_sync
    from gradio.blocks import Block, BlockFunction
    from gradio.routes import App
    from gradio.state_holder import SessionState
    from starlette.responses import PlainTextResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

FILE_SIZE = "32mb"
"""Largest file that is taken."""
VISITORS = 64
"""Sessions that are kept; the one unused for longest goes first."""
WAITING = 256
"""Requests that may wait for one another; who comes when there are more is told so."""
STORED = 256 * 2**20
"""Bytes of uploaded and shown pictures that are kept for the browsers; the oldest go first."""
YOUNG_S = 180
"""Seconds that a picture is kept in any case: an upload may wait to be read, and what is shown to be fetched."""
FOLDER = "adaptvit-playground-"
"""How the names of the temporary folders of these pictures begin."""
KEPT_S = 3600
"""Seconds that a session or an uploaded file is kept."""
STAYS: Literal["minimal"] = "minimal"
"""How gradio shows that it computes: what is there stays."""
SHARE = 50
"""Per cent of the dense MACs to begin with."""
STYLE = """
.gradio-container {max-width: 1240px !important; margin: auto}
footer {display: none !important}
.pictures img {image-rendering: pixelated}
.answers {display: grid; grid-template-columns: 1fr 1fr; gap: 2rem}
.answers h3 {margin: 0; font-size: .85rem; color: var(--body-text-color); opacity: .72}
.answers .best {font-size: 1.35rem; font-weight: 600; line-height: 1.3; min-height: 1.3em}
.answers .figures {margin: .3rem 0; color: var(--body-text-color); opacity: .72; font-variant-numeric: tabular-nums}
.answers .class {display: flex; justify-content: space-between; font-size: .9rem; margin-top: .35rem}
.answers .class span:last-child {font-variant-numeric: tabular-nums}
.answers .bar {height: 4px; border-radius: 2px; background: var(--border-color-primary)}
.answers .bar div {height: 4px; border-radius: 2px; background: #2a788e}
#examples .grid-container {grid-template-columns: repeat(5, minmax(0, 1fr)) !important; gap: 6px; margin-top: 18px;
  grid-template-rows: none !important; grid-auto-rows: max-content; align-content: start}
#examples .grid-container button {aspect-ratio: 1 !important; height: auto !important}
.plots {display: grid; grid-template-columns: 1fr 1fr; gap: 2rem}
.plots figure {margin: 0}
.plots img {width: 100%; background: white}
.dark .plots img {filter: invert(.9) hue-rotate(180deg)}
.plots figcaption, .said {font-size: .9rem; color: var(--body-text-color); opacity: .72}
.legend {display: flex; gap: .5rem; align-items: center; font-size: .85rem; color: var(--body-text-color)}
.legend div {flex: 0 0 8rem; height: .6rem; border-radius: 3px}
@media (max-width: 640px) {
  .pictures {flex-direction: column}
  .results {display: flex; flex-direction: column; order: -1}
  .results > :has(#answers), .results > #answers {order: -1}
  .answers, .plots {grid-template-columns: 1fr; gap: 1.2rem}
}
"""


class Stored:
    """The folder of uploaded and shown pictures, and what is deleted from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spared: set[Path] = set()

    def spare(self) -> None:
        """Never delete what is there now: the page begins with it."""
        self.spared = set(self.folder.rglob("*"))

    def tidy(self, most: int = STORED) -> bool:
        """Delete the oldest files until there are at most so many bytes; whether that could be without young ones."""
        files, now = [], time.time()
        for path in self.folder.rglob("*"):
            try:
                if path not in self.spared and path.is_file():
                    status = path.stat()
                    files.append((status.st_mtime, status.st_size, path))
            except FileNotFoundError:  # another request was faster
                continue
        total = sum(size for _, size, _ in files)
        for written, size, path in sorted(files):
            if total <= most or now - written < YOUNG_S:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total <= most


@contextmanager
def stored_pictures() -> Iterator[Stored]:
    """A temporary folder of pictures, deleted at the end; those of processes that were killed are deleted first."""
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        try:
            if left.is_symlink() or not (left / ".lock").is_file():
                continue
            with FileLock(left / ".lock", timeout=0):  # the system takes it back from a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        except (OSError, Timeout):  # of another user, or in use
            continue
    with (
        tempfile.TemporaryDirectory(prefix=FOLDER, ignore_cleanup_errors=True) as folder,
        FileLock(Path(folder, ".lock")),
    ):
        yield Stored(Path(folder).resolve())


class OwnPage(gr.Blocks):
    """gradio's page, which says what is wrong with values of a client, rather than log where it failed on them."""

    async def preprocess_data(
        self, block_fn: BlockFunction, inputs: list[Any], state: SessionState | None, explicit_call: bool = False
    ) -> Any:
        """Values as the functions of the page take them.

        Raises:
            gr.Error: one of them is not what a component of the page can send; nothing is logged.
        """
        if not isinstance(inputs, list) or len(inputs) != len(block_fn.inputs):
            raise gr.Error(f"This takes {len(block_fn.inputs)} values.", print_exception=False)
        for block, value in zip(block_fn.inputs, inputs, strict=True):
            if not block.stateful:  # of what is kept here, nothing that is sent is read
                own = state[block._id] if state is not None and block._id in state else block
                check_value(own, value)
        try:
            return await super().preprocess_data(block_fn, inputs, state, explicit_call)
        except (gr.Error, OSError, TypeError, ValueError) as error:  # of a file that is gone, or told of wrongly
            raise gr.Error("The picture must be one file that was uploaded here.", print_exception=False) from error


def check_value(block: Block, value: Any) -> None:
    """Whether a component of the page can send a value.

    Raises:
        gr.Error: it cannot.
    """
    if isinstance(block, gr.Slider):
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        right = number and block.minimum <= value <= block.maximum
        allowed = f"a number from {block.minimum} to {block.maximum}"
    elif isinstance(block, gr.Dropdown):
        names = [name for _, name in block.choices]
        right, allowed = isinstance(value, str) and value in names, f"one of {', '.join(map(str, names))}"
    elif isinstance(block, gr.File) and value is not None:  # gradio would download what is an address
        path = value.get("path") if isinstance(value, dict) else None
        right = isinstance(path, str) and Path(os.path.abspath(path)).is_relative_to(block.GRADIO_CACHE)
        allowed = "one file that was uploaded here"
    else:
        return
    if not right:
        told = f"{block.label} must be {allowed}, got {shortened(value)}"
        raise gr.Error(escape(told), print_exception=False)


def build(playground: Playground, stored: Stored) -> gr.Blocks:
    """The page, which tidies up what is `stored` when it answers."""
    names = playground.names
    first = playground.subject(names[0])
    with OwnPage(title="adaptvit playground", analytics_enabled=False, delete_cache=(KEPT_S, KEPT_S)) as blocks:
        session, last = gr.State(time_to_live=KEPT_S), gr.State(time_to_live=KEPT_S)
        gr.Markdown(
            "# adaptvit playground\nWhere a vision transformer spends its compute, and what leaving some out does."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                file = gr.File(label="A picture of yours, or a clip", height=150, elem_id="file")
                examples = gr.Gallery(
                    thumbnails(first),
                    label="Examples",
                    columns=5,
                    height=165,
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="examples",
                )
                files = [(Path(name).name, name) for name in names]
                model = gr.Dropdown(files, value=names[0], label="Model", elem_id="model")
                method = gr.Dropdown(methods(playground, names[0]), label="Method", elem_id="method")
                share = gr.Slider(5, 100, SHARE, step=1, label="Budget, % of dense MACs", buttons=[], elem_id="share")
                said = gr.HTML(elem_id="said")
            with gr.Column(scale=3, elem_classes="results"):
                with gr.Row(elem_classes="pictures"):
                    pictures = [
                        gr.Image(label=label, buttons=[], interactive=False, elem_id=name)
                        for label, name in (
                            ("As the model sees it", "seen"),
                            ("Where the compute went", "depth"),
                            ("What one block works on", "kept"),
                        )
                    ]
                with gr.Row():
                    with gr.Column(scale=1):
                        legend = gr.HTML()
                        block_said = gr.HTML(elem_id="block-said")
                    number = gr.Slider(1, 12, 12, step=1, label="Block", buttons=[], elem_id="block")
                answers = gr.HTML(elem_id="answers")
                plots = gr.HTML(elem_id="plots")

        shown = [session, last, *pictures, legend, number, block_said, answers, said, plots]
        asked = [session, last, number, model, method, share]

        def look(
            own: Session | None, before: View | None, block: int, name: str, way: str, per_cent: float
        ) -> list[Any] | dict[str, Any]:
            stored.tidy()
            own = own or Session(playground)
            try:
                view = own.view(name, way, per_cent / 100)
            except ValueError as error:
                return refused(error)
            if view.budget.note:
                gr.Warning(escape(view.budget.note), title="Budget")
            same = before is not None and before.blocks == view.blocks
            block = int(block) if same else view.blocks
            kept, sentence = view.block(block)
            slider = gr.skip() if same else gr.Slider(maximum=view.blocks, value=block)
            seen = [view.image(), view.shading(), kept, legend_html(view), slider, _said(sentence)]
            return [own, view, *seen, answers_html(view), _said(budget_text(view)), plots_html(view)]

        def take(
            path: str, own: Session | None, before: View | None, block: int, name: str, way: str, per_cent: float
        ) -> list[Any] | dict[str, Any]:
            if not isinstance(path, str):
                return refused(ValueError("Choose one picture."))
            own = own or Session(playground)
            try:
                picture = playground.subject(name).opened_picture(path)
                own.add(picture.image, name)
            except (MissingLibrary, ValueError) as error:
                return refused(error)
            finally:
                Path(path).unlink(missing_ok=True)
            if picture.note:
                gr.Info(escape(picture.note), title="Picture")
            if name in BUNDLED:
                known = ", ".join(playground.subject(name).classes)
                gr.Info(f"This model knows ten classes: any picture is one of {known} to it.", title="Model")
            return look(own, before, block, name, way, per_cent)

        def choose(
            chosen: gr.EventData,
            own: Session | None,
            before: View | None,
            block: int,
            name: str,
            way: str,
            per_cent: float,
        ) -> list[Any] | dict[str, Any]:
            examples, data = playground.subject(name).examples, chosen._data
            index = data.get("index") if isinstance(data, dict) else None
            if type(index) is not int or not 0 <= index < len(examples):
                return refused(ValueError("Choose one of the examples."))
            own = own or Session(playground)
            own.add(examples[index], name)
            return look(own, before, block, name, way, per_cent)

        def change(
            own: Session | None, before: View | None, block: int, name: str, per_cent: float
        ) -> list[Any] | dict[Any, Any]:
            try:
                small, ways = thumbnails(playground.subject(name)), methods(playground, name)
            except ValueError as error:
                refused(error)
                return {model: names[0] if before is None else before.model}
            looked = look(own, before, block, name, ways[0][1], per_cent)
            if isinstance(looked, dict):
                return {model: names[0] if before is None else before.model}
            return [name, gr.Dropdown(ways, value=ways[0][1]), small, *looked]

        def turn(view: View | None, block: int) -> tuple[np.ndarray, str] | dict[str, Any]:
            if view is None:
                return gr.skip()
            stored.tidy()
            kept, sentence = view.block(min(int(block), view.blocks))
            return kept, _said(sentence)

        def leave(request: gr.Request) -> None:
            blocks.state_holder.delete_state(request.session_hash)

        blocks.load(look, asked, shown, show_progress=STAYS)
        blocks.unload(leave)
        file.upload(take, [file, *asked], shown, show_progress=STAYS).then(lambda: None, None, file)
        examples.select(choose, asked, shown, show_progress=STAYS)
        model.select(
            change, [session, last, number, model, share], [model, method, examples, *shown], show_progress=STAYS
        )
        method.select(look, asked, shown, show_progress=STAYS)
        share.release(look, asked, shown, trigger_mode="always_last", show_progress=STAYS)
        number.input(
            turn, [last, number], [pictures[2], block_said], show_progress="hidden", trigger_mode="always_last"
        )
    return blocks


class OwnHost:
    """Lets through what asks for this page by its own name and from its own pages, before gradio sees it.

    A page elsewhere reaches 127.0.0.1 through the browser that shows it: by a name of its own that it points here (the
    `Host` tells), or as another origin (`Origin` tells, and `Sec-Fetch-Site` where no `Origin` is sent).
    """

    def __init__(self, app: ASGIApp, port: int, stored: Stored) -> None:
        self.app = app
        self.stored = stored
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        if port == 80:
            self.hosts |= {"127.0.0.1", "localhost"}  # browsers leave out the port of http

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or hand on to gradio."""
        if scope["type"] in ("http", "websocket"):
            reason = self.refusal(scope)
            if reason is not None and scope["type"] == "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1008, "reason": reason})
                return
            if reason is not None:
                await PlainTextResponse(reason + "\n", status_code=403)(scope, receive, send)
                return
            if scope["path"].rstrip("/").endswith("/upload") and not await run_sync(self.stored.tidy):
                full = "The playground has no room for more pictures at the moment: try again in some minutes."
                await PlainTextResponse(full + "\n", status_code=503)(scope, receive, send)
                return
            await self.answer(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What gradio answers; where it fails on a request, as on none of the page's, a sentence instead of its 500."""
        failed = False

        async def pass_on(message: Message) -> None:
            nonlocal failed
            if message["type"] == "http.response.start" and message["status"] == 500 and scope["path"] != "/":
                failed = True
            if not failed:
                await send(message)

        try:
            await self.app(scope, receive, pass_on)
        except Exception:  # raised again once it was answered, to be logged
            if not failed:
                raise
        if failed:
            wrong = "This request is none that the playground's page sends."
            await PlainTextResponse(wrong + "\n", status_code=400)(scope, receive, send)

    def refusal(self, scope: Scope) -> str | None:
        """Why a request is not answered, in a sentence; None where it is."""
        sent: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            sent.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1").lower())
        hosts, origins = sent.get("host", []), sent.get("origin", [])
        if len(hosts) != 1 or hosts[0] not in self.hosts:
            return f"This page answers to {' and '.join(sorted(self.hosts))} only."
        for origin in origins:
            try:
                parts = urlsplit(origin)
            except ValueError:
                return "This page answers to its own origin only."
            if parts.scheme != "http" or parts.netloc not in self.hosts:
                return "This page answers to its own origin only."
        opened = scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and scope["path"] == "/"
        if not opened and any(site in ("cross-site", "same-site") for site in sent.get("sec-fetch-site", [])):
            return "This page answers to its own origin only."  # a link elsewhere may open the page, and no more
        return None


class OwnApp(App):
    """gradio's application behind `OwnHost`: a middleware that is added would come after gradio's own, which answer."""

    guard: OwnHost

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or hand on to gradio."""
        await self.guard(scope, receive, send)


def serve_page(config: PlaygroundConfig) -> None:
    """Open the models and show the page until stopped.

    Raises:
        OSError: the port is taken.
        And what `Playground` raises.
    """
    playground = Playground(config)
    with stored_pictures() as stored:
        os.environ["GRADIO_TEMP_DIR"] = str(stored.folder)  # read when components are made
        blocks = build(playground, stored)
        try:
            launch(blocks, config.port, stored)
        except OSError as error:
            raise OSError(f"port {config.port} of 127.0.0.1 is taken: choose another with --port") from error
        print(f"http://127.0.0.1:{config.port} shows the playground; Ctrl+C stops it", flush=True)
        try:
            while True:  # gradio's own block_thread would keep to itself what stopped it
                time.sleep(0.1)
        finally:
            blocks.close(verbose=False)


def launch(blocks: gr.Blocks, port: int, stored: Stored) -> None:
    """Start to serve the page in the background, to this machine only."""
    app = OwnApp()
    app.guard = OwnHost(super(OwnApp, app).__call__, port, stored)
    stored.spare()
    blocks.queue(api_open=False, max_size=WAITING).launch(
        _app=app,
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        ssr_mode=False,
        footer_links=[],
        prevent_thread_lock=True,
        quiet=True,
        max_file_size=FILE_SIZE,
        state_session_capacity=VISITORS,
        theme=gr.themes.Default(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=STYLE,
    )


def thumbnails(subject: Subject) -> list[Image.Image]:
    """The examples as small squares, of a clip its middle frame."""
    single = [one[len(one) // 2] if isinstance(one, tuple) else one for one in subject.examples]
    return [ImageOps.fit(picture, (96, 96)) for picture in single]


def methods(playground: Playground, model: str) -> list[tuple[str, str]]:
    """What a model can be shown with: names as they are read, and ours."""
    return [(METHODS[name].title, name) for name in playground.subject(model).methods]


def answers_html(view: View) -> str:
    """Both answers side by side."""
    dense, adaptive = view.dense, view.adaptive
    unit, scale = macs_unit(dense.gmacs)
    gain = f": {adaptive.gmacs / dense.gmacs:.0%} of the dense MACs, {adaptive.times:.2f} times as fast"
    if adaptive.times < 1:
        gain += "; one image in so small a model saves MACs, not time: larger models and batches save both"
    columns = [
        _answer("Dense: the same weights, nothing left out", dense, f"{scale * dense.gmacs:.3g} {unit}"),
        _answer(f"Adaptive: {METHODS[view.method].title}", adaptive, f"{scale * adaptive.gmacs:.3g} {unit}", gain),
    ]
    return f'<div class="answers">{"".join(columns)}</div>'


def _answer(title: str, answer: Answer, cost: str, gain: str = "") -> str:
    rows = "".join(
        f'<div class="class"><span>{escape(name)}</span><span>{probability:.1%}</span></div>'
        f'<div class="bar"><div style="width: {probability:.1%}"></div></div>'
        for name, probability in answer.top
    )
    return (
        f'<div><h3>{escape(title)}</h3><div class="best">{escape(answer.top[0][0].split(", ")[0])}</div>'
        f'<div class="figures"><b>{cost}</b>, <b>{answer.milliseconds:.1f} ms</b>{gain}</div>{rows}</div>'
    )


def budget_text(view: View) -> str:
    """Where the knob stands."""
    knob = view.budget.config.knob
    set_to = "" if knob is None else f"{knob.field} = {getattr(view.budget.config, knob.field):.4g}: "
    over = "mean over the examples and the last pictures"
    return f"{set_to}{view.budget.share:.0%} of the dense MACs, {over}. {view.budget.note}"


def legend_html(view: View) -> str:
    """The colours over the second picture."""
    stops = ", ".join(to_hex(matplotlib.colormaps[COLOURS](place)) for place in np.linspace(0, 1, 7))
    bar = f'<div style="background: linear-gradient(to right, {stops})"></div>'
    if view.groups is not None:
        return f'<div class="legend">patches in a token: 1 {bar} {view.largest}</div>'
    return f'<div class="legend">blocks that worked on a patch: 1 {bar} all {view.blocks}</div>'


def plots_html(view: View) -> str:
    """What the pictures of the session cost, and what the blocks computed for them."""
    count = len(view.seen_gmacs)
    pictures = "the picture" if count == 1 else f"the {count} pictures"
    figures = "".join(
        f'<figure><figcaption>{caption}</figcaption><img src="{source}" alt="{caption}"></figure>'
        for caption, source in (
            (f"What {pictures} of this session cost with this model, method and budget", view.costs()),
            (f"What each block computed for {'it' if count == 1 else 'them'}", view.usage_per_block()),
        )
    )
    return f'<div class="plots">{figures}</div>'


def _said(sentence: str) -> str:
    return f'<div class="said">{escape(sentence)}</div>'


def refused(error: Exception) -> dict[str, Any]:
    """Say in the page why something is not possible, and leave the page as it was."""
    gr.Warning(escape(str(error)), title="Not possible")
    return gr.skip()
