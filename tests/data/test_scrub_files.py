"""Scrubbing files: pseudonyms agree everywhere, bad lines are set aside, and no output holds a value."""

import json
import random
import tracemalloc
from concurrent.futures import ProcessPoolExecutor

import pytest

from modelwright.base.errors import ConfigError, DataError
from modelwright.base.types import Document
from modelwright.data import scrub
from modelwright.data.check_digits import is_card, is_iban
from modelwright.data.personal_data import ALL, TAGGED
from modelwright.data.pseudonyms import Pseudonyms
from modelwright.data.scrub import Scrub, scrub_jsonl
from modelwright.data.step import Mapper

SECRET = "correct horse battery staple"
VALUES = {
    "credit_card": "4012 8888 8888 1881",
    "iban": "DE89 3704 0044 0532 0130 00",
    "email": "quentin.zyx@corp.example.org",
    "phone": "+49 30 901820",
    "ip_address": "198.7.6.5",
    "us_ssn": "536-22-1145",
    "secret": "ghp_" + "a8Fk29dLq0ZxW7mN3bVc5RtY1uIoP4sGhJ6e",
    "crypto": "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa",
    "person": "Quentin Zyxwart",
}
TEXT = (
    "My name is {person}. Card {credit_card}, IBAN {iban}, mail {email}, phone {phone}, from {ip_address}, "
    "SSN {us_ssn}, key {secret}, wallet {crypto}."
).format(**VALUES)
FORMS = tuple(kind for kind in ALL if kind not in TAGGED)


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv(scrub.SECRET, SECRET)
    scrub._pseudonyms.cache_clear()
    yield SECRET
    scrub._pseudonyms.cache_clear()


def write_rows(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def scrub_one(text):
    return Scrub(mode="pseudonym", kinds=FORMS).scrub_text(text)[0]


def test_the_three_modes(secret):
    text = "mail jo@acme.org now"
    assert Scrub(("email",)).scrub_text(text)[0] == "mail [email] now"
    assert Scrub(("email",), "remove").scrub_text(text)[0] == "mail  now"
    replaced, findings = Scrub(("email",), "pseudonym").scrub_text(text)
    assert replaced.endswith("@example.com now") and "jo@acme" not in replaced
    assert [(f.start, f.end, f.type) for f in findings] == [(5, 16, "EMAIL_ADDRESS")]


def test_equal_values_get_equal_stand_ins_in_every_process_and_spelling(secret):
    here = scrub_one(f"{TEXT} Again {VALUES['email'].upper()}.")
    with ProcessPoolExecutor(2) as pool:
        assert set(pool.map(scrub_one, [f"{TEXT} Again {VALUES['email'].upper()}."] * 4)) == {here}
    stand_in = Pseudonyms(SECRET).stand_in("email", VALUES["email"])
    assert here.count(stand_in) == 2


def test_another_secret_gives_other_stand_ins_and_the_secret_shows_nowhere():
    one, two = Pseudonyms(SECRET), Pseudonyms(SECRET + "!")
    assert all(one.stand_in(kind, value) != two.stand_in(kind, value) for kind, value in VALUES.items())
    assert SECRET not in repr(one) and "secret" not in repr(Scrub(mode="pseudonym")).replace("secret_file", "").replace(
        "'secret'", ""
    )


def test_stand_ins_keep_the_type_and_belong_to_nobody():
    made, dice = Pseudonyms(SECRET), random.Random(0)
    for _ in range(50):
        card = made.stand_in("credit_card", "4" + "".join(dice.choices("0123456789", k=15)))
        assert is_card(card) and card.startswith("411111")
        iban = made.stand_in("iban", f"DE{dice.randrange(10**19):020}")
        assert is_iban(iban) and iban[4:12] == "00000000"
    assert is_card(made.stand_in("credit_card", "3782-822463-10005"))
    assert made.stand_in("ip_address", "8.8.8.8").startswith(("192.0.2.", "198.51.100.", "203.0.113."))
    assert made.stand_in("us_ssn", "536-22-1145").startswith("000-")
    assert made.stand_in("uk_nino", "AB 12 34 56 C")[2] == " " and "555" in made.stand_in(
        "phone", "415-283-9871"
    ).replace("-", "")
    names = {made.stand_in("person", f"First{i} Last{i}") for i in range(300)}
    assert len(names) > 280  # a pseudonym is shared by few


def test_a_secret_is_needed_and_must_be_long(monkeypatch, tmp_path):
    monkeypatch.delenv(scrub.SECRET, raising=False)
    scrub._pseudonyms.cache_clear()
    with pytest.raises(ConfigError, match="MODELWRIGHT_SECRET is not set"):
        scrub_one(TEXT)
    with pytest.raises(ConfigError, match="has 5 characters; expected at least 16"):
        Pseudonyms("short")
    file = tmp_path / "secret"
    file.write_text(SECRET + "\nmore\n")
    scrubbed = Scrub(("email",), "pseudonym", str(file)).scrub_text("a jo@acme.org")[0]
    assert scrubbed == "a " + Pseudonyms(SECRET).stand_in("email", "jo@acme.org")
    with pytest.raises(ConfigError, match="cannot be read"):
        Scrub(("email",), "pseudonym", str(tmp_path / "none")).scrub_text("a jo@acme.org")


def test_settings_that_are_wrong_are_named():
    with pytest.raises(ConfigError, match="kinds holds 'emails'"):
        Scrub(("emails",))
    with pytest.raises(ConfigError, match="mode is 'hide'"):
        Scrub(mode="hide")  # type: ignore[arg-type]


def test_a_document_is_scrubbed_with_its_title_and_metadata():
    document = Document("d", "see jo@acme.org", title="of jo@acme.org", metadata={"by": ["jo@acme.org"], "n": 3})
    step = Scrub(("email",))
    assert isinstance(step, Mapper)
    changed = step.change(document)
    assert (changed.text, changed.title, changed.metadata) == ("see [email]", "of [email]", {"by": ["[email]"], "n": 3})


@pytest.mark.parametrize("mode", ["mask", "pseudonym", "remove"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".html"])
def test_no_output_holds_a_value(tmp_path, secret, mode, suffix, capfd, caplog):
    rows = [
        {"id": "a", "text": TEXT, "title": f"of {VALUES['email']}", "tags": [VALUES["iban"]]},
        {"id": VALUES["email"], "text": "nothing"},
        f'{{"id": "c", "text": "{TEXT}\n',
        f"{TEXT}\n",
        {"id": "e", "body": TEXT},
    ]
    source, out, report = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", tmp_path / f"report{suffix}"
    result = scrub_jsonl(source, out, report, Scrub(mode=mode))
    assert (result.num_documents, [line for line, _ in result.failures]) == (2, [3, 4, 5])
    with pytest.raises(DataError) as raised:
        scrub_jsonl(source, tmp_path / "strict.jsonl", None, Scrub(mode=mode), is_strict=True)
    assert "line 3" in str(raised.value) and not (tmp_path / "strict.jsonl").exists()
    shown = capfd.readouterr()
    written = "".join(p.read_text() for p in (out, report))
    seen = [written, shown.out, shown.err, caplog.text, str(raised.value), repr(raised.value), repr(result)]
    for kind, value in VALUES.items():
        assert not any(value in text or value.replace(" ", "") in text for text in seen), kind
    assert not any(SECRET in text for text in seen)


def test_the_report_has_spans_of_the_original_and_no_values(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"id": 7, "text": TEXT, "by": "jo@acme.org"}])
    scrub_jsonl(source, tmp_path / "out.jsonl", tmp_path / "r.json", Scrub(FORMS))
    report = json.loads((tmp_path / "r.json").read_text())
    [document] = report["documents"]
    assert document["id"] == 7 and report["num_documents"] == 1
    spans = {s["type"]: TEXT[s["start"] : s["end"]] for s in document["spans"] if "field" not in s}
    assert spans["CREDIT_CARD"] == VALUES["credit_card"] and spans["EMAIL_ADDRESS"] == VALUES["email"]
    assert [s for s in document["spans"] if "field" in s] == [
        {"start": 0, "end": 11, "type": "EMAIL_ADDRESS", "field": "by"}
    ]
    assert report["counts"]["EMAIL_ADDRESS"] == 2
    scrub_jsonl(source, tmp_path / "out.jsonl", tmp_path / "r.jsonl", Scrub(FORMS))
    [line] = (tmp_path / "r.jsonl").read_text().splitlines()
    assert json.loads(line) == document


