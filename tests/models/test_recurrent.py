"""Recurrent models: steps, packing and padding, folders, the training loop, and a memory of fifty steps."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import modelwright as mw
from modelwright.base.errors import CheckpointError, ConfigError, RequestError
from modelwright.data.load import RowLoader
from modelwright.data.pack import pack_rows
from modelwright.models.recurrent import RecurrentClassifier, RecurrentConfig, RecurrentLM
from modelwright.nn import RECURRENT_CELLS
from modelwright.nn.init import init_weights
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.train.loop import LoopConfig, train
from modelwright.train.objective import CausalLanguageModeling

LAG = 50


def make_lm(cell="lstm", **settings):
    return init_weights(RecurrentLM(RecurrentConfig(13, 16, 2, cell, **settings)), 0, std=0.3).eval()


def make_classifier(cell="lstm", **settings):
    settings = {"num_labels": 2, **settings}
    return init_weights(RecurrentClassifier(RecurrentConfig(8, 32, 1, cell, **settings)), 0, std=0.5).eval()


def recall_task(num_rows, seed, lag=LAG):
    """The first of ``lag`` + 1 symbols is 0 or 1 and is asked for at the end; the others are noise from 2..7."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 8, (num_rows, lag + 1), generator=generator)
    ids[:, 0] = torch.randint(0, 2, (num_rows,), generator=generator)
    return ids, ids[:, 0].clone()


def train_recall(model, num_steps, seed, learning_rate=1e-2):
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    for step in range(num_steps):
        ids, labels = recall_task(64, 1000 * seed + step)
        loss = F.cross_entropy(model(ids).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    ids, labels = recall_task(500, 10**6)
    with torch.no_grad():
        return float((model(ids).logits.argmax(-1) == labels).float().mean())


@pytest.mark.parametrize("cell", RECURRENT_CELLS)
@torch.no_grad()
def test_steps_of_any_size_equal_the_whole(cell):
    model = make_lm(cell)
    ids = torch.randint(13, (3, 20), generator=torch.Generator().manual_seed(0))
    whole = model(ids).logits
    for sizes in ([1] * 20, [5, 1, 14]):
        state = model.new_state(3)
        pieces = [
            model(part, positions=state.positions(part.shape[1]), state=state).logits for part in ids.split(sizes, 1)
        ]
        assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5)
        assert state.length == 20
    assert torch.allclose(model(ids, last_only=True).logits, whole[:, -1:], atol=1e-6)
    sizes = [layer.size(1000) for layer in model.cache_layout()]
    assert sizes == [sum(t[0].numel() for t in state.memory(i).values()) for i in range(2)]


@pytest.mark.parametrize("cell", RECURRENT_CELLS)
@torch.no_grad()
def test_padding_and_packing_change_nothing(cell):
    model = make_lm(cell)
    a, b = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6, 7]])
    alone = [model(ids).logits[0] for ids in (a, b)]
    packed = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).bool()[None, None]
    both = model(torch.cat([a, b], 1), mask=packed).logits[0]
    assert torch.allclose(both, torch.cat(alone), atol=1e-6)
    left = model(torch.tensor([[9, 9, 1, 2, 3]]), attention_mask=torch.tensor([[0, 0, 1, 1, 1]])).logits[0, 2:]
    right = model(torch.tensor([[1, 2, 3, 9]]), attention_mask=torch.tensor([[1, 1, 1, 0]])).logits[0, :3]
    assert torch.allclose(left, alone[0], atol=1e-6) and torch.allclose(right, alone[0], atol=1e-6)
    for pooling in ("last", "mean"):
        classifier = make_classifier(cell, pooling=pooling)
        ids = torch.tensor([[1, 2, 3, 0, 0], [0, 0, 1, 2, 3]])
        padded = classifier(ids, attention_mask=torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])).logits
        assert torch.allclose(padded, classifier(ids[:1, :3]).logits.expand(2, -1), atol=1e-6)


@pytest.mark.parametrize("model", [make_lm("gru"), make_lm(tie_embeddings=True), make_classifier("rnn", num_labels=3)])
@torch.no_grad()
def test_a_saved_model_loads_as_it_was(model, tmp_path):
    mw.save_model(model, tmp_path)
    loaded = mw.load_model(tmp_path)
    assert type(loaded) is type(model) and loaded.config == model.config
    ids = torch.tensor([[1, 2, 3]])
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix not in (".json", ".safetensors")) == []


