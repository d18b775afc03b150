"""Output keeps to its form at every temperature, and what cannot be checked is refused."""

import itertools
import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.base.errors import RequestError
from modelwright.base.types import SamplingParams
from modelwright.engine.grammar import GrammarCompiler, unpack_bits
from modelwright.engine.llm import LLM
from modelwright.models.llama import Llama
from modelwright.tokenizer.bpe import Tokenizer

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b\u00e9"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
GBNF = 'root ::= "(" inner ")"\ninner ::= [0-9] | root\n'
LARK = 'start: "x" ("y" | "z")* "!"\n'


@pytest.fixture(scope="module")
def llm(model: Llama, tokenizer: Tokenizer) -> LLM:
    return LLM(model, tokenizer=tokenizer)


def answers(llm: LLM, num: int = 6, **form: Any) -> list[tuple[str, str]]:
    params = [
        SamplingParams(temperature=t, seed=s, max_tokens=150, **form) for s in range(num // 2) for t in (0.0, 1.5)
    ]
    done = llm.generate(["the quick"] * len(params), params)
    return [(c.text, c.finish_reason) for c in done]


def test_json_keeps_to_its_schema(llm: LLM):
    jsonschema = pytest.importorskip("jsonschema")
    whole = [text for text, reason in answers(llm, 10, json_schema=SCHEMA) if reason == "stop"]
    assert len(whole) >= 8
    for text in whole:
        jsonschema.validate(json.loads(text), SCHEMA)
    free = answers(llm, 10)  # negative control: without the form nothing is JSON
    assert not any(text.startswith("{") for text, _ in free)


def test_regex_choices_and_both_notations_of_grammars(llm: LLM):
    for text, reason in answers(llm, regex=r"\d{3}-[a-f]{2,4}"):
        assert reason == "stop" and re.fullmatch(r"\d{3}-[a-f]{2,4}", text)
    options = ("yes", "no (really)", "caf\u00e9 $5.00", "a|b", "#1 & ~/x-y")
    seen = set()
    for text, reason in answers(llm, 24, choices=options):
        assert reason == "stop" and text in options
        seen.add(text)
    assert len(seen) > 1
    for text, reason in answers(llm, grammar=GBNF):
        assert reason == "length" or re.fullmatch(r"\(+\d\)+", text)
    for text, reason in answers(llm, grammar=LARK):
        assert reason == "length" or re.fullmatch(r"x[yz]*!", text)


def test_each_choice_alone_is_exact(llm: LLM):
    for text in ("a.b", "tab\there", "\u65e5\u672c", 'quote"', "new\nline", "{}[]()^$", "back\\slash"):
        assert answers(llm, 2, choices=(text,)) == [(text, "stop")] * 2


def test_requests_with_and_without_a_form_share_steps(llm: LLM):
    form = SamplingParams(temperature=1.0, seed=3, max_tokens=40, choices=("alpha", "beta"))
    plain = SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True)
    alone = [llm.generate("dog", p)[0].text for p in (form, plain)]
    together = [c.text for c in llm.generate(["dog", "dog", "dog"], [form, plain, form])]
    assert together == [alone[0], alone[1], alone[0]]


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"json_schema": {"type": "object", "minProperties": 3, "unevaluatedProperties": False}}, "json_schema cannot"),
        ({"json_schema": "{not json"}, "json_schema cannot be read"),
        ({"json_schema": "[1]"}, "a schema is an object"),
        ({"regex": "(unclosed"}, "regex cannot be compiled"),
        ({"grammar": "start: nothing"}, "grammar cannot be compiled"),
        ({"grammar": "root ::= missing"}, "grammar cannot be"),
        ({"regex": "a" * 300_000}, "at most 200000 are compiled"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(llm: LLM, form: dict[str, Any], words: str):
    with pytest.raises(RequestError, match=words):
        llm.generate("x", SamplingParams(**form))


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("unevaluatedProperties", False),
        ("unevaluatedItems", False),
        ("not", {"type": "string"}),
        ("if", {"type": "string"}),
        ("contains", {"type": "string"}),
        ("uniqueItems", True),
        ("propertyNames", {"maxLength": 3}),
        ("dependentSchemas", {"a": {"required": ["b"]}}),
        ("dependentRequired", {"a": ["b"]}),
        ("$dynamicRef", "#x"),
        ("format", "no-such-format"),
    ],
)
def test_a_keyword_that_is_not_checked_is_refused_and_not_passed_over(llm: LLM, keyword: str, value: Any):
    kind = {"format": "string", "uniqueItems": "array", "unevaluatedItems": "array", "contains": "array"}
    with pytest.raises(RequestError, match="json_schema cannot be compiled") as caught:
        llm.generate("x", SamplingParams(json_schema={"type": kind.get(keyword, "object"), keyword: value}))
    assert caught.value.param == "json_schema" and str(value if keyword == "format" else keyword) in str(caught.value)


