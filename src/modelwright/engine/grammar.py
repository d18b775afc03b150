"""Output that keeps to a form: a JSON Schema, a regular expression, a grammar, or a list of choices.

The library llguidance compiles the form and says, before each draw, which tokens may come; the sampler forbids the
rest. Forms are compiled once and remembered. A keyword of JSON Schema that the library does not check is refused, so
an output that passed is valid.

Source: https://github.com/guidance-ai/llguidance; Willard and Louf 2023, arXiv 2307.09702, for the idea.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelwright.base.errors import MissingExtraError, RequestError
from modelwright.base.types import SamplingParams
from modelwright.tokenizer.bpe import Tokenizer

MAX_COMPILED = 64
MAX_FORM_CHARS = 200_000
MARK = "\x02"
FORMS = ("json_schema", "regex", "grammar", "choices")


class Grammar:
    """Where one completion stands in its form."""

    def __init__(self, matcher: Any, vocab_size: int, stop_ids: Sequence[int]):
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._stop_ids = frozenset(stop_ids)
        self._bits = torch.empty((vocab_size + 31) // 32, dtype=torch.int32)

    @property
    def is_complete(self) -> bool:
        """True when the form is full: nothing more can come."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> Tensor:
        """Return which tokens may come next, (V,) boolean; an end-of-text token where the form may end."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.data_ptr(), self._bits.nbytes)
        return unpack_bits(self._bits, self._vocab_size)

    def accept(self, token: int) -> bool:
        """Take in a drawn token; False when the form does not allow it."""
        if token in self._stop_ids:
            return bool(self._matcher.is_accepting())
        return bool(self._matcher.consume_token(token))

    def forced(self) -> list[int]:
        """Return the tokens that must come next, whatever the model thinks: none, or some."""
        return list(self._matcher.compute_ff_tokens())

    def num_valid(self, draft: Sequence[int]) -> int:
        """Return how many of these tokens, from the first on, the form allows."""
        end = next((i for i, token in enumerate(draft) if token in self._stop_ids), len(draft))
        return int(self._matcher.validate_tokens(list(draft[:end])))


def unpack_bits(bits: Tensor, size: int) -> Tensor:
    """Return the first ``size`` bits of an int32 array, lowest first, as booleans.

    >>> unpack_bits(torch.tensor([5], dtype=torch.int32), 4).tolist()
    [True, False, True, False]
    """
    # NumPy has it in one pass: 5 us for 32,000 tokens, where shifting a tensor took 40.
    unpacked = np.unpackbits(bits.numpy().view(np.uint8), count=size, bitorder="little")
    return torch.from_numpy(unpacked).view(torch.bool)


class GrammarCompiler:
    """Makes `Grammar`s for one tokenizer; the tokenizer's table is built on the first use."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = tuple(stop_ids)
        self._table: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def start(self, params: SamplingParams) -> Grammar | None:
        """Return the grammar of a request, or None where it asks for no form.

        Raises:
            RequestError: The form is malformed, or asks for what cannot be checked.
            MissingExtraError: llguidance is not installed.
        """
        name = next((form for form in FORMS if getattr(params, form) is not None), None)
        if name is None:
            return None
        lib = _library()
        if not self._stop_ids:
            raise RequestError(f"{name} needs an end-of-text token to end with, and this model has none.", param=name)
        key = json.dumps([name, getattr(params, name)], sort_keys=True, default=str)
        if key not in self._compiled:
            self._compiled[key] = self._compile(lib, name, getattr(params, name))
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return Grammar(self._compiled[key].deep_copy(), self._vocab_size, self._stop_ids)

    def _compile(self, lib: Any, name: str, form: Any) -> Any:
        if len(str(form)) > MAX_FORM_CHARS:
            raise RequestError(
                f"{name} has {len(str(form))} characters; at most {MAX_FORM_CHARS} are compiled. Simplify it.",
                param=name,
                code="invalid_value",
            )
        try:
            text = _grammar_text(lib, name, form)
        except (ValueError, TypeError) as error:
            raise RequestError(f"{name} cannot be read: {error}", param=name, code="invalid_value") from None
        if self._table is None:
            self._table = lib.LLTokenizer(_Vocabulary(self._tokenizer, self._vocab_size, self._stop_ids))
        matcher = lib.LLMatcher(self._table, text, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().split("\n")[0]
            raise RequestError(f"{name} cannot be compiled: {reason}", param=name, code="invalid_value")
        return matcher


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise MissingExtraError("llguidance", "grammar", "Output that keeps to a schema or grammar") from None
    return llguidance


def _grammar_text(lib: Any, name: str, form: Any) -> str:
    """Return the form in the library's own notation."""
    if name == "json_schema":
        schema = json.loads(form) if isinstance(form, str) else form
        if not isinstance(schema, (dict, bool)):
            raise ValueError(f"a schema is an object, not {type(schema).__name__}")
        return lib.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
    if name == "regex":
        return lib.LLMatcher.grammar_from_regex(form)
    if name == "choices":
        return lib.LLMatcher.grammar_from_regex("|".join(f"({_quote(choice)})" for choice in form))
    if "::=" in form:
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            return lib.LLMatcher.grammar_from_lark(any_to_lark(form))
        except Exception as error:  # the converter raises nothing narrower
            raise ValueError(str(error)) from None
    return lib.LLMatcher.grammar_from_lark(form)


def _quote(text: str) -> str:
    """Return a regular expression for exactly this text, in the dialect of Rust."""
    return re.sub(r"([\\.+*?()|\[\]{}^$/#&~-])", r"\\\1", text)


class _Vocabulary:
    """The bytes of every token, in the form that the library asks for."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]):
        special = set(tokenizer.special_ids.values()) | set(stop_ids)
        names = {i: name for name, i in tokenizer.special_ids.items()}
        self.eos_token_id = stop_ids[0]
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted(special)
        self.tokens = [
            names.get(i, f"<stop {i}>").encode()
            if i in special
            else (bytes(tokenizer.token_bytes(i)) if i < tokenizer.vocab_size else b"")
            for i in range(vocab_size)
        ]
        self._tokenizer = tokenizer
        self._by_bytes = {data: i for i, data in enumerate(self.tokens) if data and i not in special}
        self._longest = max(map(len, self._by_bytes))

    def __call__(self, text: str | bytes) -> list[int]:
        """Return tokens whose bytes are exactly the text's."""
        data = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        plain = data.decode("utf-8", errors="replace")
        ids = self._tokenizer.encode(plain, add_special_tokens=False)
        if self._spell(ids) == data:
            return ids
        # A SentencePiece tokenizer puts a space before a text; behind a mark it does not.
        mark = self._tokenizer.encode(MARK, add_special_tokens=False)
        ids = self._tokenizer.encode(MARK + plain, add_special_tokens=False)
        if ids[: len(mark)] == mark and self._spell(ids[len(mark) :]) == data:
            return ids[len(mark) :]
        return self._longest_matches(data)

    def _spell(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.tokens[i] for i in ids)

    def _longest_matches(self, data: bytes) -> list[int]:
        ids = []
        while data:
            size = next(n for n in range(min(self._longest, len(data)), 0, -1) if data[:n] in self._by_bytes)
            ids.append(self._by_bytes[data[:size]])
            data = data[size:]
        return ids
