"""Check digits: what tells a card, an account or a citizen's number from any other row of digits.

Each function takes the value as written (blanks, dots and dashes allowed) and says whether it can be a real one.
A random row passes Luhn one time in ten, mod 97 one time in a hundred, mod 11 one time in eleven.

Source: ISO/IEC 7812-1 (Luhn), ISO 13616 and ISO 7064 (IBAN), J. Verhoeff, "Error detecting decimal codes" (1969),
BIP 173 and 350 (bech32, bech32m); the national rules are those of the issuing offices. The checksum in the letter case
of an Ethereum address (EIP-55) is not looked at.
"""

import hashlib
import re
from collections.abc import Sequence

_IBAN_LENGTHS = dict(
    re.findall(
        r"([A-Z]{2})(\d\d)",
        "AD24AE23AL28AT20AZ28BA20BE16BG22BH22BI27BR29BY28CH21CR22CY28CZ24DE22DJ27DK18DO28EE20EG29ES24FI18FK18FO18FR27"
        "GB22GE22GI23GL18GR27GT28HR21HU28IE22IL23IQ23IS26IT27JO30KW30KZ20LB28LC32LI21LT20LU20LV21LY25MC27MD24ME22MK19"
        "MN20MR27MT31MU30NI28NL18NO15OM23PK24PL28PS29PT25QA29RO24RS22RU33SA24SC31SD18SE24SI19SK24SM27SO23ST25SV28TL23"
        "TN24TR26UA29VA22VG24XK20YE30",
    )
)
# The first digits that card schemes use; without them one row of digits in ten would be a card.
_CARD_PREFIX = re.compile(
    r"4|5[1-5]|5018|5020|5038|5893|56|57|58|6304|6759|676[1-3]|0604|2[2-7]|3[47]|30|36|38|39|35|6|1800|2131"
)
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BECH32 = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_PERMUTE = [1, 5, 7, 6, 2, 8, 3, 0, 9, 4]


def digits_of(value: str) -> list[int]:
    """Return the ASCII digits of ``value``.

    >>> digits_of("12-3 a4")
    [1, 2, 3, 4]
    """
    return [ord(c) - 48 for c in value if "0" <= c <= "9"]


def luhn(value: str) -> bool:
    """Return whether the last digit is the Luhn check digit of the others.

    >>> luhn("4111 1111 1111 1111"), luhn("4111 1111 1111 1112")
    (True, False)
    """
    digits = digits_of(value)[::-1]
    doubled = (d * 2 - 9 if d > 4 else d * 2 for d in digits[1::2])
    return len(digits) > 1 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def is_card(value: str) -> bool:
    """Return whether a card scheme could have issued the number: prefix, length and Luhn digit.

    >>> is_card("5500-0000-0000-0004"), is_card("9999999999999995")
    (True, False)
    """
    digits = "".join(map(str, digits_of(value)))
    return 12 <= len(digits) <= 19 and len(set(digits)) > 1 and _CARD_PREFIX.match(digits) is not None and luhn(digits)


def is_iban(value: str) -> bool:
    """Return whether the country's length and the remainder modulo 97 are right.

    >>> is_iban("DE89 3704 0044 0532 0130 00"), is_iban("DE88 3704 0044 0532 0130 00")
    (True, False)
    """
    text = re.sub(r"[ .-]", "", value).upper()
    if len(text) != int(_IBAN_LENGTHS.get(text[:2], 0)) or not (text.isascii() and text.isalnum()):
        return False
    return int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def weighted(value: str, weights: Sequence[int]) -> int:
    """Return the sum of digits times weights, in order; digits without a weight do not count.

    >>> weighted("123", (3, 2, 1))
    10
    """
    return sum(d * w for d, w in zip(digits_of(value), weights, strict=False))


def verhoeff(value: str) -> bool:
    """Return whether the last digit is Verhoeff's, as in India's Aadhaar.

    >>> verhoeff("2363"), verhoeff("2364")
    (True, False)
    """
    digits, state, moved = digits_of(value)[::-1], 0, list(range(10))
    for digit in digits:
        state = _multiply_d5(state, moved[digit])
        moved = [_PERMUTE[m] for m in moved]
    return len(digits) > 1 and state == 0


def _multiply_d5(a: int, b: int) -> int:
    """Multiply in the dihedral group of the pentagon, whose elements 5 to 9 are reflections."""
    if a < 5:
        return (a + b) % 5 if b < 5 else 5 + (a + b - 5) % 5
    return 5 + (a - 5 - b) % 5 if b < 5 else (a - b) % 5


