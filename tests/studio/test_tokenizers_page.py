"""The page of tokenizers in a real browser: typing, reading, by keyboard, light and dark, wide and narrow."""

from collections.abc import Iterator

import pytest
from tests.studio.conftest import running

from modelwright.serve.tokenizers_app import create_tokenizers_app
from modelwright.studio import PAGE
from modelwright.tokenizer.subwords import train_unigram, train_wordpiece
from modelwright.tokenizer.train import train_bpe

pytestmark = pytest.mark.service

SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 360, "height": 740}}
TEXT = "The quick brown fox jumps over the lazy dog, again and again: wrap the text. " * 8


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    made = {
        "bpe": train_bpe([TEXT], 330),
        "unigram": train_unigram([TEXT], 360),
        "wordpiece": train_wordpiece([TEXT], 90),
    }
    with running(create_tokenizers_app(made, PAGE)) as url:
        yield url


def shown(page, name):
    return page.inner_text(f"section[aria-labelledby='column-{name}'] .tokens")


def shown_for(page, text):
    """Wait until what is shown is that of a text of this length, in UTF-16 as browsers count."""
    page.wait_for_selector(f"#status[data-chars='{len(text.encode('utf-16-le')) // 2}']", state="attached")


def write(page, text):
    page.fill("#text", text)
    shown_for(page, text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_looks_right_and_has_no_serious_findings(address, open_page, tmp_path, size, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = open_page(address, viewport=SIZES[size], color_scheme=scheme, bypass_csp=True, reduced_motion="reduce")
    write(page, "The lazy 猫 👩‍👩‍👧 wrap(text, width=70)")
    page.click("#ids")
    found = axe.Axe().run(page).response["violations"]
    assert [(v["id"], v["nodes"][0]["target"]) for v in found if v["impact"] in ("serious", "critical")] == []
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 8_000


def test_what_is_typed_is_split_by_every_tokenizer(address, open_page):
    page = open_page(address)
    assert page.inner_text("#badge") == "3 tokenizers"
    write(page, "the lazy cat 猫")
    assert page.locator(".column").count() == 3
    assert "E7" in shown(page, "bpe") and "[UNK]" in shown(page, "wordpiece") and "·" in shown(page, "bpe")
    assert "1 of them unknown" in page.inner_text("section[aria-labelledby='column-wordpiece'] .count")
    assert page.locator("#figures .is-best").count() >= 1  # the fewest among those that lose nothing
    assert "is-best" not in page.locator("#figures tr").nth(2).inner_html()
    assert page.locator("#figures tr").count() == 3 and "bpe: " in page.inner_text("#status")
    page.click("#ids")
    assert page.get_attribute("#ids", "aria-pressed") == "true" and page.locator(".tokens .number").count() > 10
    write(page, "")
    assert page.locator(".column").count() == 0 and page.is_hidden("#figures-box")
    page.click("text=Japanese")
    shown_for(page, "吾輩は猫である。名前はまだ無い。")
    assert page.input_value("#text").startswith("吾輩")


def test_the_keyboard_reaches_everything_and_text_is_never_markup(address, open_page):
    page = open_page(address)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Control+A")
    page.keyboard.type("<img src=x onerror='window.hacked=1'>")
    shown_for(page, "<img src=x onerror='window.hacked=1'>")
    assert page.evaluate("window.hacked") is None and page.locator("#columns img").count() == 0
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "ids"
    page.keyboard.press("Space")
    assert page.get_attribute("#ids", "aria-pressed") == "true"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_server_that_has_gone_is_told_in_words(open_page):
    with running(create_tokenizers_app({"bpe": train_bpe([TEXT], 300)}, PAGE)) as url:
        page = open_page(url)
        write(page, "the dog")
    page.fill("#text", "the other dog")
    page.wait_for_selector("[role=alert]")
    assert "The server does not answer" in page.inner_text("[role=alert]")
