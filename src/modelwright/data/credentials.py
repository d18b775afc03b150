"""Secrets in text: keys, tokens, passwords, by the issuers' formats and by how random a labelled value looks.

A label such as ``api_key =`` counts as a secret only when its value looks random (letters mixed with digits, at least
2.75 bits of entropy a character). A password without a label beside it is not found.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator

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


def find_secrets(text: str) -> Iterator[tuple[int, int]]:
    """Yield where a secret begins and ends: known key formats, private keys, values beside a label that look random."""
    for found in _KEYS.finditer(text):
        if len(set(found[0])) > 8 and not _PLACEHOLDER.search(found[0]):
            yield found.start(), found.end()
    for found in _PRIVATE_KEY.finditer(text):
        yield found.start(), found.end()
    for found in _URL_PASSWORD.finditer(text):
        if found["value"].lower() not in ("password", "pass", "passwd", "pw", "port", "secret"):
            yield found.start("value"), found.end("value")
    for found in _BEARER.finditer(text):
        if _looks_random(found["value"]):
            yield found.start("value"), found.end("value")
    for found in _LABELLED.finditer(text):
        if _looks_random(found["value"].rstrip(".")):
            yield found.start("value"), found.end("value")


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