def is_crypto_address(value: str) -> bool:
    """Return whether a Bitcoin address (Base58Check, bech32) or an Ethereum one (by its form) can be paid to.

    >>> is_crypto_address("1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa"), is_crypto_address("1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNb")
    (True, False)
    """
    if value[:2] == "0x":
        return re.fullmatch(r"0x[0-9a-fA-F]{40}", value) is not None and len(set(value[2:])) > 4
    if value[:3].lower() == "bc1":
        return _is_bech32(value.lower())
    if not value or any(c not in _BASE58 for c in value):
        return False
    number = 0
    for c in value:
        number = number * 58 + _BASE58.index(c)
    if number.bit_length() > 200:
        return False
    data = number.to_bytes(25, "big")
    return hashlib.sha256(hashlib.sha256(data[:21]).digest()).digest()[:4] == data[21:]


def _is_bech32(value: str) -> bool:
    part = value[3:]
    if not 11 <= len(part) <= 87 or any(c not in _BECH32 for c in part):
        return False
    check = 1
    for number in [3, 3, 0, 2, 3, *(_BECH32.index(c) for c in part)]:  # "bc", spread out
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ number
        for i, generator in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            check ^= generator if top >> i & 1 else 0
    return check in (1, 0x2BC830A3)


def is_us_ssn(value: str) -> bool:
    """Return whether the area, group and serial are ones that were or can be issued (9xx is for taxpayers without).

    >>> is_us_ssn("536-22-1145"), is_us_ssn("000-12-3456"), is_us_ssn("666-12-3456")
    (True, False, False)
    """
    d = "".join(map(str, digits_of(value)))
    return len(d) == 9 and d[:3] not in ("000", "666") and d[0] != "9" and d[3:5] != "00" and d[5:] != "0000"


def is_us_bank_routing(value: str) -> bool:
    """Return whether an American routing number's check digit holds.

    >>> is_us_bank_routing("021000021")
    True
    """
    return len(digits_of(value)) == 9 and weighted(value, (3, 7, 1) * 3) % 10 == 0


def is_medical_licence(value: str) -> bool:
    """Return whether the check digit of a DEA registration number holds.

    >>> is_medical_licence("AB1234563"), is_medical_licence("AB1234564")
    (True, False)
    """
    d = digits_of(value)
    return len(d) == 7 and (d[0] + d[2] + d[4] + 2 * (d[1] + d[3] + d[5])) % 10 == d[6]


def is_uk_nhs(value: str) -> bool:
    """Return whether the NHS number's check digit (mod 11) holds.

    >>> is_uk_nhs("943 476 5919")
    True
    """
    d = digits_of(value)
    return len(d) == 10 and len(set(d)) > 1 and weighted(value, range(10, 1, -1)) % 11 == (11 - d[9]) % 11


def is_spanish_id(value: str) -> bool:
    """Return whether the letter of a Spanish NIF or NIE fits its number.

    >>> is_spanish_id("12345678Z"), is_spanish_id("X1234567L"), is_spanish_id("12345678A")
    (True, True, False)
    """
    text = re.sub(r"[ .-]", "", value).upper()
    number = text[:-1].translate(str.maketrans("XYZ", "012"))
    return number.isdigit() and "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == text[-1]


def is_italian_code(value: str) -> bool:
    """Return whether the last letter of a codice fiscale fits.

    >>> is_italian_code("RSSMRA85T10A562S")
    True
    """
    text = value.upper()
    odd = [1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23]
    places = [int(c) if c.isdigit() else ord(c) - 65 for c in text]
    total = sum(odd[p] if i % 2 == 0 else p for i, p in enumerate(places[:-1]))
    return len(text) == 16 and total % 26 == places[-1]


def is_pesel(value: str) -> bool:
    """Return whether Poland's check digit and month hold.

    >>> is_pesel("44051401359")
    True
    """
    d = digits_of(value)
    return (
        len(d) == 11
        and (d[2] * 10 + d[3]) % 20 in range(1, 13)
        and weighted(value, (1, 3, 7, 9) * 2 + (1, 3, 1)) % 10 == 0
    )


def is_singapore_id(value: str) -> bool:
    """Return whether the last letter of an NRIC or FIN fits.

    >>> is_singapore_id("S1234567D"), is_singapore_id("S1234567A")
    (True, False)
    """
    first = value[0].upper()
    total = weighted(value, (2, 7, 6, 5, 4, 3, 2)) + {"T": 4, "G": 4, "M": 3}.get(first, 0)
    if first == "M":
        return "KLJNPQRTUWX"[10 - total % 11] == value[-1].upper()
    letters = "JZIHGFEDCBA" if first in "ST" else "XWUTRQPNMLK"
    return letters[total % 11] == value[-1].upper()


