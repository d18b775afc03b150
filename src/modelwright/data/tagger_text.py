"""Sentences to train the tagger on: patterns of this project, filled with names from lists and with made ones.

Half of all names are made by a chain of letters over one language's list, so the tagger cannot learn them by heart and
must look at the context, the form and the sound of a word. Sentences without names, and names in odd writing (all
small, all capitals, in lists and forms), are part of it. Everything follows from the seed.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from modelwright.data import names
from modelwright.data.personal_data import Finding
from modelwright.data.tagger_forms import FORMS, LISTS
from modelwright.data.tagger_patterns import PATTERNS, PLAIN

_SLOTS = {"person": "person", "first": "person", "last": "person", "org": "organization", "place": "location"}
_SLOTS |= {"city": "location", "country": "location", "address": "street_address", "nat": "nationality"}
names.PUBLIC = [
    "University of {city}",
    "{city} University",
    "{city} Hospital",
    "St. {first} Hospital",
    "{last} College",
    "{city} High School",
    "Bank of {country}",
    "{country} Airlines",
    "Ministry of Transport",
    "{city} City Council",
    "{last} Foundation",
    "{city} United",
    "{city} Chamber of Commerce",
    "Museum of {city}",
    "{last} Institute of Technology",
    "National {field} Agency",
    "{city} Police Department",
    "{country} Football Association",
    "{city} Times",
    "Royal {field} Society",
    "{last} Memorial Clinic",
    "First National Bank of {city}",
]
names.STREET_BEFORE = [
    "Rue",
    "Rue de",
    "Rue du",
    "Avenue",
    "Avenue de",
    "Boulevard",
    "Via",
    "Viale",
    "Piazza",
    "Calle",
    "Calle de",
    "Avenida",
    "Plaza",
    "Rua",
    "Travessa",
    "ul.",
    "Ulica",
    "Place",
    "Quai",
    "Chemin des",
    "Carrer",
    "Corso",
    "al.",
    "Paseo",
]
names.STREET_AFTER = [
    "straße",
    "strasse",
    "str.",
    "weg",
    "platz",
    "gasse",
    "allee",
    "straat",
    "laan",
    "gatan",
    "vägen",
    "gade",
    "vej",
    "veien",
    "gata",
    "katu",
    "tie",
    "gracht",
    " utca",
    " u.",
    " út",
    "ova",
    "ského",
    "vägen",
    "stræde",
]
names.TOWNS = [
    "{}ville",
    "{}ton",
    "{}burg",
    "{}field",
    "{}heim",
    "{}stad",
    "{}by",
    "{}borg",
    "{}ford",
    "{}bury",
    "{}mouth",
    "{}dorf",
    "{}hausen",
    "{}owo",
    "{}ice",
    "{}sk",
    "New {}",
    "Port {}",
    "San {}",
    "Saint-{}",
    "Santa {}",
    "Lake {}",
    "Mount {}",
    "{} Springs",
    "{} City",
    "{} Falls",
    "{} Beach",
    "North {}",
    "East {}",
    "Bad {}",
    "El {}",
    "La {}",
    "{}-sur-Mer",
    "{}pur",
    "{}abad",
]


@dataclass(frozen=True)
class TaggedText:
    """A text with its names."""

    text: str
    spans: list[Finding] = field(default_factory=list)


class _Chain:
    """Words in the likeness of a list: the next letter is drawn by the three before it."""

    def __init__(self, words: Sequence[str]):
        self._next: dict[str, list[str]] = defaultdict(list)
        for word in words:
            padded = f"^^{word.lower()}$"
            for i in range(2, len(padded)):
                self._next[padded[i - 2 : i]].append(padded[i])

    def make(self, dice: random.Random) -> str:
        for _ in range(20):
            word = "^^"
            while not word.endswith("$") and len(word) < 16:
                word += dice.choice(self._next[word[-2:]])
            word = word.strip("^$")
            if 3 <= len(word) <= 12:
                return "".join(p.capitalize() if p.isalpha() else p for p in _pieces(word))
        return "Anna"


def _pieces(word: str) -> list[str]:
    """Cut at the signs inside a name: each part of O'Neill and Ben-David has its own capital."""
    out = [""]
    for c in word:
        if c.isalpha() == (out[-1][-1:].isalpha() or not out[-1]):
            out[-1] += c
        else:
            out.append(c)
    return out


