"""What the processes of the parallel tests do: functions of a module, so that another process finds them by name."""

from dataclasses import replace
from pathlib import Path

import torch
from tests.train.test_loop import plain_loop

from modelwright.cli.recipe import read_training_recipe
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.optim.build import OptimizerConfig
from modelwright.optim.ema import EmaConfig
from modelwright.train.checkpoint import CheckpointConfig
from modelwright.train.loop import train
from modelwright.train.objective import CausalLanguageModeling
from modelwright.train.selfcheck import make_examples, pretrain_subject

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain" / "small.yaml"


def toy_model(tie=True, family="llama", layers=4):
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_seq_len=24,
        tie_embeddings=tie,
        family=family,
        sliding_window=7 if family == "mistral" else None,
    )
    return init_weights(Llama(config), 0)


def toy_loader():
    _, config = read_training_recipe(RECIPE)
    return replace(pretrain_subject(config), examples=make_examples()).loader(2)


def toy_loop(parallel, optimizer="adamw", **changes):
    return plain_loop(
        **{
            "num_steps": 5,
            "micro_batch_size": 2,
            "grad_accum_steps": 4,
            "max_grad_norm": 0.05,
            "optimizer": OptimizerConfig(name=optimizer),
            "ema": EmaConfig(decay=0.9),
            "parallel": parallel,
            "device": "cpu",
            **changes,
        }
    )


def train_toy(parallel, folder=None, model=None, **changes):
    """Train the toy and return (whole weights, losses, gradient norms of the steps done here), on the first rank."""
    every = CheckpointConfig(every=1, num_kept=9) if folder else CheckpointConfig()
    loop = toy_loop(parallel, checkpoint=every, **changes)
    norms = []
    whole = toy_model(**(model or {}))
    hooks = [lambda run, report: norms.append(report.gradient_norm)]
    run = train(whole, CausalLanguageModeling(), toy_loader(), loop, folder=folder, hooks=hooks)
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return None
    return {n: t.clone() for n, t in whole.state_dict().items()}, [loss for _, loss in run.losses], norms


def train_family(parallel, model):
    return train_toy(parallel, model=model)


def train_with(parallel, changes):
    return train_toy(parallel, **changes)
