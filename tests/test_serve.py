"""`adaptvit serve`: what is answered, together with whom, at what budget, and what is refused."""

import asyncio
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import small_vit
from samples import encoded, picture

from adaptvit import AViTConfig, FullConfig, cli, save
from adaptvit.commands.batches import Batches, ServeConfig, budget_for
from adaptvit.measure.predictor import Predictor
from adaptvit.model import Dial

pytest.importorskip("uvicorn", reason="the extra serve is not installed")
client_of = pytest.importorskip("fastapi.testclient", reason="the extra serve is not installed")
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from adaptvit.commands import server  # noqa: E402

PICTURES = [encoded(picture(seed)) for seed in range(6)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "avit.safetensors"
    model = AViTConfig(gate_scale=4.0, gate_center=3.0).build(small_vit(num_classes=7))
    model.class_names = [f"name {number}" for number in range(7)]
    model.dial = Dial((2.0, 3.0, 6.0), (0.4, 0.6, 1.0))
    save(model, path)
    return str(path)


@pytest.fixture(scope="module")
def client(weights: str) -> Iterator[Any]:
    config = ServeConfig(weights, budget="0.4..0.8", latency="60s", top=3, waiting=8, device="cpu")
    with client_of.TestClient(server.application(config)) as client:
        yield client


def figures(client: Any) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {sample.name + "".join(sample.labels.values()): sample.value for one in families for sample in one.samples}


def until_waiting(client: Any, count: int) -> None:
    """Until so many wait, within a minute."""
    for _ in range(6000):
        if client.get("/health").json()["waiting"] == count:
            return
        time.sleep(0.01)
    pytest.fail(f"{count} requests were to wait, but {client.get('/health').json()['waiting']} do")


def test_an_image_is_answered_as_the_predictor_has_it(client: Any, weights: str) -> None:
    told = client.post("/predict", content=PICTURES[0], headers={"Content-Type": "image/png"})
    assert told.status_code == 200
    predictor = Predictor(weights, budget=0.8, top=3, device="cpu")
    row = {name: column[0] for name, column in predictor([PICTURES[0]]).items()}
    answer = told.json()
    assert (answer["class"], answer["macs"], answer["tokens"]) == (row["class"], row["macs"], row["tokens"].tolist())
    assert answer["share"] == row["macs"] / predictor.dense_macs
    assert [one["class"] for one in answer["top"]] == [name for name, _ in row["top"]]
    assert [one["probability"] for one in answer["top"]] == pytest.approx([float(p) for _, p in row["top"]], abs=1e-6)
    assert answer["top"][0] == {"class": answer["class"], "probability": answer["probability"]}
    assert client.get("/health").json() == {"status": "ok", "waiting": 0, "budget": 0.8}


def test_those_who_wait_run_together_and_get_their_own(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [client.post("/predict", content=content).json() for content in PICTURES]
    begun, go, sizes, compute = threading.Event(), threading.Event(), [], Batches.compute

    def gated(self: Batches, pixels: np.ndarray) -> Any:
        begun.set()
        assert go.wait(60)
        sizes.append(len(pixels))
        return compute(self, pixels)

    monkeypatch.setattr(Batches, "compute", gated)
    before = figures(client)
    with ThreadPoolExecutor(len(PICTURES)) as pool:
        first = pool.submit(client.post, "/predict", content=PICTURES[0])
        assert begun.wait(60)
        others = [pool.submit(client.post, "/predict", content=content) for content in PICTURES[1:]]
        until_waiting(client, len(others))
        go.set()
        together = [answer.result().json() for answer in (first, *others)]
    assert sizes == [1, 5]
    for one, other in zip(alone, together, strict=True):
        assert (one["class"], one["macs"]) == (other["class"], other["macs"])
    after = figures(client)
    assert after["adaptvit_requests_total200"] - before["adaptvit_requests_total200"] == 6
    assert after["adaptvit_batch_images_count"] - before["adaptvit_batch_images_count"] == 2
    spent = after["adaptvit_macs_total"] - before["adaptvit_macs_total"]
    assert spent == sum(answer["macs"] for answer in together)
    assert after["adaptvit_request_seconds_count"] == after["adaptvit_requests_total200"]
    assert after["process_open_fds"] > 0


def parts() -> Iterator[bytes]:
    yield from (PICTURES[0], bytes(4000))


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        (b"", {}, 400, "the body is empty"),
        (b"no picture", {}, 422, "not an image"),
        (PICTURES[0][:200], {}, 422, "."),
        (bytes(8001), {}, 413, r"at most .* MB, this one 8001 bytes"),
        (parts, {}, 413, "at most"),
        (PICTURES[0], {"Content-Type": "multipart/form-data; boundary=x"}, 415, "own bytes, not multipart/form-data$"),
    ],
    ids=["empty", "no image", "cut off", "huge", "huge, in parts", "a form"],
)
def test_what_is_no_image_gets_a_sentence(
    client: Any, content: Any, headers: dict[str, str], status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LARGEST", 8000)
    before = figures(client).get(f"adaptvit_requests_total{status}", 0)
    told = client.post("/predict", content=content() if callable(content) else content, headers=headers)
    assert told.status_code == status
    assert re.search(words, told.json()["detail"])
    assert figures(client)[f"adaptvit_requests_total{status}"] == before + 1
    assert client.post("/predict", content=PICTURES[0]).status_code == 200


def test_what_takes_too_long_to_arrive_is_refused(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "UPLOAD_S", 0.0)

    class Slow:
        headers: dict[str, str] = {}  # noqa: RUF012

        async def stream(self) -> Any:
            await asyncio.sleep(10)
            yield b""

    slow: Any = Slow()
    with pytest.raises(server.HTTPException, match="408"):
        asyncio.run(server.body_of(slow))


def test_a_model_that_fails_answers_those_alone(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "compute", lambda self, pixels: 1 / 0)
        told = client.post("/predict", content=PICTURES[0])
    assert (told.status_code, told.json()["detail"]) == (500, "the model failed: ZeroDivisionError: division by zero")
    assert client.post("/predict", content=PICTURES[0]).status_code == 200


def test_more_than_may_wait_are_told_to_come_again(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go, compute = threading.Event(), threading.Event(), Batches.compute

    def gated(self: Batches, pixels: np.ndarray) -> Any:
        begun.set()
        assert go.wait(60)
        return compute(self, pixels)

    monkeypatch.setattr(Batches, "compute", gated)
    with ThreadPoolExecutor(8) as pool:
        taken = [pool.submit(client.post, "/predict", content=PICTURES[0])]
        assert begun.wait(60)  # or two might be taken together
        taken += [pool.submit(client.post, "/predict", content=PICTURES[0]) for _ in range(7)]
        until_waiting(client, 7)
        told = client.post("/predict", content=PICTURES[0])
        go.set()
        assert [answer.result().status_code for answer in taken] == [200] * 8
    assert (told.status_code, told.headers["Retry-After"]) == (503, "1")
    assert told.json()["detail"] == "8 requests are being answered: ask again later"


def test_the_budget_falls_with_the_wait_and_rises_again(weights: str) -> None:
    assert [budget_for(wait, 0.1, (0.4, 0.8)) for wait in (0, 0.025, 0.0375, 0.05, 9)] == pytest.approx(
        [0.8, 0.8, 0.6, 0.4, 0.4]
    )
    batches = Batches(Predictor(weights, batch_size=16, device="cpu"), (0.4, 0.8), 0.1)
    batches.pace = 0.001 / 0.8  # a millisecond an image at the highest budget
    budgets, sizes = [], []
    for waiting in (1, 30, 200, 30, 1):
        sizes.append(batches.steer(waiting))
        budgets.append(batches.predictor.opened.compute)
    assert budgets == pytest.approx([0.8, 0.72, 0.4, 0.72, 0.8])
    assert sizes == [16] * 5
    batches.latency = 0.02  # of which a quarter is 5 images at the highest budget, 10 at the lowest
    assert (batches.steer(1), batches.steer(200)) == (5, 10)


def test_the_pace_follows_what_batches_take(weights: str) -> None:
    batches = Batches(Predictor(weights, device="cpu"), (0.4, 0.8), 0.1)
    dense = batches.predictor.dense_macs
    for _ in range(60):
        batches.measured([{"macs": dense // 2}] * 4, 0.1)
    assert batches.pace == pytest.approx(0.05, rel=1e-4)
    plain = Batches(Predictor(weights, device="cpu"), None, 0.1)
    plain.measured([{"macs": dense // 2}] * 4, 0.1)
    assert (plain.pace, plain.budget, plain.steer(9)) == (0.025, None, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--budget 0.8..0.4", "budget must be a share of the dense MACs above 0 and up to 1"),
        ("--budget half", "got 'half'"),
        ("--budget 0.1..0.8", r"compute must lie in \[0.4, 1\]"),
        ("--latency 100", "latency must be a time of at most an hour, as 100ms or 2s, got '100'"),
        ("--port 70000", "port"),
        ("--host 256.0.0.1", "cannot be listened at"),
    ],
)
def test_settings_that_cannot_be_are_told(
    weights: str, options: str, words: str, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["serve", weights, "--port", "0", *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line)


def test_a_model_without_a_curve_has_no_budget(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = str(tmp_path / "vit.safetensors")
    save(FullConfig().build(small_vit()), path)
    assert cli.main(["serve", path, "--budget", "0.6", "--port", "0"]) == 2
    assert "compute needs a dial" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(weights: str, capsys: pytest.CaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", weights, "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"adaptvit: port {port} of 127.0.0.1 cannot be listened at: Address already in use\n"
    )


def test_who_has_asked_is_answered_when_the_server_is_stopped(
    weights: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    begun, go, compute = threading.Event(), threading.Event(), Batches.compute
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def gated(self: Batches, pixels: np.ndarray) -> Any:
        if threading.current_thread().name.startswith("model"):
            begun.set()
            assert go.wait(60)
        return compute(self, pixels)

    def ask() -> int:
        with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            connection.request("POST", "/predict", PICTURES[0])
            with connection.getresponse() as answer:
                answer.read()
                return answer.status

    def stop() -> list[int]:
        for _ in range(3000):
            with socket.socket() as tried:
                if not tried.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.02)
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(ask) for _ in range(3)]
            begun.wait(60)
            time.sleep(0.1)  # in which the others arrive
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)  # in which the server sees it
            go.set()
            return [one.result() for one in asked]

    monkeypatch.setattr(Batches, "compute", gated)
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(stop)
        assert cli.main(["serve", weights, "--port", str(port), "--device", "cpu"]) == 143
        assert answers.result() == [200] * 3
    told = capsys.readouterr()
    assert told.out == f"http://127.0.0.1:{port}/predict answers images; Ctrl+C stops it\n"
    assert told.err == "adaptvit: interrupted\n"
