"""The scraper on a site of our own: robots.txt, waits, a kill in the middle, fields, and nothing off the site."""

import contextlib
import csv
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from modelwright.base.errors import ConfigError, DataError, MissingExtraError
from modelwright.data.page_fields import FieldConfig, ItemConfig, extract_items, parse_number
from modelwright.data.scrape import Frontier, Page, ScrapeConfig, is_private, read_journal, read_spec, scrape, why_not
from modelwright.data.source import iterate_documents

RECIPE = Path(__file__).parents[2] / "recipes" / "data" / "listings.yaml"
NUM_LISTINGS, PER_PAGE = 7, 3
ROBOTS = "User-agent: *\nDisallow: /listing/5\n"


def listing_page(number):
    return f"""<html><body><nav><a href="/listings">All</a></nav><main><h1>House {number}</h1>
    <p class="price">EUR {100 + number},{number}00.50</p><p class="facts">With {number} rooms and a view</p>
    <table><tr><td>Area</td><td>{50 + number}.5 m2</td></tr></table><address>{number} Long Lane</address>
    <ul class="features"><li>garden</li><li>cellar {number}</li></ul><img src="/pictures/{number}.jpg">
    <p>A house of {number} rooms on a quiet lane, close to the school and the station, newly painted in spring.</p>
    </main></body></html>"""


def index_page(page):
    first = (page - 1) * PER_PAGE + 1
    numbers = range(first, min(first + PER_PAGE, NUM_LISTINGS + 1))
    links = "".join(f'<a href="/listing/{n}#top">House {n}</a> ' for n in numbers)
    last = f'<a href="/listings?page={page + 1}">next</a>' if first + PER_PAGE <= NUM_LISTINGS else ""
    others = (
        '<a href="/listings?sort=price">by price</a> <a href="http://127.0.0.1:1/x">away</a> <a href="mailto:x@y">m</a>'
    )
    return f"<html><body>{links}{last}{others}</body></html>"


