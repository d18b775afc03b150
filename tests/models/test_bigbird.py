"""BigBird: blocks equal the dense twin, the published draws, and transformers in training."""

import numpy as np
import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.models import bigbird
from modelwright.models.bigbird import BigBirdAttention, BigBirdConfig, random_blocks
from modelwright.models.weights import load_model
from modelwright.nn.init import init_weights

SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "sep_token_id": 2}


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("is_padded", [False, True])
def test_blocks_equal_the_dense_mask_of_the_same_blocks(is_training, is_padded):
    config = BigBirdConfig(**SMALL, num_layers=1, block_size=4, num_random_blocks=2)
    attention = init_weights(BigBirdAttention(config, 3), 0, std=0.3).train(is_training)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 60, 4, 8, generator=generator) for _ in range(3))
    is_token = torch.ones(2, 60, dtype=torch.bool)
    if is_padded:
        is_token[0, 37:], is_token[1, :21] = False, False
    drawn = attention.draw(15)
    dense = attention.attend_dense(q, k, v, is_token, drawn)
    blocks = attention.attend_blocks(q, k, v, is_token, drawn)
    assert (dense - blocks)[is_token].abs().max() < 1e-5 and torch.isfinite(blocks).all()
    other = attention.attend_blocks(q, k, v, is_token, random_blocks_of_another_seed())
    assert (dense - other)[is_token].abs().max() > 1e-3


def random_blocks_of_another_seed() -> torch.Tensor:
    return torch.from_numpy(random_blocks(15, 4, 2, 4, 4096, 99).copy())


@pytest.mark.peer
@pytest.mark.parametrize(("length", "size", "count"), [(150 * 8, 8, 2), (15 * 16, 16, 3), (72, 8, 1), (1024, 64, 3)])
def test_random_blocks_are_the_published_draws(length, size, count):
    published = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")
    transformers = pytest.importorskip("transformers")
    config = transformers.BigBirdConfig(
        hidden_size=8, num_attention_heads=2, block_size=size, num_random_blocks=count, max_position_embeddings=4096
    )
    attention = published.BigBirdBlockSparseAttention(config, seed=5).train()
    np.random.seed(5)
    if length == 1024:
        whole = [attention._bigbird_block_rand_mask(4096, 4096, size, size, count, last_idx=1024) for _ in range(2)]
        theirs = np.stack(whole)[:, : length // size - 2]
    else:
        plan = attention._get_rand_attn_plan(length, size, count)
        theirs = np.stack(attention._bigbird_block_rand_mask_with_head(length, length, size, size, 2, *plan))
    assert np.array_equal(random_blocks(length // size, size, count, 2, 4096, 5), theirs)


@pytest.mark.peer
def test_training_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BigBirdConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        block_size=8,
        num_random_blocks=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    theirs = transformers.BigBirdModel(config)
    theirs.save_pretrained(tmp_path)
    ours, ids = load_model(tmp_path), torch.randint(5, 40, (2, 150))
    gaps = []
    for is_training in (True, False):
        with torch.no_grad():
            other = theirs.train(is_training)(ids).last_hidden_state
            gaps.append((ours.train()(ids).last_hidden_state - other).abs().max())
    assert gaps[0] < 1e-4 and gaps[1] > 1e-2  # in evaluation the published code draws no blocks


def test_short_rows_get_full_attention_and_long_ones_too_afterwards():
    """The published code goes over to full attention for good once a short row has come; here each call decides."""
    config = BigBirdConfig(**SMALL, num_layers=1, block_size=4, num_random_blocks=1)
    model = init_weights(bigbird.BigBird(config), 0, std=0.3).eval()
    ids = torch.randint(5, 40, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).last_hidden_state
        model(ids[:, :20])
        assert torch.equal(model(ids).last_hidden_state, before)
        full = bigbird.BigBird(BigBirdConfig(**SMALL, num_layers=1, attention_type="original_full")).eval()
        full.load_state_dict(model.state_dict())
        assert (full(ids[:, :28]).last_hidden_state - model(ids[:, :28]).last_hidden_state).abs().max() < 1e-6
        assert (full(ids).last_hidden_state - before).abs().max() > 1e-3


@pytest.mark.peer
def test_answers_without_token_types_equal_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BigBirdConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, sep_token_id=2
    )
    theirs = transformers.BigBirdForQuestionAnswering(config).eval()
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(5, 40, (2, 30))
    ids[:, 11] = ids[:, 29] = 2
    with torch.no_grad():
        mine, other = load_model(tmp_path)(ids), theirs(ids)
    assert (mine.start_logits - other.start_logits).abs().max() < 1e-4
    assert (mine.start_logits[:, 1:12] < -1e5).all() and (mine.start_logits[:, [0, *range(12, 30)]] > -1e5).all()


def test_refuses_what_it_does_not_compute():
    with pytest.raises(ConfigError, match="attention_type is 'dense'"):
        BigBirdConfig.from_hf({"attention_type": "dense"})
    with pytest.raises(ConfigError, match="is_decoder is True"):
        BigBirdConfig.from_hf({"is_decoder": True})
