"""The pages in a real browser: filters and curves react to clicks, nothing but the page's own code runs, and every
width and print hold all of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from pages import EVIL, fill, log, record
from PIL import Image

from povid.preferences.show import write_page as write_preferences
from povid.preferences.triple import Triple, Turn
from povid.report import samples
from povid.report.page import write_page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("POVID_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found; install one or set POVID_CHROMIUM")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """opened(file, width) -> the page in a window of that width; its console and its requests have to stay empty."""
    pages, said, asked = [], [], []

    def _opened(file: Path, width: int):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        pages.append(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("window.hacked") is None
        return page

    yield _opened
    assert not said
    assert all(url.startswith(("file:", "data:")) for url in asked)
    for page in pages:
        page.close()


@pytest.fixture
def report(write, outputs) -> Path:
    first, second = record(1, "A dog.", "A cat."), record(2, "A cat.", EVIL + " A fork.")
    for seed in range(2):
        fill(write("text", seed), first, second)
        log(fill(write("both", seed), first | {"after": "A dog."}, second), 2)
    return write_page(outputs)


def shown(page, what: str) -> int:
    return page.locator(f"{what}:visible").count()


def test_filters_select_captions(report, opened):
    page = opened(report, 1400)
    captions, search = ".entry[data-change]", page.get_by_role("searchbox")
    assert shown(page, captions) == 8 and shown(page, "article.sample") == 2
    page.get_by_label("better").check()
    assert shown(page, captions) == 2 and shown(page, "article.sample") == 1
    assert page.locator("output").inner_text() == "2 of 8 captions"
    page.get_by_label("worse").check()
    assert shown(page, captions) == 4 and "<script>" in page.locator("article.sample:visible").inner_text()
    page.get_by_label("Row").select_option(label="both")
    assert shown(page, captions) == 2
    search.fill("zebra")
    assert shown(page, captions) == 0 and page.get_by_text("No caption passes").is_visible()
    search.press("Enter")  # sends no form
    search.fill("FORK")
    assert shown(page, captions) == 2 and page.locator("article.sample:visible mark").count() > 0
    page.get_by_label("all", exact=True).check()
    page.get_by_label("Row").select_option("")
    search.fill("")
    assert shown(page, captions) == 8


def test_curves_react_and_print(report, opened, tmp_path):
    page = opened(report, 1400)
    page.wait_for_selector("#curves[data-ready]")
    page.wait_for_function("document.querySelectorAll('.panel .main-svg').length >= 4 * 3")
    lines = ".panel[data-panel='0'] .scatterlayer .trace"
    assert page.locator(lines).count() == 6  # four runs and two means
    page.locator(".legend label", has_text="text").click()
    assert page.locator(lines).count() == 3
    page.locator(".panel[data-panel='0'] button").click()
    page.wait_for_function("document.querySelector('.panel .main-svg').clientWidth > 1000")
    page.locator("details.run").first.locator("summary").click()
    assert page.get_by_text("torch 2.13.0").first.is_visible()
    page.locator("section.scores .every").check()
    assert page.get_by_role("columnheader", name="MM-Vet").first.is_visible()
    printed = page.pdf(path=tmp_path / "page.pdf", format="A4")
    assert printed.startswith(b"%PDF") and len(printed) > 30_000
    assert page.evaluate("document.querySelector('.panel .main-svg').clientWidth") < 400  # back to the size that prints


def test_only_the_pages_own_code_runs(report, browser):
    """A script that was smuggled into the page in spite of all escaping is refused."""
    page = browser.new_page()
    text = report.read_text()
    smuggled = report.with_name("smuggled.html")
    smuggled.write_text(
        text.replace("</main>", "<script>window.hacked = 1</script><img src=x onerror=hacked=1></main>")
    )
    refused = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(smuggled.as_uri())
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert sum("Content Security Policy" in text for text in refused) >= 2
    page.close()


def test_every_page_fits_a_phone(write, outputs, opened, tmp_path):
    run = write("text", 0)
    words = "x" * 300  # nothing to break at
    log(run, 1)
    samples.write(run, [record(1, words, f"A {words}.", id=words, image=Image.new("RGB", (640, 480)))])
    samples.write_captions(run, words, words)
    asked = Turn("user", words)
    triple = Triple(words, b"no picture", (asked, Turn("assistant", words)), (asked, Turn("assistant", EVIL)))
    write_preferences([triple], tmp_path / "preferences.html", title=words, noise_steps=())
    (run / "config.yaml").write_text(json.dumps({words: words}))
    for file in (write_page(outputs), run / "captions.html", tmp_path / "preferences.html"):
        page = opened(file, 400)
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, file.name
        assert page.locator("h1").is_visible()
