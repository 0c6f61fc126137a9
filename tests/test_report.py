import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from adaptvit.show.pictures import data_uri
from adaptvit.show.report import Illustration, Report, Section, Table, machine, write_report


def report() -> Report:
    return Report(
        title="a title",
        headline="2 < 3 & so on",
        introduction=["first", "second"],
        table=Table(["", "accuracy"], [["dense", "95.0%"], ["A-ViT", "94.9%"]], "a note"),
        sections=[Section("pictures", [Illustration(data_uri(Figure((1, 1))), "a caption", wide=True)])],
        facts={"Settings": {"epochs": 3}, "Machine": machine()},
    )


class Links(HTMLParser):
    """Collects whatever an HTML page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    write_report(report(), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    links = Links(text).found
    assert len(links) == 1
    assert all(link.startswith("data:image/") for link in links)
    assert "http" not in text
    assert "url(" not in text


def test_the_page_says_it_all_and_escapes_it(tmp_path: Path) -> None:
    write_report(report(), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    for said in ("a title", "2 &lt; 3 &amp; so on", "second", "94.9%", "a note", "a caption", "epochs"):
        assert said in text


def test_a_picture_from_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a data URI"):
        Illustration("https://example.org/a.png", "not ours")


def test_the_machine_has_no_name() -> None:
    import getpass
    import platform

    facts = {str(value) for value in machine().values()}
    assert platform.node() not in facts
    assert getpass.getuser() not in facts


def test_a_table_for_the_terminal_has_straight_columns() -> None:
    lines = report().table.text().splitlines()
    assert lines == ["       accuracy", "dense     95.0%", "A-ViT     94.9%"]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_has_no_sideways_scroll_on_a_phone_or_a_desktop(tmp_path: Path) -> None:
    browsers = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    wide = Table(["", *(f"column {number}" for number in range(14))], [["a_name_of_a_file" * 3, *["1,234.5"] * 14]], "")
    whole = replace(report(), table=wide, facts={"Settings": {"path": "folder/" * 40}})
    write_report(whole, tmp_path / "report.html")
    with (
        browsers.sync_playwright() as driver,
        driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        page = browser.new_page()
        page.goto((tmp_path / "report.html").as_uri())
        page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true; })")
        for width in (390, 1400):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
