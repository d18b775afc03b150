"""Each kind is found by its form, and what has a wrong check digit or no words about it is left."""

import random
import time

import pytest

from modelwright.data.identifiers import DETECTORS
from modelwright.data.personal_data import ALL, KINDS, RANK, TAGGED, TYPES, Finding, find_patterns, without_overlaps

FORMS = tuple(kind for kind in ALL if kind not in TAGGED)

FOUND = [
    ("credit_card", "Paid with {} today", "4111 1111 1111 1111"),
    ("credit_card", "Paid with {} today", "3782-822463-10005"),
    ("credit_card", "{}", "5555555555554444"),
    ("iban", "to {}, please", "DE89 3704 0044 0532 0130 00"),
    ("iban", "to {}, please", "GB82WEST12345698765432"),
    ("crypto", "send it to {}", "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa"),
    ("crypto", "send it to {}", "0x52908400098527886E0F7030069857D2E4169EE7"),
    ("ip_address", "from {}.", "203.0.113.77"),
    ("ip_address", "from {} on", "2001:db8::ff00:42:8329"),
    ("mac_address", "interface {}", "00:1A:2b:3C:4d:5E"),
    ("us_ssn", "number {} is his", "536-22-1145"),
    ("us_ssn", "SSN: {}", "536221145"),
    ("us_itin", "ITIN {}", "912-70-1234"),
    ("us_passport", "Passport number: {}", "C01234567"),
    ("us_driver_license", "My driver's license is {}", "D1234567"),
    ("us_driver_license", "Driver license no. {}", "S530-4601-2345"),
    ("us_bank_number", "account number {}", "945456787654"),
    ("medical_license", "DEA {}", "BB1388568"),
    ("uk_nhs", "NHS number {}", "943 476 5919"),
    ("uk_nino", "her number {}", "AB 12 34 56 C"),
    ("es_nif", "DNI {}", "12345678Z"),
    ("it_fiscal_code", "codice {}", "RSSMRA85T10A562S"),
    ("pl_pesel", "PESEL: {}", "44051401359"),
    ("sg_nric_fin", "NRIC {}", "S1234567D"),
    ("au_abn", "ABN {}", "51 824 753 556"),
    ("au_acn", "ACN {}", "004 085 616"),
    ("au_tfn", "TFN {}", "123 456 782"),
    ("au_medicare", "Medicare {}", "2123 45670 1"),
    ("in_pan", "PAN {}", "ABCPK1234L"),
    ("in_vehicle_registration", "vehicle {}", "KA 01 AB 1234"),
    ("in_voter", "voter id {}", "ABC1234567"),
    ("fi_personal_identity_code", "hetu {}", "131052-308T"),
    ("br_cpf", "CPF {}", "529.982.247-25"),
    ("fr_nir", "no {}", "1 84 12 76 451 089 46"),
    ("se_personnummer", "nummer {}", "811218-9876"),
    ("date_of_birth", "born on {} in", "12/31/1979"),
    ("date_of_birth", "DOB: {}", "1979-12-31"),
    ("date", "We met on {}.", "March 3, 2021"),
    ("date", "We met on {}.", "3 March 2021"),
    ("age", "She is {} years old", "47"),
    ("age", "He just turned {}.", "63"),
    ("zip_code", "ZIP: {}", "90210"),
    ("phone", "call me at {} now", "0496 46 46 70"),
    ("phone", "ring {}", "(02) 9876 5432"),
    ("phone", "my phone is {}", "516 466 638"),
    ("phone", "dial {}", "+44 (0)20 7946 0958"),
    ("phone", "reach me on {}", "555-123-4567 x123"),
    ("url", "see {} for more", "https://www.example.com/people/7?tab=a"),
    ("email", "write to {}", "jo.doe@example.co.uk"),
]


@pytest.mark.parametrize(("kind", "around", "value"), FOUND, ids=[f"{k}-{v[:6]}" for k, _, v in FOUND])
def test_each_form_is_one_exact_span(kind, around, value):
    text = around.format(value)
    found = without_overlaps(find_patterns(text, FORMS), len(text))
    spans = [(text[f.start : f.end], f.kind) for f in found if f.kind == kind]
    assert (value if kind != "age" else value) in [v.split(" years")[0] for v, _ in spans], found


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Paid with 4111 1111 1111 1112 today", "credit_card"),
        ("order 9999999999999995", "credit_card"),
        ("DE88 3704 0044 0532 0130 00", "iban"),
        ("1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNb", "crypto"),
        ("256.1.1.1 and 1.2.3 and 1.2.3.4.5", "ip_address"),
        ("12:30:45 and std::vector and a::b", "ip_address"),
        ("000-12-3456 or 666-12-3456", "us_ssn"),
        ("536221145 rows", "us_ssn"),
        ("944 476 5919", "uk_nhs"),
        ("12345678A", "es_nif"),
        ("in 47 minutes, 12 of 30, page 99", "age"),
        ("C01234567 is a part number", "us_passport"),
        ("version 2.10.2021.4", "date"),
    ],
)
def test_near_misses_are_left(text, kind):
    assert [f for f in find_patterns(text, FORMS) if f.kind == kind] == []


def test_words_on_another_line_do_not_count_but_a_label_above_does():
    assert not [f for f in find_patterns("passport\n\nsome text, C01234567", ("us_passport", "date")) if True]
    assert [f.kind for f in find_patterns("Passport:\nC01234567", ("us_passport", "date"))] == ["us_passport"]


def test_of_two_that_overlap_the_better_kind_stays_then_the_longer_one():
    found = [Finding(0, 9, "phone"), Finding(2, 9, "us_ssn"), Finding(10, 12, "age"), Finding(10, 14, "age")]
    assert without_overlaps(found, 20) == [Finding(2, 9, "us_ssn"), Finding(10, 14, "age")]


def test_every_kind_has_a_type_and_a_rank():
    assert set(RANK) == set(TYPES) == set(ALL) and set(KINDS) | set(TAGGED) <= set(TYPES)
    assert {d.kind for d in DETECTORS} <= set(TYPES)
    assert Finding(0, 1, "email").type == "EMAIL_ADDRESS"


HARD = "1|1 |1-|0x|a.|4111|2001:|:|A1|Jan |1.1.1.1.|passport 1|call |00:|+1(|http://|bc1q|9 |1/".split("|")


@pytest.mark.parametrize("piece", HARD)
def test_time_grows_with_the_length_alone(piece):
    def seconds(num_chars):
        text = piece * (num_chars // len(piece))
        begun = time.perf_counter()
        sum(1 for _ in find_patterns(text, FORMS))
        return time.perf_counter() - begun

    # A quadratic pattern would take 64 times as long; the bound leaves room for a busy machine.
    assert seconds(32_000) < 30 * max(seconds(4_000), 0.01)


def test_random_text_is_searched_without_failing():
    dice = random.Random(0)
    signs = "0123456789 -.:/@+()[]ABCDEFabcdefxyz\n\u00e9\u4e2d\u0663"
    for _ in range(200):
        text = "".join(dice.choices(signs, k=300))
        found = without_overlaps(find_patterns(text, FORMS), len(text))
        assert all(0 <= f.start < f.end <= 300 for f in found)
        assert all(a.end <= b.start for a, b in zip(found, found[1:], strict=False))
