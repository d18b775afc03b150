"""Pseudonyms: the same value gets the same stand-in everywhere, and nothing leads back from the stand-in to the value.

A stand-in is drawn by HMAC-SHA256 of the kind and the value (blanks, dashes and letter case aside) under a secret. The
secret is never written: not into a report, a manifest, a log or the text of the object. Whoever holds it can test a
guess, so it is to be thrown away or kept apart; without it nobody can. There is no table from values to stand-ins, so
documents and worker processes agree without talking to each other, and nothing is reversible. Two values may share a
stand-in: one pair of names in 19,000, more often for places, which have 140.

A stand-in is of the same type: names come from lists, digits keep their places and separators, and numbers that are
nobody's are used where there are such: cards from test ranges whose Luhn digit holds, IBANs of the bank code of zeros,
which no bank has, whose mod 97 holds, addresses from 192.0.2.0/24 and 2001:db8::/32, mail at example.com, telephone
numbers 555-01xx, social security numbers of area 000.

Source: NIST FIPS 198-1 (HMAC); RFC 2606, 3849, 5737, 7042 (names, addresses for documentation).
"""

import hashlib
import hmac
import re
from collections.abc import Callable, Sequence

from modelwright.base.errors import ConfigError
from modelwright.data.check_digits import luhn
from modelwright.data.names import FAMILY, GIVEN, PLACES

MIN_SECRET_CHARS = 16
# Of these blanks and signs belong to the value; of the others (numbers) they are only how it is written.
_WORDED = (
    "person",
    "organization",
    "location",
    "street_address",
    "email",
    "url",
    "ip_address",
    "date",
    "age",
    "secret",
)
_GIVEN = tuple(GIVEN["english"])
_FAMILY = tuple(FAMILY["english"])
_STREETS = ("Oak Street", "Mill Lane", "Station Road", "Park Avenue", "Church Street", "High Street", "Cedar Drive")
_TRADES = ("Partners", "Industries", "Holdings", "Systems", "Works", "Trading", "Services", "Logistics")
_NATIONALITIES = (
    "Danish",
    "Chilean",
    "Kenyan",
    "Korean",
    "Irish",
    "Peruvian",
    "Belgian",
    "Moroccan",
    "Thai",
    "Finnish",
)


class Pseudonyms:
    """Stand-ins under one secret.

    >>> named = Pseudonyms("sixteen characters or more")
    >>> named.stand_in("phone", "555 123 4567")[-2:] == named.stand_in("phone", "(555) 123-4567")[-2:]
    True
    >>> named.stand_in("email", "Jo@acme.org") == named.stand_in("email", "jo@acme.org")
    True
    """

    def __init__(self, secret: str):
        if len(secret) < MIN_SECRET_CHARS:
            raise ConfigError(
                f"The secret for pseudonyms has {len(secret)} characters; expected at least {MIN_SECRET_CHARS}, or its "
                "stand-ins could be traced back by trying secrets. Give a long random one and do not store it."
            )
        self._key = secret.encode("utf-8")

    def __repr__(self) -> str:
        return "Pseudonyms(secret=...)"

    def stand_in(self, kind: str, value: str) -> str:
        """Return what stands for ``value``: always the same under one secret, of the same type."""
        maker = _MAKERS.get(kind, _same_form)
        plain = re.sub(r"\s+", " ", value) if kind in _WORDED else re.sub(r"[^\w]+", "", value)
        for attempt in range(16):
            message = f"{kind}\0{plain.casefold()}\0{attempt}"
            drawn = maker(_Draws(hmac.new(self._key, message.encode(), hashlib.sha256).digest()), value)
            if drawn.casefold() != value.casefold():  # one time in many a value would stand for itself
                return drawn
        return f"[{kind}]"


class _Draws:
    """An endless row of numbers from one key."""

    def __init__(self, key: bytes):
        self._key, self._count, self._pool = key, 0, b""

    def below(self, bound: int) -> int:
        """Return a number from 0 to ``bound`` - 1; eight bytes leave a bias below 2**-50."""
        if len(self._pool) < 8:
            self._pool = hashlib.sha256(self._key + self._count.to_bytes(8, "big")).digest()
            self._count += 1
        taken, self._pool = self._pool[:8], self._pool[8:]
        return int.from_bytes(taken, "big") % bound

    def one_of(self, choices: Sequence[str]) -> str:
        return choices[self.below(len(choices))]

    def digits(self, count: int) -> str:
        return "".join(str(self.below(10)) for _ in range(count))


