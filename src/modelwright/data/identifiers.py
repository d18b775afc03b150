"""The table of identifiers: numbers of people and accounts in many countries, dates, ages, postal codes.

Every pattern needs a digit: the search keeps to what stands near one.

A `Detector` is a kind, a pattern, and what makes a match count: a check and, where the form alone says little, words
that must stand before it on the same line ("passport no."). A new identifier is one entry.

Source: "Supported entities" of Microsoft Presidio's documentation, and the rules of the issuing offices.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from modelwright.data import check_digits as checks


@dataclass(frozen=True)
class Detector:
    """A kind by its form. The group ``value`` of the pattern, or all of it, is the finding."""

    kind: str
    pattern: re.Pattern[str]
    check: Callable[[str], bool] | None = None
    words: re.Pattern[str] | None = None  # must stand at most 60 characters before, on the same line


def _words(alternatives: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![a-z])(?:{alternatives})(?![a-z])[^\n]*\Z", re.IGNORECASE)


def _form(pattern: str, flags: int = 0) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w+-])(?<!\d[./])(?:{pattern})(?![\w-])(?!\.\d)", flags)


_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)\.?"
)
_CLOCK = r"(?:[T ,]{1,2}(?:at )?\d{1,2}:\d\d(?::\d\d)?(?:\.\d{1,6})?(?: ?[AaPp]\.?[Mm]\.?)?)?"
DATE = (
    r"(?:(?:19|20)\d\d([-/.])(?:0?[1-9]|1[0-2])\1(?:[12]\d|3[01]|0?[1-9])"
    r"|(?:[12]\d|3[01]|0?[1-9])([-/.])(?:[12]\d|3[01]|0?[1-9])\2(?:(?:1[89]|20)\d\d|\d\d)"
    rf"|(?:[12]\d|3[01]|0?[1-9])(?:st|nd|rd|th)?(?: of)? {_MONTH},?(?: (?:1[89]|20)\d\d)?"
    rf"|{_MONTH} (?:[12]\d|3[01]|0?[1-9])(?:st|nd|rd|th)?(?:,? (?:1[89]|20)\d\d)?"
    rf"|{_MONTH} (?:1[89]|20)\d\d"
    rf"|(?:[12]\d|3[01]|0?[1-9])-{_MONTH}-(?:\d{{4}}|\d\d))"
)
DETECTORS = (
    Detector("iban", _form(r"[A-Za-z]{2}\d\d(?:[ -]?[A-Za-z0-9]{4}){2,7}(?:[ -]?[A-Za-z0-9]{1,3})?"), checks.is_iban),
    Detector(
        "crypto",
        _form(r"[13][1-9A-HJ-NP-Za-km-z]{25,34}|(?:bc1|BC1)[0-9A-Za-z]{11,87}|0x[0-9a-fA-F]{40}"),
        checks.is_crypto_address,
    ),
    Detector(
        "mac_address",
        _form(r"[0-9A-Fa-f]{2}([:-])(?:[0-9A-Fa-f]{2}\1){4}[0-9A-Fa-f]{2}|(?:[0-9a-f]{4}\.){2}[0-9a-f]{4}"),
    ),
    Detector(
        "credit_card", _form(r"\d{12,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}|\d{4}([ -])\d{6}\2\d{4,5}"), checks.is_card
    ),
    Detector("us_ssn", _form(r"\d{3}([- .])\d\d\1\d{4}"), checks.is_us_ssn),
    Detector("us_ssn", _form(r"\d{9}"), checks.is_us_ssn, _words(r"ssn|ssns|social security")),
    Detector("us_itin", _form(r"9\d\d([- ])[5-9]\d\1\d{4}")),
    Detector("us_itin", _form(r"9\d\d[5-9]\d{5}"), None, _words(r"itin|taxpayer|tax id")),
    Detector("us_passport", _form(r"[A-Z]?\d{8,9}"), None, _words(r"passport")),
    Detector("in_passport", _form(r"[A-PR-WY][1-9]\d ?\d{4}[1-9]"), None, _words(r"passport")),
    Detector(
        "us_driver_license",
        _form(r"[A-Z]{0,3}[- ]?\d[\d-]{4,15}\d|[A-Z]\d{2,4}-\d{3,4}-\d{3,4}(?:-\d{1,4}){0,2}|[A-Z0-9]{7,14}(?<=\d)"),
        None,
        _words(r"driv(?:er|ing|er's|ers|er’s)'? ?(?:licen[cs]es?|permits?)|dl|licen[cs]e (?:no|number|#)|licen[cs]e"),
    ),
    Detector(
        "us_bank_number",
        _form(r"\d{8,17}"),
        None,
        _words(r"(?:bank |checking |savings? )?accounts?(?: no| number| #)|acct|bank"),
    ),
    Detector("us_bank_number", _form(r"\d{9}"), checks.is_us_bank_routing, _words(r"routing|aba|rtn")),
    Detector(
        "us_mbi",
        _form(
            r"[1-9][AC-HJKMNP-RT-Y][AC-HJKMNP-RT-Y0-9]\d-?[AC-HJKMNP-RT-Y]"
            r"[AC-HJKMNP-RT-Y0-9]\d-?[AC-HJKMNP-RT-Y]{2}\d\d"
        ),
    ),
    Detector("medical_license", _form(r"[ABCDEFGHJKLMPRSTUX][A-Z9]-?\d{7}", re.IGNORECASE), checks.is_medical_licence),
    Detector("uk_nhs", _form(r"\d{3}([ -])\d{3}\1\d{4}"), checks.is_uk_nhs, _words(r"nhs|national health|patient")),
    Detector("uk_nhs", _form(r"\d{10}"), checks.is_uk_nhs, _words(r"nhs|national health")),
    Detector("uk_nino", _form(r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D]", re.IGNORECASE)),
    Detector("es_nif", _form(r"(?:\d{8}|[XYZxyz]-?\d{7})-?[A-Za-z]"), checks.is_spanish_id),
    Detector(
        "it_fiscal_code", _form(r"[A-Z]{6}\d\d[A-EHLMPRST]\d\d[A-Z]\d{3}[A-Z]", re.IGNORECASE), checks.is_italian_code
    ),
    Detector("it_vat_code", _form(r"(?:IT)?\d{11}"), checks.luhn, _words(r"p(?:artita)?\.? ?iva|vat")),
    Detector(
        "it_identity_card",
        _form(r"C[A-Z]\d{5}[A-Z]{2}|[A-Z]{2} ?\d{7}"),
        None,
        _words(r"carta d['’ ]identit[aà]|identity card|cie"),
    ),
    Detector("pl_pesel", _form(r"\d{11}"), checks.is_pesel, _words(r"pesel")),
    Detector("sg_nric_fin", _form(r"[STFGM]\d{7}[A-Z]", re.IGNORECASE), checks.is_singapore_id),
    Detector("au_abn", _form(r"\d\d ?\d{3} ?\d{3} ?\d{3}"), checks.is_abn, _words(r"abn|australian business")),
    Detector("au_acn", _form(r"\d{3} ?\d{3} ?\d{3}"), checks.is_acn, _words(r"acn|australian company")),
    Detector("au_tfn", _form(r"\d{3} ?\d{3} ?\d{3}"), checks.is_tfn, _words(r"tfn|tax file")),
    Detector("au_medicare", _form(r"[2-6]\d{3} ?\d{5} ?\d(?:[ /-]?\d)?"), checks.is_medicare, _words(r"medicare")),
    Detector("in_pan", _form(r"[A-Z]{3}[ABCFGHLJPTK][A-Z]\d{4}[A-Z]", re.IGNORECASE)),
    Detector("in_aadhaar", _form(r"[2-9]\d{3}([ -])\d{4}\1\d{4}"), checks.is_aadhaar),
    Detector("in_aadhaar", _form(r"[2-9]\d{11}"), checks.is_aadhaar, _words(r"aadhaa?r|uidai|uid")),
    Detector(
        "in_vehicle_registration",
        _form(r"[A-Z]{2}[ -]?\d{1,2}[ -]?[A-Z]{1,3}[ -]?\d{4}"),
        None,
        _words(r"vehicles?|registration|number plate|car|rto|plate"),
    ),
    Detector("in_voter", _form(r"[A-Z]{3}\d{7}"), None, _words(r"voter(?:'s)?|epic|election")),
    Detector(
        "fi_personal_identity_code",
        _form(r"[0-3]\d[01]\d{3}[-+ABCDEFYXWVU]\d{3}[0-9A-FHJ-NPR-Y]"),
        checks.is_finnish_code,
    ),
    Detector("kr_rrn", _form(r"\d{6}-?[1-8]\d{6}"), checks.is_korean_number),
    Detector(
        "th_tnin",
        _form(r"\d-?\d{4}-?\d{5}-?\d\d-?\d"),
        checks.is_thai_number,
        _words(r"thai|tnin|national id|id card|identi\w+"),
    ),
    Detector("br_cpf", _form(r"\d{3}\.\d{3}\.\d{3}-\d\d"), checks.is_cpf),
    Detector("br_cpf", _form(r"\d{11}"), checks.is_cpf, _words(r"cpf")),
    Detector("fr_nir", _form(r"[12] ?\d\d ?\d\d ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d"), checks.is_french_number),
    Detector(
        "de_tax_id",
        _form(r"\d\d ?\d{3} ?\d{3} ?\d{3}"),
        checks.is_german_tax_id,
        _words(r"steuer\S*|tax id\w*|idnr|tin"),
    ),
    Detector("nl_bsn", _form(r"\d{9}"), checks.is_bsn, _words(r"bsn|burgerservicenummer|sofi\S*")),
    Detector("se_personnummer", _form(r"(?:19|20)?\d{6}[-+]\d{4}"), checks.is_swedish_number),
    Detector(
        "national_id",
        _form(r"[A-Z]{0,3}[- ]?\d[\dA-Z.-]{4,18}[\dA-Z]"),
        None,
        _words(
            r"(?:national|citizen|government|personal|patient|employee|insurance|medical record|member|policy"
            r"|health plan|taxpayer|student) (?:id|identi\w+|numbers?|no)|mrn|passport"
            r"|national insurance|id (?:number|card|no)"
        ),
    ),
    Detector(
        "date_of_birth",
        _form(DATE, re.IGNORECASE),
        None,
        _words(r"dob|d\.o\.b|born|birth ?date|birth|birthday|birthdate|geboren"),
    ),
    Detector("date", _form(DATE + _CLOCK, re.IGNORECASE)),
    Detector(
        "date",
        re.compile(
            r"(?i:\b(?:in|since|of|from|until|till|by|during|before|after|early|late|and|to|the|mid|year|around"
            r"|between)) (?P<value>(?:1[6-9]|20)\d\d)s?(?![\w-])(?![.,]\d)"
        ),
    ),
    Detector("date", re.compile(r"(?i:\b(?:a|an)) (?P<value>(?:19|20)\d\d) (?=[A-Za-z])")),
    Detector(
        "age",
        re.compile(
            r"(?<![\w.,-])(?P<value>1?\d?\d)[ -]?(?:years?|yrs?|y/?o|yo)(?:[ -]old|\b)"
            r"(?! (?:ago|later|before|after|of experience|in ))",
            re.IGNORECASE,
        ),
    ),
    Detector(
        "age",
        re.compile(
            r"(?:\bi'?m|\bturned|\bturning|\bturns|\baged?:?|\bwas|\bis|\bat the age of|\bage of) "
            r"(?:only |just |now |already )?(?P<value>1?\d\d)(?![\w%$°/:-])(?![.,]\d)"
            r"(?! ?(?:percent|km|m|kg|cm|of|[a-z]+s)\b)",
            re.IGNORECASE,
        ),
    ),
    Detector(
        "zip_code",
        re.compile(
            r"\b(?:zip(?: ?code)?|post(?:al)? ?code|plz|cap|postnummer)\b[: .#]{0,3}"
            r"(?:(?:is|was|of|number|it's|:)[: ]{1,2}){0,2}"
            r"(?P<value>[A-Z]{0,2}-?\d[\dA-Z]{1,4}(?:[ -]\d?[A-Z\d]{2,4})?)"
            r"(?![\w-])",
            re.IGNORECASE,
        ),
    ),
    Detector("zip_code", re.compile(r"\b[A-Z]{2} (?P<value>\d{5}(?:-\d{4})?)(?![\w-])")),
    Detector(
        "zip_code",
        re.compile(
            r"(?<![\w-])[A-Z]{1,2}\d[A-Z\d]? \d[ABD-HJLNP-UW-Z]{2}(?![\w-])"
            r"|(?<![\w-])[ABCEGHJ-NPRSTVXY]\d[A-Z] \d[A-Z]\d(?![\w-])"
        ),
    ),
)
