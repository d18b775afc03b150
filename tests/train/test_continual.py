"""Elastic weights and replay keep an old task; plain training on the new one loses it. AdaLoRA keeps its budget."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from modelwright.base.errors import ConfigError, DataError
from modelwright.data.load import RowLoader, repeat_rows
from modelwright.data.pack import Rows
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.adalora import AdaLoraConfig, AdaLoraLinear
from modelwright.nn.adapters import attach_adapter
from modelwright.nn.init import init_weights
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.train.adalora import BudgetedRanks
from modelwright.train.continual import ElasticWeights, fisher, replay_rows
from modelwright.train.finetune import mean_loss
from modelwright.train.loop import LoopConfig, train
from modelwright.train.objective import CausalLanguageModeling

ADAMW = OptimizerConfig(name="adamw", adamw=AdamWConfig(learning_rate=0.01, weight_decay=0.0))
LOOP = LoopConfig(num_steps=40, micro_batch_size=8, compile=False, precision="fp32", optimizer=ADAMW)


def counting(step, start, num=32):
    """Rows that count by ``step`` modulo 16, within a vocabulary of their own."""
    ids = np.array([[start + (first + step * t) % 16 for t in range(13)] for first in range(num)])
    return Rows(ids[:, :-1], ids[:, 1:])


OLD, NEW = counting(1, 0), counting(3, 8)


def model_of_the_old_task():
    shape = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, max_seq_len=16)
    model = init_weights(Llama(shape), 0)
    train(model, CausalLanguageModeling(), RowLoader(repeat_rows(OLD, 0), 8), LOOP)
    return model


def learn(rows, wrap=lambda model, objective: objective):
    model = model_of_the_old_task()
    objective = wrap(model, CausalLanguageModeling())
    train(model, objective, RowLoader(repeat_rows(rows, 1), 8), LOOP)
    return mean_loss(model, OLD), mean_loss(model, NEW)


def test_elastic_weights_and_replay_forget_less_and_still_learn():
    old_plain, new_plain = learn(NEW)
    old_elastic, new_elastic = learn(NEW, lambda m, o: ElasticWeights(o, fisher(m, OLD), 3e7))
    old_replayed, new_replayed = learn(replay_rows(NEW, OLD, 0.5))
    untrained = np.log(32)
    assert old_elastic < 0.8 * old_plain and new_elastic < 0.9 * untrained
    assert old_replayed < 0.3 * old_plain and new_replayed < 0.5 * untrained
    assert new_plain < 0.5 * untrained


def test_without_strength_the_springs_do_nothing():
    assert learn(NEW, lambda m, o: ElasticWeights(o, fisher(m, OLD), 0.0)) == pytest.approx(learn(NEW), abs=1e-5)


def test_replay_has_the_fraction_and_refuses_what_does_not_fit():
    rows = replay_rows(NEW, OLD, 0.25)
    assert len(rows) == len(NEW) + round(len(NEW) / 3)
    assert (rows.input_ids.min(1) < 8).sum() >= round(len(NEW) / 3)
    with pytest.raises(ConfigError, match="fraction is 1"):
        replay_rows(NEW, OLD, 1)
    with pytest.raises(DataError, match="New rows have 12 tokens and old ones 6"):
        replay_rows(NEW, replace(OLD, input_ids=OLD.input_ids[:, :6], labels=OLD.labels[:, :6]), 0.5)


def test_adalora_ends_with_the_budget_and_has_learned():
    model = model_of_the_old_task()
    config = AdaLoraConfig(("q", "v", "up", "down"), rank=6, target_rank=2, every=2)
    attach_adapter(model, config)
    before = mean_loss(model, NEW)
    train(model, BudgetedRanks(CausalLanguageModeling(), config), RowLoader(repeat_rows(NEW, 1), 8), LOOP)
    layers = [module for module in model.modules() if isinstance(module, AdaLoraLinear)]
    ranks = [int((layer.lora_e != 0).sum()) for layer in layers]
    assert sum(ranks) == 2 * len(layers)
    assert mean_loss(model, NEW) < before - 0.3
    with pytest.raises(ConfigError, match="without AdaLoRA"):
        BudgetedRanks(CausalLanguageModeling(), config).loss(torch.nn.Linear(1, 1), None)