def _same_form(draws: _Draws, value: str) -> str:
    """Replace each digit by a digit and each letter by a letter; the rest keeps its place."""
    out = []
    for c in value:
        if c.isdigit():
            out.append(str(draws.below(10)))
        elif c.isalpha():
            out.append(draws.one_of("ABCDEFGHJKLMNPRSTUVWXYZ" if c.isupper() else "abcdefghjkmnprstuvwxyz"))
        else:
            out.append(c)
    return "".join(out)


def _into_form(digits: str, value: str) -> str:
    """Lay digits into the places that the digits of ``value`` have; too few repeat their last, the rest is dropped."""
    row = iter(digits)
    return "".join(next(row, digits[-1]) if c.isdigit() else c for c in value)


def _person(draws: _Draws, value: str) -> str:
    words = value.split()
    if len(words) < 2:
        return draws.one_of(_FAMILY if value.istitle() or value.isupper() else _GIVEN)
    return f"{draws.one_of(_GIVEN)} {draws.one_of(_FAMILY)}"


def _card(draws: _Draws, value: str) -> str:
    # 4111 11, 5555 55 and 3782 82 are the card schemes' own test ranges.
    length = sum(map(str.isdigit, value))
    start = {"3": "378282", "5": "555555", "2": "555555"}.get(next(c for c in value if c.isdigit()), "411111")
    body = start + draws.digits(length - len(start) - 1)
    last = next(d for d in "0123456789" if luhn(body + d))
    return _into_form(body + last, value)


def _iban(draws: _Draws, value: str) -> str:
    text = re.sub(r"[ .-]", "", value).upper()
    # The national bank code becomes zeros, which no bank has; what follows is drawn.
    body = "".join(
        "0" if c.isdigit() and i < 8 else str(draws.below(10)) if c.isdigit() else "X" for i, c in enumerate(text[4:])
    )
    number = int("".join(str(int(c, 36)) for c in body + text[:2] + "00"))
    row = iter(f"{text[:2]}{98 - number % 97:02}{body}")
    return "".join(next(row) if c.isalnum() else c for c in value)


def _ip_address(draws: _Draws, value: str) -> str:
    if ":" in value:
        return f"2001:db8::{draws.below(1 << 16):x}:{draws.below(1 << 16):x}"
    block = draws.one_of(("192.0.2", "198.51.100", "203.0.113"))
    return f"{block}.{draws.below(256)}"


def _phone(draws: _Draws, value: str) -> str:
    count = sum(map(str.isdigit, value))
    return _into_form(f"{draws.digits(max(0, count - 7))}55501{draws.digits(2)}", value)


def _url(draws: _Draws, value: str) -> str:
    scheme = value.partition("://")[0] + "://" if "://" in value else ""
    return f"{scheme}site-{draws.below(10**8):08}.example.com"


def _date(draws: _Draws, value: str) -> str:
    return (
        f"{1930 + draws.below(90)}-{1 + draws.below(12):02}-{1 + draws.below(28):02}"
        if len(value) > 4
        else f"{1930 + draws.below(90)}"
    )


_MAKERS: dict[str, Callable[[_Draws, str], str]] = {
    "secret": lambda draws, value: f"secret-{draws.digits(12)}",
    "person": _person,
    "organization": lambda draws, value: f"{draws.one_of(_FAMILY)} {draws.one_of(_TRADES)}",
    "location": lambda draws, value: draws.one_of(PLACES),
    "street_address": lambda draws, value: f"{1 + draws.below(999)} {draws.one_of(_STREETS)}",
    "nationality": lambda draws, value: draws.one_of(_NATIONALITIES),
    "email": lambda draws, value: f"user-{draws.below(10**10):010}@example.com",
    "url": _url,
    "phone": _phone,
    "credit_card": _card,
    "iban": _iban,
    "ip_address": _ip_address,
    "mac_address": lambda draws, value: f"00:00:5e:00:53:{draws.below(256):02x}",
    "us_ssn": lambda draws, value: _into_form("000" + draws.digits(6), value),
    "date": _date,
    "date_of_birth": _date,
    "age": lambda draws, value: re.sub(r"\d+", str(18 + draws.below(70)), value),
}