class Site(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked = []
        self.times = []
        self.answers = {}  # path -> list of (status, headers, body) given one after another, the last for ever
        self.robots = (200, {}, ROBOTS)

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        site = self.server
        site.asked.append(self.path)
        site.times.append(time.monotonic())
        status, headers, body = self.find()
        data = body if isinstance(body, bytes) else body.encode()
        self.send_response(status)
        for name, value in {"Content-Type": "text/html; charset=utf-8", "Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)

    def find(self):
        site, path = self.server, self.path
        if path in site.answers:
            given = site.answers[path]
            return given.pop(0) if len(given) > 1 else given[0]
        if path == "/robots.txt":
            return site.robots
        if path.startswith("/listings"):
            return 200, {}, index_page(int(path.partition("page=")[2] or 1))
        if path.startswith("/listing/"):
            return 200, {}, listing_page(int(path.rpartition("/")[2]))
        return 404, {}, "not here"

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving():
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def site():
    pytest.importorskip("scrapy")
    with serving() as server:
        yield server


def config_for(site, **changes):
    config = read_spec(RECIPE)
    return replace(config, start_urls=(f"{site.address}/listings",), delay_seconds=0.02, **changes)


def test_the_listings_become_rows_and_the_site_is_treated_politely(site, tmp_path):
    site.answers["/listing/3"] = [(503, {"Retry-After": "1"}, "busy"), (200, {}, listing_page(3))]
    site.answers["/listing/6"] = [(200, {}, "<html><body><h1>No price</h1></body></html>")]
    result = scrape(config_for(site), tmp_path / "listings.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "listings.jsonl").read_text().splitlines()]
    assert [row["title"] for row in rows] == [f"House {n}" for n in (1, 2, 3, 4, 7)]  # in the order of the site
    assert rows[1] == {
        "id": f"{site.address}/listing/2",
        "url": f"{site.address}/listing/2",
        "title": "House 2",
        "price": 102200.5,
        "rooms": 2,
        "area": 52.5,
        "address": "2 Long Lane",
        "features": ["garden", "cellar 2"],
        "picture": f"{site.address}/pictures/2.jpg",
        "text": rows[1]["text"],
    }
    assert "close to the school" in rows[1]["text"]
    reasons = {f.path.removeprefix(site.address): f.reason for f in result.failures}
    assert reasons["/listing/5"] == "robots.txt forbids it" and "has no price" in reasons["/listing/6"]
    assert "/listing/5" not in site.asked and "/listings?sort=price" not in site.asked
    assert site.asked[0] == "/robots.txt" and site.asked.count("/robots.txt") == 1
    first, second = (i for i, path in enumerate(site.asked) if path == "/listing/3")
    assert site.times[second] - site.times[first] >= 1.0  # as Retry-After asked, and nobody else was asked meanwhile
    assert second == first + 1
    assert len(set(site.asked)) == len(site.asked) - 1
    assert (result.num_items, result.num_fetched) == (5, 10)
    documents = list(iterate_documents(tmp_path / "listings.jsonl"))
    assert [d.metadata["price"] for d in documents][0] == 101100.5 and documents[0].id.endswith("/listing/1")
    manifest = json.loads((tmp_path / "listings.jsonl.manifest.json").read_text())
    assert manifest["measured"] == {"num_pages": 9, "num_items": 5, "num_failures": 2} and len(manifest["sha256"]) == 64
    asked = len(site.asked)
    again = scrape(config_for(site), tmp_path / "listings.jsonl")  # all is known: only the rows are written again
    assert again.num_fetched == 0 and len(site.asked) == asked and again.num_items == 5
    with pytest.raises(DataError, match="other settings"):
        scrape(config_for(site, max_depth=3), tmp_path / "listings.jsonl")


def test_a_killed_run_goes_on_and_fetches_nothing_twice(site, tmp_path):
    out = tmp_path / "listings.csv"
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        RECIPE.read_text()
        .replace("http://127.0.0.1:8000", site.address)
        .replace("delay_seconds: 1.0", "delay_seconds: 0.2")
    )
    code = (
        "import sys; from pathlib import Path; from modelwright.data.scrape import *; "
        "scrape(read_spec(Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(spec), str(out)])
    journal = tmp_path / "listings.csv.pages.jsonl"
    until = time.monotonic() + 30
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 4) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # the crawler notices that its parent is gone, and asks nothing more
    before = list(site.asked)
    assert not out.exists() and 3 <= len(before) < NUM_LISTINGS + 3
    with open(journal, "ab") as handle:
        handle.write(b'{"url": "half a li')  # as a kill in the middle of a write leaves it
    result = scrape(read_spec(spec), out)
    assert result.num_fetched < 10 and not result.num_fetched == 0
    pages = [path for path in site.asked if path != "/robots.txt"]
    assert len(pages) - len(set(pages)) <= 1  # the one that was under way when the kill came, if any
    with open(out, newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["title"] for row in rows] == [f"House {n}" for n in (1, 2, 3, 4, 6, 7)]  # as if nothing had happened
    assert rows[0]["features"] == "garden | cellar 1" and rows[0]["price"] == "101100.5"


def test_nothing_off_the_site_is_fetched_also_after_a_redirect(site, tmp_path):
    with serving() as other:
        site.robots = (404, {}, "")
        site.answers["/listings"] = [
            (
                200,
                {},
                "".join(f'<a href="/listing/{n}">x</a>' for n in range(11, 19)) + f'<a href="{other.address}/">o</a>',
            )
        ]
        elsewhere = {
            11: (302, {"Location": f"{other.address}/secret"}, ""),
            12: (301, {"Location": "http://169.254.169.254/latest/meta-data/"}, ""),
            13: (302, {"Location": "file:///etc/passwd"}, ""),
            14: (302, {"Location": "/listing/1"}, ""),
            15: (302, {"Location": "/listing/15"}, ""),
            16: (200, {}, "x" * 60_000),
            17: (200, {"Content-Type": "application/pdf"}, b"%PDF-1.4"),
            18: (404, {}, ""),
        }
        for number, answer in elsewhere.items():
            site.answers[f"/listing/{number}"] = [answer]
        result = scrape(config_for(site, text=False, max_page_bytes=50_000), tmp_path / "x.jsonl")
        reasons = {f.path.rpartition("/")[2]: f.reason for f in result.failures}
        assert not other.asked
        assert "leads off the site" in reasons["11"] and "leads off the site" in reasons["12"]
        assert "no address of the web" in reasons["13"] and "larger than max_page_bytes" in reasons["16"]
        assert "application/pdf, not a page" in reasons["17"] and reasons["18"] == "answers 404"
        rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
        assert [row["title"] for row in rows] == ["House 1"]


def test_a_name_that_leads_to_a_private_address_is_refused_at_the_connection(site, tmp_path):
    port = site.server_address[1]
    config = config_for(site, allow_private=False, retries=0)
    with pytest.raises(DataError, match=r"No page could be fetched(.|\n)*private address"):
        scrape(replace(config, start_urls=(f"http://localhost:{port}/listings",)), tmp_path / "x.jsonl")
    assert not site.asked


CLOSED = {
    "robots.txt answers 503, so the site is closed": (503, {}, ""),
    "robots.txt forbids it": (200, {}, "User-agent: *\nDisallow: /"),
    "robots.txt asks for 900 s between pages": (200, {}, "User-agent: *\nCrawl-delay: 900"),
    "robots.txt leads off the site": (302, {"Location": "http://169.254.169.254/"}, ""),
}


def test_a_closed_site_is_left_alone(site, tmp_path):
    with contextlib.ExitStack() as stack:
        sites = [stack.enter_context(serving()) for _ in CLOSED]
        for closed, robots in zip(sites, CLOSED.values(), strict=True):
            closed.robots = robots
        starts = tuple(f"{closed.address}/listings" for closed in sites)
        with pytest.raises(DataError, match="No page could be fetched"):
            scrape(replace(config_for(site, retries=0), start_urls=starts), tmp_path / "x.jsonl")
        assert [closed.asked for closed in sites] == [["/robots.txt"]] * len(CLOSED)
    pages = [json.loads(line) for line in (tmp_path / "x.jsonl.pages.jsonl").read_text().splitlines()[1:]]
    for page, reason in zip(sorted(pages, key=lambda page: starts.index(page["url"])), CLOSED, strict=True):
        assert reason in page["failure"]


def test_which_addresses_are_fetched():
    config = ScrapeConfig(("https://example.org/a",), text=True)
    assert not why_not("https://example.org/b", config) and not why_not("http://example.org/", config)
    for url, reason in {
        "https://www.example.org/": "off the site",
        "https://example.org:8443/": "off the site",
        "https://example.org.evil.net/": "off the site",
        "https://user:pw@example.org/": "user name",
        "ftp://example.org/": "no address of the web",
        "https://example.org:99999/": "no address",
        "https://[::1/": "no address",
    }.items():
        assert reason in why_not(url, config), url
    wide = replace(config, allowed_domains=("example.org", "127.0.0.1:80", "[::1]:80", "10.0.0.1"))
    assert not why_not("https://www.example.org/", wide) and "off the site" in why_not("https://badexample.org/", wide)
    for url in ("http://127.0.0.1/", "http://[::1]/", "http://10.0.0.1/"):
        assert "private" in why_not(url, wide)
    assert is_private("::ffff:127.0.0.1") and is_private("169.254.169.254") and not is_private("8.8.8.8")


def test_the_frontier_goes_wave_by_wave_within_its_limits():
    config = ScrapeConfig(("http://a/0",), text=True, max_pages=5, max_depth=2)
    frontier = Frontier(config)
    assert frontier.missing() == ["http://a/0"]
    frontier.known["http://a/0"] = Page("http://a/0", links=["http://a/1", "http://a/2", "http://a/1", "http://a/0"])
    assert frontier.missing() == ["http://a/1", "http://a/2"]
    frontier.known["http://a/2"] = Page("http://a/2", links=["http://a/4"])
    assert frontier.missing() == ["http://a/1"]  # the wave is not whole
    frontier.known["http://a/1"] = Page("http://a/1", redirect="http://a/3")
    assert frontier.missing() == ["http://a/3", "http://a/4"]  # in the order of the wave, not of the answers
    for name in "34":
        frontier.known[f"http://a/{name}"] = Page(f"http://a/{name}", links=["http://a/5", "http://a/6"])
    assert frontier.missing() == []  # 3 stands in for 1, one link away, but five pages are all
    assert [page.url[-1] for page in frontier.pages()] == list("01234")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_urls": ()}, "start_urls is empty"),
        ({"start_urls": ("example.org",)}, "begins with http"),
        ({"text": False}, "Neither item nor text"),
        ({"delay_seconds": -1.0}, "not below 0"),
        ({"follow": ("(",)}, "no regular expression"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(ScrapeConfig(("https://example.org/",), text=True), **changes)


def test_wrong_fields_and_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="exactly one"):
        FieldConfig(css="a", xpath="//a")
    with pytest.raises(ConfigError, match="every row has already"):
        ItemConfig({"url": FieldConfig(css="a")})
    config = ScrapeConfig(("https://example.org/",), text=True)
    with pytest.raises(ConfigError, match="ends in .jsonl or .csv"):
        scrape(config, tmp_path / "x.txt")
    monkeypatch.setitem(sys.modules, "scrapy", None)
    with pytest.raises(MissingExtraError, match=r"modelwright\[scrape\]"):
        scrape(config, tmp_path / "x.csv")


def test_a_wrong_selector_is_refused_before_anything_is_fetched(tmp_path):
    pytest.importorskip("parsel")
    for field in (FieldConfig(css="p[["), FieldConfig(xpath="//p[")):
        config = ScrapeConfig(("https://example.org/",), item=ItemConfig({"price": field}))
        with pytest.raises(ConfigError, match=r"item.price is '(p\[\[|//p\[)', which is no selector"):
            scrape(config, tmp_path / "x.jsonl")
    assert not list(tmp_path.iterdir())


def test_several_items_of_a_page_and_numbers_in_two_notations():
    parsel = pytest.importorskip("parsel")
    page = parsel.Selector(
        '<div class="x"><b>EUR 1.250,50</b></div><div class="x"><b>call us</b></div><div class="x"></div>'
    )
    fields = {"price": FieldConfig(css="b::text", type="number", decimal_mark=",")}
    found = extract_items(page, ItemConfig(fields, each=".x"), "http://a/")
    assert [(item["id"], item["price"]) for item in found.items] == [
        ("http://a/#1", 1250.5),
        ("http://a/#2", None),
        ("http://a/#3", None),
    ]
    assert found.problems == ["item 2: price is 'call us', which is no number"]
    assert parse_number("$1,250,000", FieldConfig(css="b", type="integer")) == 1250000
    assert parse_number("-3 degrees", FieldConfig(css="b", type="integer")) == -3
    for text in ("3 to 5", "none"):
        with pytest.raises(ValueError, match=text):
            parse_number(text, FieldConfig(css="b", type="integer"))


def test_a_damaged_journal_loses_only_its_last_line(tmp_path):
    path = tmp_path / "j"
    path.write_text(
        '{"settings": {}}\n{"url": "a"}\n{"url": "b", "failure": "busy", "is_final": false}\n{"url": "c", "li'
    )
    assert list(read_journal(path)) == ["a"] and path.read_bytes().count(b"\n") == 3
