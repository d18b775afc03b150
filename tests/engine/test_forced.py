"""What a form forces comes in fewer steps, and is the same to the last bit."""

from typing import Any

import pytest
from tests.engine.conftest import needs_bf16

from modelwright.base.types import SamplingParams
from modelwright.engine.engine import EngineConfig
from modelwright.engine.llm import LLM
from modelwright.engine.speculative import SpeculationConfig
from modelwright.models.llama import Llama
from modelwright.tokenizer.bpe import Tokenizer

pytest.importorskip("llguidance")
pytestmark = needs_bf16

SCHEMA = {
    "type": "object",
    "properties": {"the quick brown fox": {"type": "boolean"}, "liquor jugs": {"enum": ["five", "dozen"]}},
    "required": ["the quick brown fox", "liquor jugs"],
    "additionalProperties": False,
}


def run(model: Llama, tokenizer: Tokenizer, forms: list[dict[str, Any]], **settings: Any) -> tuple[list[Any], LLM]:
    llm = LLM(model, tokenizer=tokenizer, config=EngineConfig(**settings))
    params = [
        SamplingParams(temperature=t, seed=s, max_tokens=60, logprobs=2, **form)
        for form in forms
        for s in range(3)
        for t in (0.0, 0.7, 1.5)
    ]
    done = llm.generate(["the quick brown fox"] * len(params), params)
    llm.engine.pool.check([])
    return [(c.token_ids, c.logprobs, c.top_logprobs, c.text, c.finish_reason) for c in done], llm


def test_answers_are_the_same_with_and_without_and_steps_are_saved(model_bf16: Llama, tokenizer: Tokenizer):
    forms = [{"json_schema": SCHEMA}]
    plain, slow = run(model_bf16, tokenizer, forms, has_jump_forward=False)
    forced, fast = run(model_bf16, tokenizer, forms)
    assert forced == plain
    assert slow.stats().num_drafted == 0 < fast.stats().num_accepted == fast.stats().num_drafted
    assert fast.stats().num_steps < slow.stats().num_steps


def test_free_text_beside_forms_is_not_guessed(model_bf16: Llama, tokenizer: Tokenizer):
    free, llm = run(model_bf16, tokenizer, [{}])
    assert llm.stats().num_drafted == 0
    mixed, _ = run(model_bf16, tokenizer, [{}, {"json_schema": SCHEMA}])
    assert mixed[: len(free)] == free


@pytest.mark.parametrize("method", ["ngram", "early_exit"])
def test_another_proposer_guesses_where_nothing_is_forced(model_bf16: Llama, tokenizer: Tokenizer, method: str):
    forms = [{"json_schema": SCHEMA}, {"regex": "(fox |box ){2,6}"}, {}]
    speculation = SpeculationConfig(method, is_timed=False)
    plain, _ = run(model_bf16, tokenizer, forms, has_jump_forward=False)
    both, llm = run(model_bf16, tokenizer, forms, speculation=speculation)
    assert both == plain
    alone, other = run(model_bf16, tokenizer, forms, speculation=speculation, has_jump_forward=False)
    assert alone == plain and llm.stats().num_accepted > other.stats().num_accepted
