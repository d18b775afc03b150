"""With speculation and without: the same tokens, whatever is guessed, and no block is lost."""

import random
from typing import Any

import pytest
from tests.engine.conftest import VOCAB_SIZE, needs_bf16

from modelwright.base.errors import ConfigError
from modelwright.base.types import Completion, SamplingParams
from modelwright.engine.engine import Engine, EngineConfig
from modelwright.engine.llm import LLM
from modelwright.engine.request import Request, make_request
from modelwright.engine.speculative import NgramProposer, SpeculationConfig
from modelwright.models.llama import Llama
from modelwright.tokenizer.bpe import Tokenizer

pytestmark = needs_bf16  # bitwise equal rows are what makes a checked draft the same token


class Oracle:
    """Guesses from known answers, and wrongly on purpose now and then."""

    def __init__(self, answers: dict[tuple[int, ...], tuple[int, ...]], wrong: float):
        self.answers, self.wrong, self.rng = answers, wrong, random.Random(0)
        self.num_right = 0

    def propose(self, request: Request, limit: int) -> list[int]:
        answer = self.answers[(request.seed, *request.prompt_ids)]
        draft = list(answer[request.num_output : request.num_output + min(limit, 6)])
        return [(t + 1) % VOCAB_SIZE if self.rng.random() < self.wrong else t for t in draft]

    def learn(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        assert 0 <= num_accepted <= num_drafted
        self.num_right += num_accepted

    def forget(self, request: Request) -> None:
        pass


def work(num: int) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = random.Random(7)
    prompts, params = [], []
    for i in range(num):
        phrase = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(2, 9))]
        prompts.append((phrase * 9)[: rng.randint(5, 60)])
        params.append(
            SamplingParams(
                temperature=(0.0, 0.7, 1.0)[i % 3],
                seed=i,
                max_tokens=rng.randint(1, 40),
                top_p=rng.choice((1.0, 0.9)),
                frequency_penalty=rng.choice((0.0, 0.0, 0.4)),
                logprobs=2,
                ignore_eos=bool(i % 2),
            )
        )
    return prompts, params


def same(mine: Completion, other: Completion) -> bool:
    return (mine.token_ids, mine.logprobs, mine.top_logprobs, mine.finish_reason, mine.text) == (
        other.token_ids,
        other.logprobs,
        other.top_logprobs,
        other.finish_reason,
        other.text,
    )


@pytest.mark.parametrize("small", [False, True], ids=["roomy", "chunks and preemption"])
def test_tokens_and_log_probabilities_are_the_same_with_lookup(model_bf16: Llama, tokenizer: Tokenizer, small: bool):
    prompts, params = work(60)
    sizes = dict(max_tokens_per_step=50, num_blocks=24, max_running=8) if small else {}
    off = LLM(model_bf16, tokenizer=tokenizer).generate(prompts, params)
    llm = LLM(
        model_bf16, tokenizer=tokenizer, config=EngineConfig(speculation=SpeculationConfig(is_timed=False), **sizes)
    )
    on = llm.generate(prompts, params)
    assert all(same(a, b) for a, b in zip(on, off, strict=True))
    stats = llm.stats()
    assert 0 < stats.num_accepted <= stats.num_drafted
    assert not small or stats.num_preemptions > 0
    llm.engine.pool.check([])


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_right_drafts_save_steps_and_wrong_ones_change_nothing(model_bf16: Llama, tokenizer: Tokenizer, wrong: float):
    prompts, params = work(24)
    plain = LLM(model_bf16, tokenizer=tokenizer)
    off = plain.generate(prompts, params)
    llm = LLM(model_bf16, tokenizer=tokenizer)
    known = {(q.seed or 0, *p): c.token_ids for p, q, c in zip(prompts, params, off, strict=True)}
    llm.engine.scheduler.proposer = oracle = Oracle(known, wrong)
    on = llm.generate(prompts, params)
    assert all(same(a, b) for a, b in zip(on, off, strict=True))
    if wrong == 0:
        assert oracle.num_right > 0 and llm.stats().num_steps < 0.5 * plain.stats().num_steps
    if wrong == 1:
        assert oracle.num_right == 0 and llm.stats().num_steps >= plain.stats().num_steps
    llm.engine.pool.check([])


