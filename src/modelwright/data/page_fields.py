"""Structured fields from a page: what a CSS or XPath selector finds, as text, a number or a list.

An item without a field that is required is left out with its reason; another field that cannot be read is null, and
that is said too.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from modelwright.base.errors import ConfigError, MissingExtraError

MAX_ITEMS = 10_000  # on one page
_MAX_VALUE = 100_000  # characters of one value


@dataclass(frozen=True)
class FieldConfig:
    """Where one field stands on the page."""

    css: str | None = None  # such as ".price::text" or "a::attr(href)"; give css or xpath
    xpath: str | None = None
    regex: str | None = None  # what of the found text is wanted: its first group, else the whole match
    type: Literal["text", "number", "integer", "url", "list"] = "text"
    decimal_mark: Literal[".", ","] = "."  # of numbers; the other one parts thousands
    required: bool = False

    def __post_init__(self) -> None:
        if (self.css is None) == (self.xpath is None):
            raise ConfigError(f"A field has css {self.css!r} and xpath {self.xpath!r}; expected exactly one of them.")
        check_regexes("regex", [self.regex or ""])


@dataclass(frozen=True)
class ItemConfig:
    """Which pages hold items, and of what fields an item is made."""

    fields: dict[str, FieldConfig] = field(default_factory=dict)
    pages: str = ""  # a regular expression that the address of such a page matches somewhere; empty: every page
    each: str | None = None  # CSS selector of the element that an item is; None: a page is one item

    def __post_init__(self) -> None:
        if not self.fields:
            raise ConfigError("item.fields is empty; name at least one field with css or xpath.")
        if reserved := {"id", "url"} & set(self.fields):
            raise ConfigError(
                f"item.fields names {sorted(reserved)}, which every row has already; choose another name."
            )
        check_regexes("item.pages", [self.pages])


def check_regexes(name: str, patterns: list[str]) -> None:
    """Refuse what is no regular expression.

    Raises:
        ConfigError: One of them does not compile; the message says why.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{name} is {pattern!r}, which is no regular expression: {error}. Mend it.") from None


def check_selectors(config: ItemConfig) -> None:
    """Refuse what is no selector, before any page is fetched.

    Raises:
        ConfigError: One of them cannot be used; the message says why.
    """
    try:
        import parsel
    except ImportError:
        raise MissingExtraError("scrapy", "scrape", "Scraping") from None
    page = parsel.Selector("<html></html>")
    for name, css, xpath in [("each", config.each, None), *((n, f.css, f.xpath) for n, f in config.fields.items())]:
        try:
            if css is not None:
                page.css(css)
            if xpath is not None:
                page.xpath(xpath)
        except (ValueError, SyntaxError) as error:  # parsel's and cssselect's errors
            raise ConfigError(f"item.{name} is {css or xpath!r}, which is no selector: {error}. Mend it.") from None


@dataclass(frozen=True)
class PageItems:
    """The items of one page, and what could not be read."""

    items: list[dict[str, Any]]
    problems: list[str]


def extract_items(page: Any, config: ItemConfig, url: str) -> PageItems:
    """Read the items of a page.

    Args:
        page: A parsel selector of the whole page, with ``urljoin`` for addresses.
        config: What to look for; its selectors are right (`check_selectors`).
        url: The page's address; an item's ``id`` is this, with a number where a page holds several.
    """
    if not re.search(config.pages, url):
        return PageItems([], [])
    roots = [page] if config.each is None else page.css(config.each)[:MAX_ITEMS]
    found = [_read_item(root, page, config) for root in roots]
    items, problems = [], []
    for number, (values, said, is_whole) in enumerate(found, start=1):
        place = "" if config.each is None else f"item {number}: "
        problems += [place + line for line in said]
        if is_whole:
            items.append({"id": url if config.each is None else f"{url}#{number}", "url": url, **values})
    return PageItems(items, problems)


def _read_item(root: Any, page: Any, config: ItemConfig) -> tuple[dict[str, Any], list[str], bool]:
    values: dict[str, Any] = {}
    said, is_whole = [], True
    for name, wanted in config.fields.items():
        texts = root.css(wanted.css).getall() if wanted.css is not None else root.xpath(wanted.xpath).getall()
        cut = [c for c in (_cut(text, wanted.regex) for text in texts) if c]
        try:
            values[name] = _convert(cut, wanted, page)
        except ValueError as error:
            values[name] = None
            said.append(f"{name} is {str(error)!r}, which is no {wanted.type}")
        if wanted.required and values[name] in (None, []):
            is_whole = False
            said.append(f"has no {name}, which is required; the item is left out")
    return values, said, is_whole


def _cut(text: str, regex: str | None) -> str:
    text = " ".join(text.split())[:_MAX_VALUE]
    if regex is None:
        return text
    found = re.search(regex, text)
    return (found[1] if found.re.groups else found[0]) or "" if found else ""


def _convert(texts: list[str], wanted: FieldConfig, page: Any) -> Any:
    if wanted.type == "list":
        return texts
    if not texts:
        return None
    first = texts[0]
    if wanted.type == "url":
        return str(page.urljoin(first))
    if wanted.type == "text":
        return first
    return parse_number(first, wanted)


def parse_number(text: str, wanted: FieldConfig) -> float | int:
    """Read the one number in a text, such as a price with its currency.

    >>> parse_number("EUR 1.250,50", FieldConfig(css="b", type="number", decimal_mark=","))
    1250.5

    Raises:
        ValueError: There is no number, or more than one.
    """
    thousands = "," if wanted.decimal_mark == "." else "."
    parts: Mapping[str, str] = {"m": re.escape(wanted.decimal_mark), "t": re.escape(thousands)}
    pattern = r"[-+]?(?:\d{{1,3}}(?:[{t}' ]\d{{3}})+|\d+)(?:{m}\d+)?".format(**parts)
    found = re.findall(pattern, text.replace("\N{MINUS SIGN}", "-"))
    if len(found) != 1:
        raise ValueError(text)
    plain = re.sub(rf"[{parts['t']}' ]", "", found[0]).replace(wanted.decimal_mark, ".")
    if wanted.type == "number":
        return float(plain)
    if not float(plain).is_integer():
        raise ValueError(text)
    return int(float(plain))
