"""A person's way through the page: asks, reads, opens a citation, goes back; with a mouse, a keyboard, a phone."""

import itertools
import re
import time

import pytest

from modelwright.serve.app import ServeConfig, create_app
from modelwright.studio import PAGE

pytestmark = pytest.mark.service

SIZES = {"desktop": {"width": 1280, "height": 800}, "phone": {"width": 360, "height": 740}}
WRAP = "What does textwrap.wrap do?"


def ask(page, question):
    page.fill("#question", question)
    page.keyboard.press("Enter")
    page.wait_for_selector("#conversation[aria-busy=false]")


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_looks_right_and_has_no_serious_findings(open_page, quotes, tmp_path, size, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    # axe needs to put its script into the page, which the page's own policy rightly forbids.
    page = open_page(quotes, viewport=SIZES[size], color_scheme=scheme, bypass_csp=True, reduced_motion="reduce")

    def check(name):
        found = axe.Axe().run(page).response["violations"]
        serious = [(v["id"], v["nodes"][0]["target"]) for v in found if v["impact"] in ("serious", "critical")]
        assert serious == [], name
        assert overflow(page) <= 0, name
        shot = tmp_path / f"{name}.png"
        page.screenshot(path=shot)
        assert shot.stat().st_size > 8_000

    check("welcome")
    ask(page, WRAP)
    page.wait_for_selector("button.cite")
    check("answer")
    page.click("button.cite >> nth=0")
    page.wait_for_selector("mark")
    check("document")
    page.keyboard.press("Escape")
    ask(page, "Who won the chess championship of Uruguay?")
    check("unsupported")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 200) == (scheme == "dark")


def test_the_accessibility_check_finds_what_is_wrong(open_page, quotes):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = open_page(quotes, bypass_csp=True)
    page.evaluate("""() => {
        document.querySelector('label').remove();
        document.getElementById('question').removeAttribute('placeholder');
        document.getElementById('lead').style.color = '#ccc';
    }""")
    found = {v["id"] for v in axe.Axe().run(page).response["violations"]}
    assert {"label", "color-contrast"} <= found


def test_an_answer_streams_in_and_its_citation_opens_the_passage(open_page, quotes, index):
    page = open_page(quotes)
    assert page.inner_text("#badge-mode") == "Exact quotes"
    assert "word for word from 4 documents" in page.inner_text("#lead")
    ask(page, WRAP)
    assert "textwrap.wrap wraps a single paragraph" in page.inner_text(".answer")
    assert "The answer is complete" in page.inner_text("#status")
    page.click(".answer button.cite >> nth=0")
    page.wait_for_selector("mark")
    document = index.document("library/textwrap.md")
    shown = page.evaluate("document.getElementById('panel-text').textContent")
    assert shown == document.text
    assert page.inner_text("#panel-title") == document.title
    quote = page.evaluate("document.querySelector('mark').textContent")
    assert quote in document.text and "textwrap" in quote
    box, frame = page.locator("mark").bounding_box(), page.locator("#panel-body").bounding_box()
    assert frame["y"] <= box["y"] and box["y"] + box["height"] <= frame["y"] + frame["height"]
    page.mouse.click(20, 400)  # the backdrop
    page.wait_for_selector("#panel:not([open])", state="attached")


def test_the_whole_way_goes_by_keyboard(open_page, quotes):
    page = open_page(quotes)
    focused = "document.activeElement.id || document.activeElement.className || document.activeElement.textContent"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "skip" and page.locator(".skip").bounding_box()["y"] >= 0
    page.keyboard.press("Enter")
    page.keyboard.type("What does textwrap.wrap do?")
    assert page.evaluate(focused) == "question"
    page.keyboard.press("Shift+Enter")
    assert page.input_value("#question").endswith("\n")
    page.keyboard.press("Enter")
    page.wait_for_selector("button.cite")
    page.wait_for_selector("#conversation[aria-busy=false]")
    assert page.evaluate(focused) == "question"  # ready for the next question
    for _ in range(30):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.matches('.answer .cite')"):
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    name = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert re.fullmatch(r"Source \d+: .+\.md", name)
    page.keyboard.press("Enter")
    page.wait_for_selector("mark")
    assert page.evaluate(focused) == "panel-body"
    for _ in range(6):  # the focus stays inside the dialog, or on the browser itself
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('#panel')")
    page.keyboard.press("Escape")
    page.wait_for_selector("#panel:not([open])", state="attached")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == name


def test_an_example_is_asked_with_one_click_and_sources_can_be_stepped_through(open_page, quotes):
    page = open_page(quotes)
    page.click("text=What wraps a single paragraph of text?")
    page.wait_for_selector("button.cite")
    page.wait_for_selector("#conversation[aria-busy=false]")
    num_sources = page.locator(".sources .cite").count()
    assert num_sources >= 2
    page.click(".sources button.cite >> nth=0")
    page.wait_for_selector("mark")
    assert page.inner_text("#panel-place") == f"Source 1 of {num_sources}" and page.is_disabled("#panel-previous")
    page.click("#panel-next")
    page.wait_for_selector("mark")
    assert page.inner_text("#panel-place") == f"Source 2 of {num_sources}"
    page.click("#panel-close")
    page.click("#restart")
    assert page.is_visible("#lead") and page.is_visible("#examples") and page.locator(".exchange").count() == 0