BANS: dict[str, Any] = {
    "penalty": {"repetition_penalty": 10.0},
    "bias": {"logit_bias": {i: -100.0 for i in range(3, 40)}},
    "words": {},  # what it would write
    "min_tokens": {"min_tokens": 25, "ignore_eos": False},
    "min_p": {"min_p": 0.3, "temperature": 1.0},
}


@pytest.mark.parametrize("ban", BANS)
def test_drafts_that_a_setting_forbids_are_turned_down(model_bf16: Llama, tokenizer: Tokenizer, ban: str):
    """The drafts are what the model would write without the setting, so they are full of what it forbids."""
    prompts = work(8)[0]
    settings = {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True}
    free = [SamplingParams(**settings, seed=i, logprobs=1) for i in range(8)]
    plain = LLM(model_bf16, tokenizer=tokenizer)
    wished = plain.generate(prompts, free)
    texts = {tokenizer.decode([token]) for c in wished for token in c.token_ids[1:4]}
    words = {"bad_words": tuple(sorted(t for t in texts if t and "\ufffd" not in t))} if ban == "words" else {}
    bound = [SamplingParams(**{**settings, **BANS[ban], **words}, seed=i, logprobs=1) for i in range(8)]
    off = plain.generate(prompts, bound)
    known = {(i, *p): c.token_ids for i, (p, c) in enumerate(zip(prompts, wished, strict=True))}
    llm = LLM(model_bf16, tokenizer=tokenizer)
    llm.engine.scheduler.proposer = Oracle(known, 0.0)
    on = llm.generate(prompts, bound)
    assert all(same(a, b) for a, b in zip(on, off, strict=True))
    assert ban == "min_tokens" or [c.token_ids for c in off] != [c.token_ids for c in wished], "it does forbid"
    assert llm.stats().num_drafted > 0
    llm.engine.pool.check([])


def test_no_token_beyond_the_length_or_the_context(model_bf16: Llama):
    prompt = [5, 6, 7] * 6
    settings: dict[str, Any] = {"temperature": 0, "seed": 0, "ignore_eos": True}
    whole = LLM(model_bf16).generate(prompt, SamplingParams(max_tokens=30, **settings))[0].token_ids
    for max_tokens in range(1, 10):  # drafts have six tokens, and one more is drawn behind them
        llm = LLM(model_bf16)
        llm.engine.scheduler.proposer = Oracle({(0, *prompt): whole}, 0.0)
        done = llm.generate(prompt, SamplingParams(max_tokens=max_tokens, **settings))[0]
        assert done.token_ids == whole[:max_tokens] and done.finish_reason == "length"
        assert done.usage.completion_tokens == len(done.logprobs or ()) == max_tokens
        room = EngineConfig(max_context=len(prompt) + max_tokens)
        llm = LLM(model_bf16, config=room)
        llm.engine.scheduler.proposer = Oracle({(0, *prompt): whole}, 0.0)
        assert llm.generate(prompt, SamplingParams(max_tokens=99, **settings))[0].token_ids == whole[:max_tokens]
        llm.engine.pool.check([])


def test_what_was_guessed_and_turned_down_is_not_found_in_the_cache(model_bf16: Llama):
    """A block is remembered by the tokens that stood, never by those that were tried in it."""
    prompt, config = [5, 6, 7, 8], EngineConfig(block_size=4)
    params = SamplingParams(temperature=0, seed=0, max_tokens=24, ignore_eos=True)
    cold = LLM(model_bf16, config=EngineConfig(block_size=4, has_prefix_cache=False))
    answer = cold.generate(prompt, params)[0].token_ids
    guessed = tuple((t + 1) % VOCAB_SIZE for t in answer)
    llm = LLM(model_bf16, config=config)
    llm.engine.scheduler.proposer = Oracle({(0, *prompt): guessed}, 0.0)
    assert llm.generate(prompt, params)[0].token_ids == answer
    assert llm.stats().num_drafted > 0 == llm.stats().num_accepted
    llm.engine.scheduler.proposer = None
    for text in ([*prompt, *guessed], [*prompt, *answer[:6], *guessed[6:]]):
        again, expected = (one.generate(text, params)[0] for one in (llm, cold))
        shared = next(i for i, (a, b) in enumerate(zip(text, [*prompt, *answer], strict=True)) if a != b)
        assert again.usage.cached_tokens <= shared
        assert (again.token_ids, again.logprobs) == (expected.token_ids, expected.logprobs)