def test_an_endless_line_is_set_aside_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(scrub, "MAX_LINE_BYTES", 1000)
    rows = [{"id": 1, "text": "a"}, "x" * 5000 + "\n", {"id": 3, "text": "b"}]
    result = scrub_jsonl(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert result.num_documents == 2 and [line for line, _ in result.failures] == [2]


def test_a_long_line_takes_a_few_times_its_length(tmp_path):
    text = "Ask jo@acme.org, or read on about the river and the town on both of its sides. " * 13_000
    source = write_rows(tmp_path / "in.jsonl", [{"id": 1, "text": text}])
    tracemalloc.start()
    result = scrub_jsonl(source, tmp_path / "out.jsonl", tmp_path / "r.jsonl", Scrub(("email",)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.counts["EMAIL_ADDRESS"] == 13_000 and peak < 14 * len(text)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        scrub_jsonl(tmp_path / "none", tmp_path / "out")


def test_an_array_of_objects_is_scrubbed_item_by_item(tmp_path):
    rows = [{"id": "a", "text": "ask jo@acme.org"}, {"body": "jo@acme.org"}, "jo@acme.org", {"id": "d", "text": "no"}]
    source, out = tmp_path / "in.json", tmp_path / "out.jsonl"
    source.write_text("\ufeff" + json.dumps(rows, indent=1), encoding="utf-8")
    result = scrub_jsonl(source, out, None, Scrub(("email",)))
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == ["ask [email]", "no"]
    assert [number for number, _ in result.failures] == [2, 3] and "jo@" not in repr(result)
    with pytest.raises(DataError, match="item 2: no object with a string 'text'"):
        scrub_jsonl(source, out, None, Scrub(("email",)), is_strict=True)
    source.write_text(json.dumps(rows)[:-30], encoding="utf-8")
    assert scrub_jsonl(source, out, None, Scrub(("email",))).failures[-1][0] == 3
    source.write_text('{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}\n', encoding="utf-8")  # lines by another name
    assert scrub_jsonl(source, out, None, Scrub(("email",))).num_documents == 2
