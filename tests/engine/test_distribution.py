"""Drawing under speculation has the distribution that was asked for, counted over many draws of the whole engine."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from modelwright.base.types import SamplingParams
from modelwright.engine.engine import EngineConfig
from modelwright.engine.llm import LLM
from modelwright.engine.speculative import SpeculationConfig
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights

VOCAB = 8
CHI2 = {1: 15.14, 2: 18.42, 3: 21.11, 4: 23.51, 5: 25.74, 6: 27.86, 7: 29.88}  # degrees: exceeded once in 10,000
LOGITS = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.0])
SETTINGS = {
    "plain": SamplingParams(temperature=1.0),
    "cold": SamplingParams(temperature=0.7),
    "top_k": SamplingParams(temperature=1.0, top_k=3),
    "top_p": SamplingParams(temperature=1.3, top_p=0.8),
    "min_p": SamplingParams(temperature=1.0, min_p=0.2),
    "bias": SamplingParams(temperature=1.0, logit_bias={2: 2.0, 3: -2.0}),
}


def indifferent() -> Llama:
    """A model that says the same behind every text: all tokens have one vector."""
    config = LlamaConfig(VOCAB, 16, 32, num_layers=1, num_heads=2, num_kv_heads=1, max_seq_len=512)
    model = init_weights(Llama(config), seed=0)
    with torch.no_grad():
        model.embed.weight[:] = torch.ones(16)
        model.layers[0].attention.o.weight.zero_()
        model.layers[0].mlp.down.weight.zero_()
        model.norm.weight.fill_(1.0)
        model.lm_head.weight[:] = LOGITS[:, None] / 16  # the normed vector is all ones
    return model.eval()


def exact(params: SamplingParams) -> np.ndarray:
    """The distribution, slowly, in float64."""
    logits = LOGITS.double().numpy().copy()
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    p = np.exp(logits / params.temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = np.zeros(VOCAB, bool)
    kept[order[: params.top_k or VOCAB]] = True
    kept &= p >= params.min_p * p.max()
    total = 0.0
    for token in order:
        kept[token] &= total < params.top_p
        total += p[token]
    p = np.where(kept, p, 0.0)
    return np.asarray(p / p.sum())


def draw(params: SamplingParams, num: int, method: str) -> tuple[np.ndarray, LLM]:
    speculation = SpeculationConfig(method, is_timed=False, min_ngram=1) if method == "ngram" else None
    if method == "draft":
        speculation = SpeculationConfig("draft", draft=indifferent(), is_timed=False)
    llm = LLM(indifferent(), config=EngineConfig(speculation=speculation, has_prefix_cache=False))
    each = 400
    asked = [replace(params, seed=i, max_tokens=each, ignore_eos=True) for i in range(num // each)]
    done = llm.generate([[1, 2, 3]] * len(asked), asked)
    return np.bincount([t for one in done for t in one.token_ids], minlength=VOCAB), llm


def check(name: str, num: int, method: str) -> None:
    seen, llm = draw(SETTINGS[name], num, method)
    p = exact(SETTINGS[name])
    assert seen.sum() == num and not seen[p == 0].any()
    expected = p[p > 0] * num
    statistic = float(((seen[p > 0] - expected) ** 2 / expected).sum())
    assert statistic < CHI2[len(expected) - 1], (name, method, seen, expected)
    if method != "none":
        assert llm.stats().num_drafted > num // 10, "nothing was guessed, so nothing was tried"
    wrong = np.roll(p, 1)  # the control: so many draws tell this distribution from another
    other = np.maximum(wrong[p > 0], 1e-6) * num
    assert float(((seen[p > 0] - other) ** 2 / other).sum()) > CHI2[len(expected) - 1]


@pytest.mark.parametrize(("name", "method"), [("plain", "ngram"), ("top_p", "draft")])
def test_a_few_thousand_draws(name: str, method: str):
    check(name, 4_000, method)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SETTINGS))
def test_two_hundred_thousand_draws(name: str):
    """33,600 for each setting, with drafts that are often wrong."""
    check(name, 33_600, "ngram")
