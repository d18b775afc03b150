"""Conversations to text: Jinja templates, rendered in a sandbox, with every special token accounted for.

The one idea: what a person wrote never becomes a special token. Before rendering, each special token that occurs
inside a message has one character exchanged for a private one that occurs nowhere else; whatever special tokens then
stand in the rendered text were written by the template. A second rendering with *all* punctuation of the special
tokens exchanged is the check: if it shows other special tokens, the message and the template had formed one
together, and the second rendering is used. No fixed sentinel exists that a message could contain.

Source: the rendering rules of ``transformers`` (trim_blocks, lstrip_blocks, loop controls, ``tojson``,
``raise_exception``, ``strftime_now``, the ``generation`` tag, ``tools``). A template that knows no tools is given them
as plain text (`tokenizer.tool_text`). Pictures stand in a text as a private character until the template is filled:
one that reads content as parts (LLaVA's) is given parts and writes its own image token, any other gets the token in
the text. Not done: documents as a template argument.
"""

import contextvars
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from modelwright.base.errors import ConfigError, DataError
from modelwright.base.types import Message
from modelwright.tokenizer.tool_text import has_tool_turns, write_tools

CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# For a published base model that has no template and no ChatML tokens: plain words, its own end token after answers.
PLAIN = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- message['role'] | capitalize + ':' -}}
{{- ' ' + message['content'] + (eos_token | default('') if message['role'] == 'assistant' else '') + '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant:' -}}
{%- endif -%}
"""

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_FIRST_PRIVATE = 0xF0000  # supplementary private use area A, then B


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation and where the template's own special tokens stand in it."""

    text: str
    marks: tuple[tuple[int, int, str], ...]  # start, end (characters), the token's text; in order
    generated: tuple[tuple[int, int], ...] = ()  # what stands inside {% generation %}, where that was asked for