def test_a_form_is_kept_with_drafts(model_bf16: Llama, tokenizer: Tokenizer):
    pytest.importorskip("llguidance")
    params = [SamplingParams(temperature=1.0, seed=s, max_tokens=60, regex="(abc ){3,9}!") for s in range(6)]
    off = LLM(model_bf16, tokenizer=tokenizer).generate(["abc abc"] * 6, params)
    llm = LLM(model_bf16, tokenizer=tokenizer, config=EngineConfig(speculation=SpeculationConfig(is_timed=False)))
    assert [c.text for c in llm.generate(["abc abc"] * 6, params)] == [c.text for c in off]
    assert llm.stats().num_accepted > 0


def test_aborting_in_the_middle_of_drafts_frees_every_block(model_bf16: Llama):
    prompt, params = [5, 6, 7] * 5, SamplingParams(temperature=0, seed=0, max_tokens=100, ignore_eos=True)
    answer = LLM(model_bf16).generate(prompt, params)[0].token_ids
    engine = Engine(model_bf16, config=EngineConfig())
    engine.scheduler.proposer = Oracle({(0, *prompt): answer}, 0.5)
    requests = [engine.add(prompt, params) for _ in range(4)]
    for _ in range(6):
        engine.step()
    assert engine.stats().num_drafted > 0 and engine.stats().free_blocks < engine.stats().total_blocks
    engine.abort(requests[1])
    assert len(engine.scheduler.running) == 3
    engine.pool.check([r.block_table for r in engine.scheduler.running])
    engine.abort_all()
    engine.pool.check([])
    assert engine.stats().free_blocks == engine.stats().total_blocks and not engine.has_work


def request(tokens: list[int]) -> Request:
    return make_request(0, tokens, SamplingParams(), max_context=1000, vocab_size=100)


def test_lookup_finds_the_last_place_and_the_longest_match():
    proposer = NgramProposer(SpeculationConfig(max_draft=3, min_ngram=1, max_ngram=3))
    assert proposer.propose(request([1, 2, 3, 9, 8, 7, 1, 2, 3, 4, 5, 6, 1, 2, 3]), 9) == [4, 5, 6]
    config = SpeculationConfig(max_draft=3, min_ngram=2, max_ngram=3)
    assert NgramProposer(config).propose(request([1, 2, 3, 4]), 9) == []
    assert NgramProposer(config).propose(request([1, 2, 3, 1, 2]), 2) == [3, 1]
    assert NgramProposer(config).propose(request([1, 1, 1, 1]), 9) == [1]


def test_drafts_grow_when_right_shrink_when_wrong_and_pause():
    proposer = NgramProposer(SpeculationConfig(max_draft=16))
    tokens = request([1, 2, 3, 4, 5, 6, 7, 8] * 8)

    def size() -> int:
        return len(proposer.propose(tokens, 99))

    assert size() == 4
    proposer.learn(tokens, 4, 4)
    assert size() == 8
    proposer.learn(tokens, 8, 3)
    assert size() == 4
    for _ in range(4):
        proposer.learn(tokens, 4, 0)
    pauses = 0
    while size() == 0:
        pauses += 1
    assert pauses == 4 and size() == 1
    proposer.forget(tokens)
    assert size() == 4


def test_refusals():
    with pytest.raises(ConfigError, match=r"speculation.method is 'magic'; known: ngram"):
        SpeculationConfig(method="magic")
    with pytest.raises(ConfigError, match="looks up 5 to 4 tokens"):
        SpeculationConfig(min_ngram=5)