def is_abn(value: str) -> bool:
    """Return whether an Australian business number divides by 89 as it must.

    >>> is_abn("51 824 753 556")
    True
    """
    d = digits_of(value)
    return len(d) == 11 and d[0] > 0 and (weighted(value, (10, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19)) - 10) % 89 == 0


def is_acn(value: str) -> bool:
    """Return whether an Australian company number's check digit holds.

    >>> is_acn("004 085 616")
    True
    """
    d = digits_of(value)
    return len(d) == 9 and (-weighted(value, range(8, 0, -1))) % 10 == d[8]


def is_tfn(value: str) -> bool:
    """Return whether an Australian tax file number divides by 11.

    >>> is_tfn("123 456 782")
    True
    """
    return len(digits_of(value)) == 9 and weighted(value, (1, 4, 3, 7, 5, 8, 6, 9, 10)) % 11 == 0


def is_medicare(value: str) -> bool:
    """Return whether an Australian Medicare number's check digit holds.

    >>> is_medicare("2123 45670 1")
    True
    """
    d = digits_of(value)
    return len(d) in (10, 11) and 2 <= d[0] <= 6 and weighted(value, (1, 3, 7, 9) * 2) % 10 == d[8]


def is_aadhaar(value: str) -> bool:
    """Return whether Verhoeff's digit holds and the number is no palindrome, as India's office says."""
    d = digits_of(value)
    return len(d) == 12 and d[0] > 1 and d != d[::-1] and verhoeff(value)


def is_finnish_code(value: str) -> bool:
    """Return whether the last sign of a henkilotunnus fits.

    >>> is_finnish_code("131052-308T")
    True
    """
    d = digits_of(value[:6] + value[7:10])
    return len(d) == 9 and "0123456789ABCDEFHJKLMNPRSTUVWXY"[int("".join(map(str, d))) % 31] == value[-1].upper()


def is_korean_number(value: str) -> bool:
    """Return whether a resident registration number's check digit holds (numbers of before October 2020)."""
    d = digits_of(value)
    return (
        len(d) == 13
        and 0 < d[2] * 10 + d[3] <= 12
        and (11 - weighted(value, (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)) % 11) % 10 == d[12]
    )


def is_thai_number(value: str) -> bool:
    """Return whether Thailand's check digit holds."""
    d = digits_of(value)
    return len(d) == 13 and d[0] > 0 and (11 - weighted(value, range(13, 1, -1)) % 11) % 10 == d[12]


def is_cpf(value: str) -> bool:
    """Return whether both check digits of Brazil's CPF hold.

    >>> is_cpf("529.982.247-25")
    True
    """
    d = digits_of(value)
    if len(d) != 11 or len(set(d)) == 1:
        return False
    first = weighted(value, range(10, 1, -1)) * 10 % 11 % 10
    return first == d[9] and weighted(value, range(11, 1, -1)) * 10 % 11 % 10 == d[10]


def is_french_number(value: str) -> bool:
    """Return whether the key of a French social security number is 97 less the rest.

    >>> is_french_number("1 84 12 76 451 089 46")
    True
    """
    text = re.sub(r"[ .-]", "", value).upper().replace("2A", "19").replace("2B", "18")
    return len(text) == 15 and text.isdigit() and text[0] in "12" and 97 - int(text[:13]) % 97 == int(text[13:])


def is_german_tax_id(value: str) -> bool:
    """Return whether the check digit of a German Steuer-Identifikationsnummer (ISO 7064, mod 11,10) holds.

    >>> is_german_tax_id("86095742719")
    True
    """
    d = digits_of(value)
    product = 10
    for digit in d[:10]:
        product = ((digit + product) % 10 or 10) * 2 % 11
    return len(d) == 11 and d[0] > 0 and (11 - product) % 10 == d[10]


def is_bsn(value: str) -> bool:
    """Return whether a Dutch citizen service number passes the eleven test.

    >>> is_bsn("111222333")
    True
    """
    d = digits_of(value)
    return len(d) == 9 and (weighted(value, range(9, 1, -1)) - d[8]) % 11 == 0


def is_swedish_number(value: str) -> bool:
    """Return whether a personnummer has a month, a day and Luhn's digit.

    >>> is_swedish_number("811218-9876")
    True
    """
    d = digits_of(value)[-10:]
    return len(d) == 10 and 0 < d[2] * 10 + d[3] <= 12 and 0 < d[4] * 10 + d[5] <= 91 and luhn("".join(map(str, d)))
