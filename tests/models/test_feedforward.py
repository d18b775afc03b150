"""The feed-forward language model: its equation, its window, its folder, and that it learns."""

import math

import pytest
import torch
from torch.nn import functional as F

import modelwright as mw
from modelwright.base.errors import ConfigError, RequestError
from modelwright.models.feedforward import FeedForwardConfig, FeedForwardLM
from modelwright.nn.init import init_weights


def make(vocab_size=11, **settings):
    settings = {"order": 4, "embedding_size": 5, "hidden_size": 9, **settings}
    return init_weights(FeedForwardLM(FeedForwardConfig(vocab_size, **settings)), 0, std=0.5).eval()


@pytest.mark.parametrize("has_direct", [False, True])
@torch.no_grad()
def test_logits_are_the_equation(has_direct):
    model = make(has_direct=has_direct)
    ids = [3, 1, 4, 1, 5]
    found = model(torch.tensor([ids])).logits[0]
    before = [11, 11, 11, *ids]  # the padding row stands before the beginning
    for t in range(len(ids)):
        newest_first = before[t + 1 : t + 4][::-1]
        x = torch.cat([model.embed.weight[i] for i in newest_first])
        y = model.output(torch.tanh(model.hidden_layer(x)))
        y = y + model.direct.weight @ x if has_direct else y
        assert torch.allclose(found[t], y, atol=1e-5)


@torch.no_grad()
def test_steps_equal_the_whole_and_only_the_window_counts():
    model = make()
    ids = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = model(ids).logits
    for sizes in ([1] * 12, [2, 9, 1]):
        state = model.new_state(2)
        parts = [model(part, state=state).logits for part in ids.split(sizes, 1)]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-6) and state.length == 12
    assert torch.allclose(model(ids, last_only=True).logits, whole[:, -1:], atol=1e-6)
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 11
    same = torch.isclose(model(changed).logits, whole).all(-1)[0]
    assert same.tolist() == [False] * 3 + [True] * 9


@torch.no_grad()
def test_a_saved_model_loads_as_it_was(tmp_path):
    model = make(has_direct=True)
    mw.save_model(model, tmp_path)
    loaded = mw.load_model(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    assert loaded.config == model.config and torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-6)


def test_it_learns_a_rule_inside_its_window_and_not_outside():
    def loss_after_training(order):
        model = make(7, order=order, embedding_size=8, hidden_size=64)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for step in range(150):
            ids = torch.randint(7, (32, 24), generator=torch.Generator().manual_seed(step))
            ids[:, 3::4] = ids[:, ::4]  # every fourth symbol repeats the one three places before it
            loss = F.cross_entropy(model(ids[:, :-1]).logits[:, 2::4].flatten(0, 1), ids[:, 3::4].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    assert loss_after_training(order=4) < 0.1
    assert loss_after_training(order=3) > 0.95 * math.log(7)


def test_refusals():
    with pytest.raises(ConfigError, match="order is 1; it must be at least 2"):
        FeedForwardConfig(10, order=1)
    with pytest.raises(RequestError, match="takes no attention mask"):
        make()(torch.tensor([[1]]), mask=torch.ones(1, 1, 1, 1, dtype=torch.bool))
