"""A polite scraper: pages of named sites, breadth first, to rows of a CSV or JSONL file.

Scrapy fetches (data/crawl.py, in a process of its own); this file holds what is asked for, which page comes next, and
the journal. Every page is written down as it comes, so a killed run goes on where it stopped and fetches no page again
that was written down; the rows are made from the journal at the end, in the order in which pages were found, so the
same site gives the same bytes.

Polite: robots.txt is always obeyed (RFC 9309: where it cannot be fetched the site is closed), also its Crawl-delay; one
page at a time and a second between pages unless set otherwise; Retry-After is waited for. Safe: only the named sites,
also after a redirect; no private address unless ``allow_private``, checked on the address that is connected to, so no
name can lead inside. Not done: JavaScript, logins, cookies, proxies, sitemaps.
"""

import csv
import importlib.util
import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urlsplit

from modelwright.base.config import build, load, to_dict
from modelwright.base.errors import ConfigError, DataError, MissingExtraError
from modelwright.base.files import atomic_file, hash_file, write_json
from modelwright.base.progress import bar
from modelwright.data.entry import Failure
from modelwright.data.page_fields import ItemConfig, check_regexes, check_selectors

MAX_REDIRECTS = 10
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class ScrapeConfig:
    """Which pages are fetched, how, and what is taken from them."""

    start_urls: tuple[str, ...]
    allowed_domains: tuple[str, ...] = ()  # with their subdomains, host or host:port; none: the hosts of start_urls
    follow: tuple[str, ...] = ()  # regular expressions; a link that matches one is followed; none: all on the sites
    ignore: tuple[str, ...] = ()  # regular expressions; a link that matches one is not
    item: ItemConfig | None = None  # None: no fields, only text
    text: bool = False  # keep the main text of each page that gives a row, as "text"
    user_agent: str = "modelwright-scraper"
    delay_seconds: float = 1.0  # between two pages of a host; robots.txt may ask for more
    concurrency: int = 1  # pages of a host at a time
    retries: int = 3  # after 429, 5xx and broken connections
    timeout_seconds: float = 30.0
    max_wait_seconds: float = 300.0  # a site that asks for a longer wait is left
    max_pages: int = 1000
    max_depth: int = 10  # links away from the start
    max_page_bytes: int = 8 * 10**6
    allow_private: bool = False  # let addresses of this machine and its network be fetched
    licence: str = ""  # of what is scraped, for the manifest

    def __post_init__(self) -> None:
        if not self.start_urls:
            raise ConfigError("start_urls is empty; name at least one page, such as https://example.org/.")
        for url in self.start_urls:
            if urlsplit(url).scheme not in _PORTS or not urlsplit(url).hostname:
                raise ConfigError(
                    f"start_urls holds {url!r}; expected an address that begins with http:// or https://."
                )
        if self.item is None and not self.text:
            raise ConfigError("Neither item nor text is set; say which fields to take, or text: true for the text.")
        numbers = (self.concurrency, self.timeout_seconds, self.max_pages, self.max_page_bytes)
        if min(numbers) <= 0 or min(self.delay_seconds, self.retries, self.max_depth, self.max_wait_seconds) < 0:
            raise ConfigError(
                "concurrency, timeout_seconds, max_pages and max_page_bytes must be above 0, the others not below 0."
            )
        check_regexes("follow", list(self.follow))
        check_regexes("ignore", list(self.ignore))


