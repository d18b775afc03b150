"""A small model with lively outputs and a small tokenizer, shared by the engine's tests."""

from collections.abc import Iterator

import pytest
import torch

from modelwright.base.device import has_fast_bf16
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.train import train_bpe

needs_bf16 = pytest.mark.skipif(
    not has_fast_bf16(torch.device("cpu")), reason="bitwise equality is promised where the CPU computes bf16"
)
TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five liquor jugs, caf\u00e9 \U0001f980. "
VOCAB_SIZE = 320


def make_model(dtype: torch.dtype = torch.float32, model_class: type[Llama] = Llama, seed: int = 0) -> Llama:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=160,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        max_seq_len=256,
    )
    model = model_class(config)
    init_weights(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)  # so that what comes next depends on what came before
    return model.to(dtype).eval()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from a second thread and lose much when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT * 5], vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="session")
def model() -> Llama:
    return make_model()


@pytest.fixture(scope="session")
def model_bf16() -> Llama:
    return make_model(torch.bfloat16)
