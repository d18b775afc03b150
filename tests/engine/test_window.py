"""Sliding windows: the engine looks back exactly as far as the model's window, and what lies behind cannot be felt."""

import torch

from modelwright.base.types import SamplingParams
from modelwright.engine.engine import Engine, EngineConfig
from modelwright.engine.llm import LLM
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights

WINDOW, SIZE = 24, 100
TOLD = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=True, ignore_eos=True)


def windowed(num_layers: int = 1) -> Llama:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=num_layers, num_heads=4, num_kv_heads=2,
        max_seq_len=256, family="mistral", sliding_window=WINDOW,
    )  # fmt: skip
    model = init_weights(Llama(config), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return model.eval()


def prompt() -> list[int]:
    return torch.randint(0, 64, (SIZE,), generator=torch.Generator().manual_seed(0)).tolist()


def last_logits(model: Llama, ids: list[int]) -> torch.Tensor:
    """Return the engine's logits behind a prompt, (V,)."""
    engine = Engine(model)
    engine.submit(engine.check(ids, TOLD))
    return engine.runner.run(engine.scheduler.schedule())[-1]


def test_one_layer_sees_the_last_tokens_of_its_window_and_no_more():
    """Behind the window a model of one layer says what it says of the last WINDOW tokens alone."""
    model, ids = windowed(), prompt()
    whole = last_logits(model, ids)
    assert torch.allclose(whole, last_logits(model, ids[-WINDOW:]), atol=1e-4)
    assert not torch.allclose(whole, last_logits(model, ids[-WINDOW + 1 :]), atol=1e-3)  # one fewer is seen


def test_the_edge_of_the_window_is_where_a_changed_token_stops_to_matter():
    model, ids = windowed(), prompt()
    whole = last_logits(model, ids)
    for distance, is_seen in [(WINDOW - 1, True), (WINDOW, False), (WINDOW + 1, False), (SIZE - 1, False)]:
        changed = list(ids)
        changed[SIZE - 1 - distance] = (changed[SIZE - 1 - distance] + 7) % 64
        assert torch.equal(last_logits(model, changed), whole) is not is_seen, distance


def test_several_layers_through_the_engine_are_the_model_itself():
    model, ids = windowed(3), prompt()
    with torch.inference_mode():
        own = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    expected = [float(own[i, token]) for i, token in enumerate(ids[1:])]
    for config in (EngineConfig(), EngineConfig(max_tokens_per_step=7), EngineConfig(block_size=4)):
        told = LLM(model, config=config).generate([ids], TOLD)[0].prompt_logprobs
        assert told is not None
        assert max(abs(a - b) for a, b in zip(told[1:], expected, strict=True)) < 1e-4  # type: ignore[operator]


def test_what_free_blocks_and_blocks_of_others_hold_is_not_felt():
    """Every slot that the request does not hold is poisoned; a mask that is off by one would let NaN through."""
    model, ids = windowed(3), prompt()
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    clean = LLM(model, config=EngineConfig(num_blocks=40)).generate([ids], params)[0]
    engine = Engine(model, config=EngineConfig(num_blocks=40))
    request = engine.add(ids, params)
    while engine.has_work:
        held = set(request.block_table)
        for pool in engine.runner.pools:
            for block in range(1, 40):
                if block not in held:
                    pool[block * 16 : (block + 1) * 16] = float("nan")
        engine.step()
    assert request.output_ids == clean.token_ids