class Maker:
    """Makes tagged texts; the same seed makes the same ones."""

    def __init__(self, seed: int = 0, made_fraction: float = 0.5):
        self._dice = dice = random.Random(seed)
        self._made_fraction = made_fraction
        self._languages = list(names.GIVEN)
        self._weights = [6 if language == "english" else 1 for language in self._languages]
        self._given = {language: _Chain(words) for language, words in names.GIVEN.items()}
        self._family = {language: _Chain(words) for language, words in names.FAMILY.items()}
        self._city = _Chain([w for city in names.CITIES for w in city.split()])
        self._brand = _Chain([w for w in names.ORGANIZATIONS if w.isalpha()] + names.FAMILY["english"] + names.FIELDS)
        self._makers: dict[str, Callable[[], str]] = {
            "first": lambda: self._name(self._given, names.GIVEN),
            "last": lambda: self._name(self._family, names.FAMILY),
            "person": self._person,
            "city": self._any_city,
            "place": self._place,
            "brand": lambda: self._brand.make(dice),
            "town": lambda: dice.choice((self._city.make(dice), self._makers["last"]())),
            "email": lambda: f"{self._makers['first']().lower()}{dice.randrange(100)}@{dice.choice(names.MAILS)}",
            "capitals": lambda: "".join(dice.choice("ABCDEFGHIKLMNOPRSTUW") for _ in range(dice.choice((3, 3, 4)))),
            "capital": lambda: dice.choice("ABCDEFGHJKLMPRSTW"),
            "plain": lambda: dice.choice(PLAIN).split()[0].strip(".,:?!").capitalize(),
            "n": lambda: str(dice.choice((dice.randrange(2, 100), dice.randrange(100, 5000)))),
            "small": lambda: str(dice.randrange(1, 300)),
            "house": lambda: str(
                dice.choice((dice.randrange(1, 300), dice.randrange(1, 9999), dice.randrange(1, 99999)))
            ),
            "number": lambda: str(dice.randrange(10**5, 10**9)),
            "day": lambda: str(dice.randrange(1, 29)),
            "year": lambda: str(dice.randrange(1900, 2030)),
            "digits": lambda: str(dice.randrange(100, 9999)),
            "digit": lambda: str(dice.randrange(1, 10)),
        }
        for slot, choices in LISTS.items():
            self._makers[slot] = lambda choices=choices: dice.choice(choices)  # type: ignore[misc]

    def texts(self, num: int) -> Iterator[TaggedText]:
        """Yield texts of one to four sentences."""
        for _ in range(num):
            yield self._vary(self._join([self._sentence() for _ in range(self._dice.choice((1, 1, 1, 2, 3, 4)))]))

    def _sentence(self) -> TaggedText:
        return self.fill(self._dice.choice(PLAIN if self._dice.random() < 0.2 else PATTERNS))

    def fill(self, pattern: str) -> TaggedText:
        """Fill the slots of a pattern: ``{person}``, ``{org}``, ... become spans, ``{n}`` and the like do not."""
        out, spans = "", []
        for i, piece in enumerate(pattern.replace("}", "{").split("{")):
            if i % 2 == 0:
                out += piece
                continue
            self._language = self._dice.choices(self._languages, self._weights)[0]
            value = self._makers[piece]() if piece in self._makers else self._compose(piece)
            if piece in _SLOTS:
                skip = 4 if value.startswith("the ") else 0
                spans.append(Finding(len(out) + skip, len(out) + len(value), _SLOTS[piece]))
            out += value
        return TaggedText(out, spans)

    def _compose(self, slot: str) -> str:
        """Fill one of the forms of a slot, and the slots in it, until none is left."""
        text = self._dice.choice(FORMS[slot])
        while found := re.search(r"\{(\w+)\}", text):
            name = found[1]
            value = self._makers[name]() if name in self._makers else self._compose(name)
            text = text[: found.start()] + value + text[found.end() :]
        return text

    def _name(self, chains: dict[str, _Chain], lists: dict[str, list[str]]) -> str:
        is_made = self._dice.random() < self._made_fraction
        return chains[self._language].make(self._dice) if is_made else self._dice.choice(lists[self._language])

    def _person(self) -> str:
        return self._compose("full")

    def _any_city(self) -> str:
        return self._dice.choice(names.CITIES) if self._dice.random() < 0.45 else self._compose("made_city")

    def _place(self) -> str:
        choice = self._dice.random()
        if choice < 0.35:
            return self._dice.choice(names.COUNTRIES)
        return self._dice.choice(names.REGIONS) if choice < 0.5 else self._any_city()

    def _join(self, parts: Sequence[TaggedText]) -> TaggedText:
        text, spans = "", []
        for part in parts:
            text += (
                self._dice.choice((" ", " ", "\n", "\n\n"))
                if text
                else self._dice.choice(("", "", "", "", "- ", "> ", "1. ", "... ", "??? ", '"'))
            )
            spans += [Finding(f.start + len(text), f.end + len(text), f.kind) for f in part.spans]
            text += part.text
        return TaggedText(text, spans)

    def _vary(self, made: TaggedText) -> TaggedText:
        choice = self._dice.random()
        if choice < 0.08 and len(made.text.lower()) == len(made.text):
            return TaggedText(made.text.lower(), made.spans)
        if choice < 0.11 and len(made.text.upper()) == len(made.text):
            return TaggedText(made.text.upper(), made.spans)
        if choice < 0.2 and made.text.endswith("."):
            return TaggedText(made.text[:-1], [f for f in made.spans if f.end < len(made.text)])
        if choice < 0.23 and not made.spans:
            return TaggedText(made.text.title(), [])
        return made
