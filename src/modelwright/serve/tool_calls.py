"""Calls of tools found in an answer while it streams: text before, name, arguments piece by piece.

One reader of JSON objects serves the forms of all families; a form says how a call begins, what its arguments are
called, and whether an answer may begin with a bare object. Text that might be the start of a tag is held back and
nothing else is, but for white space that a call may follow. The pieces of a stream and the whole answer come from the
same deltas, so they cannot disagree. What looks like a call and has no name in it is given back as text. Arguments are
passed on as the model wrote them; when it was cut off by its length, they are cut too and the finish reason says so.

Source: the published chat templates of Hermes 2 Pro and Qwen 2.5, Llama 3.1, and Mistral 7B v0.3. Not done: forms
that are no JSON (Pythonic calls, XML parameters), and Mistral's later ``[TOOL_CALLS]name[ARGS]{...}``.
"""

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

WHITE = " \t\r\n"
ARGUMENTS = frozenset({"arguments", "parameters"})


@dataclass(frozen=True)
class CallForm:
    """How a family of models writes calls."""

    name: str
    open: str
    close: str  # "" where nothing closes a call
    arguments: str = "arguments"
    is_bare: bool = False  # an answer may begin with the call, without ``open``
    is_list: bool = False  # the calls stand in a JSON list
    between: str = WHITE  # what may stand around and between the objects of calls

    def new_id(self) -> str:
        """Return an id for a call."""
        # Mistral's template refuses any other id than nine letters and digits when it comes back.
        return secrets.token_hex(5)[:9] if self.is_list else f"call_{secrets.token_hex(12)}"


HERMES = CallForm("hermes", "<tool_call>", "</tool_call>")
LLAMA3 = CallForm("llama3", "<|python_tag|>", "", "parameters", is_bare=True, between=WHITE + ";,")
MISTRAL = CallForm("mistral", "[TOOL_CALLS]", "", is_bare=True, is_list=True, between=WHITE + "[,]")
SIGNS = (("[TOOL_CALLS]", MISTRAL), ("<tool_call>", HERMES), ('"parameters":', LLAMA3))


def form_of(chat_template: str | None, takes_tools: bool = True) -> CallForm:
    """Return the form that a model's chat template teaches; a template without tools is given Hermes's section.

    >>> form_of("{{ '[TOOL_CALLS]' }}").name, form_of(None).name
    ('mistral', 'hermes')
    """
    if not takes_tools:
        return HERMES
    return next((form for sign, form in SIGNS if sign in (chat_template or "")), HERMES)


@dataclass(frozen=True)
class CallDelta:
    """A piece of one call: the first carries id and name, each carries more of the arguments."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass
class Found:
    """What one push brought to light."""

    text: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class ObjectReader:
    """Reads one JSON object a character at a time and passes its arguments on.

    Attributes:
        name: The function, once its text is complete.
        fresh: Arguments that have been read and not taken.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.fresh = ""
        self.has_arguments = False
        self.is_done = False
        self.is_broken = False
        self._state: Callable[[str], None] = self._begin
        self._key = ""
        self._value = ""
        self._depth = 0
        self._is_text = self._is_escaped = False

    def push(self, char: str) -> None:
        """Take one character."""
        self._state(char)

    def _begin(self, char: str) -> None:
        self._state, self.is_broken = self._before_key, char != "{"

    def _before_key(self, char: str) -> None:
        if char == '"':
            self._key, self._state = "", self._in_key
        elif char == "}":
            self.is_done = True
        elif char not in WHITE + ",":
            self.is_broken = True

    def _in_key(self, char: str) -> None:
        if char == '"':
            self._state = self._before_value
        else:
            self._key += char

    def _before_value(self, char: str) -> None:
        if char in WHITE + ":":
            return
        self._value, self._depth, self._is_text, self._is_escaped = "", 0, False, False
        self._state = self._in_value
        self._in_value(char)

    def _in_value(self, char: str) -> None:
        if not self._is_text and self._depth == 0 and char in ",}" + WHITE and self._value:
            self._end_value()  # of a number or a word, which only what follows it ends
            self._before_key(char)
            return
        self._take(char)
        if self._is_text:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == '"':
                self._is_text = False
        elif char == '"':
            self._is_text = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        if self._depth < 0:
            self.is_broken = True
        elif self._depth == 0 and not self._is_text and char in '"}]':
            self._end_value()

    def _take(self, char: str) -> None:
        self._value += char
        if self._key in ARGUMENTS and self._value[0] != '"':
            self.has_arguments = True
            self.fresh += char

    def _end_value(self) -> None:
        self._state = self._before_key
        if self._key == "name":
            self.name = _text(self._value)
            self.is_broken = not self.name
        elif self._key in ARGUMENTS and self._value[0] == '"':
            # Some models write the object once more as a text.
            self.fresh, self.has_arguments = _text(self._value) or "{}", True


def _text(value: str) -> str | None:
    try:
        read = json.loads(value)
    except ValueError:
        return None
    return read if isinstance(read, str) else None


