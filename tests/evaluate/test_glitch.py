"""Glitch tokens: planted ones are found, used ones are not, and a model without the sign is not accused."""

import inspect
import textwrap

import pytest
import torch
from torch.nn import functional

from modelwright.base.errors import ConfigError
from modelwright.evaluate.glitch import find_glitches
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.subwords import train_wordpiece
from modelwright.tokenizer.train import train_bpe

TEXT = inspect.getsource(textwrap)
PLANTED = " SolidGoldMagikarp" * 40 + " TheNitromeFan" * 40


def llama(vocab_size: int, tie_embeddings: bool) -> Llama:
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_layers": 1, "num_heads": 2, "max_seq_len": 48}
    return init_weights(Llama(LlamaConfig(vocab_size=vocab_size, tie_embeddings=tie_embeddings, **sizes)), seed=3)


def fit(model: Llama, tokenizer: Tokenizer, num_steps: int) -> set[int]:
    """Train on the text without the planted words, and return the ids that occurred."""
    ids = torch.tensor(tokenizer.encode(TEXT))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        rows = ids[torch.randint(len(ids) - 49, (8,), generator=generator)[:, None] + torch.arange(49)]
        loss = functional.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return set(ids.tolist())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT + PLANTED], 420)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_planted_tokens_are_found_and_used_ones_are_not(tokenizer: Tokenizer, tie_embeddings: bool):
    model = llama(tokenizer.vocab_size, tie_embeddings)
    before = find_glitches(model, tokenizer)
    assert before.line is None and before.found == []  # negative control: nothing learned, nothing told
    used = fit(model, tokenizer, 150)
    planted = {i for i in range(259, tokenizer.vocab_size) if b"Magik" in tokenizer.token_bytes(i)}
    planted |= {i for i in range(259, tokenizer.vocab_size) if b"Nitrome" in tokenizer.token_bytes(i)}
    glitches = find_glitches(model, tokenizer)
    found = set(glitches.found)
    assert len(planted) >= 2 and planted <= found
    assert not found & used and glitches.scores == sorted(glitches.scores, reverse=True)
    never = set(range(tokenizer.vocab_size)) - used - set(glitches.certain) - set(tokenizer.special_ids.values())
    assert len(found) >= 0.8 * len(never)
    assert set(glitches.certain) >= {i for i in range(3, 259) if tokenizer.token_bytes(i) in (b"\xc0", b"\xff")}


def test_free_rows_and_named_ids_are_certain_too(tokenizer: Tokenizer):
    model = llama(tokenizer.vocab_size + 4, False)
    certain = find_glitches(model, tokenizer, unused=[5]).certain
    assert {5, *range(tokenizer.vocab_size, tokenizer.vocab_size + 4)} <= set(certain)


def test_what_cannot_be_looked_at_is_refused(tokenizer: Tokenizer):
    with pytest.raises(ConfigError, match="no dense output matrix"):
        find_glitches(torch.nn.Linear(2, 2), tokenizer)
    words = train_wordpiece([TEXT], 120)
    with pytest.raises(ConfigError, match="Name some with unused="):
        find_glitches(llama(words.vocab_size, False), words)
