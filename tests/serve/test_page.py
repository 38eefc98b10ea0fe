"""The page in a real browser: Chromium, where one is installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.serve.conftest import XRAY, Running, Scripted

from medge.demo import IMAGES

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
Script = Callable[..., AbstractContextManager[tuple[Scripted, Running]]]
QUESTION = "What kind of image is this?"
DONE = "#log .assistant:last-child:not(.writing)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses to run as root
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=root)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """`visit(url, width=…, scheme=…)` -> a page, loaded. Nothing may go wrong in its console, nor leave the server."""
    contexts: list[Any] = []
    faults: list[str] = []

    def note(what: str) -> None:
        faults.append(what)

    def run(url: str, width: int = 1200, scheme: str = "light", expected: str = "\0") -> Any:
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: note(str(error)))
        page.on("console", lambda said: None if said.type != "error" or expected in said.text else note(said.text))
        page.on("request", lambda sent: None if sent.url.startswith((url, "blob:", "data:")) else note(sent.url))
        page.goto(url)
        return page

    yield run
    for context in contexts:
        context.close()
    assert faults == []


def ask(page: Any, question: str) -> str:
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.wait_for_selector(f"{DONE} .figures:not(:empty)")
    return str(page.inner_text(f"{DONE} .said"))


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (360, "light")])
def test_an_image_is_asked_about_and_scored(
    visit: Callable[..., Any], server: Running, width: int, scheme: str
) -> None:
    page = visit(server.url, width, scheme)
    assert "Not a medical device" in page.inner_text("header")
    page.set_input_files("#file", XRAY)
    page.wait_for_selector("#preview:not([hidden])")
    assert "chest x-ray" in ask(page, QUESTION)
    assert XRAY.name in page.inner_text("#log .user")
    ask(page, "Explain the contrast.")
    assert XRAY.name not in page.inner_text("#log .user:nth-last-child(2)")
    assert "first token" in page.inner_text(f"{DONE} .figures")
    page.click("#score")
    page.wait_for_selector("#labels output:not(:empty)")
    scores = [float(each.inner_text().split()[0]) for each in page.query_selector_all("#labels output")]
    assert sum(scores) == pytest.approx(100, abs=0.5)
    bars = [each.bounding_box()["width"] for each in page.query_selector_all("#labels .meter div")]
    assert max(bars) > 20
    assert bars.index(max(bars)) == scores.index(max(scores))
    assert "round trip" in page.inner_text("#latency")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    with suppress(KeyError):
        page.screenshot(path=Path(os.environ["MEDGE_SCREENSHOTS"]) / f"{width}-{scheme}.png", full_page=True)


def test_tokens_come_one_by_one_and_can_be_stopped(visit: Callable[..., Any], scripted: Script) -> None:
    with scripted([f"{i} " for i in range(2000)], ("again",), pause=0.02) as (model, server):
        page = visit(server.url)
        page.fill("#question", "Count.")
        page.click("#send")
        page.wait_for_selector("#log .writing .said:not(:empty)")
        early = page.inner_text("#log .assistant .said")
        page.wait_for_timeout(300)
        late = page.inner_text("#log .assistant .said")
        assert late.startswith(early.strip())
        assert len(late) > len(early)
        assert page.get_attribute("#log", "aria-busy") == "true"
        page.click("#stop")
        page.wait_for_selector(DONE)
        assert page.inner_text(f"{DONE} .figures") == "stopped"
        server.until_idle()
        assert model.said < 2000
        assert ask(page, "Once more.") == "again"
        assert [message.role for message in model.asked[1][0]] == ["user", "assistant", "user"]
        page.click("#clear")
        assert page.query_selector_all("#log li") == []


def test_a_dicom_is_shown_and_read(visit: Callable[..., Any], server: Running) -> None:
    data = pytest.importorskip("pydicom.data")
    page = visit(server.url)
    page.set_input_files("#file", data.get_testdata_file("CT_small.dcm", download=False))
    page.wait_for_selector("#preview:not([hidden])")
    assert page.evaluate("document.getElementById('preview').naturalWidth") == 128
    assert ask(page, QUESTION)
    page.click("#remove")
    assert page.is_hidden("#preview")


def test_a_file_is_dropped(visit: Callable[..., Any], server: Running) -> None:
    page = visit(server.url)
    file = next(iter(sorted((IMAGES / "histology").glob("*.jpg"))))
    drop = """async ([name, bytes]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], name));
        document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
    }"""
    page.evaluate(drop, [file.name, list(file.read_bytes())])
    page.wait_for_selector("#preview:not([hidden])")
    assert page.inner_text("#file-name") == file.name


def test_labels_are_edited(visit: Callable[..., Any], server: Running) -> None:
    page = visit(server.url, expected="400")
    page.set_input_files("#file", XRAY)
    page.wait_for_selector("#preview:not([hidden])")
    page.click("#add")
    page.keyboard.type("head ct")
    page.click("#score")
    page.wait_for_selector("#zero-shot-error:not([hidden])")
    assert "given twice" in page.inner_text("#zero-shot-error")
    page.click("#labels li:last-child button")
    page.fill("#template", "a photo of {}")
    page.click("#score")
    page.wait_for_selector("#labels output:not(:empty)")
    assert page.is_hidden("#zero-shot-error")
    page.fill("#labels li:first-child input", "a hand")
    assert page.inner_text("#labels output") == ""  # a score of another label must not stand there


def test_what_is_no_image_is_said(visit: Callable[..., Any], server: Running, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing to see")
    page = visit(server.url, expected="400")
    page.set_input_files("#file", tmp_path / "notes.txt")
    page.wait_for_selector("#image-error:not([hidden])")
    assert "notes.txt: The image is no image that medge knows" in page.inner_text("#image-error")


def test_a_key_is_asked_for(visit: Callable[..., Any], scripted: Script) -> None:
    with scripted(("fine",), key="a-key-that-nobody-guesses") as (_, server):
        page = visit(server.url, expected="401")
        page.wait_for_selector("#key-form:not([hidden])")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("#page-error:not([hidden])")
        page.fill("#key", "a-key-that-nobody-guesses")
        page.press("#key", "Enter")
        page.wait_for_selector("#ask:not([hidden])")
        assert page.is_hidden("#zero-shot")
        assert ask(page, "How are you?") == "fine"


def test_it_is_usable_without_a_mouse_and_named_for_readers(visit: Callable[..., Any], server: Running) -> None:
    page = visit(server.url)
    page.wait_for_selector("#main:not([hidden])")
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert {"file", "generator", "question", "send", "embedder", "score", "add", "multilabel", "template"} <= {*reached}
    unnamed = """() => [...document.querySelectorAll("input, textarea, select, button, [role]")]
        .filter((e) => e.checkVisibility() && !(e.labels?.length || e.ariaLabel || e.textContent.trim()))
        .map((e) => e.outerHTML)"""
    assert page.evaluate(unnamed) == ['<p id="latency" class="hint" role="status">&nbsp;</p>']


def test_a_server_that_is_gone_is_said(visit: Callable[..., Any], scripted: Script) -> None:
    with scripted(("fine",)) as (_, server):
        page = visit(server.url, expected="ERR_CONNECTION_REFUSED")
        page.wait_for_selector("#ask:not([hidden])")
    page.fill("#question", "Are you there?")
    page.click("#send")
    page.wait_for_selector("#ask-error:not([hidden])")
    assert "cannot be reached" in page.inner_text("#ask-error")
    assert page.input_value("#question") == "Are you there?"
