"""Find and replace e-mail addresses, telephone numbers and secrets (keys, tokens, passwords) by pattern.

Each finding is a span and a kind; its value is never kept, so no log or report can show it. The patterns are written
for text with code in it: version numbers, dates, hexadecimal constants, decorators and ``a @ b.T`` must stay. A label
such as ``api_key =`` counts as a secret only when its value looks random (letters mixed with digits, at least 3 bits
of entropy a character). Not done: names, postal addresses; they need a trained tagger.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

KINDS = ("email", "phone", "secret")

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

_KEYS = re.compile(
    r"""(?<![\w/+-]) (?:
      A[KS]IA[0-9A-Z]{16}                                     # AWS access key id
    | gh[pousr]_[A-Za-z0-9]{30,255} | github_pat_\w{50,255}   # GitHub
    | glpat-[\w-]{20,64}                                      # GitLab
    | xox[abeoprs]-[A-Za-z0-9-]{10,200}                       # Slack
    | AIza[\w-]{35}                                           # Google
    | sk-(?:ant-|proj-|or-|live-)?[A-Za-z0-9_-]{20,200}       # OpenAI, Anthropic and kin
    | (?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,128}          # Stripe
    | hf_[A-Za-z0-9]{20,64}                                   # Hugging Face
    | npm_[A-Za-z0-9]{36} | pypi-AgEI[\w-]{50,300}            # package registries
    | SG\.[\w-]{16,64}\.[\w-]{16,64}                          # SendGrid
    | eyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]{10,2000}    # JSON web token
    ) (?![\w]) """,
    re.VERBOSE,
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?P<what>[A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?)-----(?:[^-]|-(?!----)){1,20000}-----END (?P=what)-----"
)
_URL_PASSWORD = re.compile(r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@'\"<>]{1,100}:(?P<value>[^\s/@'\"<>]{3,200})@[\w.-]")
_BEARER = re.compile(r"\b(?:Bearer|Basic)\s+(?P<value>[A-Za-z0-9_~+/.-]{16,2000}={0,2})")
_LABELLED = re.compile(
    r"""(?P<label>(?:password|passwd|passphrase|pwd|secret|token|credential|api[_ -]?key|access[_ -]?key|auth[_ -]?key
    |account[_ -]?key|private[_ -]?key|client[_ -]?secret))["']?\s{0,3}(?::|=|:=|=>|\bis\b)\s{0,3}
    (?P<quote>["'`]?)(?P<value>[^\s"'`<>(){}\[\],;]{8,256})(?P=quote)""",
    re.VERBOSE | re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"x{4,}|\*{3,}|\.{3}|your|example|changeme|placeholder|redacted|dummy|\$\{|%\(", re.IGNORECASE
)
_IDENTIFIER = re.compile(r"[A-Za-z_]+(?:[._-][A-Za-z_]+\d?)*\d?")


@dataclass(frozen=True)
class Finding:
    """A personal datum in a text: where it stands and what it is, never its value."""

    start: int
    end: int
    kind: str  # one of KINDS


def find_personal(text: str, kinds: Sequence[str] = KINDS) -> list[Finding]:
    """Return what should be redacted, in order and without overlaps.

    >>> find_personal("Ask jo@acme.org, version 3.11.7 of 2024-01-31.")
    [Finding(start=4, end=15, kind='email')]
    """
    found = [finding for kind in kinds for finding in _FINDERS[kind](text)]
    # Of two that overlap the earlier in KINDS wins, except that a secret (a password in a URL) beats an address.
    rank = {"secret": 0, "email": 1, "phone": 2}
    found.sort(key=lambda f: (rank[f.kind], f.start, -f.end))
    kept: list[Finding] = []
    taken = bytearray(len(text))
    for finding in found:
        if taken.find(1, finding.start, finding.end) < 0:
            taken[finding.start : finding.end] = b"\1" * (finding.end - finding.start)
            kept.append(finding)
    return sorted(kept, key=lambda f: f.start)


def redact(text: str, kinds: Sequence[str] = KINDS) -> tuple[str, list[Finding]]:
    """Replace each finding by its kind in brackets; the spans point into the text as it was.

    >>> redact("Call +49 30 9018200 now")[0]
    'Call [phone] now'
    """
    findings = find_personal(text, kinds)
    parts, at = [], 0
    for finding in findings:
        parts += [text[at : finding.start], f"[{finding.kind}]"]
        at = finding.end
    return "".join([*parts, text[at:]]), findings


def _find_emails(text: str) -> Iterable[Finding]:
    if "@" not in text:
        return
    for found in _EMAIL.finditer(text):
        after = text[found.end() : found.end() + 1]
        local = found[0].partition("@")[0]
        if local.strip(".") and not (local == "git" and after == ":"):  # git@host:path is a repository
            yield Finding(found.start(), found.end(), "email")


def _find_phones(text: str) -> Iterable[Finding]:
    for found in _PHONE.finditer(text):
        if found[0].startswith("+") and not _is_international(found[0]):
            continue
        yield Finding(found.start(), found.end(), "phone")
    for found in _LABELLED_PHONE.finditer(text):
        yield Finding(found.start("value"), found.end("value"), "phone")


def _is_international(value: str) -> bool:
    num_digits = sum(map(str.isdigit, value))
    is_decimal = re.fullmatch(r"\+\d+\.\d+", value) is not None
    return 8 <= num_digits <= 15 and not is_decimal


def _find_secrets(text: str) -> Iterable[Finding]:
    for found in _KEYS.finditer(text):
        if len(set(found[0])) > 8 and not _PLACEHOLDER.search(found[0]):
            yield Finding(found.start(), found.end(), "secret")
    for found in _PRIVATE_KEY.finditer(text):
        yield Finding(found.start(), found.end(), "secret")
    for found in _URL_PASSWORD.finditer(text):
        if found["value"].lower() not in ("password", "pass", "passwd", "pw", "port", "secret"):
            yield Finding(found.start("value"), found.end("value"), "secret")
    for found in _BEARER.finditer(text):
        if _looks_random(found["value"]):
            yield Finding(found.start("value"), found.end("value"), "secret")
    for found in _LABELLED.finditer(text):
        if _looks_random(found["value"].rstrip(".")):
            yield Finding(found.start("value"), found.end("value"), "secret")


def _looks_random(value: str) -> bool:
    """Letters mixed with digits, no identifier, no placeholder, and enough entropy for what it is.

    >>> _looks_random("Tr0ub4dor&3"), _looks_random("tokenize.OP"), _looks_random("your-api-key-1")
    (True, False, False)
    """
    is_mixed = any(map(str.isdigit, value)) and any(map(str.isalpha, value))
    if not is_mixed or _IDENTIFIER.fullmatch(value) or _PLACEHOLDER.search(value) or value.startswith(("0x", "http")):
        return False
    return entropy(value) >= 2.75


def entropy(value: str) -> float:
    """Return the Shannon entropy of the characters of ``value``, in bits a character.

    >>> entropy("aaaa"), entropy("abcd")
    (0.0, 2.0)
    """
    counts = Counter(value).values()
    return max(0.0, -sum(c / len(value) * math.log2(c / len(value)) for c in counts)) if value else 0.0


_FINDERS: dict[str, Callable[[str], Iterable[Finding]]] = {
    "email": _find_emails,
    "phone": _find_phones,
    "secret": _find_secrets,
}
