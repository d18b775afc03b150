"""The crawler's own process: Scrapy downloads, one wave of pages after the other, into the journal of data/scrape.py.

Robots.txt, redirects, retries and the choice of pages are decided here, on `scrape.Frontier`; Scrapy's own versions of
them are off, since each answers otherwise than we want (a site whose robots.txt is broken is closed; a redirect is a
page like any other and asked like one; Retry-After counts). Scrapy brings connections, delays per host, time and size
limits, decompression within that size, and selectors.
"""

import asyncio
import datetime
import email.utils
import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urlsplit

import scrapy
from protego import Protego
from scrapy import signals
from scrapy.crawler import CrawlerProcess
from scrapy.exceptions import DontCloseSpider
from scrapy.http import HtmlResponse, Request, Response
from scrapy.resolver import CachingThreadedResolver

from modelwright.data.entry import Unreadable
from modelwright.data.page_fields import PageItems, extract_items
from modelwright.data.parse import parse_html
from modelwright.data.scrape import (
    Frontier,
    Page,
    ScrapeConfig,
    append_page,
    build_config,
    is_private,
    read_journal,
    why_not,
)

MAX_LINKS = 20_000  # of one page
_AGAIN = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524}
_REDIRECTS = {301, 302, 303, 307, 308}


class PublicResolver(CachingThreadedResolver):
    """Looks names up and refuses private addresses: what is checked here is what is connected to."""

    def getHostByName(self, name: str, timeout: Any = ()) -> Any:  # noqa: N802 - Twisted's name
        """Return the address of a host, or fail if it is not public."""
        return super().getHostByName(name, timeout).addCallback(_refuse_private, name)


_refused: set[str] = set()  # names that led to a private address; Scrapy hides the reason


def _refuse_private(address: str, name: str) -> str:
    if is_private(address):
        _refused.add(name.lower())
        raise OSError("a private address")
    return address


def make_settings(config: ScrapeConfig) -> dict[str, Any]:
    """Return the settings of Scrapy that the house's settings come to."""
    resolver = "scrapy.resolver.CachingThreadedResolver" if config.allow_private else f"{__name__}.PublicResolver"
    off = ("COOKIES", "RETRY", "REDIRECT", "METAREFRESH", "HTTPPROXY", "TELNETCONSOLE", "LOG", "REFERER")
    return {
        **{f"{name}_ENABLED": False for name in off},
        "ROBOTSTXT_OBEY": False,  # obeyed here
        "TWISTED_REACTOR": "twisted.internet.asyncioreactor.AsyncioSelectorReactor",
        "DNS_RESOLVER": resolver,
        "TWISTED_DNS_RESOLVER": resolver,
        "SCHEDULER_MEMORY_QUEUE": "scrapy.squeues.FifoMemoryQueue",
        "USER_AGENT": config.user_agent,
        "DOWNLOAD_DELAY": config.delay_seconds,
        "RANDOMIZE_DOWNLOAD_DELAY": False,
        "DOWNLOAD_DELAY_JITTER": 0,
        "CONCURRENT_REQUESTS_PER_DOMAIN": config.concurrency,
        "CONCURRENT_REQUESTS": max(16, config.concurrency),
        "DOWNLOAD_TIMEOUT": config.timeout_seconds,
        "DOWNLOAD_MAXSIZE": config.max_page_bytes,
        "DOWNLOAD_WARNSIZE": 0,
        "DOWNLOAD_FAIL_ON_DATALOSS": True,
        "DOWNLOAD_HANDLERS": {"file": None, "ftp": None, "s3": None, "data": None},
        "EXTENSIONS": {"scrapy.extensions.telnet.TelnetConsole": None},
        "SPIDER_MIDDLEWARES": {
            "scrapy.spidermiddlewares.referer.RefererMiddleware": None,
            "scrapy.spidermiddlewares.depth.DepthMiddleware": None,
        },
        "DOWNLOADER_MIDDLEWARES": {"scrapy.downloadermiddlewares.offsite.OffsiteMiddleware": None},
    }


