"""Personal data: precision, recall and F2 on generated, labelled sets that the detector was not built from.

    python benchmarks/pii.py [--data FOLDER] [--texts 1500] [--train] [--json FILE]

Two sets. The first is made here in the way of presidio-research: templates of this file (none is a training pattern)
filled by the library Faker in twelve locales; a person, town or company with a word of three letters or more from our
training lists is drawn again, so no such value was seen in training (countries and nationalities are closed classes and
stay). The second, under FOLDER/safety, is presidio-research's own (1,500 texts, 209 templates): templates with even
numbers were read while the patterns were written, those with odd numbers never were, and are the figure to look at.
No value and no template of either is in the training text.

The measure is presidio-research's: tokens, personal or not whatever the type, F2. Types are counted beside it: a
labelled span is found when findings cover half of it or more; a finding is right when it overlaps a label.

Rivals in the run: patterns alone, and patterns with a gazetteer (the training lists looked up); the published
figure of Presidio out of the box on that set is 0.618 (its notebook 4). --train also trains three taggers
with other seeds and one with shuffled labels, on made text alone.
"""

import argparse
import gzip
import json
import random
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from faker import Faker

from modelwright.base import env
from modelwright.base.measured import write_result
from modelwright.data import names, scrub
from modelwright.data.personal_data import ALL, TAGGED, Finding, find_patterns, without_overlaps
from modelwright.data.tagger import load_tagger, split_words
from modelwright.data.tagger_patterns import PATTERNS, PLAIN
from modelwright.data.tagger_training import TaggerConfig, train_tagger

Finder = Callable[[str], list[Finding]]
PUBLISHED_F2 = 0.618
LOCALES = "en_US en_GB en_AU de_DE fr_FR es_ES it_IT nl_NL sv_SE pl_PL pt_BR cs_CZ".split()
FORMS = tuple(kind for kind in ALL if kind not in TAGGED)
# presidio-research scores what Presidio supports; titles, ages, postal codes and licences are then no label.
UNSUPPORTED = {"TITLE", "AGE", "ZIP_CODE", "US_DRIVER_LICENSE"}

TEMPLATES = """
Could somebody at the desk confirm that {person} picked up the parcel?
{person} has changed her telephone number to {phone_number}.
We regret to inform you, {person}, that your claim was rejected.
The lease names {person} and {person} as tenants of {address}.
After the storm the residents of {city} waited three days for power.
Tickets for the show in {city} go on sale tomorrow; write to {email}.
The charge on {credit_card_number} was not made by me.
Refund it to {iban}, the account of {person}.
Login from {ipv4} failed four times.
The gateway {ipv6} does not answer.
Her social security number, {ssn}, was printed on the envelope.
Yesterday {company} told its staff that the factory in {city} would be sold.
{company} hired {person} away from {company}.
I gave my notice at {company} this morning.
Our landlord, {person}, never answers the phone.
Send the ambulance to {address}!
The van was last seen outside {address}.
For the attention of {person}, {company}, {address}
Beneficiary: {person}
Insured person: {person}, born {date_of_birth}
Next of kin: {person}, {phone_number}
Mailing address: {address}
Place of residence: {city}
Registered office: {company}, {address}
Mobile no.: {phone_number}
IBAN: {iban}
Card: {credit_card_number}
Reply-to: {email}
Visited pages: {url}
{person} grew up on a farm near {city} and studied in {country}.
Nobody in {country} had heard of {company} until then.
The delegation from {country} landed in {city} at noon.
When {person} was young, {city} had no cinema.
It took {person} two hours to drive from {city} to {city}.
Guests included {person}, {person} and the ambassador of {country}.
The letter was signed by {person}, treasurer of {company}.
According to the minutes, {person} objected and {person} abstained.
I'd like to upgrade my plan. It's registered to {email}, the name is {person}.
hi there, {person} here, my card {credit_card_number} got declined
ok my number is {phone_number} and the address is {address}
pls cancel the booking for {person}
You owe {person} an apology.
"Leave that to {person}," the nurse answered.
The prize went to {person} for a story set in {country}.
Dr. {person} operated on the patient on {date_of_birth}.
Mrs. {person} teaches chemistry.
Both {company} and {company} refused to comment on the deal.
The lawsuit against {company} was filed in {city}.
We compared offers by {company}, {company} and {company}.
Wire the deposit from {iban} to {iban}.
The website {url} has been down since {date_of_birth}.
Dial {phone_number} and ask for {person}.
Her parents emigrated from {country} to {country}.
They honeymooned in {city}.
My cousin {person} paints.
Has {person} signed yet?
Attendees: {person}; {person}; {person}
Pick-up point:\\n{person}\\n{address}
{person}\\n{company}\\n{address}\\n{phone_number}\\n{email}
Best,\\n{person}\\n{company}
The meeting was moved to the afternoon.
How long does a transfer usually take?
The printer on the second floor is out of paper again.
Please restart the server and send me the log.
Version 4.12.9 fixes the error on line 210.
The price rose from 1,250 to 1,480 within 12 months.
Chapter 7 explains how Gradient Descent works.
Invoice 2231980 is overdue.
All Rights Reserved. See the Terms and Conditions.
The Annual General Meeting takes place every spring.
""".strip().splitlines()