# The two private characters that stand around generated text while a template is filled to find it; none: not asked.
_BRACKETS: contextvars.ContextVar[tuple[str, str]] = contextvars.ContextVar("brackets", default=("", ""))


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's text; its content is a block of its own, as in ``transformers``."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_bracket"), [], [], body).set_lineno(line)

    def _bracket(self, caller: Callable[[], str]) -> str:
        left, right = _BRACKETS.get()
        return f"{left}{caller()}{right}"


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def as_dicts(messages: Sequence[Message | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as the dictionaries that templates read, checked.

    Content may be a text, None (nothing), or a list of ``{"type": "text", "text": ...}`` parts, which are joined.

    Raises:
        DataError: A message without a role, with a role that is not a plain word, or with content of another kind.
    """
    if isinstance(messages, str | bytes | Mapping | Message):
        raise DataError(
            f"messages is one {type(messages).__name__}; expected a list of messages with role and content."
        )
    result = []
    for number, message in enumerate(messages):
        if isinstance(message, Message):
            row: dict[str, Any] = _message_row(message)
        elif isinstance(message, Mapping):
            row = dict(message)
        else:
            raise DataError(
                f"messages[{number}] is a {type(message).__name__}; expected a mapping with role and content."
            )
        role = row.get("role")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise DataError(f"messages[{number}] has the role {role!r}; expected system, user, assistant or tool.")
        row["content"] = _text_of(row.get("content"), number)
        result.append(row)
    return result


def _message_row(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        row["tool_calls"] = [
            # Templates write the arguments with ``tojson``, so they are handed over as an object.
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": _parsed(c.arguments)}}
            for c in message.tool_calls
        ]
    if message.tool_call_id is not None:
        row["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        row["name"] = message.name
    return row


def _with_pictures(
    messages: Sequence[Message | Mapping[str, Any]], rows: list[dict[str, Any]], mark: str
) -> list[dict[str, Any]]:
    """Return the rows with a character in their contents where a picture stands."""
    marked = []
    for message, row in zip(messages, rows, strict=True):
        content, images = row["content"], message.images if isinstance(message, Message) else ()
        for place, _ in sorted(images, key=lambda image: image[0], reverse=True):
            content = content[:place] + mark + content[place:]
        marked.append({**row, "content": content})
    return marked


def _in_parts(content: str, mark: str) -> list[dict[str, str]]:
    """Return a content as the parts that some templates read."""
    pieces = re.split(f"({re.escape(mark)})", content) if mark else [content]
    return [{"type": "image"} if p == mark else {"type": "text", "text": p} for p in pieces if p]


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:  # a model's own mistake, sent back to it as it was
        return arguments


def _text_of(content: Any, number: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise DataError(
        f"messages[{number}] has content of type {type(content).__name__}; expected a text or a list of text parts. "
        "Images and audio are not read here."
    )


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Apply ``change`` to every text inside a JSON-like value, and to keys that are no plain names."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_key(key, change): _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, change) for item in value]
    return value


def _map_key(key: Any, change: Callable[[str], str]) -> Any:
    return key if not isinstance(key, str) or key.isidentifier() else change(key)


def _map_rows(rows: list[dict[str, Any]], change: Callable[[str], str]) -> list[dict[str, Any]]:
    """Apply ``change`` to messages; their roles, checked to be plain words, belong to the template."""
    return [_map_texts(row, change) | {"role": row["role"]} for row in rows]


def _letters(rows: list[dict[str, Any]], tools: list[dict[str, Any]]) -> set[str]:
    """Return every character that occurs in the texts of messages and tools."""
    found: set[str] = set()

    def note(text: str) -> str:
        found.update(text)
        return text

    _map_rows(rows, note)
    _map_texts(tools, note)
    return found


class ChatTemplate:
    """One compiled template with the special tokens of its tokenizer.

    Args:
        source: The Jinja text.
        roles: Special tokens by role for the template's variables: ``{"bos_token": "<s>", ...}``.
        specials: Every special token's text.

    Raises:
        ConfigError: The template is not valid Jinja.
    """

    def __init__(self, source: str, roles: Mapping[str, str], specials: Iterable[str]):
        self.source = source
        self._roles = dict(roles)
        self._specials = sorted(specials, key=lambda text: (-len(text), text))
        either = "|".join(re.escape(text) for text in self._specials) or r"(?!)"
        self._mark = re.compile(either)
        self._any_mark = re.compile(f"(?={either})")  # also finds overlapping ones
        self._alphabet = sorted({c for text in self._specials for c in text if not c.isalnum() and not c.isspace()})
        try:
            environment = _environment()
            self._compiled = environment.from_string(source)
            self.takes_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))
            self.marks_generation = any(token[1:] == ("name", "generation") for token in environment.lex(source))
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"The chat template is not valid Jinja: {error}. Mend chat_template.jinja or give another template."
            ) from error

    @functools.cached_property
    def takes_parts(self) -> bool:
        """True where a message's content must be a list of parts: a plain text would be left out, without a word."""
        probe = "Zq"
        found = []
        for content in (probe, [{"type": "text", "text": probe}]):
            try:
                text = self._compiled.render(
                    messages=[{"role": "user", "content": content}],
                    add_generation_prompt=True,
                    tools=None,
                    documents=None,
                    **self._roles,
                )
            except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
                text = ""
            found.append(probe in text and "'type'" not in text)  # a list that was written as it is does not count
        return found == [False, True]

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        find_generated: bool = False,
        image_token: str = "",
    ) -> Rendered:
        """Render a conversation.

        Args:
            messages: The turns.
            add_generation_prompt: Whether the assistant's turn is opened at the end.
            tools: Functions that the assistant may call, ``{"type": "function", "function": {...}}`` each.
            find_generated: Whether to tell what stands inside ``{% generation %}``.
            image_token: The special token that stands for a picture; empty: the model reads none.

        Raises:
            ConfigError: The template refused the conversation, the message carries its reason; or it changes the text
                inside its generation marks afterwards, so that they cannot be found.
            DataError: A message is malformed.
        """
        rows, offered = as_dicts(messages), [dict(tool) for tool in tools]
        rows, mark = self._mark_pictures(messages, rows, image_token)
        if not self.takes_tools and (offered or has_tool_turns(rows)):
            rows, offered = write_tools(rows, offered), []
        written = _letters(rows, offered)
        private = self._private(written)
        back = str.maketrans({hidden: char for char, hidden in private.items()})

        def hide_tokens(text: str) -> str:
            starts = {match.start() for match in self._any_mark.finditer(text)}
            return "".join(private.get(c, c) if i in starts else c for i, c in enumerate(text)) if starts else text

        fill = functools.partial(self._fill, is_open=add_generation_prompt, picture=(mark, image_token))
        shown = _map_rows(rows, hide_tokens)
        rendered = fill(shown, _map_texts(offered, hide_tokens))
        marks = self._marks(rendered)
        if written.intersection(self._alphabet):
            hide_all = str.maketrans({c: private[c] for c in self._alphabet})

            def hide(text: str) -> str:
                return hide_tokens(text).translate(hide_all)

            strict = fill(_map_texts(rows, hide), _map_texts(offered, hide))
            strict_marks = self._marks(strict)
            if [mark[2] for mark in marks] != [mark[2] for mark in strict_marks]:
                rendered, marks, shown = strict, strict_marks, _map_texts(rows, hide)
        generated: tuple[tuple[int, int], ...] = ()
        if find_generated and self.marks_generation:
            left, right = (chr(code) for code in _free_codes({*written, *private.values(), *self.source}, 2))
            known = _BRACKETS.set((left, right))
            try:
                bracketed = fill(shown, _map_texts(offered, hide_tokens))
            finally:
                _BRACKETS.reset(known)
            generated = _cut_brackets(bracketed, rendered, left, right)
        return Rendered(rendered.translate(back), marks, generated)

    def _mark_pictures(
        self, messages: Sequence[Message | Mapping[str, Any]], rows: list[dict[str, Any]], image_token: str
    ) -> tuple[list[dict[str, Any]], str]:
        """Return the rows with a private character for each picture, and that character; none: there are none."""
        if not any(isinstance(message, Message) and message.images for message in messages):
            return rows, ""
        if image_token not in self._specials:
            raise DataError(
                f"A message has pictures, and the image token is {image_token!r}, which is no special token here. "
                "Send text alone, or use a model that sees with its own tokenizer."
            )
        taken = _letters(rows, []) | set(self.source) | set("".join(self._specials))
        mark = chr(_free_codes(taken, 1)[0])
        return _with_pictures(messages, rows, mark), mark

    def _private(self, written: set[str]) -> dict[str, str]:
        """Give each character that may be hidden a private one that no text here contains."""
        taken = written | set(self.source) | set("".join(self._specials))
        hidden = sorted({*self._alphabet, *(text[0] for text in self._specials)})
        return dict(zip(hidden, map(chr, _free_codes(taken, len(hidden))), strict=True))

    def _marks(self, text: str) -> tuple[tuple[int, int, str], ...]:
        return tuple((match.start(), match.end(), match.group()) for match in self._mark.finditer(text))

    def _fill(
        self, rows: list[dict[str, Any]], tools: list[dict[str, Any]], is_open: bool, picture: tuple[str, str]
    ) -> str:
        mark, image_token = picture
        if self.takes_parts:
            rows = [{**row, "content": _in_parts(row["content"], mark)} for row in rows]
        try:
            text = self._compiled.render(
                messages=rows,
                add_generation_prompt=is_open,
                tools=tools or None,
                documents=None,
                **self._roles,
            )
            return text.replace(mark, image_token) if mark else text
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"The chat template refused the conversation: {error}. Roles were: "
                f"{', '.join(row['role'] for row in rows) or 'none'}. Change the messages or use another template."
            ) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ConfigError(
                f"The chat template failed on this conversation: {type(error).__name__}: {error}. "
                "Mend chat_template.jinja or give another template."
            ) from error


