"""Asked to repeat: planted untrained tokens fail, trained ones do not, and a model that cannot copy accuses nobody."""

import pytest
import torch
from torch.nn import functional

from modelwright.base.errors import ConfigError
from modelwright.evaluate.repeat import MAX_PROBABILITY, check_repeats, repeat_probabilities
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.train import train_bpe

TEXT = "the river runs past the old stone bridge and the garden of the miller, who repeats what the river says " * 3


def make_model(tokenizer: Tokenizer, tie_embeddings: bool = False) -> Llama:
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_layers": 1, "num_heads": 2, "max_seq_len": 64}
    config = LlamaConfig(vocab_size=tokenizer.vocab_size, tie_embeddings=tie_embeddings, **sizes)
    return init_weights(Llama(config), seed=5)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT], 330)


@pytest.fixture(scope="module")
def planted(tokenizer) -> list[int]:
    return [i for i in range(260, tokenizer.vocab_size) if i % 9 == 0]


@pytest.fixture(scope="module")
def copier(tokenizer, planted) -> Llama:
    """A model that has learned to go on with a run of any token but the planted ones, which it never sees."""
    model = make_model(tokenizer)
    used = torch.tensor([i for i in range(tokenizer.vocab_size) if i not in planted])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        rows = used[torch.randint(len(used), (128, 1), generator=generator)].expand(-1, 8)
        rows = torch.cat([torch.full((128, 1), tokenizer.eos_id), rows], dim=1)
        loss = functional.cross_entropy(model(rows[:, :-1]).logits[:, 1:].flatten(0, 1), rows[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_planted_tokens_cannot_be_repeated_and_trained_ones_can(copier, tokenizer, planted):
    repeats = check_repeats(copier, tokenizer)
    assert repeats.failed is not None and set(repeats.failed) == set(planted)
    assert repeats.copied > 0.9
    some = check_repeats(copier, tokenizer, [planted[0], 271])
    assert some.failed == [planted[0]] and len(some.controls) == 100
    assert not {planted[0], 271} & set(some.controls)


def test_a_row_put_back_to_its_beginning_is_found_and_the_others_are_not(copier, tokenizer):
    victim, fresh = 275, make_model(tokenizer)
    before = repeat_probabilities(copier, tokenizer, [victim])[0]
    kept = copier.embed.weight[victim].clone(), copier.lm_head.weight[victim].clone()
    with torch.no_grad():
        copier.embed.weight[victim], copier.lm_head.weight[victim] = (
            fresh.embed.weight[victim],
            fresh.lm_head.weight[victim],
        )
    try:
        after = check_repeats(copier, tokenizer, [victim, 276, 277])
    finally:
        with torch.no_grad():
            copier.embed.weight[victim], copier.lm_head.weight[victim] = kept
    assert before > 0.5 and after.failed == [victim] and after.probabilities[0] < MAX_PROBABILITY


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_a_model_that_cannot_copy_accuses_no_token(tokenizer, tie_embeddings):
    repeats = check_repeats(make_model(tokenizer, tie_embeddings), tokenizer)
    assert repeats.failed is None or repeats.failed == []
    if not tie_embeddings:
        assert repeats.failed is None and repeats.copied < 0.1


def test_what_cannot_be_asked_is_refused(copier, tokenizer):
    with pytest.raises(ConfigError, match="Token 4000 is not in the vocabulary"):
        check_repeats(copier, tokenizer, [4000])
    with pytest.raises(ConfigError, match="no ordinary token"):
        check_repeats(copier, tokenizer, [5], controls=[])
    assert repeat_probabilities(copier, tokenizer, []) == []
