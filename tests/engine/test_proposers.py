"""Guessing by a model, by the first layers, by heads: the same tokens as without, and no block lost."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.engine.conftest import TEXT, make_model, needs_bf16
from tests.engine.test_speculative import same, work

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.engine.draft import first_layers
from modelwright.engine.engine import EngineConfig
from modelwright.engine.llm import LLM
from modelwright.engine.pace import BUDGET, NUM_PLAIN, Pace
from modelwright.engine.prepare import rounded
from modelwright.engine.speculative import Lengths, SpeculationConfig
from modelwright.models.llama import Llama
from modelwright.models.multi_token import MultiTokenDecoder, save_heads
from modelwright.models.weights import save_model
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.train import train_bpe


@pytest.fixture
def heads(model_bf16: Llama, tmp_path: Path) -> Path:
    """Heads with weights of their own, so that they guess right now and then at most."""
    model = MultiTokenDecoder(make_model(torch.bfloat16), 3)
    with torch.no_grad():
        for number, head in enumerate(model.heads):
            head.dense.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(number))
    save_heads(model, tmp_path)
    return tmp_path


def config_of(kind: str, heads: Path, model: Llama) -> SpeculationConfig:
    return {
        "itself": SpeculationConfig("draft", draft=model, is_timed=False),
        "a stranger": SpeculationConfig("draft", draft=make_model(torch.bfloat16, seed=5), is_timed=False),
        "first layers": SpeculationConfig("early_exit", num_layers=2, is_timed=False),
        "heads": SpeculationConfig("medusa", draft=heads, is_timed=False),
    }[kind]


@needs_bf16
@pytest.mark.parametrize("small", [False, True], ids=["roomy", "chunks and preemption"])
@pytest.mark.parametrize("kind", ["itself", "a stranger", "first layers", "heads"])
def test_tokens_and_log_probabilities_are_the_same(model_bf16, tokenizer: Tokenizer, heads: Path, kind: str, small):
    prompts, params = work(24)
    sizes = dict(max_tokens_per_step=50, num_blocks=24, max_running=8) if small else {}
    plain = LLM(model_bf16, tokenizer=tokenizer)
    off = plain.generate(prompts, params)
    speculation = config_of(kind, heads, model_bf16)
    llm = LLM(model_bf16, tokenizer=tokenizer, config=EngineConfig(speculation=speculation, **sizes))
    on = llm.generate(prompts, params)
    assert all(same(a, b) for a, b in zip(on, off, strict=True))
    stats = llm.stats()
    assert stats.num_drafted > 0
    if kind == "itself":  # the same noise draws the same token at every temperature
        assert stats.num_accepted == pytest.approx(stats.num_drafted, rel=0.1)
        assert small or stats.num_steps < 0.5 * plain.stats().num_steps
    llm.engine.pool.check([])
    proposer = llm.engine.scheduler.proposer.other  # type: ignore[union-attr]  # behind what forms force
    if hasattr(proposer, "pool"):
        proposer.pool.check([])  # type: ignore[union-attr]


@needs_bf16
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_rounded_cache_takes_drafts_too(model_bf16, tokenizer: Tokenizer, quantize: str | None):
    prompts, params = work(9)
    model = model_bf16 if quantize is None else rounded(model_bf16, quantize)  # whose steps differ in their rows
    for settings in ({"kv_dtype": "int8"}, {"kv_dtype": "int4"}):
        off = LLM(model, tokenizer=tokenizer, config=EngineConfig(**settings)).generate(prompts, params)
        speculation = SpeculationConfig("early_exit", num_layers=1, is_timed=False)
        llm = LLM(model, tokenizer=tokenizer, config=EngineConfig(speculation=speculation, **settings))
        assert all(same(a, b) for a, b in zip(llm.generate(prompts, params), off, strict=True))


@needs_bf16
@pytest.mark.parametrize("quantize", ["int8", "int4", "nf4"])
def test_heads_guess_over_rounded_weights(model_bf16, tokenizer: Tokenizer, heads: Path, quantize: str):
    prompts, params = work(6)
    model = rounded(model_bf16, quantize)  # an output matrix that is rounded has no `weight`
    sizes = {"kernels": "plain", "max_tokens_per_step": 200}
    off = LLM(model, tokenizer=tokenizer, config=EngineConfig(**sizes)).generate(prompts, params)
    speculation = SpeculationConfig("medusa", draft=heads, is_timed=False)
    llm = LLM(model, tokenizer=tokenizer, config=EngineConfig(speculation=speculation, **sizes))
    assert all(same(a, b) for a, b in zip(llm.generate(prompts, params), off, strict=True))
    assert llm.stats().num_drafted > 0


def test_the_first_layers_are_the_models_own(model: Llama):
    view = first_layers(model, 2)
    assert len(view.layers) == 2 and len(model.layers) == 3 and len(view.cache_layout()) == 2
    assert view.layers[0] is model.layers[0] and view.embed is model.embed
    with pytest.raises(ConfigError, match="num_layers is 3 and the model has 3 layers; drafts need 1 to 2"):
        first_layers(model, 3)


def test_a_drafting_model_is_read_from_a_folder_and_must_have_the_same_tokens(tmp_path, model, tokenizer: Tokenizer):
    save_model(model, tmp_path)
    tokenizer.save(tmp_path)
    speculation = SpeculationConfig("draft", draft=tmp_path, is_timed=False)
    llm = LLM(model, tokenizer=tokenizer, config=EngineConfig(speculation=speculation))
    llm.generate(TEXT[:20])
    assert llm.stats().num_accepted > 0
    train_bpe([TEXT[::-1] * 5], vocab_size=320).save(tmp_path)
    with pytest.raises(ConfigError, match="Draft with a model of the same tokenizer"):
        LLM(model, tokenizer=tokenizer, config=EngineConfig(speculation=speculation))
    other = Llama(replace(model.config, vocab_size=100))
    with pytest.raises(ConfigError, match="has 100 tokens and the served one 320"):
        LLM(model, config=EngineConfig(speculation=SpeculationConfig("draft", draft=other)))


def test_settings_that_do_not_go_together_are_refused(tmp_path, model_bf16: Llama):
    with pytest.raises(ConfigError, match="'oracle'; known: ngram, draft, early_exit, medusa"):
        SpeculationConfig("oracle")
    with pytest.raises(ConfigError, match="draft is given, and 'ngram' drafts by itself"):
        SpeculationConfig(draft="x")
    with pytest.raises(ConfigError, match="num_layers is given"):
        SpeculationConfig("draft", draft="x", num_layers=2)
    for config, error in (
        (SpeculationConfig("draft"), "no model drafts"),
        (SpeculationConfig("medusa"), "no heads are named"),
    ):
        with pytest.raises(ConfigError, match=error):
            LLM(model_bf16, config=EngineConfig(speculation=config))
    with pytest.raises(CheckpointError, match="is missing"):
        LLM(model_bf16, config=EngineConfig(speculation=SpeculationConfig("medusa", draft=tmp_path)))
    with pytest.raises(ConfigError, match="kernels='native' cannot be: speculation.method is 'medusa'"):
        LLM(model_bf16, config=EngineConfig(speculation=SpeculationConfig("medusa", draft="x"), kernels="native"))


def test_lengths_grow_while_right_and_rest_while_wrong():
    lengths = Lengths(8)
    seen = []
    for accepted_all in [True] * 4 + [False] * 6:
        length = lengths.next_length(1)
        seen.append(length)
        if length:
            lengths.learn(1, length, length if accepted_all else 0)
    assert seen == [4, 6, 8, 8, 8, 1, 1, 0, 0, 1]
    lengths.forget(1)
    assert lengths.next_length(1) == 4


def run_pace(plain_seconds: float, draft_seconds: float, tokens: int, num_steps: int) -> tuple[float, int]:
    """Return the tokens a second against those without drafts, and how many steps had drafts."""
    pace, spent, made, drafted = Pace(), 0.0, 0, 0
    for _ in range(num_steps):
        has_drafts = pace.may_draft(1)
        seconds, brought = (draft_seconds, tokens) if has_drafts else (plain_seconds, 1)
        pace.note(1, brought, seconds, has_drafts)
        spent, made, drafted = spent + seconds, made + brought, drafted + has_drafts
    return made / spent * plain_seconds, drafted


@pytest.mark.parametrize("cost", [1.02, 1.3, 2.0, 5.0, 40.0])
@pytest.mark.parametrize("kind", ["never right", "right at first", "right by turns", "right until it is trusted"])
def test_no_way_of_being_wrong_costs_more_than_the_bound_at_any_moment(cost: float, kind: str):
    pace, spent, plain, worst, drafted = Pace(), 0.0, 0.0, 0.0, 0
    for step in range(6000):  # a clock of its own: a step takes 1, one with drafts `cost`, whatever the machine does
        has_drafts = pace.may_draft(1)
        drafted += has_drafts
        is_right = {
            "never right": False,
            "right at first": step < 1000,
            "right by turns": step // 150 % 2 == 0,
            "right until it is trusted": pace.account < cost,
        }[kind]
        tokens, seconds = (9 if is_right else 1, cost) if has_drafts else (1, 1.0)
        pace.note(1, tokens, seconds, has_drafts)
        spent, plain = spent + seconds, plain + tokens
        worst = max(worst, spent - plain / (1 - BUDGET))
    assert drafted > 0
    assert worst <= cost - 1 + 1e-9  # one drafted step, nothing of which was right
    assert spent < 1.03 * plain + cost


def test_guessing_that_never_pays_is_tried_less_and_less():
    speeds = [run_pace(1.0, 2.0, 1, num_steps) for num_steps in (500, 20000)]
    assert speeds[0][0] > 0.97 and speeds[1][0] > 0.994
    assert 0 < speeds[0][1] < speeds[1][1] < 120


def test_guessing_that_pays_goes_on():
    speed, drafted = run_pace(1.0, 1.5, 3, 2000)
    assert speed > 1.9 and drafted > 1900


def test_guessing_that_pays_on_the_whole_is_not_stopped_by_a_few_unlucky_steps():
    rng, pace, spent, made = random.Random(0), Pace(), 0.0, 0
    for _ in range(4000):  # four tokens guessed, each right with 0.6 and worth nothing behind a wrong one: 2.3 a step
        has_drafts = pace.may_draft(1)
        num_right = next((i for i in range(4) if rng.random() > 0.6), 4) if has_drafts else 0
        seconds = rng.uniform(0.9, 1.1) * (1.6 if has_drafts else 1.0)
        pace.note(1, 1 + num_right, seconds, has_drafts)
        spent, made = spent + seconds, made + 1 + num_right
    assert made / spent > 1.35  # 1.44 with drafts in every step; judged by four steps each it was 1.08


def test_guessing_is_measured_first_and_per_load():
    pace = Pace()
    for _ in range(NUM_PLAIN):
        assert not pace.may_draft(1)
        pace.note(1, 1, 1.0, has_drafts=False)
    while not pace.may_draft(1):
        pace.note(1, 1, 1.0, has_drafts=False)
    assert not pace.may_draft(8)  # nothing is known of eight requests
    pace.note(1, 1, 3.0, has_drafts=True)
    assert not pace.may_draft(1)
    for _ in range(200):
        pace.note(1, 1, 1.0, has_drafts=False)
    assert pace.may_draft(1)
    before = pace.account
    pace.note_mixed(1)  # with a prompt beside it a step's time says nothing; drafts are charged as if they were wrong
    assert pace.account < before and not pace.may_draft(1)


def test_a_disturbed_step_without_drafts_hardly_moves_what_is_expected():
    calm, disturbed = Pace(), Pace()
    for step in range(200):
        calm.note(1, 1, 1.0, has_drafts=False)
        disturbed.note(1, 1, 50.0 if step == 150 else 1.0, has_drafts=False)
    for pace in (calm, disturbed):
        pace.note(1, 1, 1.5, has_drafts=True)
    assert abs(disturbed.account - calm.account) < 0.05
