import io
import os
import sys
import warnings
from types import SimpleNamespace

import pytest

from adaptvit import terminal
from adaptvit.show.report import Illustration, Report, Section, Table, write_report
from adaptvit.terminal import say, shown, warn

HOSTILE = "\x1b]0;owned\x07\x1b[31mred\u202egnp.exe\u2066\r\n\x9b2J\udcff\u200b"


def test_what_a_terminal_would_obey_is_shown() -> None:
    assert shown(HOSTILE) == (
        r"\x1b]0;owned\x07\x1b[31mred\u202egnp.exe\u2066\r\n\x9b2J\udcff\u200b"  # a surrogate is a byte of a name
    )
    assert shown("Käfer, 甲虫 ± 1") == "Käfer, 甲虫 ± 1"


def test_a_line_is_said_in_any_encoding() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("Käfer ± \x1b", file)
    assert file.buffer.getvalue() == rb"K\xe4fer \xb1 \x1b" + os.linesep.encode()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_warning_shows_names_and_comes_from_the_first_process_alone(
    rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn(f"no {HOSTILE}")
        warn("everybody", everywhere=True)
    said = [str(one.message) for one in caught]
    assert said == ([f"no {shown(HOSTILE)}"] if rank == "0" else []) + ["everybody"]
    assert {one.filename for one in caught} == {__file__}


def test_where_nobody_reads_any_more_the_work_goes_on() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as file:
        say("one", file)
        say("two", file)


def test_progress_in_a_pipe_is_a_line_every_thirty_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    now = [1000.0]
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(terminal, "LINES", terminal.Lines())
    outer = terminal.progress_bar(words="runs", total=2, outer=True)
    for _ in range(2):
        inner = terminal.progress_bar(words="steps", total=33, stays=True)
        for _ in range(33):
            now[0] += 1
            inner.update()
            inner.refresh()
        inner.close()
        outer.update()
    outer.close()
    told = capsys.readouterr().err
    assert [line.split(":")[0] for line in told.splitlines()] == ["steps", "steps"]
    assert "\r" not in told
    with terminal.quiet():
        assert terminal.progress_bar(range(3)).disable
        say("figures")
        say("an error", sys.stderr)
    assert capsys.readouterr() == ("", "an error\n")


def test_a_table_shows_names_and_a_report_quotes_them(tmp_path: pytest.TempPathFactory) -> None:
    table = Table(["", "<b>top-1</b>"], [["a\x1b[31m<script>alert(1)</script>\n", "1"]], "note")
    first, second = table.text().split("\n")
    assert second.startswith(r"a\x1b[31m<script>")
    assert len(first) == len(second)
    picture = Illustration("data:image/png;base64,", '"><script>alert(2)</script>')
    name = "<script>alert(3)</script>"
    report = Report(
        title=name,
        headline=name,
        introduction=[name],
        table=table,
        sections=[Section(name, [picture])],
        facts={name: {name: name}},
    )
    write_report(report, tmp_path / "report.html")
    assert "<script" not in (tmp_path / "report.html").read_text()
