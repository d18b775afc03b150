"""Sequence to sequence: equations, steps, padding, search against brute force, and reversal with its controls."""

import itertools
import math
import random

import pytest
import torch

import modelwright as mw
from modelwright.base.errors import ConfigError, RequestError
from modelwright.models.fit import fit_steps
from modelwright.models.seq2seq import ATTENTIONS, Seq2Seq, Seq2SeqConfig
from modelwright.nn.attention import record_attention
from modelwright.nn.init import init_weights

ALL = [*ATTENTIONS, None]
SOURCES = [[3, 4, 5, 6], [7], [5, 5]]
TARGETS = [[6, 5], [7, 3, 3, 3], []]


def make(attention="bahdanau", vocab_size=9, seed=0, **settings):
    config = Seq2SeqConfig(vocab_size, 8, 12, attention=attention, **settings)
    return init_weights(Seq2Seq(config), seed, std=0.5).eval()


def draw(seed, num, *, num_symbols=6, longest=5):
    source = random.Random(seed)
    return [[3 + source.randrange(num_symbols) for _ in range(source.randint(2, longest))] for _ in range(num)]


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("attention", ALL)
@torch.no_grad()
def test_padding_changes_nothing_and_steps_equal_the_whole(attention, cell):
    model = make(attention, cell=cell)
    together = model.make_pairs(SOURCES, TARGETS)
    assert together.labels.tolist()[2] == [2, -100, -100, -100, -100]
    output = model(together.input_ids, together.decoder_input_ids, attention_mask=together.attention_mask)
    for i, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        one = model.make_pairs([source], [target])
        alone = model(one.input_ids, one.decoder_input_ids)
        assert torch.allclose(output.logits[i, : len(target) + 1], alone.logits[0], atol=1e-5)
        if attention is not None:
            assert torch.allclose(alone.attention.sum(-1), torch.ones(1, len(target) + 1))
            assert torch.all(output.attention[i, :, len(source) + 1 :] == 0)
    encoded = model.encode(together.input_ids, together.attention_mask)
    state = model.new_state(3)
    steps = [model.decode(ids, encoded, state).logits for ids in together.decoder_input_ids.split([1, 3, 1], 1)]
    assert torch.allclose(torch.cat(steps, 1), output.logits, atol=1e-5) and state.length == 5


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_one_step_is_the_equations(attention):
    model = make(attention)
    encoded = model.encode(torch.tensor([[3, 4, 5, 2]]))
    h, s = encoded.annotations[0], encoded.start[0]
    y = model.embed.weight[1]
    cell = model.cell

    def look(query):
        if attention == "bahdanau":
            scores = [model.energy.weight[0] @ torch.tanh(model.query(query) + model.key.weight @ h_j) for h_j in h]
        else:
            scores = [query @ (model.key.weight @ h_j) for h_j in h]
        weights = torch.stack(scores).softmax(0)
        values = h @ model.key.weight.T if attention == "luong_dot" else h
        return weights, weights @ values

    def step(x):
        return cell.step(cell.input_weight @ x + cell.input_bias, {"h": s[None]})["h"][0]

    if attention == "bahdanau":
        weights, c = look(s)
        s1 = step(torch.cat([y, c]))
        read = torch.tanh(model.combine(torch.cat([s1, c, y])))
    else:
        s1 = step(torch.cat([y, torch.zeros(12)]))
        weights, c = look(s1)
        read = torch.tanh(model.combine(torch.cat([c, s1])))
    found = model.decode(torch.tensor([[1]]), encoded)
    assert torch.allclose(found.logits[0, 0], model.output(read), atol=1e-5)
    assert torch.allclose(found.attention[0, 0], weights, atol=1e-6)
    with record_attention() as maps:
        model.decode(torch.tensor([[1, 4]]), encoded)
    assert maps[0].shape == (1, 1, 2, 4)


def log_prob(model, source, target, *, is_ended=True):
    pairs = model.make_pairs([source], [target])
    scores = model(pairs.input_ids, pairs.decoder_input_ids).logits[0].log_softmax(-1)
    labels = pairs.labels[0] if is_ended else pairs.labels[0, :-1]
    return float(sum(scores[i, label] for i, label in enumerate(labels)))


