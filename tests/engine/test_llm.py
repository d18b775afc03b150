"""The offline front: text in and out, streams, stop strings, many callers."""

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modelwright.base.device import has_fast_bf16
from modelwright.base.errors import RequestError
from modelwright.base.types import Message, SamplingParams
from modelwright.compress.rtn import quantize_model, save_quantized
from modelwright.engine.engine import EngineConfig
from modelwright.engine.llm import LLM
from modelwright.models.llama import Llama
from modelwright.models.weights import load_model, save_model
from modelwright.tokenizer.bpe import Tokenizer

MESSAGES = [Message("system", "be brief"), Message("user", "the quick brown caf\u00e9?")]
LIVELY = SamplingParams(temperature=1.5, max_tokens=60, seed=5, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(model: Llama, tokenizer: Tokenizer) -> LLM:
    return LLM(model, tokenizer=tokenizer)


def test_one_prompt_or_many_text_or_ids(llm: LLM, tokenizer: Tokenizer):
    (one,) = llm.generate("the lazy dog", LIVELY)
    ids = tokenizer.encode("the lazy dog")
    assert llm.generate(["the lazy dog", ids], LIVELY)[1].token_ids == one.token_ids
    assert llm.generate(ids, [LIVELY])[0].text == one.text == tokenizer.decode(one.token_ids)
    assert one.finish_reason == "length" and len(one.logprobs) == len(one.token_ids) == 60
    assert one.usage.prompt_tokens == len(ids) and one.usage.completion_tokens == 60
    assert llm.generate([], LIVELY) == []


def test_a_folder_is_loaded_in_the_fast_format(tmp_path: Path, model: Llama, tokenizer: Tokenizer):
    save_model(model, tmp_path)
    tokenizer.save(tmp_path)
    llm = LLM(tmp_path)
    fast = has_fast_bf16(torch.device("cpu"))
    assert llm.engine.runner.dtype == (torch.bfloat16 if fast else torch.float32)
    assert LLM(tmp_path, config=EngineConfig(dtype="float32")).engine.runner.dtype == torch.float32
    assert len(llm.chat(MESSAGES, LIVELY).token_ids) == 60


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_folder_is_loaded_as_any_other(tmp_path: Path, model: Llama, bits: int):
    save_quantized(quantize_model(model, bits, dtype=torch.float32), tmp_path)
    quantized = load_model(tmp_path, dtype=torch.float32)
    llm = LLM(quantized)
    ids = [5, 6, 7]
    (completion,) = llm.generate(ids, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    with torch.inference_mode():
        for token in completion.token_ids:
            assert int(quantized(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_stream_equals_whole(llm: LLM):
    for seed in range(5):
        params = SamplingParams(temperature=1.5, max_tokens=40, seed=seed)
        whole = llm.chat(MESSAGES, params)
        deltas = list(llm.stream(MESSAGES, params))
        assert "".join(d.text for d in deltas) == whole.text
        assert tuple(t for d in deltas for t in d.token_ids) == whole.token_ids
        assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + [whole.finish_reason]
        assert deltas[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert not any("\ufffd" in d.text for d in deltas) or "\ufffd" in whole.text


def test_the_second_time_the_prompt_is_cached(model: Llama, tokenizer: Tokenizer):
    llm = LLM(model, tokenizer=tokenizer, config=EngineConfig(block_size=4))
    first, second = (llm.chat(MESSAGES, LIVELY) for _ in range(2))
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == (second.usage.prompt_tokens - 1) // 4 * 4
    assert second.text == first.text


def test_stop_strings_anywhere_in_the_text(llm: LLM):
    whole = llm.generate("the", LIVELY)[0].text
    for start in (1, 4, 9, 20):
        for length in (1, 2, 5):
            stop = whole[start : start + length]
            expected = whole[: whole.index(stop)]
            params = SamplingParams(temperature=1.5, max_tokens=60, seed=5, ignore_eos=True, stop=("\0never", stop))
            completion = llm.generate("the", params)[0]
            assert (completion.text, completion.finish_reason) == (expected, "stop")
            shown = [d.text for d in llm.stream_prompt("the", params)]
            assert "".join(shown) == expected
    assert completion.usage.completion_tokens == len(completion.token_ids) < 60


def test_a_stop_string_that_never_completes_is_shown(llm: LLM):
    whole = llm.generate("the", LIVELY)[0].text
    params = SamplingParams(temperature=1.5, max_tokens=60, seed=5, ignore_eos=True, stop=(whole[-2:] + "\0",))
    assert llm.generate("the", params)[0].text == whole


def test_seeds(llm: LLM):
    def run(seed: int | None) -> tuple[int, ...]:
        return llm.generate("the", SamplingParams(temperature=1.5, max_tokens=20, seed=seed))[0].token_ids

    assert run(1) == run(1) != run(2)
    assert run(None) != run(None)


def test_a_seed_does_not_feel_its_neighbours_wherever_they_stand(llm: LLM):
    seeded = [SamplingParams(temperature=1.5, max_tokens=20, seed=s, ignore_eos=True) for s in range(4)]
    unseeded = [SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True)] * 4
    alone = [llm.generate("the", one)[0].token_ids for one in seeded]
    for order in ([0, 4, 1, 5, 2, 6, 3, 7], [7, 3, 6, 5, 2, 1, 4, 0]):
        mixed = [(seeded + unseeded)[i] for i in order]
        done = llm.generate(["the"] * 8, mixed)
        assert [done[order.index(i)].token_ids for i in range(4)] == alone
        assert len({done[order.index(i)].token_ids for i in range(4, 8)}) == 4


def test_a_stop_text_in_the_prompt_stops_nothing(llm: LLM):
    params = SamplingParams(temperature=1.5, max_tokens=20, seed=5, ignore_eos=True)
    free = llm.generate("the quick brown fox", params)[0]
    stop = next(s for s in ("fox", "the quick", "brown") if s not in free.text)
    bound = llm.generate("the quick brown fox", replace(params, stop=(stop,)))[0]
    assert (bound.text, bound.finish_reason) == (free.text, "length")


def test_top_k_one_is_greedy(llm: LLM):
    greedy = llm.generate("the", SamplingParams(temperature=0, max_tokens=20))[0].token_ids
    assert llm.generate("the", SamplingParams(top_k=1, max_tokens=20))[0].token_ids == greedy


def test_streams_open_at_the_same_time_share_the_engine(llm: LLM):
    expected = [llm.generate(p, LIVELY)[0].text for p in ("the", "fox")]
    streams = [llm.stream_prompt(p, LIVELY) for p in ("the", "fox")]
    texts = ["", ""]
    for pair in zip(*streams, strict=True):
        for i, delta in enumerate(pair):
            texts[i] += delta.text
    assert texts == expected


def test_closing_a_stream_frees_its_blocks(llm: LLM):
    stream = llm.stream(MESSAGES, LIVELY)
    next(stream)
    assert llm.stats().running == 1
    stream.close()
    stats = llm.stats()
    assert stats.running == 0 and stats.free_blocks == stats.total_blocks and not llm._pieces


def test_callers_in_threads_get_their_own_answers(llm: LLM):
    prompts = [f"box {i}" for i in range(6)]
    expected = [llm.generate(p, LIVELY)[0].text for p in prompts]
    found: dict[int, str] = {}

    def call(i: int) -> None:
        found[i] = llm.generate(prompts[i], LIVELY)[0].text

    threads = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(6)] == expected


def test_more_prompts_than_may_wait(model: Llama):
    llm = LLM(model, config=EngineConfig(max_waiting=2, max_running=2))
    assert len(llm.generate([[i] for i in range(9)], SamplingParams(max_tokens=3))) == 9


def test_refusals(llm: LLM, model: Llama):
    with pytest.raises(RequestError, match="no tokens"):
        llm.generate("")
    with pytest.raises(RequestError, match="2 prompts and 1 sampling params"):
        llm.generate(["a", "b"], [LIVELY])
    with pytest.raises(RequestError, match="maximum context length"):
        llm.generate(["fine", "the " * 400], LIVELY)
    assert llm.stats().running == llm.stats().waiting == 0
    with pytest.raises(RequestError, match="has no tokenizer"):
        LLM(model).generate("text")
    with pytest.raises(RequestError, match="min_tokens"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_several_completions_of_one_prompt(llm: LLM):
    params = SamplingParams(temperature=1.0, max_tokens=12, seed=5, n=4, ignore_eos=True)
    (first,) = llm.generate("the quick", params)
    texts = [first.token_ids, *(c.token_ids for c in first.others)]
    assert len(texts) == 4 and len(set(texts)) == 4
    again = llm.generate("the quick", params)[0]
    assert [again.token_ids, *(c.token_ids for c in again.others)] == texts
    alone = llm.generate("the quick", SamplingParams(temperature=1.0, max_tokens=12, seed=5, ignore_eos=True))[0]
    assert alone.token_ids == texts[0]  # the first keeps the seed


@pytest.mark.parametrize("step", [512, 7])
def test_logprobs_of_prompt_and_completion_are_the_models_own(model: Llama, tokenizer: Tokenizer, step: int):
    llm = LLM(model, tokenizer=tokenizer, config=EngineConfig(max_tokens_per_step=step))
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3, prompt_logprobs=True, ignore_eos=True)
    ids = tokenizer.encode("the lazy dog jumps over the quick brown fox")
    for _ in range(2):  # the second time the prompt stands in the prefix cache
        (done,) = llm.generate([ids], params)
        whole = torch.tensor([ids + list(done.token_ids)])
        with torch.inference_mode():
            expected = torch.log_softmax(model(whole).logits[0].float(), -1)
        assert done.prompt_logprobs is not None and done.prompt_logprobs[0] is None
        assert len(done.prompt_logprobs) == len(ids)
        for at in range(1, len(ids)):
            assert done.prompt_logprobs[at] == pytest.approx(float(expected[at - 1, ids[at]]), abs=1e-4)
        told = done.prompt_top_logprobs
        assert told is not None and len(told) == len(ids) and told[0] == ()
        for at in range(1, len(ids)):
            values, tokens = expected[at - 1].topk(3)
            assert [t for t, _ in told[at]] == tokens.tolist()
            assert [p for _, p in told[at]] == pytest.approx(values.tolist(), abs=1e-4)
        assert done.top_logprobs is not None and len(done.top_logprobs) == 6
        for at, top in enumerate(done.top_logprobs, len(ids) - 1):
            assert [t for t, _ in top] == expected[at].topk(3).indices.tolist()
    mixed = llm.generate([ids, ids, "fox"], [params, LIVELY, params])  # rows of several kinds in one step
    assert mixed[0].token_ids == done.token_ids
    assert mixed[1].prompt_logprobs is None and mixed[2].prompt_logprobs is not None
    assert [len(top) for top in mixed[0].prompt_top_logprobs or ()] == [len(top) for top in told]
    assert mixed[1].prompt_top_logprobs is None
    (alone,) = llm.generate([ids], replace(params, logprobs=None))  # the prompt's own tokens alone
    assert alone.prompt_logprobs is not None and alone.prompt_top_logprobs is None
    assert alone.prompt_logprobs[1:] == pytest.approx(done.prompt_logprobs[1:], abs=1e-4)


def test_penalties_and_bad_words_change_what_is_written(llm: LLM, tokenizer: Tokenizer):
    plain = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    (free,) = llm.generate("the quick", plain)
    repeated = max(set(free.token_ids), key=free.token_ids.count)
    word = tokenizer.decode([repeated])
    (kept,) = llm.generate(
        "the quick", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, bad_words=(word,))
    )
    assert repeated in free.token_ids and repeated not in kept.token_ids
    (varied,) = llm.generate(
        "the quick", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, frequency_penalty=2.0)
    )
    assert len(set(varied.token_ids)) >= len(set(free.token_ids))
    biased = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logit_bias={7: 100.0})
    assert llm.generate("the quick", biased)[0].token_ids == (7, 7, 7)
    with pytest.raises(RequestError, match="logit_bias names token id 99999"):
        llm.generate("x", SamplingParams(logit_bias={99999: 1.0}))


