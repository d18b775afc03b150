"""Every token is scored exactly once, windows agree with the whole, and bytes are the text's own."""

import math
import random

import pytest
import torch

from modelwright.base.errors import ConfigError, DataError
from modelwright.base.types import Document
from modelwright.evaluate.perplexity import cut_windows, evaluate_text
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.tokenizer.train import train_bpe

TEXTS = [
    "The function returns the first element, or None when the list is empty.",
    "Grüße aus Köln! 東京は日本の首都です。 🙂👩‍👩‍👧 naïve café",
    "def add(a, b):\n    return a + b\n" * 6,
    "x",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, vocab_size=300)


def small_llama(tokenizer, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_seq_len=512,
        tie_embeddings=False,
    )
    return Llama(config).eval()


def sharp_llama(tokenizer):
    """Far from uniform, so that a misplaced token changes the score."""
    model = small_llama(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    return model


@torch.no_grad()
def plain_nats(model, tokenizer, text):
    ids = [tokenizer.eos_id, *tokenizer.encode(text, add_special_tokens=False)]
    log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(log_probs[i, ids[i + 1]]) for i in range(len(ids) - 1))


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 7, 8, 9, 64, 100])
@pytest.mark.parametrize("max_seq_len", [2, 3, 4, 5, 8, 64])
def test_windows_score_each_token_once_with_context(length, max_seq_len):
    windows = cut_windows(range(length), max_seq_len)
    scored = [i for start, end, first in windows for i in range(first, end)]
    assert scored == list(range(1, length))
    for start, end, first in windows:
        assert 0 <= start < first < end <= length and end - start <= max_seq_len
        assert first == 1 or first - start >= max_seq_len // 2
        assert end - start == min(max_seq_len, length)


def test_one_window_is_the_whole_document(tokenizer):
    model = sharp_llama(tokenizer)
    expected = sum(plain_nats(model, tokenizer, text) for text in TEXTS)
    score = evaluate_text(model, tokenizer, TEXTS, max_seq_len=512, batch_size=3)
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.tokens == sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS)
    assert score.perplexity == pytest.approx(math.exp(score.nats / score.tokens))


def test_windows_of_a_model_without_context_equal_the_whole(tokenizer):
    # With silent attention each token is predicted from the one before it, so windows must not change the sum.
    model = sharp_llama(tokenizer)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.o.weight.zero_()
    whole = evaluate_text(model, tokenizer, TEXTS, max_seq_len=512)
    for max_seq_len in (2, 7, 16):
        windows = evaluate_text(model, tokenizer, TEXTS, max_seq_len=max_seq_len, batch_size=5)
        assert windows.nats == pytest.approx(whole.nats, rel=1e-5)
        assert (windows.tokens, windows.bytes) == (whole.tokens, whole.bytes)


def test_windows_of_a_model_with_context_stay_close(tokenizer):
    model = small_llama(tokenizer)
    whole = evaluate_text(model, tokenizer, TEXTS, max_seq_len=512)
    windows = evaluate_text(model, tokenizer, TEXTS, max_seq_len=32)
    assert windows.nats != whole.nats
    assert windows.nats == pytest.approx(whole.nats, rel=0.02)


def test_batching_and_order_do_not_change_the_score(tokenizer):
    model = sharp_llama(tokenizer)
    one = evaluate_text(model, tokenizer, TEXTS, max_seq_len=24, batch_size=1)
    many = evaluate_text(model, tokenizer, TEXTS[::-1], max_seq_len=24, batch_size=64)
    assert many.nats == pytest.approx(one.nats, rel=1e-5)


def test_uniform_model_spends_log2_vocab_bits_a_token(tokenizer):
    model = small_llama(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    score = evaluate_text(model, tokenizer, [Document("a", text) for text in TEXTS], max_seq_len=16)
    assert score.perplexity == pytest.approx(tokenizer.vocab_size, rel=1e-5)
    expected = score.tokens * math.log2(tokenizer.vocab_size) / score.bytes
    assert score.bits_per_byte == pytest.approx(expected, rel=1e-6)


def test_bytes_are_the_bytes_that_the_tokens_spell(tokenizer):
    draw = random.Random(0)
    texts = [*TEXTS, "".join(chr(draw.choice([65, 0xE9, 0x4E2D, 0x1F600, 10, 32])) for _ in range(300))]
    score = evaluate_text(small_llama(tokenizer), tokenizer, texts, max_seq_len=64)
    spelled = sum(
        len(tokenizer.token_bytes(i)) for text in texts for i in tokenizer.encode(text, add_special_tokens=False)
    )
    assert score.bytes == spelled == sum(len(text.encode()) for text in texts)


def test_bfloat16_autocast_is_close_and_the_mode_is_kept(tokenizer):
    model = small_llama(tokenizer).train()
    exact = evaluate_text(model, tokenizer, TEXTS, max_seq_len=64)
    rounded = evaluate_text(model, tokenizer, TEXTS, max_seq_len=64, dtype=torch.bfloat16)
    assert model.training
    assert rounded.nats == pytest.approx(exact.nats, rel=0.01)
    loss = model(torch.tensor([[1, 2, 3]])).logits.float().sum()
    loss.backward()  # nothing cached while scoring may stand in the way of training


def test_refusals(tokenizer):
    model = small_llama(tokenizer)
    with pytest.raises(DataError, match="2 documents to score hold no text"):
        evaluate_text(model, tokenizer, ["", ""], max_seq_len=16)
    with pytest.raises(ConfigError, match="max_seq_len is 1"):
        evaluate_text(model, tokenizer, ["a"], max_seq_len=1)