def test_a_document_cannot_bring_a_script(open_page, quotes):
    page = open_page(quotes)
    ask(page, "Who asks about marmalade? <img src=x onerror='window.hacked = 4'>")
    page.wait_for_selector("button.cite")
    assert "<script>" in page.inner_text(".answer")
    page.click("button.cite >> nth=0")
    page.wait_for_selector("mark")
    assert "<img src=x" in page.inner_text("#panel-title")
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#conversation img, #conversation script, #panel img, #panel script").count() == 0


def test_a_long_document_opens_quickly_at_the_right_place(open_page, quotes):
    page = open_page(quotes)
    ask(page, "What is the zanzibar constant?")
    start = time.perf_counter()
    page.click("button.cite >> nth=0")
    page.wait_for_selector("mark")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    seconds = time.perf_counter() - start
    assert "zanzibar constant is exactly forty-two" in page.inner_text("mark")
    assert page.locator("mark").bounding_box()["y"] < 800
    assert page.evaluate("document.getElementById('panel-text').childNodes.length") == 3
    print(f"{len(page.inner_text('#panel-text'))} characters opened in {seconds:.2f} s")
    assert seconds < 5, f"{seconds:.1f} s"


def test_a_server_that_has_gone_is_told_in_words_and_asking_again_works(open_page, start_server, index, config):
    app = create_app(config, None, None, "library", index, PAGE)
    with start_server(app) as url:
        page = open_page(url)
        ask(page, WRAP)
    ask(page, "And textwrap.fill?")
    assert "The server does not answer" in page.inner_text("[role=alert]")
    assert page.is_enabled("#question") and page.is_visible("#send")
    page.keyboard.press("Escape")


def test_a_refused_question_is_told_in_the_servers_words(open_page, quotes):
    page = open_page(quotes)
    page.evaluate("document.getElementById('question').removeAttribute('maxlength')")
    ask(page, "why " * 3000)
    assert "Shorten it" in page.inner_text("[role=alert]")
    page.click("text=Ask again")
    page.wait_for_selector("[role=alert]")
    assert page.locator("[role=alert]").count() == 1


def test_stop_ends_the_answer_and_frees_the_engine(open_page, start_server, engine):
    with start_server(create_app(ServeConfig(), engine, engine.tokenizer, "tiny", None, PAGE)) as url:
        page = open_page(url)
        assert page.inner_text("#badge-mode") == "Model without documents"
        page.fill("#question", "Tell me everything")
        page.keyboard.press("Enter")
        page.wait_for_selector(".answer.is-writing")
        assert page.is_visible("#stop") and not page.is_visible("#send")
        page.click("#stop")
        page.wait_for_selector("#conversation[aria-busy=false]")
        assert "Stopped" in page.inner_text(".exchange .note")
        deadline = time.monotonic() + 10
        while engine.stats().free_blocks < engine.stats().total_blocks and time.monotonic() < deadline:
            time.sleep(0.02)
        assert engine.stats().running == 0 and engine.stats().free_blocks == engine.stats().total_blocks
        assert page.evaluate("document.activeElement.id") == "question"


def test_conversations_are_kept_opened_again_and_deleted(open_page, start_server, engine):
    with start_server(create_app(ServeConfig(), engine, engine.tokenizer, "tiny", None, PAGE)) as url:
        page = open_page(url)

        def ask_model(question):
            page.fill("#question", question)
            page.keyboard.press("Enter")
            page.wait_for_selector(".answer.is-writing")
            page.click("#stop")  # this model would write until its context is full; what it wrote is kept
            page.wait_for_selector("#conversation[aria-busy=false]")

        assert not page.is_visible("#chats")
        ask_model("First <b>question</b>?")
        ask_model("And its second?")
        page.click("#restart")
        ask_model("Another matter?")
        page.reload()
        page.wait_for_selector("#chats:not([hidden])")
        page.click("#chats summary")
        assert page.locator(".chat-name").all_inner_texts() == ["Another matter?", "First <b>question</b>?"]
        page.click("text=First <b>question</b>?")
        page.wait_for_selector(".exchange >> nth=1")
        assert page.locator(".asked").all_inner_texts() == ["First <b>question</b>?", "And its second?"]
        assert all(text.strip() for text in page.locator(".answer").all_inner_texts())
        assert page.locator("[aria-current=true]").count() == 1
        page.click("#chats summary")
        page.set_viewport_size(SIZES["phone"])
        boxes = [page.locator(part).bounding_box() for part in ("#name", "#chats > summary", "#restart", ".chats-box")]
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= SIZES["phone"]["width"] for box in boxes)
        assert all(a["x"] + a["width"] <= b["x"] for a, b in itertools.pairwise(boxes[:3])), (
            "nothing covers its neighbour"
        )
        page.click(".chat-remove >> nth=1")
        assert page.inner_text(".chat-remove >> nth=1") == "Really?"
        page.click(".chat-remove >> nth=1")
        page.wait_for_selector(".chat-name >> nth=1", state="detached")
        assert page.locator(".exchange").count() == 0 and page.is_visible("#lead")


def test_answers_that_a_model_writes_say_so(open_page, start_server, engine, index):
    settings = ServeConfig(answer_mode="generated", num_passages=2)
    with start_server(create_app(settings, engine, engine.tokenizer, "tiny", index, PAGE)) as url:
        page = open_page(url)
        assert page.inner_text("#badge-mode") == "Written by a model"
        assert "It can be wrong" in page.inner_text("#lead")
        page.fill("#question", WRAP)
        page.keyboard.press("Enter")
        page.wait_for_selector("#conversation[aria-busy=false]", timeout=30_000)
        assert page.locator("[role=alert]").count() == 0