def test_a_stream_is_read_by_async_for_as_well(llm: LLM):
    params = SamplingParams(temperature=1.5, max_tokens=20, seed=3)

    async def read() -> list[str]:
        return [delta.text async for delta in llm.stream(MESSAGES, params)]

    async def read_two() -> list[list[str]]:
        return list(await asyncio.gather(read(), read()))

    whole = llm.chat(MESSAGES, params).text
    assert ["".join(texts) for texts in asyncio.run(read_two())] == [whole, whole]


def test_scores_are_the_models_log_probabilities(llm: LLM, model: Llama, tokenizer: Tokenizer):
    first, whole = tokenizer.encode("the quick"), tokenizer.encode("the quick brown fox")
    with torch.inference_mode():
        log_probs = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    expected = [float(log_probs[i - 1, whole[i]]) for i in range(len(first), len(whole))]
    text, ids = llm.score(["the quick", first], [" brown fox", whole[len(first) :]])
    assert text.token_log_probs == pytest.approx(expected, abs=1e-4) and text == ids
    assert text.log_prob == pytest.approx(sum(expected), abs=1e-3)
    several = llm.score("the quick", [" brown fox", " dog"])
    assert several[0] == text and len(several) == 2
    with pytest.raises(RequestError, match="adds no token"):
        llm.score("the", "")
    with pytest.raises(RequestError, match="2 prompts and 1 continuations"):
        llm.score(["a", "b"], ["c"])


def test_vectors_are_the_mean_of_the_last_states(llm: LLM, model: Llama, tokenizer: Tokenizer):
    ids = tokenizer.encode("the lazy dog")
    with torch.inference_mode():
        mean = model.hidden(torch.tensor([ids]))[0].float().mean(0)
    vectors = llm.embed(["the lazy dog", "a fox", ids])
    assert vectors.shape == (3, len(mean)) and vectors[0].tolist() == vectors[2].tolist()
    assert vectors[0].tolist() == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
    assert llm.embed([]).shape == (0, len(mean))
