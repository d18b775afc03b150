"""Another tokenizer for a model: rows from the right places, tied and untied, and a start better than chance."""

import heapq
import inspect
import textwrap

import numpy as np
import pytest
import torch
from torch.nn import functional

from modelwright.base.errors import ConfigError
from modelwright.compress.rtn import quantize_model
from modelwright.compress.transplant import GLOBAL_SHARE, Mixture, by_adaptation, ngram_vectors, transplant
from modelwright.evaluate.perplexity import evaluate_text
from modelwright.models.gpt2 import GPT2, GPT2Config
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.tokenizer.overlap import find_overlap
from modelwright.tokenizer.train import train_bpe

TEXT = inspect.getsource(textwrap)
OTHER = inspect.getsource(heapq)


@pytest.fixture(scope="module")
def old() -> Tokenizer:
    return train_bpe([TEXT], 400)


@pytest.fixture(scope="module")
def new() -> Tokenizer:
    return train_bpe([OTHER], 450, ["<s>", "<|endoftext|>"])


def llama(vocab_size: int, tie_embeddings: bool = False) -> Llama:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        max_seq_len=64,
        tie_embeddings=tie_embeddings,
        eos_token_id=(0,),
    )
    return init_weights(Llama(config), seed=1).eval()


@pytest.mark.parametrize("way", ["adapt", "pieces", "mean", "random"])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_shared_tokens_keep_their_rows_and_the_rest_gets_some(old, new, way, tie_embeddings, tmp_path):
    model = llama(408, tie_embeddings)  # a padded matrix: the rows behind the tokenizer's are left out
    changed, overlap = transplant(model, old, new, way=way, multiple_of=16)
    assert changed.config.vocab_size == 464 and changed.config.eos_token_id == (new.eos_id,)
    assert 256 < len(overlap.shared) < 450 and len(overlap.spelled) > 50 and list(overlap.strange) == [0]
    for before, after in ((model.embed.weight, changed.embed.weight), (model.lm_head.weight, changed.lm_head.weight)):
        assert all(torch.equal(after[index], before[other]) for index, other in overlap.shared.items())
        assert torch.isfinite(after).all()
        assert len({tuple(row.tolist()) for row in after[:450]}) >= (440 if way == "pieces" else 450)
    assert (changed.lm_head.weight is changed.embed.weight) == tie_embeddings
    untouched = set(model.state_dict()) - {"embed.weight", "lm_head.weight"}
    assert all(torch.equal(model.state_dict()[name], changed.state_dict()[name]) for name in untouched)
    save_model(changed, tmp_path)
    assert torch.equal(load_model(tmp_path).lm_head.weight, changed.lm_head.weight)


def test_pieces_are_averaged_and_neighbours_have_their_share(old, new):
    model = llama(400)
    changed, overlap = transplant(model, old, new, way="pieces")
    index, pieces = next(iter(overlap.spelled.items()))
    assert torch.allclose(changed.embed.weight[index], model.embed.weight[pieces].mean(0), atol=1e-6)
    mixture = by_adaptation(old, new, overlap, ngram_vectors)
    assert set(mixture.ids) == set(overlap.spelled)
    for index, weights in mixture.weights.items():
        count = len(overlap.spelled[index])
        assert mixture.ids[index][:count] == overlap.spelled[index] and min(weights) >= 0
        assert sum(weights[:count]) == pytest.approx(1 - GLOBAL_SHARE) and sum(weights) == pytest.approx(1)
        assert not set(mixture.ids[index]) & set(old.special_ids.values())


def test_longer_pieces_weigh_more_and_the_nearest_neighbour_looks_alike():
    old = train_bpe(["tokenizer tokenizer tokens zebra zebra " * 20], 290)
    new = train_bpe(["tokenizers tokenizers " * 20], 290)
    overlap = find_overlap(old, new)
    index = next(i for i in overlap.spelled if new.token_bytes(i) == b" tokenizers")
    mixture = by_adaptation(old, new, overlap, ngram_vectors)
    pieces = overlap.spelled[index]
    weights = dict(zip(pieces, mixture.weights[index], strict=False))
    longest = max(pieces, key=lambda piece: len(old.token_bytes(piece)))
    assert weights[longest] == max(weights.values())
    neighbours = mixture.ids[index][len(pieces) :]
    shares = mixture.weights[index][len(pieces) :]
    assert b"token" in old.token_bytes(neighbours[int(np.argmax(shares))])


def test_any_space_and_any_way_can_be_handed_in(old, new):
    def alike(pieces):  # one axis: the length
        return np.stack([[len(piece), 1.0] for piece in pieces]).astype(np.float32)

    changed, _ = transplant(llama(400), old, new, describe=alike)
    assert torch.isfinite(changed.embed.weight).all()
    first, overlap = transplant(
        llama(400),
        old,
        new,
        way=lambda o, n, found, d: Mixture(
            {i: p[:1] for i, p in found.spelled.items()}, {i: [1.0] for i in found.spelled}
        ),
    )
    index, pieces = next(iter(overlap.spelled.items()))
    assert torch.equal(first.embed.weight[index], llama(400).embed.weight[pieces[0]])
    with pytest.raises(ConfigError, match="Did you mean 'pieces'"):
        transplant(llama(400), old, new, way="piece")


def test_what_cannot_be_changed_is_refused(old, new):
    with pytest.raises(ConfigError, match="400 tokens and the model 300 rows"):
        transplant(llama(300), old, new)
    with pytest.raises(ConfigError, match="quantized"):
        transplant(quantize_model(llama(400), 8), old, new)


def fit(model: torch.nn.Module, tokenizer: Tokenizer, text: str, num_steps: int) -> None:
    ids = torch.tensor(tokenizer.encode(text))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        starts = torch.randint(len(ids) - 49, (8,), generator=generator)
        rows = ids[starts[:, None] + torch.arange(49)]
        loss = functional.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def test_a_transplanted_model_knows_more_than_one_with_rows_drawn_anew(old):
    """Negative controls: the mean of all rows, and rows at random, under the same new tokenizer."""
    model = llama(400)
    fit(model, old, TEXT, 300)
    new = train_bpe([TEXT], 700)
    bits = {}
    for way in ("adapt", "pieces", "mean", "random"):
        changed, _ = transplant(model, old, new, way=way)
        bits[way] = evaluate_text(changed, new, [TEXT[:4000]], max_seq_len=64).bits_per_byte
    assert max(bits["adapt"], bits["pieces"]) < min(bits["mean"], bits["random"]) - 0.4, bits


@pytest.mark.peer
@pytest.mark.parametrize("family", ["llama", "tied llama", "gpt2"])
def test_transformers_reads_the_changed_model_and_its_tokenizer(old, new, family, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if family == "gpt2":
        small = GPT2Config(vocab_size=400, hidden_size=32, num_layers=1, num_heads=2, max_seq_len=64)
        model = init_weights(GPT2(small), seed=1).eval()
    else:
        model = llama(400, tie_embeddings=family.startswith("tied"))
    changed, _ = transplant(model, old, new)
    save_model(changed, tmp_path)
    new.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "the heap is a list"
    ids = load_tokenizer(tmp_path).encode(text)
    assert tokenizer(text)["input_ids"] == ids and theirs.config.eos_token_id in (new.eos_id, [new.eos_id])
    with torch.no_grad():
        logits = changed(torch.tensor([ids])).logits
        assert torch.allclose(theirs(torch.tensor([ids])).logits, logits, atol=1e-4)
