"""Check digits accept published examples and refuse the same number with one digit changed."""

import random

import pytest

from modelwright.data import check_digits as checks

# Published examples of the issuing offices and of the standards' own texts; none belongs to a person.
PUBLISHED = [
    (checks.is_card, "4111 1111 1111 1111"),
    (checks.is_card, "378282246310005"),
    (checks.is_card, "6011111111111117"),
    (checks.is_iban, "GB82 WEST 1234 5698 7654 32"),
    (checks.is_iban, "FR14 2004 1010 0505 0001 3M02 606"),
    (checks.is_iban, "NO93 8601 1117 947"),
    (checks.is_crypto_address, "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa"),
    (checks.is_crypto_address, "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4"),
    (checks.is_us_bank_routing, "021000021"),
    (checks.is_medical_licence, "AB1234563"),
    (checks.is_uk_nhs, "943 476 5919"),
    (checks.is_spanish_id, "12345678Z"),
    (checks.is_italian_code, "RSSMRA85T10A562S"),
    (checks.is_pesel, "44051401359"),
    (checks.is_singapore_id, "S1234567D"),
    (checks.is_abn, "51 824 753 556"),
    (checks.is_acn, "004 085 616"),
    (checks.is_tfn, "123 456 782"),
    (checks.is_medicare, "2123 45670 1"),
    (checks.verhoeff, "2363"),
    (checks.is_finnish_code, "131052-308T"),
    (checks.is_cpf, "529.982.247-25"),
    (checks.is_french_number, "1 84 12 76 451 089 46"),
    (checks.is_german_tax_id, "86095742719"),
    (checks.is_bsn, "111222333"),
    (checks.is_swedish_number, "811218-9876"),
]


@pytest.mark.parametrize(("check", "value"), PUBLISHED, ids=[f"{c.__name__}-{v[:4]}" for c, v in PUBLISHED])
def test_published_examples_pass_and_almost_no_neighbour_does(check, value):
    assert check(value)
    places = [i for i, c in enumerate(value) if c.isdigit()][1:]
    others = [value[:i] + str((int(value[i]) + 1) % 10) + value[i + 1 :] for i in places]
    assert sum(map(check, others)) <= len(others) // 3


def test_random_digits_pass_as_seldom_as_the_arithmetic_says():
    dice = random.Random(0)
    rows = [f"{dice.randrange(10**15):016}" for _ in range(4000)]
    assert 300 < sum(map(checks.luhn, rows)) < 500
    ibans = [f"DE{dice.randrange(100):02}{dice.randrange(10**18):018}" for _ in range(4000)]
    assert 15 < sum(map(checks.is_iban, ibans)) < 75


@pytest.mark.parametrize(
    "value", ["0x0000000000000000000000000000000000000000", "bc1qqqqqqqqqqqqqq", "1Il0OIl0OIl0OIl0OIl0OIl0", ""]
)
def test_what_only_looks_like_a_crypto_address_is_none(value):
    assert not checks.is_crypto_address(value)
