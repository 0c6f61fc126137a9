"""Many people at the playground at once: is everybody served, with their own picture, how soon, and what is kept?

    python benchmarks/playground_load.py [--sessions 50] [--pictures 2] [--seconds 600]

Starts `adaptvit playground` on a free port of 127.0.0.1, speaks HTTP to it as the page does, stops it, and prints JSON.
No more than so many seconds pass: what was not answered by then is lost.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

MODEL, METHOD, BUDGET = "digits (bundled)", "ats", 60
STARTS = "import sys; from adaptvit.cli import main; sys.exit(main())"
SETTLES_S = 5
"""Seconds between the last page that is closed and the last look at the memory."""


class Visitor(threading.Thread):
    """Opens the page, shows it pictures one after the other, and closes it."""

    def __init__(self, port: int, take: int, number: int, pictures: int, ends: float) -> None:
        super().__init__()
        self.port, self.take, self.number, self.pictures, self.ends = port, take, number, pictures, ends
        self.waits: list[float] = []
        """Seconds until each picture was answered."""
        self.faults: list[str] = []
        """What went wrong, a sentence a picture."""

    def run(self) -> None:
        """Ask, and note the answers."""
        session = f"visitor{self.number}"
        alive = self.ask("GET", f"/gradio_api/heartbeat/{session}")[0]
        for index in range(self.pictures):
            began = time.monotonic()
            try:
                self.show(session, 10 + 4 * self.number + 2 * index)
            except (OSError, ValueError, http.client.HTTPException) as error:
                self.faults.append(f"{type(error).__name__}: {error}")
            else:
                self.waits.append(time.monotonic() - began)
        alive.close()

    def ask(
        self, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """A connection on which a request was answered, and the answer."""
        left = self.ends - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time is over")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=left)
        connection.request(method, path, body, {"Content-Type": kind} if body else {})
        answer = connection.getresponse()
        if answer.status != 200:
            raise ValueError(f"{answer.status} {answer.read().decode()}")
        return connection, answer

    def read(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        """The whole answer to a request."""
        connection, answer = self.ask(method, path, body, kind)
        with closing(connection), answer:
            return answer.read()

    def show(self, session: str, grey: int) -> None:
        """Upload a picture of one grey and see that it is this one that is shown.

        Raises:
            ValueError: it is not.
            OSError: there was no answer in time.
        """
        png = BytesIO()
        Image.new("L", (64, 64), grey).save(png, "PNG")
        head = b'--edge\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        form = head + png.getvalue() + b"\r\n--edge--\r\n"
        path = json.loads(self.read("POST", "/gradio_api/upload", form, "multipart/form-data; boundary=edge"))[0]
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        data = [file, None, None, 8, MODEL, METHOD, BUDGET]
        asked = {"data": data, "fn_index": self.take, "session_hash": session}
        self.read("POST", "/gradio_api/queue/join", json.dumps(asked, allow_nan=False).encode())
        connection, answer = self.ask("GET", f"/gradio_api/queue/data?session_hash={session}")
        with closing(connection), answer:
            for line in answer:
                if time.monotonic() > self.ends:
                    raise TimeoutError("the time is over")
                told = json.loads(line[5:]) if line.startswith(b"data:") else {}
                if told.get("msg") == "process_completed":
                    break
            else:
                raise ValueError("the connection ended without an answer")
        if not told["success"]:
            raise ValueError(told["output"]["error"])
        seen = self.read("GET", f"/gradio_api/file={told['output']['data'][2]['path']}")
        shown = np.asarray(Image.open(BytesIO(seen)).convert("L")).mean()
        if abs(shown - grey) > 1:
            raise ValueError(f"a picture of grey {grey} was shown as {shown:.0f}")


def memory(process: int) -> tuple[float, float]:
    """MB that a process has in memory, and that it had at most."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    now, most = (float(values[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def main() -> None:
    """Start, ask, stop, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=50)
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600)
    arguments = parser.parse_args()
    ends = time.monotonic() + arguments.seconds
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", STARTS, "playground", "--port", str(port)]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": folder}
        ) as server,
    ):
        try:
            assert server.stdout is not None
            if not server.stdout.readline().startswith("http://127.0.0.1"):
                raise SystemExit(server.communicate()[1])
            first = Visitor(port, 0, 0, 0, ends)
            functions = json.loads(first.read("GET", "/config"))["dependencies"]
            take = next(one["id"] for one in functions if one["api_name"] == "take")
            before = memory(server.pid)[0]
            began = time.monotonic()
            visitors = [Visitor(port, take, k, arguments.pictures, ends) for k in range(arguments.sessions)]
            for visitor in visitors:
                visitor.start()
            for visitor in visitors:
                visitor.join()
            took = time.monotonic() - began
            stored = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            time.sleep(SETTLES_S)
            after, peak = memory(server.pid)
        finally:
            server.send_signal(signal.SIGTERM)
            errors = server.communicate(timeout=60)[1]
        left = [path.name for path in Path(folder).iterdir() if path.name.startswith("adaptvit")]
    waits = [wait for visitor in visitors for wait in visitor.waits]
    faults = [fault for visitor in visitors for fault in visitor.faults]
    figures = {
        "sessions": arguments.sessions,
        "asked": arguments.sessions * arguments.pictures,
        "served": len(waits),
        "lost": arguments.sessions * arguments.pictures - len(waits),
        "faults": sorted(set(faults)),
        "seconds": round(took, 1),
        "longest_wait_s": round(max(waits, default=0), 1),
        "mb_before": round(before),
        "mb_peak": round(peak),
        "mb_after": round(after),
        "stored_mb": round(stored / 2**20, 2),
        "exit_code": server.returncode,
        "left_behind": left,
        "errors": errors,
    }
    print(json.dumps(figures, indent=2, allow_nan=False))


if __name__ == "__main__":
    main()
