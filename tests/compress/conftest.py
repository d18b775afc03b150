"""A small Llama that has really learned something: quantizing random weights proves nothing."""

import argparse
import inspect
import logging
import subprocess

import pytest
import torch
from torch.nn import functional as F

from modelwright.models.llama import Llama, LlamaConfig

ROW = 96


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
    """A byte-level Llama trained for a few seconds, from 5.5 to about 2 nats a byte."""
    train, _ = texts
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=256,
        num_layers=2,
        num_heads=3,
        num_kv_heads=3,
        max_seq_len=128,
        tie_embeddings=True,
    )
    model = Llama(config)
    torch.nn.init.normal_(model.embed.weight, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    for step in range(100):
        rows = train[torch.randint(len(train), (16,))]
        loss = F.cross_entropy(model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 10, (100 - step) / 40)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
