"""A small Llama that has really learned something: quantizing random weights proves nothing."""

import argparse
import inspect
import logging
import subprocess

import pytest
import torch
from torch.nn import functional as F

from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.optim.build import OptimizerConfig, make_optimizer

ROW = 96
NUM_STEPS = 150


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Matrices this small take longer on several threads than on one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def texts():
    """Bytes of three standard modules as token rows: (training, held-out)."""
    source = "\n".join(inspect.getsource(module) for module in (argparse, logging, subprocess))
    ids = torch.frombuffer(bytearray(source.encode()), dtype=torch.uint8).long() % 256
    rows = ids[: len(ids) // ROW * ROW].view(-1, ROW)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order[64:]], rows[order[:64]]


@pytest.fixture(scope="session")
def trained(texts):
    """A byte-level Llama trained for some five seconds, from 5.5 to about 1.6 nats a byte."""
    train, _ = texts
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_layers=2,
        num_heads=2,
        max_seq_len=128,
        tie_embeddings=True,
    )
    model = init_weights(Llama(config), seed=0)
    optimizer = make_optimizer(model, OptimizerConfig())
    draw = torch.Generator().manual_seed(0)
    for step in range(NUM_STEPS):
        rows = train[torch.randint(len(train), (16,), generator=draw)]
        loss = F.cross_entropy(model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        optimizer.set_factor(min(1, (step + 1) / 10, (NUM_STEPS - step) / (0.4 * NUM_STEPS)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
