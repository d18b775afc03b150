"""Is a chat template fit to be trained on and served with? Checks of what goes wrong most often, each with its reason.

Probe conversations are rendered and encoded with the tokenizer. A template may refuse a role; what it renders must
only append (the prompt of each turn is a prefix of what follows), hold one beginning-of-sequence token where the
tokenizer has one, train what the assistant says and the token that stops it and nothing else, and keep every special
token out of the reach of what people write.

`mask_pieces` cuts a rendered conversation into pieces that are trained, special or neither, for showing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from modelwright.base.errors import ConfigError, ModelwrightError
from modelwright.tokenizer.bpe import Messages, Tokenizer

Turns = list[dict[str, str]]
_TALK: Turns = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And three and three?"},
    {"role": "assistant", "content": "Six."},
]
_SHOWN = 60


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    state: Literal["ok", "wrong", "none"]  # none: there is nothing to check
    detail: str


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation."""

    text: str
    is_trained: bool
    is_special: bool


def mask_pieces(tokenizer: Tokenizer, messages: Messages, tools: Sequence[Mapping[str, Any]] = ()) -> list[Piece]:
    """Cut a conversation, as training sees it, into the longest pieces of one kind.

    Raises:
        ConfigError: The template refuses it, or no mask can be right for it.
    """
    tokens = tokenizer.chat_tokens(messages, tools=tools)
    special = set(tokenizer.special_ids.values())
    marked = zip(tokens.ids, tokens.assistant_mask, strict=True)
    pieces = []
    for (is_trained, is_special), group in groupby(marked, key=lambda one: (one[1], one[0] in special)):
        ids = [index for index, _ in group]
        text = tokenizer.decode_bytes(ids).decode("utf-8", errors="replace")
        pieces.append(Piece(text, is_trained, is_special))
    return pieces


def check_template(tokenizer: Tokenizer, talk: Sequence[Mapping[str, Any]] | None = None) -> list[Check]:
    """Return what each check found.

    Args:
        tokenizer: With its chat template.
        talk: A conversation with the roles of the template; None: system, user and assistant, or what of it renders.
    """
    turns: list[Any] = list(talk or _TALK)
    try:
        tokenizer.render_chat(turns)
    except ConfigError as error:
        if talk is not None:
            return [Check("renders", "wrong", str(error))]
        turns = turns[1:]
        try:
            tokenizer.render_chat(turns)
        except ConfigError as second:
            return [Check("renders", "wrong", str(second))]
        first = Check("renders", "ok", f"but no system turn: {_short(str(error))}")
    else:
        first = Check("renders", "ok", f"{len(turns)} turns, {', '.join(dict.fromkeys(t['role'] for t in turns))}")
    checks: list[tuple[str, Callable[[Tokenizer, list[Any]], tuple[str, str]]]] = [
        ("keeps every text", _keeps_texts),
        ("only appends", _only_appends),
        ("one beginning", _one_beginning),
        ("trains the answers", _trains_answers),
        ("trains the stop", _trains_stop),
        ("cannot be spoofed", _cannot_be_spoofed),
    ]
    found = [first]
    for name, check in checks:
        try:
            state, detail = check(tokenizer, turns)
        except ModelwrightError as error:
            state, detail = "wrong", str(error)
        found.append(Check(name, state, detail))  # type: ignore[arg-type]
    return found


def _short(text: str) -> str:
    return text if len(text) <= 2 * _SHOWN else text[: 2 * _SHOWN - 3] + "..."


def _keeps_texts(tokenizer: Tokenizer, turns: list[Any]) -> tuple[str, str]:
    text = tokenizer.render_chat(turns)
    lost = [turn["role"] for turn in turns if str(turn["content"]).strip() not in text]
    if lost:
        return "wrong", f"what these roles say is not in the rendering: {', '.join(dict.fromkeys(lost))}"
    return "ok", "every turn's text stands in the rendering"


def _trained_roles(tokenizer: Tokenizer, turns: list[Any]) -> list[str]:
    """Roles whose turns hold trained tokens: those whose text is inside trained pieces."""
    trained = "".join(piece.text for piece in mask_pieces(tokenizer, turns) if piece.is_trained)
    return list(dict.fromkeys(turn["role"] for turn in turns if str(turn["content"]).strip() in trained))


