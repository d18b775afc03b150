"""Personal data are found, code is left alone, and no finding carries its value."""

import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.data.scrub import KINDS, Finding, find_personal, redact

# Made up for the tests and put together here, so that no scanner takes this file for a leak.
KEYS = [
    "AKIA" + "Q7ZP4LMN8RT2VX5W",
    "ghp_" + "a8Fk29dLq0ZxW7mN3bVc5RtY1uIoP4sGhJ6e",
    "sk-proj-" + "Zk39dkLqPxW7mN3bVc5RtY1uIoP4",
    "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNm12",
    "AIza" + "SyD3kf93jf02kf93jf02kf93jf02kf93jfa",
    "xoxb-" + "1234567890-abcdefghij",
    "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "dozjgNryP4J3jVmNHl0w5N",
]
FOUND = {
    "email": [
        "jane.doe+x@mail.example.co.uk",
        "o'brien_1@acme.org".split("'")[1],
        "m\u00fcller@b\u00fccher.de",
        "a@b.io",
    ],
    "phone": [
        "+1 415 555 2671",
        "+14155552671",
        "+49 (30) 901820-10",
        "(415) 555-2671",
        "415-555-2671",
        "1-800-555-0199".replace("555", "275"),
        "415.555.2671",
        "020 7946 0958",
        "+33 1 23 45 67 89",
    ],
    "secret": KEYS,
}
LEFT = [
    "version 3.11.7, 10.0.19041.1234 and 2.0.0-rc.1",
    "2024-01-31T12:30:45.123456+00:00 and 2001:db8::ff00:42:8329",
    "@dataclass\n@pytest.mark.slow\nclass A: pass",
    "scores = q @ k.T; y = weights@x.mean(0); z = a@b.to(device)",
    "0xDEADBEEF 0x7ffee4bff5c0 d41d8cd98f00b204e9800998ecf8427e",
    "192.168.10.254:8080, 127.0.0.1, 255.255.255.255",
    "ISBN 978-3-16-148410-0, RFC 2822, issue #1234567890, 1234567890123",
    "3.141592653589793, 1e-10, +1.2345678901, 1_000_000_000, -123456789",
    "123 456 7890 555 123 4567 rows of a table",
    "token = tokenize.generate_tokens, password=None, secret: str = 'secret'",
    "api_key=os.environ['OPENAI_API_KEY'], token=token2, access_key = get_access_key_v2()",
    "password: your-password-123, token=<TOKEN12345>, api_key = xxxxxxxx1234, key=sk-xxxxxxxxxxxxxxxxxxxxxxxx",
    "git@github.com:owner/repo.git and https://user:password@host/path",
    "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "the sk-learn package, pk_test, hf_hub_download, ghp_ prefix",
    "uuid 123e4567-e89b-12d3-a456-426614174000",
    "2023/01/31 - 2024/12/01, 12:30-14:45, pages 123-456-789",
    "Call 911 or 112. In 1984-1985 there were 555-1234 of them.",
]


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, values in FOUND.items() for value in values])
def test_each_is_found_as_one_exact_span(kind, value):
    for before, after in (("Write to ", " today."), ("(", ")"), ("", "."), ("see: ", ", or"), ("<", ">"), ("\n", "\n")):
        text = f"{before}{value}{after}"
        assert find_personal(text) == [Finding(len(before), len(before) + len(value), kind)], text


@pytest.mark.parametrize("text", LEFT)
def test_code_numbers_and_dates_stay(text):
    assert redact(text) == (text, [])


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("password: Tr0ub4dor&3x", "password: [secret]"),
        ('"api_key": "9f8Ae7d6C5b4a3Z2"', '"api_key": "[secret]"'),
        ("Authorization: Bearer abc123DEF456ghi789", "Authorization: Bearer [secret]"),
        ("postgres://admin:s3cr3tPa5s@db.host/x", "postgres://admin:[secret]@db.host/x"),
        ("Phone: 030 12345678.", "Phone: [phone]."),
        ("fax no. 555 123 4567", "fax no. [phone]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "[secret]"),
    ],
)
def test_labels_tell_what_a_value_is(text, redacted):
    assert redact(text)[0] == redacted


def test_kinds_can_be_chosen():
    text = "a@b.io, +14155552671"
    assert redact(text, ("phone",))[0] == "a@b.io, [phone]"
    assert redact(text, ())[0] == text
    assert KINDS == ("email", "phone", "secret")


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=string.printable + "\u00e9\u4e2d@@++0123456789"))
def test_spans_lie_in_order_and_redacting_twice_finds_nothing_new(text):
    redacted, findings = redact(text)
    assert all(a.end <= b.start for a, b in zip(findings, findings[1:], strict=False))
    assert all(0 <= f.start < f.end <= len(text) for f in findings)
    again, more = redact(redacted)
    assert len(more) <= len(findings) and len(again) <= len(redacted) + 9 * len(more)


@pytest.mark.parametrize(
    "piece", ["a", "a@", "1", "+1", "0 ", "a.", "eyJ", "token=", "://a:", "-----BEGIN PRIVATE KEY-----", "@a."]
)
def test_endless_input_takes_bounded_time(piece):
    text = piece * (300_000 // len(piece))
    begun = time.perf_counter()
    find_personal(text)
    assert time.perf_counter() - begun < 5


def test_on_real_reference_text_only_addresses_of_authors_are_found(reference_documents):
    found = []
    for text in (document.text for document in reference_documents):
        found += [(f.kind, text[f.start : f.end]) for f in find_personal(text)]
    # 3 MB of code documentation: version numbers, dates, addresses in memory, signatures with token= and password=.
    assert not [value for kind, value in found if kind != "email"]
    assert all("@" in value and "." in value.partition("@")[2] for _, value in found)
    assert len(found) < 100
