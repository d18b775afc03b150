"""Asking a folder for another task: the encoder is kept, heads begin anew, and both are said."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelwright.base.errors import CheckpointError
from modelwright.models import bert, llama, modernbert, roberta
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights

SMALL = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4}
IDS = torch.randint(3, 24, (2, 9), generator=torch.Generator().manual_seed(0))


def save(room, name, config, folder):
    model = init_weights(room.ARCHITECTURES[name](config), seed=1)
    save_model(model, folder)
    return model


def test_a_classifier_begins_on_a_masked_language_model(tmp_path, caplog):
    source = save(bert, "BertForMaskedLM", bert.BertConfig(**SMALL), tmp_path)
    with caplog.at_level(logging.WARNING):
        model = load_model(tmp_path, task="sequence_classification", num_labels=3)
    assert model(IDS).logits.shape == (2, 3)
    assert model.config.labels.names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert set(model.fresh_tensors) == {
        *(f"classifier.{leaf}" for leaf in ("weight", "bias")),
        *(f"bert.pooler.dense.{leaf}" for leaf in ("weight", "bias")),
    }
    assert len(model.dropped_tensors) == 5
    assert all(name.startswith("cls.predictions.") for name in model.dropped_tensors)
    assert "classifier.weight" in caplog.text and "cls.predictions.bias" in caplog.text
    assert torch.equal(model.encoder.layers[1].mlp.up.weight, source.encoder.layers[1].mlp.up.weight)
    again = load_model(tmp_path, task="sequence_classification", num_labels=3)
    assert torch.equal(again.head.out.weight, model.head.out.weight)  # drawn from a fixed seed
    assert not torch.equal(model.encoder.pooler.weight, torch.zeros(32, 32)) and model.head.out.weight.std() > 0.01
    save_model(model, tmp_path / "tuned")
    assert torch.equal(load_model(tmp_path / "tuned")(IDS).logits, model(IDS).logits)


def test_nothing_is_said_where_nothing_is_made(tmp_path, caplog):
    save(bert, "BertForMaskedLM", bert.BertConfig(**SMALL), tmp_path)
    with caplog.at_level(logging.WARNING):
        model = load_model(tmp_path, task="masked_lm")
    assert model.fresh_tensors == model.dropped_tensors == () and not caplog.text


def test_the_encoder_alone_and_back_without_its_prefix(tmp_path):
    source = save(bert, "BertForSequenceClassification", bert.BertConfig(**SMALL), tmp_path / "a")
    bare = load_model(tmp_path / "a", task="encoder")
    assert torch.equal(bare(IDS).pooled, source.encoder(IDS).pooled)
    assert bare.dropped_tensors == ("classifier.bias", "classifier.weight") and bare.fresh_tensors == ()
    save_model(bare, tmp_path / "b")
    back = load_model(tmp_path / "b", task="sequence_classification")
    assert back.fresh_tensors == ("classifier.weight", "classifier.bias")
    assert torch.equal(back.encoder(IDS).pooled, bare(IDS).pooled)
    # A head that does not read the pooler leaves it behind.
    assert load_model(tmp_path / "b", task="token_classification").encoder.pooler is None


def test_other_labels_make_the_output_anew_and_keep_what_fits(tmp_path):
    config = roberta.RobertaConfig(**SMALL)
    source = save(roberta, "RobertaForSequenceClassification", config, tmp_path)
    model = load_model(tmp_path, num_labels=5)
    assert model.fresh_tensors == ("classifier.out_proj.weight", "classifier.out_proj.bias")
    assert model.dropped_tensors == tuple(sorted(model.fresh_tensors))
    assert torch.equal(model.head.dense.weight, source.head.dense.weight)
    assert model(IDS).logits.shape == (2, 5)


def test_a_reranker_is_a_classifier_with_one_label(tmp_path):
    save(modernbert, "ModernBertForMaskedLM", modernbert.ModernBertConfig(**SMALL, pad_token_id=0), tmp_path)
    model = load_model(tmp_path, task="sequence_classification", num_labels=1)
    assert model(IDS).logits.shape == (2, 1)
    # Head and norm are the masked language model's: the family publishes both under the same names.
    assert model.fresh_tensors == ("classifier.weight", "classifier.bias")


def test_an_encoder_that_is_not_whole_is_refused_as_ever(tmp_path):
    save(bert, "BertForMaskedLM", bert.BertConfig(**SMALL), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*layer\.1\.output\.dense\.weight"):
        load_model(tmp_path, task="token_classification")
    save_file(tensors | {name.replace("1", "7"): tensors[name].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 1 tensors.*layer\.7\.output"):
        load_model(tmp_path, task="token_classification")


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"task": "chat"}, "task is 'chat'; known: encoder"),
        ({"task": "masked_lm", "num_labels": 3}, "only classification has labels"),
        ({"num_labels": 3}, "only classification has labels"),
    ],
)
def test_what_cannot_be_asked(tmp_path, asked, match):
    save(bert, "BertForMaskedLM", bert.BertConfig(**SMALL), tmp_path)
    with pytest.raises(CheckpointError, match=match):
        load_model(tmp_path, **asked)


def test_a_decoder_has_no_heads(tmp_path):
    config = llama.LlamaConfig(vocab_size=24, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2)
    save_model(init_weights(llama.Llama(config), 0), tmp_path)
    with pytest.raises(CheckpointError, match="this family has LlamaForCausalLM"):
        load_model(tmp_path, task="sequence_classification")
