"""Log-probabilities of given tokens, in pieces, against the whole softmax at once."""

import math

import pytest
import torch

from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.scoring import token_log_probs
from modelwright.nn.init import init_weights

MODEL = init_weights(Llama(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_layers=2)), 0).eval()
IDS = torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("chunk_rows", [1, 7, 10_000])
def test_equals_the_whole_softmax(chunk_rows):
    with torch.no_grad():
        expected = MODEL(IDS).logits.double().log_softmax(-1)[:, :-1].gather(2, IDS[:, 1:, None]).squeeze(2)
        found = token_log_probs(MODEL, IDS, max_chunk_bytes=chunk_rows * 4 * 50)
    assert found.shape == (3, 39) and found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5


def test_probabilities_of_all_next_tokens_sum_to_one():
    rows = torch.cat([IDS[:1, :9].expand(50, -1), torch.arange(50)[:, None]], dim=1)
    with torch.no_grad():
        last = token_log_probs(MODEL, rows)[:, -1]
    assert math.isclose(last.double().exp().sum().item(), 1.0, abs_tol=1e-5)


def test_bfloat16_weights_are_scored_in_float32():
    half = init_weights(Llama(MODEL.config), 0).to(torch.bfloat16)
    with torch.no_grad():
        found = token_log_probs(half, IDS)
    assert found.dtype == torch.float32
    assert (found - token_log_probs(MODEL, IDS)).abs().mean() < 0.02


def test_gradients_flow():
    token_log_probs(MODEL, IDS).sum().backward()
    assert all(p.grad is not None for p in MODEL.parameters())
    MODEL.zero_grad()


def test_packed_rows_pass_their_mask_and_positions_on():
    positions = torch.cat([torch.arange(20), torch.arange(20)]).expand(3, -1)
    document = torch.tensor([0] * 20 + [1] * 20)
    mask = (document[:, None] == document)[None, None]
    with torch.no_grad():
        packed = token_log_probs(MODEL, IDS, positions=positions, mask=mask)
        assert (packed[:, 20:] - token_log_probs(MODEL, IDS[:, 20:])).abs().max() < 1e-5
