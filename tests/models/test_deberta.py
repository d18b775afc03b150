"""DeBERTa: buckets of distance, its two terms, its two masked-language-model heads."""

import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.models import deberta
from modelwright.models.deberta import DebertaConfig, DistanceConfig, distance_buckets
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights

SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}
IDS = torch.randint(5, 40, (2, 50), generator=torch.Generator().manual_seed(0))


@pytest.mark.peer
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(256, 512), (32, 512), (8, 64), (16, 700), (-1, 512)])
def test_buckets_are_the_published_ones(num_buckets, max_distance):
    published = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    row = torch.empty(1, 700, 1)
    theirs = published.build_relative_position(row, row, num_buckets, max_distance)[0]
    assert torch.equal(distance_buckets(700, num_buckets, max_distance), theirs)


@pytest.mark.parametrize("terms", [("c2p",), ("p2c",), ("c2p", "p2c")])
def test_distance_alone_tells_order(terms):
    """Without absolute positions, the two terms are all that tells a row from its words shuffled."""
    gaps = []
    for distance in (DistanceConfig(terms=terms, num_buckets=8, is_shared=True), None):
        model = init_weights(
            deberta.Deberta(DebertaConfig(**SMALL, has_positions=False, distance=distance)), 0, std=0.2
        )
        order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            gaps.append((model(IDS).last_hidden_state[:, order] - model(IDS[:, order]).last_hidden_state).abs().max())
    assert gaps[0] > 1e-2 and gaps[1] < 1e-5


def test_a_folder_of_v3_pretraining_is_read(tmp_path):
    """Published v3 folders carry both pre-training heads and absolute positions that are not added."""
    config = DebertaConfig(**SMALL, has_positions=False, has_legacy_head=False, distance=DistanceConfig())
    model = init_weights(deberta.ARCHITECTURES["DebertaV2ForMaskedLM"](config), 0)
    save_model(model, tmp_path)
    assert load_model(tmp_path)(IDS).logits.shape == (2, 50, 40)
    bare = load_model(tmp_path, task="encoder")
    assert torch.equal(bare(IDS).last_hidden_state, model.encoder(IDS).last_hidden_state)
    classifier = load_model(tmp_path, task="sequence_classification")
    assert classifier.fresh_tensors[0] == "pooler.dense.weight"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"pos_att_type": "c2p"}, "relative_attention is off"),
        ({"relative_attention": True, "pos_att_type": ["p2p"]}, "c2p and p2c are computed"),
        ({"norm_rel_ebd": "batch_norm"}, "norm_rel_ebd is 'batch_norm'"),
        ({"conv_kernel_size": 3, "conv_groups": 2}, "conv_groups is 2"),
        ({"attention_head_size": 32}, "attention_head_size is 32; only 64"),
        ({"legacy": False, "tie_word_embeddings": False}, "own head is the embedding"),
    ],
)
def test_refuses_what_it_does_not_compute(values, match):
    with pytest.raises(ConfigError, match=match):
        DebertaConfig.from_hf(values)
