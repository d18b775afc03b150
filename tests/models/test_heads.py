"""Task heads: labels, pooling, ties, and that they learn what a shuffled control does not."""

import json

import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.models import bert, modernbert
from modelwright.models.heads import Labels, find_task_class, pool_states
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights

SMALL = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4}
BERT = bert.BertConfig(**SMALL, max_seq_len=32)
MODERN = modernbert.ModernBertConfig(**SMALL, max_seq_len=32, local_attention=8, pad_token_id=0)


def test_label_names_survive(tmp_path):
    names = ("bad", "fair", "good")
    config = bert.BertConfig(**SMALL, labels=Labels(names, "single_label_classification"))
    model = init_weights(bert.ARCHITECTURES["BertForSequenceClassification"](config), 0)
    save_model(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["BertForSequenceClassification"]
    assert written["label2id"] == {"bad": 0, "fair": 1, "good": 2}
    again = load_model(tmp_path)
    assert again.config.labels == Labels(names, "single_label_classification")
    assert again(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3)


def test_labels_that_are_no_labels_are_refused():
    with pytest.raises(ConfigError, match=r"ids \[0, 2\]; expected 0 to 1"):
        Labels.from_hf({"id2label": {"0": "a", "2": "b"}})
    with pytest.raises(ConfigError, match="no two alike"):
        Labels(("a", "a"))
    assert Labels.from_hf({"id2label": {"1": "b", "0": "a"}}).names == ("a", "b")
    assert len(Labels.from_hf({"num_labels": 4}).names) == 4


def test_pooling_does_not_count_padding():
    states = torch.tensor([[[1.0, -5.0], [3.0, -7.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool_states(states, mask, "mean").tolist() == [[2.0, -6.0]]
    assert pool_states(states, mask, "max").tolist() == [[3.0, -5.0]]
    assert pool_states(states, mask, "cls").tolist() == [[1.0, -5.0]]
    assert pool_states(states, None, "max").tolist() == [[100.0, 100.0]]
    with pytest.raises(ConfigError, match="pooling is 'sum'; known: mean, cls, max"):
        pool_states(states, mask, "sum")


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_output_matrix_is_the_embedding_where_the_config_says_so(is_tied, tmp_path):
    config = bert.BertConfig(**SMALL, tie_embeddings=is_tied)
    model = init_weights(bert.ARCHITECTURES["BertForMaskedLM"](config), 0)
    save_model(model, tmp_path)
    for other in (model, load_model(tmp_path), load_model(tmp_path, dtype=torch.bfloat16), model.to(torch.float64)):
        assert (other.head.out.weight is other.encoder.embed.weight) is is_tied
        assert other.head.out.bias.shape == (24,)


def test_the_class_for_a_task_is_of_the_same_name():
    from_roberta = ("RobertaModel", "RobertaForMaskedLM", "XLMRobertaModel", "XLMRobertaForMaskedLM")
    classes = dict.fromkeys(from_roberta, bert.Bert)
    assert find_task_class(classes, "masked_lm", like="XLMRobertaModel") == "XLMRobertaForMaskedLM"
    assert find_task_class(classes, "encoder", like="RobertaForMaskedLM") == "RobertaModel"
    with pytest.raises(ConfigError, match="task is 'chat'; known: encoder, masked_lm"):
        find_task_class(classes, "chat")


def train(model, inputs, targets, steps=60):
    """Train on rows of inputs (R, T) by AdamW; targets (R,), or (R, T) with -100 where nothing is asked."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        rows = torch.arange(16) + 16 * step
        logits = model(inputs[rows % len(inputs)]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets[rows % len(inputs)].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def counting_rows(num_rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that count upwards modulo 10 from a random start, with three positions masked (id 1)."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 10, (num_rows, 1), generator=generator)
    ids = 10 + (start + torch.arange(12)) % 10
    is_masked = torch.rand(ids.shape, generator=generator).argsort(1) < 3
    return ids.masked_fill(is_masked, 1), ids.masked_fill(~is_masked, -100)


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_a_masked_language_model_learns_to_count(is_shuffled):
    """Held-out loss of masked tokens against ln 10 = 2.30 of a guess; targets shuffled among rows teach nothing."""
    model = init_weights(modernbert.ARCHITECTURES["ModernBertForMaskedLM"](MODERN), seed=0)
    inputs, targets = counting_rows(640, seed=0)
    if is_shuffled:
        asked = targets != -100
        known = targets[asked]
        targets[asked] = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(1))]
    train(model, inputs, targets, steps=150)
    held_inputs, held_targets = counting_rows(64, seed=9)
    with torch.no_grad():
        logits = model(held_inputs).logits
    loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_targets.flatten()))
    assert loss > 2.0 if is_shuffled else loss < 0.5, loss


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_a_classifier_learns_which_of_two_words_is_there(is_shuffled):
    """Held-out accuracy; half is a guess, and what labels shuffled among rows teach."""
    model = init_weights(bert.ARCHITECTURES["BertForSequenceClassification"](BERT), seed=0)

    def rows(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(10, 24, (count, 12), generator=generator)
        label = torch.randint(0, 2, (count,), generator=generator)
        ids[torch.arange(count), torch.randint(1, 12, (count,), generator=generator)] = 5 + label
        return ids, label

    inputs, labels = rows(960, seed=0)
    if is_shuffled:
        labels = labels[torch.randperm(960, generator=torch.Generator().manual_seed(1))]
    train(model, inputs, labels)
    held_inputs, held_labels = rows(200, seed=9)
    with torch.no_grad():
        accuracy = float((model(held_inputs).logits.argmax(-1) == held_labels).float().mean())
    assert 0.35 < accuracy < 0.65 if is_shuffled else accuracy > 0.95, accuracy
