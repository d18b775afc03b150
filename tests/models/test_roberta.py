"""RoBERTa: positions that count tokens, wherever the padding is."""

import torch

from modelwright.models import bert, roberta
from modelwright.models.roberta import RobertaConfig, count_tokens
from modelwright.nn.init import init_weights

SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}


def test_a_row_padded_on_the_left_is_the_row():
    """Negative control: BERT counts padding, so its tokens stand elsewhere."""
    ids = torch.randint(5, 40, (1, 30), generator=torch.Generator().manual_seed(0))
    padded = torch.cat((torch.ones(1, 12, dtype=torch.long), ids), dim=1)
    mask = (padded != 1).long()
    gaps = []
    for model in (roberta.Roberta(RobertaConfig(**SMALL)), bert.Bert(bert.BertConfig(**SMALL, pad_token_id=1))):
        init_weights(model, 0, std=0.2)
        with torch.no_grad():
            alone = model(ids).last_hidden_state
            gaps.append((model(padded, attention_mask=mask).last_hidden_state[:, 12:] - alone).abs().max())
    assert gaps[0] < 1e-5 and gaps[1] > 1e-2


def test_positions_go_round_padding_in_the_middle():
    assert count_tokens(torch.tensor([[0, 5, 1, 6], [1, 1, 1, 7]]), 1).tolist() == [[2, 3, 1, 4], [1, 1, 1, 2]]


def test_the_table_has_room_for_padding():
    config = RobertaConfig.from_hf({"max_position_embeddings": 514, "pad_token_id": 1})
    assert config.max_seq_len == 512 and config.to_hf()["max_position_embeddings"] == 514
    assert roberta.Roberta(RobertaConfig(**SMALL)).position_embed.weight.shape[0] == 514


def test_xlm_keeps_its_name():
    config = RobertaConfig.from_hf({"model_type": "xlm-roberta"})
    assert config.to_hf()["model_type"] == "xlm-roberta" and config.to_hf()["architectures"] == ["XLMRobertaModel"]
