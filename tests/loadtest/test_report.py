"""The report opens anywhere: well-formed, self-contained, escaped, small."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Final

import pytest

from loadtest.report import page
from tests.loadtest.made import made

VOID: Final = {"meta", "br", "link", "img", "input", "hr"}
SHAPES: Final = {"path", "rect", "circle", "text"}
MIB: Final = 1_048_576


class Reader(HTMLParser):
    """Follows the tags, and notes what does not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader


@pytest.fixture(scope="module")
def text() -> str:
    return page(made())


def test_every_tag_is_closed(text: str) -> None:
    """The page is well-formed, drawings included."""
    reader = read(text)
    assert reader.wrong == []
    assert reader.open == []


def test_it_shows_everything_that_was_asked_for(text: str) -> None:
    """Each part has its headline, and each drawing has shapes in it."""
    words = " ".join(read(text).words)
    for part in (
        *("Promises", "Throughput per shard", "Latency", "By percentile", "Leadership", "Pause per move", "Failover"),
        *("Never two leaders", "Failures", "Machine, versions, settings", "made up", "SIGKILL to w2"),
    ):
        assert part in words, part
    drawings = re.findall(r"<svg.*?</svg>", text)
    assert len(drawings) >= 8
    for drawing in drawings:
        assert len([tag for tag, _ in read(drawing).seen if tag in SHAPES]) > 5
        assert "nan" not in drawing
        assert "inf" not in drawing


def test_it_needs_no_network(text: str) -> None:
    """No script, no link, no image, no font from anywhere."""
    reader = read(text)
    assert not {tag for tag, _ in reader.seen} & {"script", "link", "img", "iframe", "object", "use"}
    assert [attributes for _, attributes in reader.seen if {"src", "href"} & set(attributes)] == []
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text


def test_what_comes_from_outside_is_escaped(text: str) -> None:
    """A reason or a name with a tag in it is shown, not obeyed."""
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_it_is_readable_with_ten_thousand_shards() -> None:
    """Under two megabytes, no drawing with tens of thousands of shapes, and no bar for each shard."""
    big = page(made(shards=10_000, rate=1500, duration_s=12))
    assert len(big) < 2 * MIB
    assert read(big).wrong == []
    assert max(drawing.count("<") for drawing in re.findall(r"<svg.*?</svg>", big)) < 10_000
    assert "the busiest first" in big


def test_a_run_without_any_answer_has_a_report() -> None:
    """Nothing was sent: no drawing divides by it."""
    outcome = made(rate=1, duration_s=0.9)
    assert read(page(outcome)).wrong == []


def test_a_browser_draws_it(text: str, tmp_path: Path) -> None:
    """Chromium, where there is one, takes the page without a complaint and finds the drawings in it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    file = tmp_path / "report.html"
    file.write_text(text)
    ran = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *(f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr", "--dump-dom", file.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ran.stdout.count("<svg") == text.count("<svg")
    assert "CONSOLE" not in ran.stderr