def test_a_wrong_config_is_refused(tmp_path):
    mw.save_model(make_lm("gru"), tmp_path)
    place = tmp_path / "config.json"
    place.write_text(place.read_text().replace('"gru"', '"lstm"'))
    with pytest.raises(CheckpointError, match=r"tensor layers\.0\.cell\.\w+ has shape"):
        mw.load_model(tmp_path)


def test_dropout_acts_in_training_alone():
    model = make_lm(dropout=0.5)
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_an_lstm_carries_a_symbol_over_fifty_steps_and_a_plain_rnn_does_not():
    assert train_recall(make_classifier("lstm", memory_len=60), 60, seed=0) >= 0.95
    control = make_classifier("rnn")
    assert train_recall(control, 60, seed=0) < 0.65
    # The control can learn: what it cannot bridge is the lag.
    optimizer = torch.optim.Adam(control.parameters(), 1e-2)
    for step in range(60):
        ids, labels = recall_task(64, step, lag=3)
        loss = F.cross_entropy(control(ids).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids, labels = recall_task(500, 10**6, lag=3)
    assert float((control(ids).logits.argmax(-1) == labels).float().mean()) >= 0.95


def test_a_language_model_learns_what_needs_its_state():
    # Each row repeats one of 12 symbols after a marker: a b c 12 a b c; the last three need what was read before.
    def rows(seed, is_copy):
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(12, (64, 3), generator=generator)
        second = first if is_copy else torch.randint(12, (64, 3), generator=generator)
        return torch.cat([first, torch.full((64, 1), 12), second], 1)

    losses = {}
    for is_copy in (True, False):
        config = RecurrentConfig(13, 64, cell="gru", memory_len=8)
        model = init_weights(RecurrentLM(config), 0, std=0.3)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for step in range(200):
            ids = rows(step, is_copy)
            loss = F.cross_entropy(model(ids[:, :-1]).logits[:, 3:].flatten(0, 1), ids[:, 4:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ids = rows(10**6, is_copy)
        with torch.no_grad():
            losses[is_copy] = float(
                F.cross_entropy(model(ids[:, :-1]).logits[:, 3:].flatten(0, 1), ids[:, 4:].flatten())
            )
    assert losses[True] < 0.5 and losses[False] > 0.95 * math.log(12)


def test_the_training_loop_trains_a_recurrent_model_on_packed_rows():
    # Texts of one counting sequence each, packed: the state starts anew with each, and the loop needs nothing special.
    texts = [(np.arange(6 + i % 7) % 12 + 1).tolist() for i in range(40)]

    def losses(is_shuffled):
        def make(epoch):
            rows = pack_rows([(ids, [True] * len(ids)) for ids in texts], 32, 0)
            assert rows.document_ids is not None and len(rows) < len(texts)
            labels = np.random.default_rng(epoch).permutation(rows.labels.ravel()).reshape(rows.labels.shape)
            return replace(rows, labels=labels) if is_shuffled else rows

        optimizer = OptimizerConfig(name="adamw", adamw=AdamWConfig(learning_rate=3e-2))
        config = LoopConfig(num_steps=60, micro_batch_size=4, precision="fp32", compile=False, optimizer=optimizer)
        run = train(make_lm("lstm").train(), CausalLanguageModeling(), RowLoader(make, 4), config)
        return [loss for _, loss in run.losses]

    real, shuffled = losses(False), losses(True)
    assert real[-1] < 0.7 < 1.5 < shuffled[-1]


def test_refusals():
    for settings, message in (
        ({"num_layers": 0}, "num_layers is 0"),
        ({"cell": "elman"}, "cell is 'elman'; known: gru, lstm, rnn"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"num_labels": 1}, "num_labels is 1"),
        ({"num_labels": 3, "pooling": "max"}, "pooling is 'max'"),
        ({"pooling": "mean"}, "pooling is given without num_labels"),
    ):
        with pytest.raises(ConfigError, match=message):
            RecurrentConfig(10, **settings)
    with pytest.raises(ConfigError, match="a language model has none"):
        RecurrentLM(RecurrentConfig(10, num_labels=2))
    with pytest.raises(ConfigError, match="needs the number of classes"):
        RecurrentClassifier(RecurrentConfig(10))
    with pytest.raises(RequestError, match="marks no token"):
        make_classifier()(torch.tensor([[1, 2]]), attention_mask=torch.tensor([[0, 0]]))
