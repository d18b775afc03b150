"""Draws depend on their own request alone and have the softmax's distribution."""

import math

import numpy as np
import pytest
import torch

from modelwright.base.types import SamplingParams
from modelwright.engine.sampler import Draw, gumbel_noise, sample, truncate


def draw(temperature=1.0, top_k=0, top_p=1.0, seed=0, position=0, banned=()) -> Draw:
    return Draw(SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p), seed, position, banned)


def counts(logits: torch.Tensor, num: int, **how) -> np.ndarray:
    tokens = [sample(logits[None].clone(), [draw(position=i, **how)])[0].token for i in range(num)]
    return np.bincount(tokens, minlength=len(logits))


def test_a_draw_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    logits = torch.randn(40, 997).bfloat16()
    draws = [
        draw(t, k, p, seed=i, position=i * 3)
        for i, (t, k, p) in enumerate([(0, 0, 1.0), (0.7, 0, 0.9), (1.3, 5, 1.0), (1, 50, 0.5), (2, 0, 1.0)] * 8)
    ]
    drawn = sample(logits, draws)
    for i in range(40):
        assert sample(logits[i : i + 1], draws[i : i + 1]) == [drawn[i]]
    order = torch.randperm(40)
    assert sample(logits[order], [draws[i] for i in order]) == [drawn[i] for i in order]


def test_the_distribution_is_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.0])
    for temperature in (0.7, 1.0, 2.0):
        expected = torch.softmax(logits.double() / temperature, 0).numpy() * 4000
        seen = counts(logits, 4000, temperature=temperature, seed=11)
        assert ((seen - expected) ** 2 / expected).sum() < 24.3  # chi-square, 7 degrees, p = 0.001


def test_noise_is_gumbel_and_differs_by_seed_position_and_token():
    ids = torch.arange(20000)
    noise = gumbel_noise(3, 5, ids)
    assert abs(float(noise.mean()) - 0.57722) < 0.03 and abs(float(noise.var()) - math.pi**2 / 6) < 0.06
    assert torch.equal(noise, gumbel_noise(3, 5, ids))
    assert torch.equal(noise[[7, 3]], gumbel_noise(3, 5, torch.tensor([7, 3])))
    for other in (gumbel_noise(4, 5, ids), gumbel_noise(3, 6, ids), gumbel_noise(5, 3, ids)):
        assert abs(float(torch.corrcoef(torch.stack((noise, other)))[0, 1])) < 0.03
    assert gumbel_noise(-1, 0, ids).isfinite().all() and gumbel_noise(2**64 + 3, 5, ids).equal(noise)


def test_noise_equals_the_hash_in_plain_integers():
    """A seed gives the same text from one version and one device to the next."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    for seed, position, token in [(42, 7, 0), (42, 7, 4095), (2**63 - 1, 100_000, 151_935), (0, 0, 1)]:
        key = mix((mix(seed) + 0x9E3779B97F4A7C15 * (position + 1)) & mask)
        x = mix((key + (token + 1) * 0x9E3779B97F4A7C15) & mask)
        expected = -math.log(-math.log(((x >> 11) + 0.5) / 2**53))
        assert float(gumbel_noise(seed, position, torch.tensor([token]))) == pytest.approx(expected, rel=1e-12)
    assert float(gumbel_noise(42, 7, torch.tensor([0]))) == pytest.approx(1.575137658481384, rel=1e-12)


def slow_truncate(logits: list[float], top_k: int, top_p: float) -> list[int]:
    """The definition, in plain Python: rank by logit, then id; keep top_k; keep while the mass before is < top_p."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    ranked = ranked[:top_k] if top_k else ranked
    mass = [math.exp(logits[i] - logits[ranked[0]]) for i in ranked]
    kept, before = [], 0.0
    for token, weight in zip(ranked, mass, strict=True):
        if before / sum(mass) >= top_p:
            break
        kept.append(token)
        before += weight
    return kept


@pytest.mark.parametrize("vocab_size", [8, 300, 2000])
@pytest.mark.parametrize("top_k", [0, 1, 3, 299, 10_000])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.93, 1.0])
def test_truncation_equals_its_definition(vocab_size: int, top_k: int, top_p: float):
    for seed in range(3):
        torch.manual_seed(seed)
        logits = torch.randn(vocab_size).mul(1 + seed).bfloat16().float()  # coarse, so that many are equal
        ids, values = truncate(logits, top_k, top_p)
        if (top_k == 0 or top_k >= vocab_size) and top_p == 1.0:
            assert len(ids) == vocab_size
            continue
        assert ids.tolist() == slow_truncate(logits.tolist(), top_k if top_k < vocab_size else 0, top_p)
        assert torch.equal(values, logits[ids])


def test_flat_logits_need_more_than_the_first_candidates():
    ids, _ = truncate(torch.zeros(3000), 0, 0.9)
    assert ids.tolist() == list(range(len(ids))) and 2700 <= len(ids) <= 2701


def test_greedy_top_k_one_and_tiny_top_p_agree_on_ties():
    logits = torch.zeros(1, 50)
    logits[0, [9, 4, 30]] = 3.0
    for how in (draw(0), draw(1, top_k=1), draw(1, top_p=1e-9), draw(100, top_k=1)):
        assert sample(logits.clone(), [how])[0].token == 4


def test_only_kept_tokens_are_drawn():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert counts(logits, 300, temperature=5.0, top_k=2)[:2].sum() == 0
    seen = counts(logits, 300, temperature=1.0, top_p=0.7)  # 3 has 0.64, 2 has 0.24
    assert seen[:2].sum() == 0 and (seen[2:] > 0).all()


def test_banned_ids_are_never_drawn_and_logprobs_are_the_models_own():
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    (drawn,) = sample(logits.clone(), [draw(0, banned=(1,))])
    assert drawn.token == 2
    assert drawn.logprob == pytest.approx(float(torch.log_softmax(logits, -1)[0, 2]))
    assert counts(logits[0], 100, temperature=10.0, banned=(1,))[1] == 0


def test_logits_are_left_as_they_were_given():
    logits = torch.randn(2, 10)
    before = logits.clone()
    sample(logits, [draw(0, banned=(3,)), draw(1.0)])
    assert torch.equal(logits, before)
