"""The page that looks inside, in a real browser: drawings with words, by keyboard, light and dark, wide and narrow."""

from collections.abc import Iterator

import pytest
import torch
from tests.studio.conftest import running

from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.serve.look_app import create_look_app
from modelwright.studio import PAGE
from modelwright.tokenizer.train import train_bpe

pytestmark = pytest.mark.service
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 360, "height": 740}}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    tokenizer = train_bpe(["The quick brown fox jumps over the lazy dog. " * 8], 330)
    shape = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        max_seq_len=128,
    )
    torch.manual_seed(0)
    with running(create_look_app(PAGE, init_weights(Llama(shape), 0), tokenizer, "toy")) as url:
        yield url


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_looks_right_and_has_no_serious_findings(address, open_page, tmp_path, size, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = open_page(address, viewport=SIZES[size], color_scheme=scheme, bypass_csp=True, reduced_motion="reduce")
    found = axe.Axe().run(page).response["violations"]
    assert [(v["id"], v["nodes"][0]["target"]) for v in found if v["impact"] in ("serious", "critical")] == []
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    page.screenshot(path=tmp_path / f"look-{size}-{scheme}.png", full_page=True)
    assert (tmp_path / f"look-{size}-{scheme}.png").stat().st_size > 20_000


def test_everything_is_drawn_and_said(address, open_page):
    page = open_page(address)
    assert page.inner_text("#badge") == "toy"
    assert page.locator("#ends tr").count() == 5
    assert page.locator("#maps figure").count() == 2
    assert "looks most at" in page.inner_text("#maps")
    assert page.locator("#histograms figure").count() == 4 and "dead" in page.inner_text("#histograms")
    before = page.inner_text("#ends")
    page.select_option("#surface", "bowl")
    page.wait_for_selector("#paths[aria-label^='Paths on bowl']")
    assert page.inner_text("#ends") != before


def test_by_keyboard_and_with_wrong_input(address, open_page):
    page = open_page(address)
    page.focus("#text")
    page.keyboard.press("Control+A")
    page.keyboard.type("<img src=x onerror='window.hacked=1'>")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    page.wait_for_selector("#status[data-layer='1']", state="attached")
    assert page.evaluate("window.hacked") is None
    page.fill("#text", "")
    page.press("#text", "Enter")
    page.wait_for_selector("[role=alert]")
    assert "text must be 1 to 2000 characters" in page.inner_text("[role=alert]")


def test_without_a_model_there_are_optimizers(open_page):
    with running(create_look_app(PAGE)) as url:
        page = open_page(url)
        assert page.inner_text("#badge") == "optimizers" and page.is_hidden("#inside")