KINDS = {"person": "person", "city": "location", "country": "location", "company": "organization", "email": "email"}
KINDS |= {"address": "street_address", "phone_number": "phone", "credit_card_number": "credit_card", "iban": "iban"}
KINDS |= {"ipv4": "ip_address", "ipv6": "ip_address", "ssn": "us_ssn", "date_of_birth": "date", "url": "url"}


class Generated:
    """Labelled texts of the templates, filled by Faker."""

    def __init__(self, seed: int):
        self._dice = random.Random(seed)
        self._fakers = {locale: Faker(locale) for locale in LOCALES}
        for number, faker in enumerate(self._fakers.values()):
            faker.seed_instance(1000 * seed + number)
        lists = [*names.GIVEN.values(), *names.FAMILY.values(), names.CITIES]
        self._known = {w.lower() for row in lists for name in row for w in re.findall(r"[^\W\d_]{3,}", name)}

    def texts(self, num: int) -> list[tuple[str, list[Finding]]]:
        """Return that many texts with their labels."""
        return [self._fill(self._dice.choice(TEMPLATES).replace("\\n", "\n")) for _ in range(num)]

    def _fill(self, template: str) -> tuple[str, list[Finding]]:
        locale = self._dice.choice(LOCALES) if self._dice.random() < 0.6 else "en_US"
        out, labels = "", []
        for i, piece in enumerate(template.replace("}", "{").split("{")):
            value = piece if i % 2 == 0 else self._value(piece, locale)
            if i % 2:
                labels.append(Finding(len(out), len(out) + len(value), KINDS[piece]))
            out += value
        return out, labels

    def _value(self, slot: str, locale: str) -> str:
        faker, english = self._fakers[locale], self._fakers["en_US"]
        if slot == "person":
            makers = [faker.first_name, faker.last_name, *[lambda: f"{faker.first_name()} {faker.last_name()}"] * 4]
            return self._unknown(self._dice.choice(makers))
        if slot in ("city", "company"):
            return self._unknown(getattr(faker, slot))
        if slot == "country":
            return str(english.country())
        if slot == "date_of_birth":
            day = english.date_of_birth(minimum_age=16, maximum_age=95)
            return day.strftime(self._dice.choice(("%d/%m/%Y", "%Y-%m-%d", "%B %d, %Y", "%d %B %Y")))
        value = getattr(english if slot in ("ssn", "ipv4", "ipv6", "url", "credit_card_number") else faker, slot)()
        return str(value).replace("\n", self._dice.choice((", ", "\n"))) if slot == "address" else str(value)

    def _unknown(self, maker: Callable[[], str]) -> str:
        for _ in range(200):
            value = maker()
            if not {w.lower() for w in re.findall(r"[^\W\d_]{3,}", value)} & self._known:
                return value
        return "Zyxwart"


def presidio_set(folder: Path, parity: int, leave_out: set[str]) -> list[tuple[str, list[Finding]]]:
    """Return the texts of the even or the odd templates; kinds are types of that set here."""
    rows = json.loads(gzip.decompress((folder / "safety/pii_spans_synthetic.json.gz").read_bytes()))
    return [
        (
            row["full_text"],
            [
                Finding(s["start_position"], s["end_position"], s["entity_type"])
                for s in row["spans"]
                if s["entity_type"] not in leave_out
            ],
        )
        for row in rows
        if row["template_id"] % 2 == parity
    ]


def gazetteer() -> Finder:
    """Return a finder that joins the patterns with a look-up of the training lists, word by word."""
    kinds = {w: "person" for row in [*names.GIVEN.values(), *names.FAMILY.values()] for w in row}
    places = [*names.COUNTRIES, *names.CITIES, *names.REGIONS]
    kinds |= {w: "location" for name in places for w in name.split() if w[0].isupper()}
    kinds |= {w: "organization" for w in [*names.ORGANIZATIONS, *names.LEGAL, *names.FIELDS] if " " not in w}
    kinds |= dict.fromkeys(names.NATIONALITIES, "nationality") | dict.fromkeys(names.STREETS, "street_address")

    def find(text: str) -> list[Finding]:
        found = [Finding(a, b, kinds[text[a:b]]) for a, b in split_words(text) if text[a:b] in kinds]
        return without_overlaps([*find_patterns(text, FORMS), *found], len(text))

    return find


