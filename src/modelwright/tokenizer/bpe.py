"""The tokenizer every room uses: text to ids and back, conversations to ids, over a ``tokenizer.json``.

The work is done by the Rust library ``tokenizers``; this class adds the rules it leaves to the caller. Text never
becomes a special token: specials are written by id, from the chat template or the post-processor. Byte-level pieces
are decoded through bytes, so that counting, streaming and decoding agree. `plain_bpe` is the readable twin.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers

from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import atomic_file, write_json
from modelwright.base.types import Message
from modelwright.tokenizer.byte_level import PIECE_CHARS, cut_text, unspell
from modelwright.tokenizer.chat_template import ChatTemplate, assistant_spans
from modelwright.tokenizer.special import TURN_END

_BATCH_CHARS = 4_000_000  # handed to the library at once; its encodings take some 100 bytes a token
_SENTENCEPIECE_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}

Messages = Sequence[Message | Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatTokens:
    """A conversation as ids; the mask is True on the tokens the assistant must produce, its end-of-turn included."""

    ids: list[int]
    assistant_mask: list[bool]


class Tokenizer:
    """Text to ids and back. Made by `train_bpe` and `load_tokenizer`.

    Args:
        backend: The ``tokenizers.Tokenizer``; owned by this object from here on.
        roles: Special tokens by role, as in tokenizer_config.json: ``{"eos_token": "<|endoftext|>"}``.
        chat_template: Jinja text, or None where there is none.
        stop_ids: Ids that end a completion, besides the EOS and the end of a turn.
        settings: Further entries of tokenizer_config.json, kept when saved.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        roles: Mapping[str, str],
        chat_template: str | None = None,
        stop_ids: Sequence[int] = (),
        settings: Mapping[str, Any] | None = None,
    ):
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        self._backend = backend
        self._layout = _Layout.read(backend)
        self.roles = dict(roles)
        self._settings = dict(settings or {})
        added = backend.get_added_tokens_decoder()
        self.special_ids = {token.content: index for index, token in sorted(added.items()) if token.special}
        self._absorbs = {token.content: (token.lstrip, token.rstrip) for token in added.values() if token.special}
        # Ordinary text may turn into the unknown token, and into nothing else that is special.
        self._guarded = frozenset(i for text, i in self.special_ids.items() if text != self.roles.get("unk_token"))
        self._special_set = frozenset(self.special_ids.values())
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._prefix, self._suffix = self._post_processed()
        self._template = ChatTemplate(chat_template, self.roles, self.special_ids) if chat_template else None
        self.bos_id = self._id_of("bos_token")
        eos = self._id_of("eos_token")
        ends = (eos, self.special_ids.get(TURN_END), *stop_ids, self._turn_end())
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in ends if i is not None))

    # -- ids of the special tokens ---------------------------------------------------------------------------------

    def _id_of(self, role: str) -> int | None:
        text = self.roles.get(role)
        return None if text is None else self._backend.token_to_id(text)

    @property
    def eos_id(self) -> int:
        """The id that ends a document.

        Raises:
            ConfigError: The tokenizer names none (encoders such as BERT have none).
        """
        found = self._id_of("eos_token")
        if found is None:
            raise ConfigError("This tokenizer names no eos_token. Name one in its tokenizer_config.json.")
        return found

    @property
    def pad_id(self) -> int:
        """The id that fills short rows: the file's pad token, else the EOS. Loss masks go by position, never by it."""
        found = self._id_of("pad_token")
        return self.eos_id if found is None else found

    @property
    def chat_template(self) -> str | None:
        """The Jinja text of the chat template."""
        return self._template.source if self._template else None

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template itself writes tools; otherwise they are put into its texts."""
        return self._template is not None and self._template.takes_tools

    def with_chat_template(self, source: str) -> "Tokenizer":
        """Return the same tokenizer with another chat template."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        return Tokenizer(
            backend, roles=self.roles, chat_template=source, stop_ids=self.stop_ids, settings=self._settings
        )

    def with_tokens(self, tokens: Sequence[str]) -> "Tokenizer":
        """Return the same tokenizer with more tokens, found in ordinary text as they stand; their ids follow the last.

        Raises:
            ConfigError: The ids would leave a gap or take one that is used.
        """
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in tokens])
        found = [backend.token_to_id(token) for token in tokens]
        if found != list(range(self.vocab_size, self.vocab_size + len(tokens))):
            raise ConfigError(f"The new tokens got the ids {found[:5]}; expected those from {self.vocab_size} on.")
        return Tokenizer(
            backend,
            roles=self.roles,
            chat_template=self.chat_template,
            stop_ids=self.stop_ids,
            settings=self._settings,
        )

    def token_id(self, token: str) -> int | None:
        """Return the id of one token by its text in the vocabulary; None: there is no such token."""
        return self._backend.token_to_id(token)

    # -- text to ids -----------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text.

        Special tokens spelled out in the text become ordinary ids. ``add_special_tokens`` adds what the file's
        post-processor adds (often a BOS), exactly once.

        Raises:
            DataError: The text has lone surrogates, which no UTF-8 can hold.
        """
        if isinstance(text, str) and len(text) > PIECE_CHARS:
            return self.encode_batch([text], add_special_tokens)[0]
        ids = self._ordinary(text)[0]
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Return the ids of many texts, each as `encode` gives them, on all cores."""
        if isinstance(texts, str):
            raise DataError("encode_batch was given one text; expected a list of texts. Call encode for one.")
        rows: list[list[int]] = [list(self._prefix) if add_special_tokens else [] for _ in texts]
        waiting: list[tuple[list[int], str]] = []
        num_chars = 0
        for row, text in zip(rows, texts, strict=True):
            if not isinstance(text, str):
                raise DataError(_why_not_text(text))
            for piece in cut_text(text) if self._is_cuttable else [text]:
                waiting.append((row, piece))
                num_chars += len(piece)
                if num_chars > _BATCH_CHARS:
                    self._encode_pieces(waiting)
                    waiting, num_chars = [], 0
        self._encode_pieces(waiting)
        if add_special_tokens and self._suffix:
            for row in rows:
                row += self._suffix
        return rows

    def _encode_pieces(self, pieces: list[tuple[list[int], str]]) -> None:
        """Encode pieces on all cores and append the ids of each to its row."""
        try:
            encodings = self._backend.encode_batch_fast([piece for _, piece in pieces], add_special_tokens=False)
        except TypeError as error:
            wrong = next((piece for _, piece in pieces if _lone_surrogate(piece) is not None), "")
            raise DataError(_why_not_text(wrong)) from error
        for (row, piece), encoding in zip(pieces, encodings, strict=True):
            ids = encoding.ids
            row += ids if self._guarded.isdisjoint(ids) else self._ordinary(piece)[0]

    @property
    def _is_cuttable(self) -> bool:
        """Whether the ids of a text are those of its words, wherever they stand."""
        return self._layout.kind == "byte_level" and not self._layout.is_prefixing

    @functools.cached_property
    def _continued(self) -> tokenizers.Tokenizer:
        """The tokenizer for text that does not stand at the beginning, where the file tells these apart."""
        if self._layout.continued is None:
            return self._backend
        backend = tokenizers.Tokenizer.from_str(self._layout.continued)
        backend.encode_special_tokens = True
        return backend

    def _ordinary(self, text: str, is_continued: bool = False) -> tuple[list[int], list[int]]:
        """Return ids and their first characters' offsets, for text that must not give special ids."""
        try:
            backend = self._continued if is_continued else self._backend
            encoding = backend.encode(text, add_special_tokens=False)
        except TypeError as error:
            raise DataError(_why_not_text(text)) from error
        ids, offsets = encoding.ids, encoding.offsets
        if self._guarded.isdisjoint(ids):
            return ids, [start for start, _ in offsets]
        # A Unigram or WordLevel vocabulary may hold "</s>" as a piece: cut the text inside it and try again.
        start, end = next(span for index, span in zip(ids, offsets, strict=True) if index in self._guarded)
        if end - start < 2:
            raise DataError(f"The text holds {text[start:end]!r}, which this tokenizer only has as a special token.")
        middle = (start + end) // 2
        left_ids, left_starts = self._ordinary(text[:middle], is_continued)
        right_ids, right_starts = self._ordinary(text[middle:], True)
        return left_ids + right_ids, left_starts + [middle + s for s in right_starts]

    def _post_processed(self) -> tuple[list[int], list[int]]:
        """Find the ids that the file's post-processor puts before and after a text."""
        encoding = self._backend.encode("a", add_special_tokens=True)
        is_added = [bool(flag) for flag in encoding.special_tokens_mask]
        first = is_added.index(False) if False in is_added else len(is_added)
        last = len(is_added) - is_added[::-1].index(False) if False in is_added else len(is_added)
        return encoding.ids[:first], encoding.ids[last:]

    def added_ids(self) -> tuple[list[int], list[int]]:
        """Return the ids that `encode` puts before and after a text."""
        return list(self._prefix), list(self._suffix)

    # -- ids to text -----------------------------------------------------------------------------------------------

    @functools.cached_property
    def _piece_bytes(self) -> list[bytes]:
        pieces = [b""] * self.vocab_size  # ids without a piece (padding rows of a published matrix) stand for nothing
        for piece, index in self._backend.get_vocab(with_added_tokens=False).items():
            pieces[index] = self._layout.piece_bytes(piece)
        for index, token in self._backend.get_added_tokens_decoder().items():
            pieces[index] = token.content.encode("utf-8")
        return pieces

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes one id stands for; a special token's are its own text.

        Raises:
            DataError: The id is negative. Ids at or above ``vocab_size`` stand for nothing: b"".
        """
        if token_id < 0:
            raise DataError(f"Token id {token_id} is negative; a loss mask value such as -100 is no token.")
        return self._piece_bytes[token_id] if token_id < self.vocab_size else b""

    def decode_bytes(self, ids: Sequence[int], skip_special_tokens: bool = False) -> bytes:
        """Return the bytes that ids stand for, without repairing broken characters."""
        kept = (i for i in ids if i not in self._special_set) if skip_special_tokens else ids
        data = b"".join(map(self.token_bytes, kept))
        for _ in range(self.num_stripped_spaces):
            data = data.removeprefix(b" ")
        return data

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""
        if self.has_byte_pieces:
            return self.decode_bytes(ids, skip_special_tokens).decode("utf-8", errors="replace")
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @property
    def has_byte_pieces(self) -> bool:
        """Whether decoding is joining bytes (byte-level, SentencePiece); WordPiece and others have their own rules."""
        return self._layout.kind != "other"

    @property
    def num_stripped_spaces(self) -> int:
        """How many spaces decoding takes from the front of a text: one for SentencePiece, else none."""
        return self._layout.num_stripped

    # -- conversations ---------------------------------------------------------------------------------------------

    def render_chat(self, messages: Messages, add_generation_prompt: bool = False, tools: Tools = ()) -> str:
        """Return a conversation as the template writes it."""
        return self._needed_template().render(messages, add_generation_prompt, tools).text

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        tools: Tools = (),
        image_token: str = "",
    ) -> list[int]:
        """Return the ids of a conversation; texts of messages and tools never become special tokens.

        Where messages have pictures, ``image_token`` names the special token that stands for each, once.

        Where the vocabulary is byte-level, no token spans the point at which the assistant takes over, so that the
        prompt of a turn is a prefix of the conversation that contains its answer.

        Raises:
            ConfigError: There is no template, or it refused the conversation.
        """
        return self._chat(messages, add_generation_prompt, False, tools, image_token).ids

    def chat_tokens(self, messages: Messages, add_generation_prompt: bool = False, tools: Tools = ()) -> ChatTokens:
        """Return the ids of a conversation and which of them the assistant must produce.

        Raises:
            ConfigError: The template rewrites earlier turns, so that no mask can be right; or as above.
        """
        return self._chat(messages, add_generation_prompt, True, tools, "")

    def _needed_template(self) -> ChatTemplate:
        if self._template is None:
            raise ConfigError(
                "This tokenizer has no chat template. Put a chat_template.jinja beside tokenizer.json, or call "
                "tokenizer.with_chat_template(modelwright.tokenizer.chat_template.PLAIN)."
            )
        return self._template

    def _chat(
        self, messages: Messages, add_generation_prompt: bool, is_mask_needed: bool, tools: Tools, image_token: str
    ) -> ChatTokens:
        template = self._needed_template()
        rendered = template.render(messages, add_generation_prompt, tools, is_mask_needed, image_token)
        if is_mask_needed and template.marks_generation:  # the template says itself what is learned
            marked = rendered.generated
            ids, starts = self._encode_marked(
                rendered.text, rendered.marks, {place for span in marked for place in span}
            )
            return ChatTokens(ids, [any(start <= at < end for start, end in marked) for at in starts])
        found = assistant_spans(template, messages, rendered.text, tools, image_token)
        spans = [span for span in found if span is not None]
        if is_mask_needed and len(spans) < len(found):
            raise ConfigError(
                "The chat template is not prefix-preserving: it writes earlier turns differently once a later one is "
                "there, so the assistant's tokens cannot be told apart. Train on one answer per conversation, or "
                "give a template that only appends."
            )
        ids, starts = self._encode_marked(rendered.text, rendered.marks, {start for start, _ in spans})
        # The turn ends with the last special token of its span; what follows it (a newline) is the template's.
        learned = [
            (start, max((mark[1] for mark in rendered.marks if start < mark[1] <= end), default=end))
            for start, end in spans
        ]
        return ChatTokens(ids, [any(start <= at < end for start, end in learned) for at in starts])

    def _encode_marked(
        self, text: str, marks: Sequence[tuple[int, int, str]], cuts: set[int]
    ) -> tuple[list[int], list[int]]:
        """Encode text whose special tokens stand exactly at ``marks``; byte-level text is also cut at ``cuts``."""
        ids: list[int] = []
        starts: list[int] = []

        def write(start: int, end: int) -> None:
            inner = sorted(cut for cut in cuts if start < cut < end) if self._is_cuttable else []
            for left, right in zip([start, *inner], [*inner, end], strict=True):
                if left < right:
                    piece_ids, piece_starts = self._ordinary(text[left:right], is_continued=left > 0)
                    ids.extend(piece_ids)
                    starts.extend(left + at for at in piece_starts)

        position = 0
        for start, end, token in marks:
            takes_left, takes_right = self._absorbs[token]
            while takes_left and position < start and text[start - 1].isspace():
                start -= 1
            while takes_right and end < len(text) and text[end].isspace():
                end += 1
            write(position, start)
            ids.append(self.special_ids[token])
            starts.append(start)
            position = end
        write(position, len(text))
        return ids, starts

    def _turn_end(self) -> int | None:
        """Return the special token that ends an assistant's turn in the chat template, if there is one."""
        if self._template is None:
            return None
        turns = [Message("user", "a"), Message("assistant", "b")]
        try:
            whole = self._template.render(turns)
            spans = assistant_spans(self._template, turns, whole.text)
        except ConfigError:
            return None
        if spans[0] is None:
            return None
        ends = [token for _, end, token in whole.marks if end > spans[0][0]]
        return self.special_ids[ends[-1]] if ends else None

    # -- files -----------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Return the text of tokenizer.json: the vocabulary and its rules, without roles and chat template."""
        return str(self._backend.to_str())

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, readable by ``transformers``."""
        folder = Path(folder)
        with atomic_file(folder / "tokenizer.json") as handle:
            handle.write(self._backend.to_str(pretty=True))
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        write_json(folder / "tokenizer_config.json", settings | self._settings | self.roles)
        if self._template is not None:
            with atomic_file(folder / "chat_template.jinja") as handle:
                handle.write(self._template.source)


@dataclass(frozen=True)
class _Layout:
    """How a tokenizer.json spells its pieces: read from its decoder, pre-tokenizer and normalizer."""

    kind: Literal["byte_level", "sentencepiece", "other"]
    is_prefixing: bool  # text gets a space in front of it before it is cut
    num_stripped: int  # spaces that decoding takes from the very front
    continued: str | None  # the same file without the space in front, where only a text's beginning gets one

    @staticmethod
    def read(backend: tokenizers.Tokenizer) -> "_Layout":
        file = json.loads(backend.to_str())
        decoder = _steps(file.get("decoder"))
        before = _steps(file.get("normalizer")) + _steps(file.get("pre_tokenizer"))
        spaces = [step for step in before if step["type"] == "Metaspace"]
        is_first_only = any(step.get("prepend_scheme") == "first" for step in spaces)
        for step in spaces:
            step["prepend_scheme"] = "never"
        return _Layout(
            kind=_kind_of(decoder),
            is_prefixing=bool(spaces)
            or any(step["type"] == "Prepend" or step.get("add_prefix_space") is True for step in before),
            num_stripped=sum(
                step.get("start", 0) if step["type"] == "Strip" else step.get("prepend_scheme", "always") != "never"
                for step in decoder
                if step["type"] in ("Strip", "Metaspace")
            ),
            continued=json.dumps(file) if is_first_only else None,
        )

    def piece_bytes(self, piece: str) -> bytes:
        """Return the bytes of one piece of the vocabulary."""
        if self.kind == "byte_level":
            return unspell(piece)
        if self.kind == "sentencepiece":
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace("\u2581", " ").encode("utf-8")
        return piece.removeprefix("##").encode("utf-8")


def _steps(part: Any) -> list[dict[str, Any]]:
    """Return the steps of a tokenizer.json part, whether it is one step or a sequence of them."""
    if not part:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = next(value for value in part.values() if isinstance(value, list))
    return [step for item in inner for step in _steps(item)]


def _kind_of(decoder: list[dict[str, Any]]) -> Literal["byte_level", "sentencepiece", "other"]:
    types = {step["type"] for step in decoder}
    if types == {"ByteLevel"}:
        return "byte_level"
    has_spaces = "Metaspace" in types or any(
        step.get("content") == " " for step in decoder if step["type"] == "Replace"
    )
    return "sentencepiece" if has_spaces and types <= _SENTENCEPIECE_STEPS else "other"


def _lone_surrogate(text: str) -> int | None:
    return next((i for i, char in enumerate(text) if 0xD800 <= ord(char) <= 0xDFFF), None)


def _why_not_text(text: Any) -> str:
    if not isinstance(text, str):
        return f"The text to encode is a {type(text).__name__}; expected str."
    at = _lone_surrogate(text)
    if at is None:
        return "The tokenizer refused the text."
    return (
        f"The text holds a lone surrogate {text[at]!r} at character {at}, which UTF-8 cannot hold. "
        "Read the file with errors='replace', or remove the character."
    )
