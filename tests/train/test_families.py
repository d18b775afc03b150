"""Every family learns through the one loop; experts' losses do not depend on how a batch is cut; balance is kept."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from modelwright.data.load import Batch, RowLoader
from modelwright.data.pack import IGNORED, Rows, pack_rows
from modelwright.models.deepseek import Deepseek, DeepseekConfig
from modelwright.models.gemma import Gemma, GemmaConfig
from modelwright.models.gpt2 import GPT2, GPT2Config
from modelwright.models.mixtral import Mixtral, MixtralConfig
from modelwright.models.phi3 import Phi3, Phi3Config
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights
from modelwright.nn.latent_attention import LatentShape
from modelwright.nn.moe import MoeOptions
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.train.loop import LoopConfig, Run, train
from modelwright.train.objective import CausalLanguageModeling

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 32}
WIDE = SIZES | {"intermediate_size": 64, "num_kv_heads": 2}
EXPERTS = MoeOptions(num_experts=4, top_k=2, expert_size=24, balance_coefficient=0.5, z_coefficient=0.1)
MIXTRAL = MixtralConfig(**SIZES, num_kv_heads=2, experts=EXPERTS)
FAMILIES = {
    "gpt2": (GPT2, GPT2Config(**SIZES)),
    "gemma2": (
        Gemma,
        GemmaConfig(**WIDE, head_dim=8, sliding_window=8, full_layers=(1,), attention_softcap=50.0, logit_softcap=30.0),
    ),
    "phi3": (Phi3, Phi3Config(**WIDE)),
    "mixtral": (Mixtral, replace(MIXTRAL, experts=replace(EXPERTS, balance_coefficient=0.01, z_coefficient=0.001))),
    "deepseek_v3": (
        Deepseek,
        DeepseekConfig(
            **SIZES,
            intermediate_size=64,
            heads=LatentShape(kv_rank=16, q_rank=16, nope_dim=8, rope_dim=4, value_dim=8),
            experts=MoeOptions(num_experts=4, top_k=2, expert_size=24, shared_size=24, score="sigmoid", scale=2.5),
            family="deepseek_v3",
        ),
    ),
}


def counting_rows(epoch: int = 0) -> Rows:
    random = np.random.default_rng(epoch)
    stream = (random.integers(0, 63, (64, 1)) + np.arange(17)) % 63 + 1
    return Rows(stream[:, :-1].astype(np.int64), stream[:, 1:].astype(np.int64))


def loop(**changes) -> LoopConfig:
    optimizer = OptimizerConfig(name="adamw", adamw=AdamWConfig(learning_rate=1e-2))
    base = LoopConfig(num_steps=25, micro_batch_size=8, precision="fp32", compile=False, optimizer=optimizer)
    return replace(base, device="cpu", **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_learns_to_count_and_is_the_same_when_saved(family, tmp_path):
    """From weights that were not a number before; shuffled labels, the control, cannot be learned."""
    model_class, config = FAMILIES[family]
    losses = {}
    for name in ("counting", "shuffled"):
        with torch.device("meta"):
            model = model_class(config)
        model = model.to_empty(device="cpu")
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
        init_weights(model, 0)

        def make(epoch: int, is_shuffled: bool = name == "shuffled") -> Rows:
            rows = counting_rows(epoch)
            if is_shuffled:
                labels = np.random.default_rng(epoch).permutation(rows.labels.ravel()).reshape(rows.labels.shape)
                return Rows(rows.input_ids, labels)
            return rows

        for module in model.modules():
            if hasattr(module, "reset_buffers"):
                module.reset_buffers(torch.device("cpu"))
        run = train(model, CausalLanguageModeling(), RowLoader(make, 8), loop())
        losses[name] = run.losses[-1][1]
        if name == "counting":
            save_model(model, tmp_path)
            ids = torch.from_numpy(counting_rows().input_ids[:2])
            with torch.no_grad():
                assert torch.equal(load_model(tmp_path)(ids).logits, model.eval()(ids).logits)
    assert losses["counting"] < 3.0 and losses["shuffled"] > 4.0, losses  # ln 63 = 4.14


def gradients(model, rows: Rows, sizes: tuple[int, int]) -> dict[str, torch.Tensor]:
    """One step of ``sizes``: rows a micro-batch, micro-batches."""
    micro, accumulate = sizes
    loader = RowLoader(lambda epoch: rows, micro)
    config = loop(max_grad_norm=None, micro_batch_size=micro, grad_accum_steps=accumulate)
    run, seen = Run(model, CausalLanguageModeling(), loader, config), {}
    run.optimizer.step = lambda: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    run.do_step()
    return seen


def fine_tuning_rows() -> Rows:
    """Rows of several examples with padding behind them; few positions are trained."""
    examples = []
    for i in range(16):
        ids = list((np.arange(5 + i % 7) * 3 + i) % 63 + 1)
        examples.append((ids, [False, False] + [i % 3 > 0] * (len(ids) - 3) + [True]))
    rows = pack_rows(examples, 20, 0)
    keep = len(rows) // 4 * 4
    return Rows(rows.input_ids[:keep], rows.labels[:keep], rows.document_ids[:keep])


@pytest.mark.parametrize("capacity", [None, 0.8])
@pytest.mark.parametrize("kind", ["stream", "packed and padded"])
def test_any_split_into_micro_batches_gives_the_same_gradient(kind, capacity):
    rows = counting_rows() if kind == "stream" else fine_tuning_rows()
    rows = Rows(rows.input_ids[:4], rows.labels[:4], None if rows.document_ids is None else rows.document_ids[:4])
    config = replace(MIXTRAL, experts=replace(EXPERTS, capacity_factor=capacity))
    model = init_weights(Mixtral(config), 0)
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.router.weight.mul_(20)
    whole, cut = gradients(model, rows, (4, 1)), gradients(model, rows, (1, 4))
    for name, expected in whole.items():
        assert (cut[name] - expected).norm() <= 1e-4 * expected.norm() + 1e-8, name
    plain = Mixtral(replace(config, experts=replace(config.experts, balance_coefficient=0.0, z_coefficient=0.0)))
    plain.load_state_dict(model.state_dict())
    without = gradients(plain, rows, (4, 1))
    name = "layers.0.mlp.router.weight"
    assert (whole[name] - without[name]).norm() > 0.1 * without[name].norm(), "the losses reach the router"


def test_padding_does_not_count():
    """Pads after the rows change neither loss nor gradient: by the mask of a packed row, or by an attention mask."""
    rows = fine_tuning_rows()
    wider = Rows(
        np.pad(rows.input_ids, ((0, 0), (0, 6)), constant_values=9),
        np.pad(rows.labels, ((0, 0), (0, 6)), constant_values=IGNORED),
        np.pad(rows.document_ids, ((0, 0), (0, 6)), constant_values=-1),
    )
    model = init_weights(Mixtral(MIXTRAL), 0).train()
    first, second = (RowLoader(lambda e, r=r: r, 4).next_batch() for r in (rows, wider))
    objective = CausalLanguageModeling()
    assert torch.allclose(objective.loss(model, first), objective.loss(model, second), rtol=1e-5)
    ids = torch.from_numpy(counting_rows().input_ids[:2])
    mask = torch.ones(2, 22, dtype=torch.long)
    mask[:, 16:] = 0
    padded = model(torch.cat((ids, ids[:, :6]), 1), attention_mask=mask)
    assert torch.allclose(padded.auxiliary, model(ids).auxiliary, rtol=1e-5)
    unmarked = model(torch.cat((ids, ids[:, :6]), 1))
    assert not torch.allclose(unmarked.auxiliary, model(ids).auxiliary, rtol=1e-5)


def test_the_losses_are_those_of_training_alone():
    model = init_weights(Mixtral(MIXTRAL), 0)
    ids = torch.from_numpy(counting_rows().input_ids[:2])
    assert model.eval()(ids).auxiliary is None
    out = model.train()(ids)
    assert out.auxiliary.shape == (2,) and len(out.routings) == 2
    off = Mixtral(replace(MIXTRAL, experts=replace(EXPERTS, balance_coefficient=0.0, z_coefficient=0.0)))
    assert off.train()(ids).auxiliary is None
    batch = Batch(ids, ids)
    assert CausalLanguageModeling().loss(model, batch) > CausalLanguageModeling().loss(model.eval(), batch)


@pytest.mark.slow
def test_experts_stay_in_use_with_the_loss_and_not_without():
    """Seeds 0 and 1 of benchmarks/moe_balance.py; the run without the loss is the control that collapses."""
    script = Path(__file__).parents[2] / "benchmarks" / "moe_balance.py"
    spec = importlib.util.spec_from_file_location("moe_balance", script)
    balance = sys.modules["moe_balance"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(balance)
    task = balance.Task()
    for seed in (0, 1):
        kept, control = balance.run(task, task.coefficient, seed), balance.run(task, 0.0, seed)
        assert kept["variation"] <= 0.3 and control["variation"] > 1.0, (kept, control)
        assert kept["loss"] < 0.5 * kept["loss_first"], "it learns all the same"
