"""More ways to say the same: misspellings, case, paraphrase, and translation there and back. Answers stay as they are.

Each way changes what the user writes, never what is to be learned, so that a model meets the same task in the forms in
which people type it. Code, numbers, links and names with a digit or an underscore stay untouched: changed, they would
be another task.

Source: Wei and Zou 2019, arXiv:1901.11196 (small changes of words); Sennrich et al. 2016, arXiv:1511.06709 (translation
there and back). Typing errors are those of a QWERTY keyboard: a neighbour's key, two letters swapped, one left out or
doubled.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from modelwright.base.errors import ConfigError
from modelwright.base.types import Message
from modelwright.data.conversation import Conversation
from modelwright.data.generate import Asker
from modelwright.data.novelty import words_of
from modelwright.data.prompts import PARAPHRASE

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
# Keys beside each other in a row, and those half a key away in the rows above and below.
_NEAR = {
    letter: "".join(
        other
        for down, line in enumerate(_ROWS)
        for along, other in enumerate(line)
        if abs(2 * along + down - 2 * at - row) <= 2 and abs(down - row) <= 1 and other != letter
    )
    for row, keys in enumerate(_ROWS)
    for at, letter in enumerate(keys)
}
_WORD = re.compile(r"(?<![\w`/.@:])[A-Za-z]{4,}(?![\w`/@(]|\.\w|:/)")
_CODE = re.compile(r"```.*?```|`[^`]*`|^(?: {4}|\t).*$", re.DOTALL | re.MULTILINE)

Change = Callable[[str, random.Random], str | None]


def misspell(text: str, rng: random.Random, rate: float = 0.1) -> str | None:
    """Return the text with about ``rate`` of its longer words mistyped, at least one; None where there is none."""
    code = [found.span() for found in _CODE.finditer(text)]
    words = [found for found in _WORD.finditer(text) if not any(a <= found.start() < b for a, b in code)]
    if not words:
        return None
    chosen = [found for found in words if rng.random() < rate] or [rng.choice(words)]
    for found in reversed(chosen):
        text = text[: found.start()] + _mistype(found[0], rng) + text[found.end() :]
    return text


def _mistype(word: str, rng: random.Random) -> str:
    at = rng.randrange(1, len(word) - 1)  # first and last letters are rarely wrong, and a reader needs them
    kind = rng.choice(("near", "swap", "drop", "double"))
    if kind == "swap" and word[at] != word[at + 1]:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if kind == "drop":
        return word[:at] + word[at + 1 :]
    if kind == "double":
        return word[: at + 1] + word[at:]
    near = rng.choice(_NEAR[word[at].lower()])
    return word[:at] + (near.upper() if word[at].isupper() else near) + word[at + 1 :]


def change_case(text: str, rng: random.Random) -> str | None:
    """Return the text in lower case, in capitals, or without its first capital and last mark; None if nothing changes.

    A text with code, links or names of more than one capital keeps its case: there it carries meaning.
    """
    if _CODE.search(text) or re.search(r"\w[_/]\w|\b\w+[A-Z]\w*\b|://", text):
        return None
    ways = [text.lower(), text.upper(), text[:1].lower() + text[1:].rstrip(".?! ")]
    return rng.choice([way for way in ways if way != text] or [None])


def paraphraser(asker: Asker) -> Change:
    """Return a change that asks a model for other words; one that gives the same words or none changes nothing."""

    def change(text: str, rng: random.Random) -> str | None:
        said = asker.ask(PARAPHRASE.format(text=text))
        return said if said and words_of(said) != words_of(text) else None

    return change


def back_translator(there: Callable[[str], str], back: Callable[[str], str]) -> Change:
    """Return a change that goes through another language; the two translators are the caller's."""

    def change(text: str, rng: random.Random) -> str | None:
        said = back(there(text)).strip()
        return said if said and words_of(said) != words_of(text) else None

    return change


CHANGES: dict[str, Change] = {"typo": misspell, "case": change_case}


def augment(
    conversations: Sequence[Conversation], changes: Sequence[Change], num_each: int = 1, seed: int = 0
) -> list[Conversation]:
    """Return each conversation and up to ``num_each`` changed copies of it, which no other one equals.

    Args:
        conversations: What there is.
        changes: Ways to change what the user writes; for each copy one of them is drawn.
        num_each: Copies of each.
        seed: Decides the changes of a conversation by its place.
    """
    if not changes or num_each < 0:
        raise ConfigError(f"There are {len(changes)} changes and {num_each} copies of each; give at least one change.")
    kept: list[Conversation] = []
    seen = {conversation.messages for conversation in conversations}
    for place, conversation in enumerate(conversations):
        kept.append(conversation)
        rng = random.Random(f"{seed}:augment:{place}")
        for _ in range(num_each):
            change = rng.choice(list(changes))
            turns = tuple(_changed(turn, change, rng) for turn in conversation.messages)
            if turns not in seen:
                seen.add(turns)
                kept.append(replace(conversation, messages=turns))
    return kept


def _changed(turn: Message, change: Change, rng: random.Random) -> Message:
    if turn.role != "user":
        return turn
    said = change(turn.content, rng)
    return turn if said is None else replace(turn, content=said)