def _only_appends(tokenizer: Tokenizer, turns: list[Any]) -> tuple[str, str]:
    try:
        trained = _trained_roles(tokenizer, turns) or ["assistant"]
    except ConfigError:  # no mask can be made: what is wrong is found below
        trained = ["assistant"]
    for number in range(1, len(turns)):
        before = tokenizer.apply_chat_template(turns[:number])
        after = tokenizer.apply_chat_template(turns[: number + 1])
        if after[: len(before)] != before:
            return "wrong", f"turns 1 to {number} are written differently once turn {number + 1} is there"
        if turns[number]["role"] in trained:
            prompt = tokenizer.apply_chat_template(turns[:number], add_generation_prompt=True)
            if after[: len(prompt)] != prompt:
                return "wrong", f"the prompt for turn {number + 1} is not how the conversation with it begins"
    return "ok", "the prompt of every turn is a prefix of what follows"


def _one_beginning(tokenizer: Tokenizer, turns: list[Any]) -> tuple[str, str]:
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    if tokenizer.bos_id is None:
        return "none", "the tokenizer has no beginning-of-sequence token"
    count = ids.count(tokenizer.bos_id)
    is_expected = tokenizer.bos_id in tokenizer.encode("a")
    if count == 1 and ids[0] == tokenizer.bos_id:
        return "ok", "exactly one, in front"
    if count == 0 and not is_expected:
        return "none", "neither the template nor plain text gets one"
    return "wrong", f"{count} of them, the first token is {tokenizer.decode(ids[:1], False)!r}; expected one, in front"


def _trains_answers(tokenizer: Tokenizer, turns: list[Any]) -> tuple[str, str]:
    pieces = mask_pieces(tokenizer, turns)
    trained = [piece.text for piece in pieces if piece.is_trained and not piece.is_special]
    joined = "".join(trained)
    if not joined:
        return "wrong", "no token of any turn is trained"
    lost = [t["content"] for t in turns if t["role"] == "assistant" and str(t["content"]).strip() not in joined]
    if lost:
        return "wrong", f"not all of this answer is trained: {_short(repr(lost[0]))}"
    others = [turn for turn in turns if turn["role"] in ("system", "user", "tool")]
    leaked = next((turn for turn in others if str(turn["content"]).strip() in joined), None)
    if leaked is not None:
        return "wrong", f"a turn of the role {leaked['role']} is trained"
    share = sum(map(len, trained)) / sum(len(piece.text) for piece in pieces)
    return "ok", f"{', '.join(_trained_roles(tokenizer, turns))}: {share:.0%} of the characters"


def _trains_stop(tokenizer: Tokenizer, turns: list[Any]) -> tuple[str, str]:
    tokens = tokenizer.chat_tokens(turns)
    runs = [
        [index for index, _ in group]
        for is_trained, group in groupby(zip(tokens.ids, tokens.assistant_mask, strict=True), key=lambda one: one[1])
        if is_trained
    ]
    ends = [tokenizer.decode(run[-1:], False) for run in runs if run[-1] not in tokenizer.stop_ids]
    if ends:
        return (
            "wrong",
            f"{len(ends)} of {len(runs)} trained stretches end with {ends[0]!r}, which does not stop a model",
        )
    early = sum(index in tokenizer.stop_ids for run in runs for index in run[:-1])
    if early:
        return "wrong", f"{early} trained stop tokens stand before the end of their turn"
    return "ok", f"each answer ends with {tokenizer.decode(runs[0][-1:], False)}"


def _cannot_be_spoofed(tokenizer: Tokenizer, turns: list[Any]) -> tuple[str, str]:
    special = set(tokenizer.special_ids.values()) - {tokenizer.special_ids.get(tokenizer.roles.get("unk_token", ""))}

    def controls(conversation: list[Any]) -> list[int]:
        ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
        return [index for index in ids if index in special]

    calm = controls([{**turn, "content": "calm"} for turn in turns])
    for text in [*tokenizer.special_ids, "".join(tokenizer.special_ids), *_halves(tokenizer)]:
        wild = controls([{**turn, "content": text} for turn in turns])
        if wild != calm:
            return "wrong", f"a message of {_short(repr(text))} changes the special tokens of the conversation"
    return "ok", f"{len(tokenizer.special_ids)} special tokens tried, whole and in parts"


def _halves(tokenizer: Tokenizer) -> list[str]:
    return [part for text in tokenizer.special_ids for part in (text[:-1], text[1:]) if part][:16]
