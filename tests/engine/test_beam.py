"""Beam search and best-of: equal to transformers', better than greedy, and ordinary requests to the engine."""

import asyncio
from dataclasses import replace

import pytest
import torch
from tests.engine.conftest import TEXT, VOCAB_SIZE, make_model

from modelwright.base.errors import RequestError
from modelwright.base.types import Completion, SamplingParams, Usage
from modelwright.engine.beam import BeamSearch, best_completions, check_beams, mean_logprob
from modelwright.engine.engine import EngineConfig
from modelwright.engine.llm import LLM
from modelwright.engine.stream import AsyncEngine
from modelwright.models.llama import Llama
from modelwright.models.weights import save_model
from modelwright.tokenizer.bpe import Tokenizer


@pytest.mark.peer
@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -1.0])
def test_beams_equal_those_of_transformers(tmp_path, length_penalty: float, early_stopping: bool):
    transformers = pytest.importorskip("transformers")
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[7] *= 1.6  # an end that comes now and then
    save_model(model, tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    engine_model = make_model()
    engine_model.load_state_dict(model.state_dict())
    engine_model.config = replace(engine_model.config, eos_token_id=(7,))
    llm = LLM(engine_model)
    params = SamplingParams(
        beam_width=4, n=4, max_tokens=12, length_penalty=length_penalty, early_stopping=early_stopping
    )
    endings = set()
    for seed in range(6):
        prompt = torch.randint(8, VOCAB_SIZE, (1, 9), generator=torch.Generator().manual_seed(seed))
        expected = peer.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            num_beams=4,
            num_return_sequences=4,
            max_new_tokens=12,
            do_sample=False,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            eos_token_id=7,
            pad_token_id=0,
        )[:, 9:].tolist()
        best = llm.generate(prompt[0].tolist(), params)[0]
        mine = [best, *best.others]
        endings |= {c.finish_reason for c in mine}
        ended = [row[: row.index(7) + 1] if 7 in row else row for row in expected]  # theirs are filled up behind it
        assert [list(c.token_ids) for c in mine] == ended
    assert endings == {"stop", "length"}
    llm.engine.pool.check([])


def test_a_wide_search_finds_what_is_likelier_than_the_greedy_answer(model: Llama, tokenizer: Tokenizer):
    llm = LLM(model, tokenizer=tokenizer)
    prompts = [TEXT[i : i + 30] for i in range(0, 40, 5)]
    greedy = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    beams = llm.generate(prompts, SamplingParams(beam_width=8, max_tokens=10, ignore_eos=True))
    gains = [sum(b.logprobs or ()) - sum(g.logprobs or ()) for b, g in zip(beams, greedy, strict=True)]
    assert sum(gains) > 0 and min(gains) > -1e-3
    one = llm.generate(prompts, SamplingParams(beam_width=1, max_tokens=10, ignore_eos=True))
    assert [c.token_ids for c in one] == [c.token_ids for c in greedy]
    assert [c.text for c in one] == [c.text for c in greedy]
    assert beams[0].usage == Usage(greedy[0].usage.prompt_tokens, 10, beams[0].usage.cached_tokens)


def test_beams_in_a_full_engine_in_one_that_is_served_and_beside_draws(model: Llama, tokenizer: Tokenizer):
    params = SamplingParams(beam_width=4, n=2, max_tokens=12)
    alone = LLM(model, tokenizer=tokenizer).generate(TEXT[:40], params)[0]
    small = LLM(model, tokenizer=tokenizer, config=EngineConfig(num_blocks=7, max_running=3, max_tokens_per_step=9))
    drawn, beams = small.generate([TEXT[:40]] * 2, [SamplingParams(seed=1, max_tokens=5, n=2), params])
    assert [beams.token_ids, beams.others[0].token_ids] == [alone.token_ids, alone.others[0].token_ids]
    assert len(drawn.others) == 1
    small.engine.pool.check([])
    with AsyncEngine(model, tokenizer=tokenizer) as engine:
        served = asyncio.run(engine.complete_tokens(tokenizer.encode(TEXT[:40]), params))
    assert [served.token_ids, served.others[0].token_ids] == [alone.token_ids, alone.others[0].token_ids]
    assert engine.engine.pool.num_free == engine.engine.pool.num_usable


def test_best_of_keeps_the_likeliest_draws_and_counts_all_tokens(model: Llama, tokenizer: Tokenizer):
    llm = LLM(model, tokenizer=tokenizer)
    every = llm.generate(TEXT[:20], SamplingParams(n=6, seed=3, max_tokens=9))[0]
    best = llm.generate(TEXT[:20], SamplingParams(n=2, best_of=6, seed=3, max_tokens=9))[0]
    drawn = sorted([every, *every.others], key=lambda c: -mean_logprob(c.logprobs or ()))
    assert [c.token_ids for c in (best, *best.others)] == [c.token_ids for c in drawn[:2]]
    assert sum(c.usage.completion_tokens for c in (best, *best.others)) == sum(c.usage.completion_tokens for c in drawn)
    with AsyncEngine(model, tokenizer=tokenizer) as engine:
        params = SamplingParams(n=2, best_of=6, seed=3, max_tokens=9)
        served = asyncio.run(engine.complete_tokens(tokenizer.encode(TEXT[:20]), params))
    assert [c.token_ids for c in (served, *served.others)] == [c.token_ids for c in (best, *best.others)]


def test_equal_draws_stay_in_order():
    draws = [Completion("", (i,), "stop", Usage(1, 1), (-1.0,)) for i in range(3)]
    assert [c.token_ids for c in best_completions(draws, SamplingParams(n=2, best_of=3))] == [(0,), (1,)]


def test_a_search_ends_with_its_first_full_house_if_asked_to():
    step = ((0, -0.7), (1, -0.8), (2, -5.0), (3, -6.0))
    searches = [
        BeamSearch(SamplingParams(beam_width=2, early_stopping=early, length_penalty=0.0), {0}, 20)
        for early in (True, False)
    ]
    lengths = []
    for search in searches:
        while not search.is_done:
            search.extend([step] * len(search.open))
        lengths.append(max(len(beam.token_ids) for beam in search.finished))
    assert lengths[0] <= lengths[1]


def test_what_a_search_cannot_keep_is_refused_by_name(model: Llama, tokenizer: Tokenizer):
    for wrong in ({"top_p": 0.5}, {"regex": "a+"}, {"stop": ("x",)}, {"logprobs": 2}, {"repetition_penalty": 1.2}):
        with pytest.raises(RequestError, match=f"{next(iter(wrong))} is .* no effect on a beam search"):
            SamplingParams(beam_width=2, **wrong)
    with pytest.raises(RequestError, match="length_penalty is 2.0 and has no effect without beam_width"):
        SamplingParams(length_penalty=2.0)
    for wrong in ({"beam_width": 2, "n": 3}, {"best_of": 2, "n": 3}, {"beam_width": 33}, {"priority": 2**31}):
        with pytest.raises(RequestError, match="it must be|a whole number"):
            SamplingParams(**wrong)
    llm = LLM(model, tokenizer=tokenizer)
    for params in (SamplingParams(beam_width=2), SamplingParams(best_of=2)):
        with pytest.raises(RequestError, match="piece by piece"):
            next(llm.stream_prompt("a", params))
    with pytest.raises(RequestError, match="at most 100 alternatives"):
        check_beams(SamplingParams(beam_width=32), vocab_size=5000, num_stop_ids=3)
