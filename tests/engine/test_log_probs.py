"""What training thinks of a completion is what the engine thought of it while writing: to the last bit in bf16."""

import copy

import numpy as np
import pytest
import torch
from tests.engine.conftest import make_model, needs_bf16

from modelwright.data.load import RowLoader
from modelwright.data.pack import Rows
from modelwright.engine.engine import EngineConfig
from modelwright.engine.llm import LLM
from modelwright.engine.request import SamplingParams
from modelwright.models.llama import Llama
from modelwright.models.scoring import token_log_probs
from modelwright.nn.attention import use_backend
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.train.finetune import mean_loss
from modelwright.train.loop import LoopConfig, train
from modelwright.train.objective import CausalLanguageModeling

PROMPTS = [[(7 * i + 3 * j) % 300 + 3 for j in range(size)] for i, size in enumerate((3, 20, 61, 120, 130))]
LIVELY = SamplingParams(temperature=1.0, max_tokens=24, seed=1, ignore_eos=True)


def largest_difference(model: Llama, backend: str, config: EngineConfig | None = None) -> float:
    """Let the engine write, all prompts at once, and score each completion by the model that is trained."""
    found = LLM(model, config=config or EngineConfig()).generate(PROMPTS, LIVELY)
    largest = 0.0
    for prompt, completion in zip(PROMPTS, found, strict=True):
        whole = torch.tensor([[*prompt, *completion.token_ids]])
        with use_backend(backend):  # with a graph, as a trainer computes them
            scored = token_log_probs(model, whole)[0, len(prompt) - 1 :]
        assert scored.requires_grad and scored.shape == (24,)
        largest = max(largest, float((scored.detach() - torch.tensor(completion.logprobs)).abs().max()))
    return largest


@needs_bf16
@pytest.mark.parametrize("config", [EngineConfig(), EngineConfig(max_tokens_per_step=17)], ids=["whole", "chunks"])
def test_in_bf16_they_are_the_same_to_the_last_bit(config: EngineConfig):
    assert largest_difference(make_model(torch.bfloat16), "tiles", config) == 0.0


@needs_bf16
def test_in_bf16_the_usual_attention_rounds_otherwise():
    """The control: the equality above is the work of the shape, not of a test that cannot see."""
    assert 0.0 < largest_difference(make_model(torch.bfloat16), "auto") < 0.5


@pytest.mark.parametrize("backend", ["tiles", "auto"])
def test_in_fp32_they_are_the_same_but_for_rounding(backend: str):
    assert largest_difference(make_model(), backend) < 1e-4


def test_in_fp32_a_text_computed_in_one_step_is_the_same_to_the_last_bit():
    """What differs in fp32 is the number of rows of a product; here it is equal."""
    model, params = make_model(), SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=True, ignore_eos=True)
    found = LLM(model).generate([PROMPTS[3]], params)[0].prompt_logprobs
    assert found is not None
    with use_backend("tiles"):
        scored = token_log_probs(model, torch.tensor([PROMPTS[3]]))[0]
    assert scored.tolist() == [p for p in found if p is not None]


@needs_bf16
def test_they_stay_the_same_after_training_with_the_engines_attention():
    model = make_model(torch.bfloat16).train()
    rows = torch.tensor([PROMPTS[3], PROMPTS[3][::-1]])
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with use_backend("tiles"):
        first = -token_log_probs(model, rows).mean()
        first.backward()
        optimizer.step()
        assert float(-token_log_probs(model, rows).mean()) < float(first)
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert largest_difference(model.eval(), "tiles") == 0.0


def test_a_model_from_the_loop_is_scored_by_the_engine_as_by_the_loops_loss():
    """The mean of the engine's log-probabilities of a text is the loss that the objective reports for it."""
    model = make_model()
    ids = np.array([PROMPTS[3]])
    rows = Rows(ids[:, :-1], ids[:, 1:])
    optimizer = OptimizerConfig("adamw", adamw=AdamWConfig(learning_rate=1e-3))
    loop = LoopConfig(num_steps=3, micro_batch_size=1, compile=False, precision="fp32", optimizer=optimizer)
    run = train(model, CausalLanguageModeling(), RowLoader(lambda _: rows, 1), loop)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=True, ignore_eos=True)
    found = LLM(run.model).generate([PROMPTS[3]], params)[0].prompt_logprobs
    assert found is not None
    with torch.no_grad():
        loss = mean_loss(run.model, rows)
    assert -sum(p for p in found if p is not None) / (len(found) - 1) == pytest.approx(loss, abs=1e-4)