class CallParser:
    """Finds calls in the text of one answer.

    >>> parser = CallParser(HERMES)
    >>> parser.push('Look. <tool_').text
    'Look.'
    >>> [(c.name, c.arguments) for c in parser.push('call>{"name": "f", "arguments": {"a": 1}}</tool_call>').calls]
    [('f', '{"a": 1}')]

    Args:
        form: How the model writes calls.
        is_parallel: False takes the first call and drops everything after it.
    """

    def __init__(self, form: CallForm, is_parallel: bool = True):
        self.form = form
        self.num_complete = 0
        self._is_parallel = is_parallel
        self._state: Callable[[Found], bool] = self._first if form.is_bare else self._in_text
        self._rest = ""  # not yet looked at
        self._held = ""  # white space that goes if a call follows
        self._raw = ""  # the call that is being read, in case it is none
        self._reader = ObjectReader()
        self._num_calls = 0
        self._id: str | None = None

    @property
    def _is_full(self) -> bool:
        return not self._is_parallel and self.num_complete > 0

    def push(self, text: str) -> Found:
        """Take the next piece of the answer."""
        found = Found()
        self._rest += text
        while self._rest and self._state(found):
            pass
        return found

    def finish(self) -> Found:
        """Return what was held back; the answer is over."""
        found = Found()
        if self._state == self._in_call and self._id is None:
            self._say(self._raw + self._rest, found)
        elif self._state in (self._in_text, self._first):
            self._say(self._rest, found)
        if self._num_calls == 0:
            found.text += self._held
        return found

    # Each state looks at `_rest` and returns False when it needs more.

    def _first(self, found: Found) -> bool:
        start = self._rest.lstrip(WHITE)
        opening = "[{" if self.form.is_list else "{"
        compact = "".join(c for c in start[:64] if c not in WHITE)
        if not compact or (len(compact) < len(opening) and opening.startswith(compact)):
            return False
        if compact.startswith(opening):
            at = self._rest.index("{")
            self._raw, self._rest = self._rest[:at], self._rest[at:]
            self._state = self._between
        else:
            self._state = self._in_text
        return True

    def _in_text(self, found: Found) -> bool:
        at = self._rest.find(self.form.open)
        if at >= 0:
            self._say(self._rest[:at], found)
            self._rest, self._raw = self._rest[at + len(self.form.open) :], self.form.open
            self._state = self._between
            return True
        held = _overlap(self._rest, self.form.open)
        cut = len(self._rest) - held
        self._say(self._rest[:cut], found)
        self._rest = self._rest[cut:]
        return False

    def _between(self, found: Found) -> bool:
        """Before the object of a call, or after one."""
        char, close = self._rest[0], self.form.close
        if char == "{":
            self._reader, self._id, self._state = ObjectReader(), None, self._in_call
        elif char in self.form.between:
            self._raw += char
            self._rest = self._rest[1:]
        elif close and self._rest.startswith(close):
            if self._raw.strip(WHITE) == self.form.open:  # nothing between the tags
                self._raw = ""
            self._rest, self._state = self._rest[len(close) :], self._in_text
        elif close and close.startswith(self._rest):
            return False
        else:
            self._say(self._raw, found)
            self._raw, self._state = "", self._in_text
        return True

    def _in_call(self, found: Found) -> bool:
        reader, rest = self._reader, self._rest
        for at, char in enumerate(rest):
            reader.push(char)
            self._raw += char
            if reader.is_done or reader.is_broken:
                self._rest = rest[at + 1 :]
                self._tell(found)
                return self._end_call(found)
        self._rest = ""
        self._tell(found)
        return False

    def _tell(self, found: Found) -> None:
        reader = self._reader
        if reader.name is None or self._is_full:
            return
        if self._id is None and not (reader.is_broken and not reader.fresh):
            self._id = self.form.new_id()
            found.calls.append(CallDelta(self._num_calls, "", self._id, reader.name))
            self._num_calls += 1
            self._held = ""
        if reader.fresh:
            found.calls.append(CallDelta(self._num_calls - 1, reader.fresh))
            reader.fresh = ""

    def _end_call(self, found: Found) -> bool:
        reader = self._reader
        if self._id is None and not self._is_full:  # no call: the model's own words
            self._say(self._raw, found)
            self._state = self._in_text
        else:
            if reader.is_done and not self._is_full:
                self.num_complete += 1
                if not reader.has_arguments:
                    found.calls.append(CallDelta(self._num_calls - 1, "{}"))
            self._state = self._between if reader.is_done else self._in_text
        self._raw = ""
        return True

    def _say(self, text: str, found: Found) -> None:
        if self._is_full or not text:
            return
        text = self._held + text
        shown = text.rstrip(WHITE)
        self._held = text[len(shown) :]
        found.text += shown if self._num_calls == 0 or shown.strip(WHITE) else ""


def _overlap(text: str, tag: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a tag."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)
