"""Find personal data that has a form: addresses, numbers with check digits, dates, keys.

A finding is a span and a kind; its value is never kept, so no log or report can show it. E-mail, telephone and secret
are written for text with code in it: version numbers, dates, hexadecimal constants, decorators and ``a @ b.T`` stay.
The other kinds (most of them in `identifiers.py`) are for prose; in code an IP address or a row of digits may be meant.

Every pattern has bounded repeats and starts at a word's edge, so time grows with the length of the text, whatever it
holds. Not done: names of people, places and organisations (`tagger.py`), scripts without blanks between words.

Source: the entities are those of Microsoft Presidio's documentation ("Supported entities"), and their names in `TYPES`.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from modelwright.data.credentials import find_secrets
from modelwright.data.identifiers import DATE, DETECTORS, Detector

# Kind -> the name that Presidio and its evaluators use, for reports. The order is the rank: of two findings that
# overlap the earlier kind stays.
TYPES = {
    "secret": "SECRET",
    "email": "EMAIL_ADDRESS",
    "url": "URL",
    "iban": "IBAN_CODE",
    "crypto": "CRYPTO",
    "mac_address": "MAC_ADDRESS",
    "ip_address": "IP_ADDRESS",
    "us_ssn": "US_SSN",
    "us_itin": "US_ITIN",
    "us_passport": "US_PASSPORT",
    "us_driver_license": "US_DRIVER_LICENSE",
    "us_bank_number": "US_BANK_NUMBER",
    "us_mbi": "US_MBI",
    "medical_license": "MEDICAL_LICENSE",
    "uk_nhs": "UK_NHS",
    "uk_nino": "UK_NINO",
    "es_nif": "ES_NIF",
    "it_fiscal_code": "IT_FISCAL_CODE",
    "it_vat_code": "IT_VAT_CODE",
    "it_identity_card": "IT_IDENTITY_CARD",
    "pl_pesel": "PL_PESEL",
    "sg_nric_fin": "SG_NRIC_FIN",
    "au_abn": "AU_ABN",
    "au_acn": "AU_ACN",
    "au_tfn": "AU_TFN",
    "au_medicare": "AU_MEDICARE",
    "in_pan": "IN_PAN",
    "in_aadhaar": "IN_AADHAAR",
    "in_vehicle_registration": "IN_VEHICLE_REGISTRATION",
    "in_voter": "IN_VOTER",
    "in_passport": "IN_PASSPORT",
    "fi_personal_identity_code": "FI_PERSONAL_IDENTITY_CODE",
    "kr_rrn": "KR_RRN",
    "th_tnin": "TH_TNIN",
    "br_cpf": "BR_CPF",
    "fr_nir": "FR_NIR",
    "de_tax_id": "DE_TAX_ID",
    "nl_bsn": "NL_BSN",
    "se_personnummer": "SE_PERSONNUMMER",
    "national_id": "NATIONAL_ID",
    "credit_card": "CREDIT_CARD",
    "date_of_birth": "DATE_OF_BIRTH",
    "date": "DATE_TIME",
    "phone": "PHONE_NUMBER",
    "age": "AGE",
    "street_address": "STREET_ADDRESS",
    "zip_code": "ZIP_CODE",
    "person": "PERSON",
    "organization": "ORGANIZATION",
    "location": "LOCATION",
    "nationality": "NRP",
}
TAGGED = ("street_address", "person", "organization", "location", "nationality")  # what the tagger finds
ALL = tuple(TYPES)
# What may be looked for in any text, code too, without a model.
KINDS = ("email", "phone", "secret")
RANK = {kind: rank for rank, kind in enumerate(TYPES)}


@dataclass(frozen=True)
class Finding:
    """A personal datum in a text: where it stands and what it is, never its value."""

    start: int
    end: int
    kind: str  # one of TYPES

    @property
    def type(self) -> str:
        """The kind by the name that Presidio gives it."""
        return TYPES[self.kind]


_DIGITS = re.compile(r"\d+")
_WEEKDAY = re.compile(r"\b(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b")
# Top-level domains: any country code, or one of these. Without the list, ``weights@x.mean`` would be an address.
_DOMAINS = (
    "com|org|net|edu|gov|mil|int|info|biz|name|pro|aero|coop|museum|jobs|mobi|travel|post|dev|app|cloud|online|site|"
    "tech|shop|store|blog|xyz|email|company|agency|digital|systems|solutions|network|academy|example|invalid|test|"
    "localhost|local|berlin|london|paris|tokyo|nyc|africa|asia|earth|foundation|engineering|science|group|global|world"
)
_EMAIL = re.compile(
    rf"(?<![\w.+%-])[\w.+%-]{{1,64}}@(?:[^\W_](?:[\w-]{{0,61}}[^\W_])?\.){{1,8}}(?:[A-Za-z]{{2}}|{_DOMAINS}|xn--\w+)"
    r"(?![\w(\[@]|-\w|\.\w)",
    re.IGNORECASE,
)
_URL = re.compile(
    r"\b(?:https?|ftp|sftp|ssh|ws)://[^\s<>\"'`{}|\\^]{3,2000}|\bwww\.[^\s<>\"'`{}|\\^]{3,500}", re.IGNORECASE
)
_DOMAIN = re.compile(
    r"(?<![\w@.+/-])(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.){1,4}"
    r"(?:com|org|net|edu|gov|info|biz|io|co|dev|app|shop|online|(?:co|com|org|ac|gov)\.[a-z]{2}"
    r"|de|fr|uk|it|es|nl|se|ch|eu|us)"
    r"(?![\w@(-]|\.\w)(?:/[\w./?&=%#-]{0,500})?",
    re.IGNORECASE,
)
_IP4 = r"(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_IP = re.compile(rf"(?<![\w.:-]){_IP4}(?![\w-]|\.\d)")
_IP6 = re.compile(
    r"(?<![\w:.])(?=[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{0,4}:)[0-9A-Fa-f:]{2,39}(?:(?<=:)\d{1,3}(?:\.\d{1,3}){3})?(?![\w:])"
)
_PHONE = re.compile(
    r"""(?<![\w.+/\#\\-]) (?:
      \+ [1-9]\d{0,2} (?: [ ./()-]{0,2} \d ){6,13}                      # +49 30 901820, +14155552671
    | (?: 1[ .-])? \( [2-9]\d{2} \) [ ]? [2-9]\d{2} [ .-] \d{4}         # (415) 555-2671
    | (?: 1[.-])? [2-9]\d{2} (?P<mark>[.-]) [2-9]\d{2} (?P=mark) \d{4}  # 415-555-2671
    | 0[1-9]\d{1,3} [ /] \d{3,4} [ ] \d{3,4}                            # 020 7946 0958
    ) (?! [\w/+] | [.-]\d | \( )""",
    re.VERBOSE,
)
_LABELLED_PHONE = re.compile(
    r"\b(?:tel|phone|telephone|telefon|fax|mobile|cell|hotline)(?:\s?(?:no|number|nr))?\.?\s?[:=]?\s{0,2}"
    r"(?P<value>\(?\d(?:[ ./()-]{0,2}\d){6,14})(?!\w|[.-]\d)",
    re.IGNORECASE,
)
# Forms of many countries, too weak for text with code in it: only when the kinds of prose are looked for.
_LOOSE_PHONE = re.compile(
    r"""(?<![\w.+/\#\\$€£-]) (?:
      (?:\+|00)? (?:1[ .-]?)? \(?[2-9]\d{2}\)? [ .-]? [2-9]\d{2} [ .-]? \d{4}
      (?: [ ]?(?:x|ext\.?|extension)[ ]?\d{1,6} )?
    | (?:\+|00) [1-9]\d{0,2} (?: [ ./()-]{0,2} \d ){6,13} (?: [ ]?(?:x|ext\.?|extension)[ ]?\d{1,6} )?
    | \(?0\d{1,4}\)? (?: [ /.-]{0,2} \d{2,4} ){2,5}
    | \(0?\d{1,4}\) [ ]? \d{2,5} (?: [ -] \d{2,4} ){1,3}
    | \d{2,3} [ ] \d{2,3} [ ] \d{2} [ ] \d{2} | \d{3} [ ] \d{3} [ ] \d{3} | \d{2} (?: [ ] \d{2} ){3,4} | \d{4}[ -]\d{4}
    ) (?! [\w/+] | [.-]\d | \( )""",
    re.VERBOSE,
)
_PHONE_WORDS = re.compile(
    r"\b(?:phone|telephone|tel|mobile|cell(?:phone)?|fax|call(?:ed|ing|s)?|ring|dial|text|sms|whatsapp|contact|reach(?:ed)?"
    r"|number|numbers|hotline|desk|office|home|work|landline|line|voicemail|answering|messages? (?:to|on|at|from))\b"
    r"[^.\n\d]{0,40}(?P<value>\+?\(?\d(?:[ ./()-]{0,2}\d){5,14}(?:[ ]?(?:x|ext\.?)[ ]?\d{1,6})?)(?![\w%]|[.,-]\d)",
    re.IGNORECASE,
)
_NO_PHONE_WORDS = re.compile(
    r"\b(?:card|account|order|invoice|ticket|case|reference|ref|tracking|serial|id|passport|licen[cs]e|ssn|isbn|policy"
    r"|confirmation|booking|flight|zip|iban|version|routing)\b[^.\n]{0,30}\Z",
    re.IGNORECASE,
)


def find_patterns(text: str, kinds: Sequence[str]) -> Iterator[Finding]:
    """Yield what has the form of one of the kinds; they may overlap and come in no order."""
    wanted = set(kinds)
    is_prose = not wanted <= set(KINDS)
    for kind, finder in _FINDERS.items():
        if kind in wanted:
            for start, end in finder(text):
                yield Finding(start, end, kind)
    if is_prose and "phone" in wanted:
        for start, end in _find_loose_phones(text):
            yield Finding(start, end, "phone")
    regions = list(_near_digits(text)) if is_prose else []
    for detector in DETECTORS:
        if detector.kind in wanted:
            yield from _detect(text, detector, regions)
    if "date" in wanted:
        for found in _WEEKDAY.finditer(text):
            yield Finding(*found.span(), "date")


def without_overlaps(findings: Iterable[Finding], text_len: int) -> list[Finding]:
    """Return them in order; of those that overlap the better kind stays, then the longer one."""
    kept: list[Finding] = []
    taken = bytearray(text_len)
    for finding in sorted(findings, key=lambda f: (RANK[f.kind], f.start - f.end, f.start)):
        if taken.find(1, finding.start, finding.end) < 0:
            taken[finding.start : finding.end] = b"\1" * (finding.end - finding.start)
            kept.append(finding)
    return sorted(kept, key=lambda f: f.start)


def _near_digits(text: str, reach: int = 100) -> Iterator[tuple[int, int]]:
    """Yield the stretches of a text with a digit within reach: no identifier lies outside, and most of prose does."""
    begin, end = -1, -1
    for found in _DIGITS.finditer(text):
        if found.start() - reach > end:
            if end >= 0:
                yield begin, end
            begin = max(0, found.start() - reach)
        end = found.end() + reach
    if end >= 0:
        yield begin, min(end, len(text))


def _detect(text: str, detector: Detector, regions: Sequence[tuple[int, int]]) -> Iterator[Finding]:
    has_value = "value" in detector.pattern.groupindex
    for found in (found for region in regions for found in detector.pattern.finditer(text, *region)):
        start, end = found.span("value") if has_value else found.span()
        if detector.check is not None and not detector.check(text[start:end]):
            continue
        if detector.words is not None and not detector.words.search(_before(text, start)):
            continue
        yield Finding(start, end, detector.kind)


def _before(text: str, start: int, reach: int = 60) -> str:
    """Return what stands before on the same line, or on the line above when that is a label on its own."""
    before = text[max(0, start - reach) : start]
    line = before.rpartition("\n")[2]
    return line if line.strip() else before.rstrip().rpartition("\n")[2]


def _find_emails(text: str) -> Iterator[tuple[int, int]]:
    if "@" not in text:
        return
    for found in _EMAIL.finditer(text):
        after = text[found.end() : found.end() + 1]
        local = found[0].partition("@")[0]
        if local.strip(".") and not (local == "git" and after == ":"):  # git@host:path is a repository
            yield found.span()


def _find_phones(text: str) -> Iterator[tuple[int, int]]:
    for found in _PHONE.finditer(text):
        if found[0].startswith("+") and not _is_international(found[0]):
            continue
        yield found.span()
    for found in _LABELLED_PHONE.finditer(text):
        yield found.span("value")


def _find_loose_phones(text: str) -> Iterator[tuple[int, int]]:
    for found in _LOOSE_PHONE.finditer(text):
        if not _NO_PHONE_WORDS.search(_before(text, found.start(), 40)) and not _is_date(found[0]):
            yield found.span()
    for found in _PHONE_WORDS.finditer(text):
        if not _NO_PHONE_WORDS.search(_before(text, found.start("value"), 40)) and not _is_date(found["value"]):
            yield found.span("value")


def _is_date(value: str) -> bool:
    return re.match(rf"{DATE}\Z", value, re.IGNORECASE) is not None


def _is_international(value: str) -> bool:
    num_digits = sum(map(str.isdigit, value))
    is_decimal = re.fullmatch(r"\+\d+\.\d+", value) is not None
    return 8 <= num_digits <= 15 and not is_decimal


def _find_urls(text: str) -> Iterator[tuple[int, int]]:
    for pattern in (_URL, _DOMAIN):
        for found in pattern.finditer(text):
            value = found[0].rstrip(".,;:!?)]*")
            yield found.start(), found.start() + len(value)


def _find_ip_addresses(text: str) -> Iterator[tuple[int, int]]:
    if "." in text:
        for found in _IP.finditer(text):
            yield found.span()
    if "::" in text or text.count(":") >= 7:
        for found in _IP6.finditer(text):
            value = found[0].removesuffix(":") if not found[0].endswith("::") else found[0]
            if sum(c in "0123456789abcdefABCDEF" for c in value) >= 3 and _is_ip(value):
                yield found.start(), found.start() + len(value)


def _is_ip(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return True


_FINDERS: dict[str, Callable[[str], Iterator[tuple[int, int]]]] = {
    "secret": find_secrets,
    "email": _find_emails,
    "url": _find_urls,
    "ip_address": _find_ip_addresses,
    "phone": _find_phones,
}
