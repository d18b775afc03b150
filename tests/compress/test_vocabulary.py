"""More tokens: rows in the right places, known tokens untouched, starts that make sense, tied and untied."""

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from modelwright.base.errors import ConfigError
from modelwright.compress.surgery import measure_cost
from modelwright.compress.vocabulary import add_tokens, extend_vocabulary
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.formats import load_tokenizer

ROWS = torch.arange(40).remainder(20).view(2, 20)


def llama(vocab_size: int = 24, tie_embeddings: bool = False) -> Llama:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        max_seq_len=64,
        tie_embeddings=tie_embeddings,
    )
    return init_weights(Llama(config), seed=1).eval()


def bytes_tokenizer() -> Tokenizer:
    """One token a byte, and an end."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, roles={"eos_token": "<end>"})


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_a_new_row_is_the_mean_of_its_pieces_in_both_matrices(tie_embeddings, tmp_path):
    model = llama(tie_embeddings=tie_embeddings)
    wide = extend_vocabulary(model, 24, {24: [3, 5, 5], 25: [7]}, multiple_of=8)
    assert wide.config.vocab_size == 32
    for old, new in ((model.embed.weight, wide.embed.weight), (model.lm_head.weight, wide.lm_head.weight)):
        assert torch.equal(new[:24], old)
        assert torch.allclose(new[24], (old[3] + 2 * old[5]) / 3, atol=1e-7) and torch.equal(new[25], old[7])
        assert torch.allclose(new[26:], old.mean(0).expand(6, -1), atol=1e-7)
    assert (wide.lm_head.weight is wide.embed.weight) == tie_embeddings
    cost = measure_cost(model, wide, ROWS)
    assert cost.max_logit_difference < 1e-6  # known tokens, known texts: only the softmax has more to share with
    assert cost.perplexity_before < cost.perplexity_after < 1.5 * cost.perplexity_before
    save_model(wide, tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(again.lm_head.weight, wide.lm_head.weight)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_new_tokens_take_the_free_rows_of_a_padded_matrix_first(tie_embeddings):
    """A tokenizer of 20 on a matrix of 24 stays at 24; id 20 is row 20, not row 24."""
    model = llama(24, tie_embeddings)
    wide = extend_vocabulary(model, 20, {20: [1], 21: [2, 3]})
    assert wide.config.vocab_size == 24 and wide.embed.weight.shape[0] == 24
    assert torch.equal(wide.embed.weight[20], model.embed.weight[1])
    assert torch.equal(wide.embed.weight[22:], model.embed.weight[22:])
    wider = extend_vocabulary(model, 20, {i: [1] for i in range(20, 26)})
    assert wider.config.vocab_size == 26
    assert torch.equal(wider.lm_head.weight[25], model.lm_head.weight[1])


def test_tokens_without_a_spelling_start_near_the_mean_and_apart_from_each_other():
    model = llama()
    wide = extend_vocabulary(model, 24, {24: [], 25: []})
    rows, mean = wide.embed.weight[24:], model.embed.weight.mean(0)
    spread = model.embed.weight.std(0).norm()
    assert 0 < (rows[0] - mean).norm() < 0.3 * spread and not torch.equal(rows[0], rows[1])
    assert torch.equal(wide.embed.weight, extend_vocabulary(model, 24, {24: [], 25: []}).embed.weight)


def test_refuses_ids_that_are_taken_and_pieces_that_are_not_known():
    with pytest.raises(ConfigError, match="new ids start at 24"):
        extend_vocabulary(llama(), 24, {23: [1]})
    with pytest.raises(ConfigError, match=r"24 is spelled \[25\]"):
        extend_vocabulary(llama(), 24, {24: [25]})
    with pytest.raises(ConfigError, match="tokenizer has 30 tokens and the model 24 rows"):
        extend_vocabulary(llama(), 30, {30: [1]})


def test_texts_become_tokens_that_say_what_they_said_before(tmp_path):
    tokenizer = bytes_tokenizer()
    model = llama(260)  # 257 tokens: three rows are free
    wide, larger = add_tokens(model, tokenizer, ["abc", "été", " token"])
    assert wide.config.vocab_size == 260 and larger.vocab_size == 260 and tokenizer.vocab_size == 257
    assert larger.encode("xabc été") == [
        *tokenizer.encode("x"),
        257,
        *tokenizer.encode(" "),
        258,
    ]
    assert larger.decode(larger.encode("xabc été token")) == "xabc été token"
    pieces = tokenizer.encode("été")
    assert torch.allclose(wide.embed.weight[258], model.embed.weight[pieces].mean(0), atol=1e-7)
    more, largest = add_tokens(wide, larger, ["fourth"])
    assert more.config.vocab_size == largest.vocab_size == 261
    largest.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("fourth") == [260]
    for wrong in (["abc"], [""], ["new", "new"], []):
        with pytest.raises(ConfigError, match="is empty, given twice or known already"):
            add_tokens(wide, larger, wrong)


def test_a_start_from_the_pieces_reads_better_than_one_at_random():
    """Negative control: the same token with a random row, where its text stood before."""
    torch.manual_seed(0)
    tokenizer, model = bytes_tokenizer(), llama(257)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = "the cat sat on the mat. the dog sat on the log. " * 4
    ids = torch.tensor([tokenizer.encode(text)[:60]])
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits[0], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wide, larger = add_tokens(model.eval(), tokenizer, ["the"])
    randomly = extend_vocabulary(model, 257, {257: []})
    with torch.no_grad():
        randomly.embed.weight[257] = model.embed.weight.std() * torch.randn(16)
    rows = torch.tensor([larger.encode(text)[:40]])

    def known(model: Llama) -> float:
        with torch.no_grad():
            scores = model(rows[:, :-1]).logits[0, :, :257].log_softmax(-1)
        wanted = rows[0, 1:]
        keep = wanted < 257
        return -float(scores[keep].gather(1, wanted[keep, None]).mean())

    assert known(wide) < known(randomly)