class PageSpider(scrapy.Spider):
    """Asks the frontier for a wave, fetches it, and asks again."""

    name = "pages"

    def __init__(self, config: ScrapeConfig, journal: Path, **kwargs: Any):
        super().__init__(**kwargs)
        self.config = config
        self.frontier = Frontier(config, read_journal(journal))
        self._journal = open(journal, "a", encoding="utf-8")  # open as long as the process
        self._robots: dict[str, Protego | str] = {}  # by scheme and host: the rules, or why the site is closed
        self._resume_at = 0.0
        self._delays: dict[str, float] = {}  # by host, as robots.txt asks

    @classmethod
    def from_crawler(cls, crawler: Any, *args: Any, **kwargs: Any) -> Any:
        """Make the spider and let it be asked whenever nothing is left to do."""
        spider = super().from_crawler(crawler, *args, **kwargs)
        crawler.signals.connect(spider.on_idle, signal=signals.spider_idle)
        return spider

    async def start(self) -> AsyncIterator[Any]:
        """Begin with nothing; `on_idle` brings the first wave."""
        for request in self.next_requests():
            yield request

    def on_idle(self) -> None:
        """Bring the next wave, or let the spider end."""
        if requests := self.next_requests():
            for request in requests:
                self.crawler.engine.crawl(request)
            raise DontCloseSpider

    def next_requests(self) -> list[Request]:
        """Return what is to be fetched now: robots.txt of sites that are new, else pages of the wave.

        No more than may be under way at once, so that a site that says "later" is asked nothing that waits in a queue.
        """
        while urls := self.frontier.missing():
            sites = list(dict.fromkeys(_site(url) for url in urls if not why_not(url, self.config)))
            if new := [site for site in sites if site not in self._robots]:
                return [self._request(f"{site}/robots.txt", self.on_robots, cb_kwargs={"site": site}) for site in new]
            batch = Counter[str]()
            requests = []
            for url in urls:
                reason = why_not(url, self.config) or self._forbids(url)
                if reason:
                    self._write(Page(url, failure=reason))
                elif batch[_site(url)] < self.config.concurrency:
                    batch[_site(url)] += 1
                    requests.append(self._request(url, self.on_page))
            if requests:
                self._keep_delays()
                return requests
        return []

    def _keep_delays(self) -> None:
        for host, slot in self.crawler.engine.downloader.slots.items():
            slot.delay = max(slot.delay, self._delays.get(host, 0.0))

    def _request(self, url: str, callback: Any, attempt: int = 0, cb_kwargs: dict[str, Any] | None = None) -> Request:
        meta = {"handle_httpstatus_all": True, "attempt": attempt, "asked": url}
        return Request(url, callback, errback=self.on_error, dont_filter=True, meta=meta, cb_kwargs=cb_kwargs or {})

    def _forbids(self, url: str) -> str:
        rules = self._robots[_site(url)]
        if isinstance(rules, str):
            return rules
        return "" if rules.can_fetch(url, self.config.user_agent) else "robots.txt forbids it"

    async def on_robots(self, response: Response, site: str) -> AsyncIterator[Any]:
        """Keep the rules of a site (RFC 9309, 2.3.1: none where there are none, closed where they cannot be read)."""
        if again := await self._again(response):
            yield again
        elif response.status >= 500 or response.status == 429:
            self._robots[site] = f"the site's robots.txt answers {response.status}, so the site is closed"
        elif response.status in _REDIRECTS:
            target = response.urljoin(_header(response, "Location"))
            hops = response.meta.get("hops", 0) + 1
            if hops > 5 or why_not(target, self.config):
                self._robots[site] = "the site's robots.txt leads off the site, so the site is closed"
                return
            request = self._request(target, self.on_robots, cb_kwargs={"site": site})
            request.meta["hops"] = hops
            yield request
        else:
            body = response.body[:500_000] if response.status == 200 else b""
            rules = Protego.parse(body.decode("utf-8", "replace"))
            self._robots[site] = rules
            self._slow_down(site, rules.crawl_delay(self.config.user_agent))

    def _slow_down(self, site: str, delay: float | None) -> None:
        if delay is None:
            return
        if delay > self.config.max_wait_seconds:
            self._robots[site] = f"robots.txt asks for {delay:g} s between pages, more than max_wait_seconds"
            return
        self._delays[urlsplit(site).hostname or ""] = delay

    async def on_page(self, response: Response) -> AsyncIterator[Any]:
        """Write a page down: its links, its items, or why it has none."""
        if again := await self._again(response):
            yield again
            return
        self._write(self._read(response, response.meta["asked"]))

    def _read(self, response: Response, url: str) -> Page:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        digest = hashlib.sha256(response.body).hexdigest()
        if response.status in _REDIRECTS:
            target = urldefrag(response.urljoin(_header(response, "Location")))[0]
            if reason := why_not(target, self.config):
                shown = urlsplit(target).netloc.rpartition("@")[2]
                return Page(url, failure=f"redirects to {shown}: {reason}", fetched=now)
            return Page(url, redirect=target, fetched=now)
        if response.status != 200:
            is_final = response.status not in _AGAIN
            return Page(url, failure=f"answers {response.status}", is_final=is_final, fetched=now)
        if not isinstance(response, HtmlResponse):
            kind = _header(response, "Content-Type").partition(";")[0] or "of no stated type"
            return Page(url, failure=f"is {kind[:60]}, not a page", hash=digest, fetched=now)
        found = (
            extract_items(response, self.config.item, url)
            if self.config.item
            else PageItems([{"id": url, "url": url}], [])
        )
        items, problems = found.items, found.problems
        if self.config.text and items:
            try:
                text = parse_html(response.text.encode("utf-8")).text
                items = [{**item, "text": text} for item in items]
            except Unreadable as error:
                items, problems = [], [*problems, str(error)]
        return Page(url, self._links(response), items=items, problems=problems, hash=digest, fetched=now)

    def _links(self, response: HtmlResponse) -> list[str]:
        found: dict[str, None] = {}
        for href in response.css("a::attr(href), area::attr(href)").getall()[:MAX_LINKS]:
            try:
                link = urldefrag(response.urljoin(href.strip()))[0]
            except ValueError:
                continue
            is_wanted = not self.config.follow or any(re.search(p, link) for p in self.config.follow)
            if is_wanted and not any(re.search(p, link) for p in self.config.ignore) and not why_not(link, self.config):
                found[link] = None
        return list(found)

    async def _again(self, response: Response) -> Request | None:
        """Wait as the site asks and return the request to try again; None when it is answered or tried enough."""
        attempt = response.meta["attempt"] + 1
        if response.status not in _AGAIN or attempt > self.config.retries:
            return None
        wait = _retry_after(_header(response, "Retry-After"))
        if wait is not None and wait > self.config.max_wait_seconds:
            return None
        await self._pause(max(wait or 0.0, self.config.delay_seconds * 2**attempt))
        return self._repeat(response.request, attempt)

    def _repeat(self, request: Any, attempt: int) -> Request:
        again: Request = request.replace(dont_filter=True)
        again.meta["attempt"] = attempt
        return again

    async def _pause(self, seconds: float) -> None:
        """Ask nothing more for a while: a site that is busy is busy for all pages."""
        loop = asyncio.get_running_loop()
        self._resume_at = max(self._resume_at, loop.time() + seconds)
        self.crawler.engine.pause()
        while (left := self._resume_at - loop.time()) > 0:
            await asyncio.sleep(left)
        self.crawler.engine.unpause()

    async def on_error(self, failure: Any) -> AsyncIterator[Any]:
        """Try a page again whose connection broke, or write down that it could not be fetched."""
        request = failure.request
        attempt = request.meta["attempt"] + 1
        said = f"{type(failure.value).__name__}: {failure.value}".splitlines()[0][:200]
        if urlsplit(request.url).hostname in _refused:
            said = "its name leads to a private address; allow_private is off"
        is_final = "private address" in said or "larger than download" in said or "Cancelled" in said
        if attempt <= self.config.retries and not is_final:
            await self._pause(self.config.delay_seconds * 2**attempt)
            yield self._repeat(request, attempt)
        elif "site" in request.cb_kwargs:
            self._robots[request.cb_kwargs["site"]] = f"the site's robots.txt cannot be fetched ({said})"
        else:
            reason = "is larger than max_page_bytes" if "Cancelled" in said else f"cannot be fetched ({said})"
            self._write(Page(request.meta["asked"], failure=reason, is_final=is_final))

    def _write(self, page: Page) -> None:
        append_page(self._journal, page)
        self.frontier.known[page.url] = page
        print(page.url, flush=True)


def _header(response: Response, name: str) -> str:
    return (response.headers.get(name) or b"").decode("latin-1")


def _site(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _retry_after(value: str) -> float | None:
    """Seconds that a Retry-After header asks for: a number of them, or a date."""
    if re.fullmatch(r"\s*\d{1,9}\s*", value):
        return float(value)
    try:
        then = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (then - datetime.datetime.now(datetime.UTC)).total_seconds()) if then.tzinfo else None


def main() -> None:
    """Run one job from standard input; what `scrape.scrape` starts."""
    with os.fdopen(os.dup(0), "rb", buffering=0) as questions:
        job = json.loads(questions.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    config = build_config(job["config"])
    process = CrawlerProcess(make_settings(config), install_root_handler=False)
    process.crawl(PageSpider, config=config, journal=Path(job["journal"]))
    process.start(install_signal_handlers=False)


def _end_with_parent() -> None:
    # Not sys.stdin: a thread that holds its lock makes the interpreter die at its end.
    while os.read(0, 1024):
        pass
    os._exit(1)