def why_not(url: str, config: ScrapeConfig) -> str:
    """Say why an address is not fetched; empty if it may be."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip(".").lower(), parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError:
        return "is no address"
    if parts.scheme not in _PORTS or not host:
        return "is no address of the web"
    if parts.username or parts.password:
        return "carries a user name"
    if not any(_is_within(host, port, allowed) for allowed in config.allowed_domains or config.start_urls):
        return "leads off the site"
    if not config.allow_private and is_private(host):
        return "is a private address; allow_private is off"
    return ""


def _is_within(host: str, port: int, allowed: str) -> bool:
    parts = urlsplit(allowed if "://" in allowed else f"//{allowed}")
    name = (parts.hostname or "").rstrip(".").lower()
    ports = {parts.port} if parts.port else set(_PORTS.values())
    is_start = "://" in allowed  # the start's host itself, not what lies below it
    return port in ports and (host == name or (not is_start and host.endswith(f".{name}")))


def is_private(host: str) -> bool:
    """Tell whether a numeric address is not one of the public network; names are looked up when they are fetched."""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return False


@dataclass(frozen=True)
class Page:
    """What became of one address."""

    url: str
    links: list[str] = field(default_factory=list)  # to follow, in the order of the page
    redirect: str = ""  # where it leads instead
    items: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # of its items
    failure: str = ""  # why it could not be read
    is_final: bool = True  # False: another run may have more luck
    hash: str = ""  # SHA-256 of the body
    fetched: str = ""  # when, in UTC


class Frontier:
    """The pages in the order in which they were found, wave by wave; what is known decides what comes next."""

    def __init__(self, config: ScrapeConfig, known: Mapping[str, Page] | None = None):
        self.config = config
        self.known = dict(known or {})
        self._depths: dict[str, tuple[int, int]] = {}  # links from the start, and redirects in a row
        self._wave: list[str] = []
        for url in config.start_urls:
            self._add(urldefrag(url)[0], 0, 0, self._wave)

    def missing(self) -> list[str]:
        """Return the pages of the first wave that is not known whole; empty at the end."""
        while self._wave:
            left = [url for url in self._wave if url not in self.known]
            if left:
                return left
            following: list[str] = []
            for url in self._wave:
                page, (depth, hops) = self.known[url], self._depths[url]
                if page.redirect and hops < MAX_REDIRECTS:
                    self._add(page.redirect, depth, hops + 1, following)
                for link in page.links if depth < self.config.max_depth else []:
                    self._add(link, depth + 1, 0, following)
            self._wave = following
        return []

    def _add(self, url: str, depth: int, hops: int, wave: list[str]) -> None:
        if url not in self._depths and len(self._depths) < self.config.max_pages:
            self._depths[url] = (depth, hops)
            wave.append(url)

    def pages(self) -> Iterator[Page]:
        """Yield what is known in order of finding."""
        yield from (self.known[url] for url in self._depths if url in self.known)


def read_journal(path: Path) -> dict[str, Page]:
    """Return the pages that a journal holds, and cut off a line that a killed run left half written."""
    pages: dict[str, Page] = {}
    with open(path, "rb+") as handle:
        end = 0
        for line in iter(handle.readline, b""):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            row = json.loads(line)
            if "url" in row:
                pages[row["url"]] = Page(**row)
        handle.truncate(end)
    return {url: page for url, page in pages.items() if page.is_final}


@dataclass(frozen=True)
class ScrapeResult:
    """What a run made."""

    out: Path
    num_pages: int  # all that were read, now or before
    num_fetched: int  # of these now
    num_items: int
    failures: list[Failure]


def read_spec(path: Path, arguments: tuple[str, ...] = ()) -> ScrapeConfig:
    """Read the settings from a YAML file.

    Raises:
        ConfigError: A name or value in it is wrong.
    """
    return load(ScrapeConfig, path, arguments)


def scrape(config: ScrapeConfig, out: Path, *, fresh: bool = False) -> ScrapeResult:
    """Fetch the pages and write their rows to ``out``, a .jsonl or .csv file.

    Beside it lie ``out.pages.jsonl`` (the journal), ``out.failures.jsonl`` and ``out.manifest.json``. Run again after a
    kill it goes on; when all is fetched it only writes the rows again. ``fresh`` forgets what was fetched.

    Raises:
        ConfigError: The suffix is another one, or a selector is wrong.
        DataError: The journal belongs to other settings, or nothing at all could be fetched.
        MissingExtraError: Scrapy is not installed.
    """
    out = Path(out)
    if out.suffix not in (".jsonl", ".csv"):
        raise ConfigError(f"--out is {out}; expected a file that ends in .jsonl or .csv.")
    if importlib.util.find_spec("scrapy") is None:
        raise MissingExtraError("scrapy", "scrape", "Scraping")
    if config.item is not None:
        check_selectors(config.item)
    out.parent.mkdir(parents=True, exist_ok=True)
    journal = out.with_name(out.name + ".pages.jsonl")
    known = _open_journal(journal, config, fresh)
    frontier = Frontier(config, known)
    num_fetched = 0
    if frontier.missing():
        num_fetched = _run_crawler(config, journal)
        frontier = Frontier(config, read_journal(journal) | _last_failures(journal))
        frontier.missing()
    pages = list(frontier.pages())
    failures = [Failure(p.url, p.failure) for p in pages if p.failure]
    failures += [Failure(p.url, problem) for p in pages for problem in p.problems]
    num_read = sum(not p.failure for p in pages)
    if not num_read:
        reasons = "; ".join(f"{failure.path} {failure.reason}" for failure in failures[:5])
        raise DataError(
            f"No page could be fetched: {reasons or 'the crawler gave none'}. Check start_urls and the network."
        )
    rows = [item for page in pages for item in page.items]
    _write_rows(out, rows, config)
    _write_report(out, config, failures, num_read, len(rows))
    return ScrapeResult(out, num_read, num_fetched, len(rows), failures)


def _open_journal(path: Path, config: ScrapeConfig, fresh: bool) -> dict[str, Page]:
    settings = to_dict(config)
    if fresh:
        path.unlink(missing_ok=True)
    if path.is_file() and path.stat().st_size:
        known = read_journal(path)
        with open(path, encoding="utf-8") as handle:
            first = handle.readline()
        if first and json.loads(first).get("settings") == json.loads(json.dumps(settings)):
            return known
        if first:
            raise DataError(
                f"{path} was made with other settings than these. Give another --out, or --fresh to fetch all anew."
            )
    with open(path, "w", encoding="utf-8") as handle:
        handle.write(json.dumps({"settings": settings}) + "\n")
    return {}


def _last_failures(path: Path) -> dict[str, Page]:
    """Return the pages that failed for now, which the reader of a journal leaves out so that they are tried again."""
    with open(path, encoding="utf-8") as handle:
        rows = [json.loads(line) for line in handle]
    last = {row["url"]: Page(**row) for row in rows if "url" in row}
    return {url: page for url, page in last.items() if not page.is_final}


def _run_crawler(config: ScrapeConfig, journal: Path) -> int:
    """Run data/crawl.py on the journal until it ends, and return how many pages it wrote down."""
    job = {"config": to_dict(config), "journal": str(journal)}
    command = [sys.executable, "-c", "from modelwright.data.crawl import main; main()"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    count = 0
    try:
        # The pipe stays open while we live; the crawler ends itself when it closes.
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
        with bar("pages") as shown:
            for line in process.stdout:
                count += 1
                shown.describe(line.decode("utf-8", "replace").strip()[:80])
                shown.advance()
        said = process.stderr.read().decode("utf-8", "replace").strip()
        if process.wait():
            kind, _, message = (said.splitlines() or ["no message"])[-1].partition(": ")
            raise DataError(f"The crawler ended with {process.returncode}: {kind}: {message}. Run again to go on.")
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()
    return count


def _write_rows(out: Path, rows: list[dict[str, Any]], config: ScrapeConfig) -> None:
    if out.suffix == ".jsonl":
        with atomic_file(out) as handle:
            for row in rows:
                handle.write(json.dumps(row, ensure_ascii=False) + "\n")
        return
    names = ["id", "url", *(config.item.fields if config.item else ()), *(["text"] if config.text else ())]
    with atomic_file(out) as handle:
        writer = csv.DictWriter(handle, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: " | ".join(v) if isinstance(v, list) else v for k, v in row.items()})


def _write_report(out: Path, config: ScrapeConfig, failures: list[Failure], num_pages: int, num_items: int) -> None:
    with atomic_file(out.with_name(out.name + ".failures.jsonl")) as handle:
        for failure in failures:
            handle.write(json.dumps({"path": failure.path, "reason": failure.reason}, ensure_ascii=False) + "\n")
    manifest = {
        "kind": "scrape",
        "settings": to_dict(config),
        "licence": config.licence,
        "sha256": hash_file(out),
        "measured": {"num_pages": num_pages, "num_items": num_items, "num_failures": len(failures)},
    }
    write_json(out.with_name(out.name + ".manifest.json"), manifest)


def append_page(handle: Any, page: Page) -> None:
    """Write one page down, for good."""
    handle.write(json.dumps(to_dict(page), ensure_ascii=False) + "\n")
    handle.flush()
    os.fsync(handle.fileno())


def build_config(values: Mapping[str, Any]) -> ScrapeConfig:
    """Return the settings from plain values."""
    return build(ScrapeConfig, values)
