"""A step without numbers: parts equal their formulas, recomputation and adapters show, nothing real is made."""

import pytest
import torch

from modelwright.data.load import Batch
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn import nf4
from modelwright.nn.lora import add_lora
from modelwright.optim.build import OptimizerConfig
from modelwright.train import footprint
from modelwright.train.footprint import trace_step
from modelwright.train.loop import LoopConfig
from modelwright.train.objective import CausalLanguageModeling
from modelwright.train.recompute import RecomputeConfig

SHAPE = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_layers=3, num_heads=2, max_seq_len=64, tie_embeddings=True
)


def adapted():
    model = Llama(SHAPE)
    add_lora(model, rank=2)
    return model


def trace(make=lambda: Llama(SHAPE), rows=4, **settings):
    def batch():
        ids = torch.zeros(rows, 64, dtype=torch.int64)
        return Batch(ids, ids.clone())

    settings.setdefault("optimizer", OptimizerConfig(name="adamw"))
    loop = LoopConfig(num_steps=1, micro_batch_size=rows, **settings)
    return trace_step(make, CausalLanguageModeling(), batch, loop, vocab_size=96, precision="fp32")


def test_weights_and_state_are_what_the_formula_says():
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Llama(SHAPE).parameters())
    found = trace()
    assert 4 * parameters <= found.weights < 4 * parameters + 20_000  # and the tables of rotations
    assert found.optimizer == pytest.approx(8 * parameters, rel=0.02)


def test_activations_grow_with_rows_and_shrink_by_recomputation():
    few, many = trace(rows=4), trace(rows=8)
    assert many.activations > 1.7 * few.activations and many.weights == few.weights
    assert trace(rows=8, recompute=RecomputeConfig("layers")).activations < 0.7 * many.activations


def test_an_adapter_has_state_for_itself_alone():
    assert trace(adapted).optimizer < 0.3 * trace().optimizer


def test_nothing_real_is_made():
    big = LlamaConfig(
        vocab_size=32_000, hidden_size=8192, intermediate_size=28_672, num_layers=1, num_heads=64, max_seq_len=64
    )
    found = trace(lambda: Llama(big), rows=1)
    assert found.total > 15e9  # more than a test may take


def test_tables_that_a_trace_makes_have_numbers_afterwards():
    nf4.forget_tables()
    with footprint._without_numbers():
        assert nf4.nf4_levels().device.type == "cpu"
    assert type(nf4.nf4_levels()) is torch.Tensor and nf4.nf4_levels()[15].item() == 1.0