def test_one_form_at_a_time():
    with pytest.raises(RequestError, match="json_schema and regex are given together"):
        SamplingParams(json_schema={}, regex="a")
    with pytest.raises(RequestError, match="regex and min_tokens"):
        SamplingParams(regex="a", min_tokens=2)
    with pytest.raises(RequestError, match="choices is"):
        SamplingParams(choices=())


def test_bans_that_leave_nothing_end_the_request(llm: LLM):
    with pytest.raises(RequestError, match="No token is left"):
        llm.generate("x", SamplingParams(temperature=0, choices=("z",), bad_words=("z",)))
    assert llm.generate("x", SamplingParams(temperature=0, max_tokens=3))[0].token_ids  # the engine goes on


@given(st.lists(st.booleans(), min_size=32, max_size=96).filter(lambda x: len(x) % 32 == 0))
@settings(max_examples=50, deadline=None)
def test_bits_are_unpacked_lowest_first(bits: list[bool]):
    words = [sum(bit << i for i, bit in enumerate(bits[at : at + 32])) for at in range(0, len(bits), 32)]
    signed = torch.tensor([w - (1 << 32) if w >> 31 else w for w in words], dtype=torch.int32)
    assert unpack_bits(signed, len(bits)).tolist() == bits


@pytest.mark.parametrize(
    ("form", "language"),
    [
        ({"choices": ("the fox", "the dog", "the dogs", "jug")}, {"the fox", "the dog", "the dogs", "jug"}),
        (
            {"regex": "(ab|ba){1,3}x?"},
            {"".join(p) + x for n in (1, 2, 3) for p in itertools.product(("ab", "ba"), repeat=n) for x in ("", "x")},
        ),
        ({"regex": "caf\u00e9|\U0001f980{2}"}, {"caf\u00e9", "\U0001f980\U0001f980"}),
        (
            {"json_schema": {"enum": ["quick", "quiz", 7, True, None, {"a": [1]}]}},
            {'"quick"', '"quiz"', "7", "true", "null", '{"a":[1]}'},
        ),
    ],
)
def test_the_mask_is_what_brute_force_says(llm: LLM, tokenizer: Tokenizer, form: dict[str, Any], language: set[str]):
    """In every state that can be reached, a token is allowed if and only if the text with it begins a valid one.

    Where only one text can follow, the library holds the model to the tokens that the tokenizer would cut it into.
    """
    words = {text.encode() for text in language}
    beginnings = {word[:size] for word in words for size in range(len(word) + 1)}
    assert llm.engine.grammars is not None
    stops = set(llm.engine.stop_ids)
    spelled = {
        i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids.values()
    }
    waiting, seen = [()], set()
    while waiting:
        ids = waiting.pop()
        text = b"".join(spelled[i] for i in ids)
        if text in seen:  # another cutting of the same text gives the same state
            continue
        seen.add(text)
        grammar = llm.engine.grammars.start(SamplingParams(**form))
        assert grammar is not None and all(grammar.accept(i) for i in ids)
        if grammar.is_complete:
            assert text in words
            continue
        allowed = {i for i, is_allowed in enumerate(grammar.allowed().tolist()) if is_allowed}
        viable = {i for i, piece in spelled.items() if piece and text + piece in beginnings}
        forced = grammar.forced()
        assert allowed - stops == viable or (forced and allowed == {forced[0]} <= viable)
        assert bool(allowed & stops) == (text in words)
        assert allowed, "a dead end"
        waiting += [(*ids, i) for i in allowed - stops]
    assert seen >= words


class Spaced:
    """A tokenizer that puts a space before every text, as SentencePiece does, over another one."""

    def __init__(self, inner: Tokenizer):
        self.inner = inner
        self.special_ids, self.vocab_size = inner.special_ids, inner.vocab_size
        self.bos_id, self.token_bytes = inner.bos_id, inner.token_bytes

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.inner.encode(" " + text, add_special_tokens=add_special_tokens)


def test_a_tokenizer_that_adds_a_space_spells_forced_text_exactly(tokenizer: Tokenizer):
    compiler = GrammarCompiler(Spaced(tokenizer), tokenizer.vocab_size, tokenizer.stop_ids)  # type: ignore[arg-type]
    grammar = compiler.start(SamplingParams(regex='\\{"name":"a caf\u00e9"\\}'))
    assert grammar is not None
    text = b""
    while not grammar.is_complete:
        token = max(grammar.allowed().nonzero().flatten().tolist(), key=lambda i: len(tokenizer.token_bytes(i)))
        assert grammar.accept(token)
        text += bytes(tokenizer.token_bytes(token))
    assert text.decode() == '{"name":"a caf\u00e9"}'
