"""Bans, biases and penalties are their formulas, and reach the tokens that are drawn."""

import math

import pytest
import torch

from modelwright.base.errors import RequestError
from modelwright.base.types import SamplingParams
from modelwright.engine.adjust import adjust
from modelwright.engine.sampler import Draw, keep_min_p, keep_typical, sample

LOGITS = torch.tensor([2.0, -1.0, 0.5, 3.0, -4.0, 1.0])


def test_each_penalty_is_its_formula():
    prompt, output = [0, 1], [3, 3, 2]
    params = SamplingParams(repetition_penalty=2.0)
    assert adjust(LOGITS, params, prompt_ids=prompt, output_ids=output).tolist() == [1.0, -2.0, 0.25, 1.5, -4.0, 1.0]
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
    assert adjust(LOGITS, params, prompt_ids=prompt, output_ids=output).tolist() == [2.0, -1.0, -0.25, 1.75, -4.0, 1.0]
    params = SamplingParams(logit_bias={4: 10.0, 3: -100.0})
    assert adjust(LOGITS, params).tolist() == [2.0, -1.0, 0.5, -97.0, 6.0, 1.0]
    assert adjust(LOGITS, SamplingParams()) is LOGITS
    assert LOGITS.tolist() == [2.0, -1.0, 0.5, 3.0, -4.0, 1.0]


def test_bad_words_are_banned_where_they_would_be_complete():
    def banned(output):
        row = adjust(LOGITS, SamplingParams(), output_ids=output, bad_words=[(3,), (1, 2), (2, 1, 5)])
        return [i for i, value in enumerate(row.tolist()) if value == -math.inf]

    assert banned([]) == [3]
    assert banned([1]) == [2, 3]
    assert banned([2, 1]) == [2, 3, 5]
    row = adjust(LOGITS, SamplingParams(logit_bias={3: 100.0}), bad_words=[(3,)])
    assert row[3] == -math.inf  # a bias lifts no ban


def test_min_p_and_typical_equal_their_definitions():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.randn(50, generator=generator) * 2
        weights = torch.softmax(logits.double(), 0)
        kept = keep_min_p(logits, 0.1).isfinite()
        assert torch.equal(kept, weights >= 0.1 * weights.max())
        surprise = (-weights.log() - (-(weights * weights.log()).sum())).abs()
        order = sorted(range(50), key=lambda i: float(surprise[i]))
        wanted, mass = set(), 0.0
        for i in order:
            wanted.add(i)
            mass += float(weights[i])
            if mass >= 0.6:
                break
        assert set(keep_typical(logits, 0.6).isfinite().nonzero().flatten().tolist()) == wanted


def test_a_grammar_mask_and_top_logprobs():
    allowed = torch.tensor([False, True, False, False, True, False])
    for temperature in (0.0, 1.0):
        (drawn,) = sample(
            LOGITS[None], [Draw(SamplingParams(temperature=temperature, logprobs=2), 1, 0, allowed=allowed)]
        )
        assert drawn.token in (1, 4)
        assert [token for token, _ in drawn.top] == [3, 0]
        assert drawn.top[0][1] == pytest.approx(float(torch.log_softmax(LOGITS, 0)[3]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", 1.0),
        ("typical_p", 0.0),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", 2.5),
        ("logit_bias", {3: 101}),
        ("bad_words", ("",)),
        ("n", 0),
        ("logprobs", 101),
    ],
)
def test_wrong_values_are_refused_by_name(field, value):
    with pytest.raises(RequestError, match=field):
        SamplingParams(**{field: value})
