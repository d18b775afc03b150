"""One rank of a layout, played alone: shares are what the degrees say, and no group of processes is left behind."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from modelwright.base.errors import ConfigError
from modelwright.data.load import Batch
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.optim.build import OptimizerConfig
from modelwright.train.footprint import Footprint, trace_step
from modelwright.train.loop import LoopConfig
from modelwright.train.memory_plan import Work, plan_memory
from modelwright.train.objective import CausalLanguageModeling
from modelwright.train.parallel import ParallelConfig
from modelwright.train.plan_ranks import PlayedPipeline, as_rank, traced_ranks

SHAPE = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, max_seq_len=64, tie_embeddings=True
)
with torch.device("meta"):
    BYTES = 4 * sum(p.numel() for p in Llama(SHAPE).parameters())
    A_LAYER = 4 * sum(p.numel() for p in Llama(SHAPE).layers[0].parameters())


def batch(rows: int) -> Batch:
    ids = torch.zeros(rows, 64, dtype=torch.int64)
    return Batch(ids, ids.clone())


def loop_of(rows: int = 8, micro: int = 2, **degrees) -> LoopConfig:
    adamw = OptimizerConfig(name="adamw")
    parallel = ParallelConfig(**degrees)
    return LoopConfig(num_steps=1, micro_batch_size=rows, grad_accum_steps=micro, parallel=parallel, optimizer=adamw)


def trace(rank: int = 0, num_layers: int = 2, **settings) -> Footprint:
    loop = loop_of(**settings)
    with as_rank(loop.parallel, rank, "fp32") as layout:
        return trace_step(
            lambda: Llama(replace(SHAPE, num_layers=num_layers)),
            CausalLanguageModeling(),
            lambda: batch(loop.micro_batch_size),
            loop,
            vocab_size=96,
            precision="fp32",
            layout=layout,
        )


def near(value: float) -> object:
    return pytest.approx(value, rel=0.05)


def test_shards_keep_a_part_of_each():
    found = trace(shard=4, micro=4)
    assert found.facts.gradient_bytes == near(BYTES / 4) and found.optimizer == near(BYTES / 2)
    assert BYTES / 4 < found.weights < BYTES / 4 + 20_000  # and the tables of rotations
    assert found.loading > 0 or found.live > BYTES  # each rank builds the whole model first


def test_weights_that_stay_gathered_take_more_than_those_gathered_block_by_block():
    blockwise, kept = trace(shard=2), trace(shard=2, zero=2)
    assert A_LAYER < kept.live - blockwise.live < BYTES
    assert trace(shard=2, micro=4, zero=1).live > trace(shard=2, micro=4, zero=2).live  # gradients whole


def test_copies_divide_the_rows_and_collect_gradients_in_buckets():
    alone, copied = trace(micro=1), trace(micro=1, data=2)
    assert copied.weights == alone.weights and copied.optimizer == alone.optimizer
    assert copied.facts.gradient_bytes == 2 * alone.facts.gradient_bytes
    assert copied.activations == pytest.approx(alone.activations / 2, rel=0.15)


def test_tensor_ranks_keep_a_part_of_each_layer_and_all_rows():
    alone, cut = trace(), trace(tensor=2)
    assert cut.optimizer == near(alone.optimizer / 2)
    assert alone.activations / 2 < cut.activations + cut.logits < alone.activations + alone.logits


def test_a_pipeline_holds_as_many_micro_batches_as_are_in_flight():
    few, many = (trace(rows=16, micro=m, pipeline=2) for m in (2, 4))
    assert few.optimizer == near(2 * (BYTES - A_LAYER))
    a_buffer = 4 * 16 * 64 * 32  # of what comes back from the second stage, kept for each micro-batch
    assert many.activations - few.activations == pytest.approx(2 * a_buffer, rel=0.05)
    last = trace(rank=1, rows=16, micro=2, pipeline=2)
    assert last.logits > 0 == many.logits


def test_the_schedule_has_megatrons_order():
    def order(size, rank, chunks, micro):
        stages = PlayedPipeline.__new__(PlayedPipeline)
        stages.size, stages.rank, stages.segments = size, rank, [None] * chunks
        return stages.order(micro)

    assert order(4, 1, 1, 8)[2] == 3 and order(4, 3, 1, 8)[2] == 1 and order(4, 0, 1, 2)[2] == 2
    forward, backward, most = order(2, 0, 2, 4)
    assert forward == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]
    assert backward[:4] == [(0, 1), (1, 1), (0, 0), (1, 0)] and most == 5


@pytest.mark.parametrize(
    "degrees",
    [
        {"shard": 2, "tensor": 2},
        pytest.param({"pipeline": 2, "shard": 2}, marks=pytest.mark.slow),
        pytest.param({"context": 2}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "shard": 2}, marks=pytest.mark.slow),
        pytest.param({"pipeline": 2, "schedule": "interleaved"}, marks=pytest.mark.slow),
        pytest.param({"pipeline": 2, "shard": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda d: "x".join(map(str, d)),
)
def test_products_are_traced_and_leave_nothing_behind(degrees):
    loop = loop_of(micro=4, **degrees)
    ranks = traced_ranks(loop.parallel)
    num_layers = 4 if "schedule" in degrees else 2
    found = max((trace(rank, num_layers, micro=4, **degrees) for rank in ranks), key=lambda one: one.total)
    alone = trace(0, num_layers, micro=4)
    assert 0 < found.optimizer < 0.8 * alone.optimizer and found.weights < 0.8 * alone.weights
    assert found.total < 1.5 * alone.total
    assert not dist.is_initialized()
    assert dist.device_mesh.DeviceMesh.__getitem__.__name__ == "__getitem__"


def test_a_plan_is_that_of_a_rank():
    work = Work(lambda: Llama(SHAPE), batch, CausalLanguageModeling(), loop_of(shard=2), 64, 96)
    found = plan_memory(work, precision="fp32", memory_bytes=10**10)
    assert found.footprint.total == trace(shard=2).total and found.largest_micro_batch > 8
    assert traced_ranks(ParallelConfig(pipeline=3, data=2)) == (0, 4)


def test_layouts_that_do_not_suit_the_model_are_refused():
    with pytest.raises(ConfigError, match="16 stages, and the model has 2 layers"):
        trace(pipeline=16, micro=16)
    with pytest.raises(ConfigError, match="tensor"):
        trace(tensor=3)
    two = ParallelConfig(shard=2)
    with as_rank(two, 0, "fp32"), pytest.raises(ConfigError, match="one that is one of 2"), as_rank(two, 0, "fp32"):
        pass