@pytest.mark.parametrize("length_alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("attention", ["bahdanau", "luong_general", None])
@torch.no_grad()
def test_a_wide_beam_finds_what_brute_force_finds(attention, length_alpha):
    model = make(attention, vocab_size=5, seed=2)
    longest = 3
    every = [list(t) for n in range(longest + 1) for t in itertools.product([0, 1, 3, 4], repeat=n)]
    scored = []
    for target in every:
        is_ended = len(target) < longest
        total = log_prob(model, [3, 4, 3], target, is_ended=is_ended)
        length = len(target) + is_ended
        scored.append((total / ((5 + length) / 6) ** length_alpha, target))
    scored.sort(reverse=True)
    found = model.beam_search([3, 4, 3], num_beams=100, max_tokens=longest, length_alpha=length_alpha)
    assert [h.tokens for h in found[:10]] == [target for _, target in scored[:10]]
    assert [h.score for h in found[:10]] == pytest.approx([score for score, _ in scored[:10]], abs=1e-4)


@torch.no_grad()
def test_one_beam_is_greedy_and_more_beams_are_no_worse():
    for seed in range(6):
        model = make(ALL[seed % 4], seed=seed)
        sources = draw(seed, 5)
        greedy = model.greedy(sources, max_tokens=8)
        for source, target in zip(sources, greedy, strict=True):
            one = model.beam_search(source, num_beams=1, max_tokens=8, length_alpha=0.0)
            assert len(one) == 1 and one[0].tokens == target == model.greedy([source], max_tokens=8)[0]
            assert one[0].log_prob == pytest.approx(log_prob(model, source, target, is_ended=len(target) < 8), abs=1e-4)


def test_length_normalisation_favours_longer_targets():
    model = make("bahdanau", vocab_size=5, seed=2)
    short, long = (
        [h.tokens for h in model.beam_search([3, 4], num_beams=8, max_tokens=6, length_alpha=a)] for a in (0.0, 2.0)
    )
    assert sum(map(len, long[:3])) > sum(map(len, short[:3]))


def train_reversal(attention, *, is_shuffled=False, num_steps=130):
    model = Seq2Seq(Seq2SeqConfig(9, 16, 32, attention=attention))
    init_weights(model, 0, std=0.2)
    held_out = {tuple(s) for s in draw(10**6, 200)}

    def loss_at(step):
        sources = [s for s in draw(step, 64) if tuple(s) not in held_out]
        targets = [s[::-1] for s in sources]
        if is_shuffled:
            random.Random(step).shuffle(targets)
        return model.loss(model.make_pairs(sources, targets))

    losses = fit_steps(model, loss_at, num_steps, learning_rate=1e-2)
    sources = [list(s) for s in sorted(held_out)]
    exact = sum(a == b[::-1] for a, b in zip(model.greedy(sources, 8), sources, strict=True)) / len(sources)
    return exact, losses, model


def test_reversal_is_learned_with_attention_and_not_without_or_from_shuffled_targets():
    exact, losses, model = train_reversal("bahdanau")
    assert exact >= 0.98 and losses[0] > math.log(9) * 0.8
    # What it looked at is the source read backwards.
    pairs = model.make_pairs([[3, 4, 5, 6, 7]], [[7, 6, 5, 4, 3]])
    looked = model(pairs.input_ids, pairs.decoder_input_ids).attention[0, :5].argmax(-1)
    assert model.beam_search([3, 4, 5, 6, 7])[0].tokens == [7, 6, 5, 4, 3]
    assert (looked.diff() < 0).sum() >= 3
    assert train_reversal(None)[0] < 0.8
    assert train_reversal("bahdanau", is_shuffled=True, num_steps=60)[0] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["luong_dot", "luong_general"])
def test_reversal_is_learned_by_the_other_attentions(attention):
    assert train_reversal(attention, num_steps=250)[0] >= 0.98


@torch.no_grad()
def test_a_saved_model_loads_as_it_was(tmp_path):
    for attention in ALL:
        model = make(attention, cell="lstm")
        mw.save_model(model, tmp_path / str(attention))
        loaded = mw.load_model(tmp_path / str(attention))
        pairs = model.make_pairs(SOURCES, TARGETS)
        given = {"input_ids": pairs.input_ids, "decoder_input_ids": pairs.decoder_input_ids}
        assert loaded.config == model.config
        mask = pairs.attention_mask
        assert torch.allclose(
            loaded(**given, attention_mask=mask).logits, model(**given, attention_mask=mask).logits, atol=1e-6
        )


def test_refusals():
    with pytest.raises(ConfigError, match="attention is 'luong'; known: bahdanau, luong_dot, luong_general, or None"):
        Seq2SeqConfig(9, attention="luong")
    with pytest.raises(ConfigError, match=r"pad, bos and eos are \(0, 0, 2\)"):
        Seq2SeqConfig(9, bos_token_id=0)
    model = make()
    with pytest.raises(RequestError, match="padding before a token"):
        model.encode(torch.tensor([[0, 3]]), torch.tensor([[0, 1]]))
    with pytest.raises(RequestError, match="num_beams is 0"):
        model.beam_search([3], num_beams=0)