def _free_codes(taken: Iterable[str], num: int) -> list[int]:
    """Return private characters that are not taken, as code points."""
    known = set(taken)
    free = (code for code in range(_FIRST_PRIVATE, 0x110000) if chr(code) not in known)
    return [next(free) for _ in range(num)]


def _cut_brackets(bracketed: str, plain: str, left: str, right: str) -> tuple[tuple[int, int], ...]:
    """Return where the brackets stood, as spans of the text without them."""
    spans, at, start = [], 0, 0
    for piece in re.split(f"([{left}{right}])", bracketed):
        if piece == left:
            start = at
        elif piece == right:
            spans.append((start, at))
        else:
            at += len(piece)
    if bracketed.replace(left, "").replace(right, "") != plain:
        raise ConfigError(
            "The chat template changes the text inside {% generation %} after it was marked (a filter around the "
            "block), so the marked text cannot be found. Apply the filter inside the block."
        )
    return tuple(spans)


def assistant_spans(
    template: ChatTemplate,
    messages: Sequence[Message | Mapping[str, Any]],
    whole: str,
    tools: Sequence[Mapping[str, Any]] = (),
    image_token: str = "",
) -> list[tuple[int, int] | None]:
    """Return, for each assistant message, where the text it must produce stands in ``whole``, in characters.

    A span begins right after the generation prompt and ends where the turn's rendering ends. It is None where the
    template is not prefix-preserving, that is, where the turns before read differently once later ones are there.
    """
    spans: list[tuple[int, int] | None] = []
    for number, row in enumerate(as_dicts(messages)):
        if row["role"] != "assistant":
            continue
        try:
            before = template.render(messages[:number], True, tools, image_token=image_token).text
            after = template.render(messages[: number + 1], tools=tools, image_token=image_token).text
        except ConfigError:  # some templates refuse a conversation that ends here
            spans.append(None)
            continue
        spans.append((len(before), len(after)) if whole.startswith(after) and after.startswith(before) else None)
    return spans