def with_tagger(tagger: Any) -> Finder:
    return lambda text: without_overlaps([*find_patterns(text, ALL), *tagger.find(text)], len(text))


def measure(texts: Sequence[tuple[str, list[Finding]]], find: Finder) -> dict[str, Any]:
    """Return token precision, recall and F2 whatever the type, and precision and recall by type."""
    right = wrong = missed = 0
    found_of: Counter[str] = Counter()
    all_of: Counter[str] = Counter()
    precise: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for text, labels in texts:
        findings = find(text)
        is_label, is_found = bytearray(len(text)), bytearray(len(text))
        for spans, marks in ((labels, is_label), (findings, is_found)):
            for span in spans:
                marks[span.start : span.end] = b"\1" * (span.end - span.start)
        for word in re.finditer(r"\w+", text):
            label, mark = any(is_label[word.start() : word.end()]), any(is_found[word.start() : word.end()])
            right, wrong, missed = right + (label and mark), wrong + (mark and not label), missed + (label and not mark)
        for span in labels:
            all_of[span.kind] += 1
            found_of[span.kind] += sum(is_found[span.start : span.end]) * 2 >= span.end - span.start
        for finding in findings:
            precise[finding.kind][0] += any(is_label[finding.start : finding.end])
            precise[finding.kind][1] += 1
    precision, recall = right / max(1, right + wrong), right / max(1, right + missed)
    return {
        "f2": round(5 * precision * recall / max(1e-9, 4 * precision + recall), 4),
        "precision": round(precision, 4),
        "recall": round(recall, 4),
        "recall_by_type": {k: [round(found_of[k] / n, 3), n] for k, n in sorted(all_of.items())},
        "precision_by_type": {k: [round(a / n, 3), n] for k, (a, n) in sorted(precise.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=env.data_folder())
    parser.add_argument("--texts", type=int, default=1500)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    assert not set(TEMPLATES) & {*PATTERNS, *PLAIN}, "a template of the test is a training pattern"
    finders: dict[str, Finder] = {
        "ours": lambda text: scrub.find_personal(text, ALL),
        "patterns alone": lambda text: without_overlaps(find_patterns(text, FORMS), len(text)),
        "patterns and gazetteer": gazetteer(),
    }
    if options.train:
        for seed in (1, 2, 3):
            trained = train_tagger(TaggerConfig(seed=seed, num_texts=15_000, num_epochs=2))
            finders[f"trained on made text, seed {seed}"] = with_tagger(trained)
        control = train_tagger(TaggerConfig(num_texts=15_000, num_epochs=2), labels_seed=0)
        finders["shuffled labels"] = with_tagger(control)
    sets = {f"generated, seed {seed}": Generated(seed).texts(options.texts) for seed in (0, 1, 2)}
    if options.data:
        for name, left_out in (("", set()), (", Presidio's types", UNSUPPORTED)):
            sets[f"presidio-research, templates not seen{name}"] = presidio_set(options.data, 1, left_out)
            sets[f"presidio-research, templates seen{name}"] = presidio_set(options.data, 0, left_out)
    results = {name: {who: measure(texts, find) for who, find in finders.items()} for name, texts in sets.items()}
    for name, of in results.items():
        print(name, {who: (m["precision"], m["recall"], m["f2"]) for who, m in of.items()})
    seeds = [of["ours"]["f2"] for name, of in results.items() if name.startswith("generated")]
    gazetteers = [of["patterns and gazetteer"]["f2"] for name, of in results.items() if name.startswith("generated")]
    rows = [
        row("F2, generated set", statistics.mean(seeds), statistics.mean(gazetteers), "patterns and gazetteer", seeds)
    ]
    held_out = results.get("presidio-research, templates not seen, Presidio's types")
    if held_out:
        ours = held_out["ours"]["f2"]
        name = "F2, presidio-research's set, templates not seen"
        rows.append(row(name, ours, PUBLISHED_F2, "Presidio out of the box (published, whole set)", [ours]))
    text = ("In May 2021 Jo Smith of Acme Ltd wrote to jo@acme.org about 4111 1111 1111 1111. " * 20_000)[: 1 << 20]
    load_tagger()
    begun = time.perf_counter()
    scrub.find_personal(text, ALL)
    speed = {"dense_text_mb_per_second": round(1 / (time.perf_counter() - begun), 3)}
    print(rows, speed)
    if options.json:
        write_result(options.json, {"rows": rows, "sets": results, "speed": speed}, ("numpy", "torch", "faker"))


def row(name: str, ours: float, rival: float, rival_name: str, runs: list[float]) -> dict[str, Any]:
    figures = {"name": name, "ours": round(ours, 4), "rival": round(rival, 4), "rival_name": rival_name}
    return {**figures, "ratio": round(ours / rival, 3), "unit": "F2", "runs": runs}


if __name__ == "__main__":
    main()
