"""Experts sorted and batched equal experts asked token by token; losses are those of the papers; padding is inert."""

import math
from dataclasses import replace

import pytest
import torch

from modelwright.base.errors import ConfigError
from modelwright.nn.init import init_weights
from modelwright.nn.moe import (
    MoeOptions,
    Router,
    Routing,
    SparseMoe,
    auxiliary_losses,
    combine_experts,
    combine_experts_plain,
    keep_within_capacity,
    load_balancing_loss,
    load_variation,
    record_routing,
    router_z_loss,
)

SMALL = MoeOptions(num_experts=6, top_k=2, expert_size=12)
VARIANTS = {
    "softmax, renormalised": SMALL,
    "softmax as it is": replace(SMALL, is_renormalised=False, top_k=3),
    "one expert a token": replace(SMALL, top_k=1, is_renormalised=False),
    "all experts": replace(SMALL, top_k=6),
    "softmax in groups": replace(SMALL, num_groups=3, num_kept_groups=1, is_renormalised=False, scale=1.5),
    "sigmoid in groups": replace(SMALL, score="sigmoid", num_groups=3, num_kept_groups=2, scale=2.5),
    "shared": replace(SMALL, shared_size=20),
    "shared behind a gate": replace(SMALL, shared_size=20, has_shared_gate=True),
}


def make_layer(options: MoeOptions, size: int = 8, seed: int = 0) -> SparseMoe:
    layer = init_weights(SparseMoe(size, options), seed, std=0.5)
    with torch.no_grad():
        layer.router.weight.mul_(25)
        if layer.router.correction is not None:
            layer.router.correction.copy_(torch.linspace(-0.2, 0.2, options.num_experts))
    return layer


def random_input(batch: int = 2, length: int = 11, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, length, size, generator=torch.Generator().manual_seed(seed))


def uneven_routing(batch: int = 2, length: int = 10, num_experts: int = 4, seed: int = 0) -> Routing:
    router = Router(8, MoeOptions(num_experts, 2, 8))
    init_weights(router, seed)
    with torch.no_grad():
        router.weight.mul_(40)
    return router(random_input(batch, length, seed=seed))


@pytest.mark.parametrize("name", VARIANTS)
def test_sorted_equals_token_by_token_with_gradients(name):
    layer = make_layer(VARIANTS[name])
    x = random_input().requires_grad_()
    routing = layer.router(x)
    fast, plain = combine_experts(x, routing, layer.experts), combine_experts_plain(x, routing, layer.experts)
    assert (fast - plain).abs().max() < 1e-5
    weight = random_input(seed=9)
    inputs = [x, *layer.router.parameters(), *layer.experts.parameters()]
    expected = torch.autograd.grad((plain * weight).sum(), inputs, retain_graph=True, allow_unused=True)
    for mine, wanted in zip(torch.autograd.grad((fast * weight).sum(), inputs), expected, strict=True):
        # An expert that nobody chose has a gradient of zero here, and none there.
        wanted = torch.zeros_like(mine) if wanted is None else wanted
        assert (mine - wanted).norm() <= 1e-5 * wanted.norm() + 1e-7


@pytest.mark.parametrize("name", VARIANTS)
def test_the_layer_adds_what_every_token_passes(name):
    layer = make_layer(VARIANTS[name])
    x = random_input()
    expected = combine_experts_plain(x, layer.router(x), layer.experts)
    if layer.shared is not None:
        gate = 1.0 if layer.shared_gate is None else torch.sigmoid(layer.shared_gate(x))
        expected = expected + gate * layer.shared(x)
    assert (layer(x) - expected).abs().max() < 1e-5


def test_tokens_are_routed_one_by_one():
    """Neighbours change nothing: any split of a batch gives the same."""
    layer = make_layer(VARIANTS["sigmoid in groups"])
    x = random_input(3, 7)
    pieces = [layer(x[b : b + 1, t : t + 1]) for b in range(3) for t in range(7)]
    assert (layer(x) - torch.cat(pieces).view(3, 7, 8)).abs().max() < 1e-5


def test_chosen_weights():
    x = random_input()
    for name, options in VARIANTS.items():
        routing = make_layer(options).router(x)
        assert routing.experts.shape == routing.weights.shape == (2, 11, options.top_k)
        assert torch.allclose(routing.probs.sum(-1), torch.ones(2, 11)), name
        if options.is_renormalised:
            assert torch.allclose(routing.weights.sum(-1), torch.full((2, 11), options.scale)), name
        assert (routing.experts.sort(-1).values.diff(dim=-1) > 0).all(), "an expert is chosen once"


def test_experts_come_from_the_best_groups():
    options = VARIANTS["sigmoid in groups"]
    routing = make_layer(options).router(random_input(4, 50))
    groups = routing.experts // 2
    assert all(len(set(row.tolist())) <= 2 for row in groups.flatten(0, 1))


def test_a_correction_moves_the_choice_and_not_the_weights():
    options = MoeOptions(4, 1, 8, score="sigmoid", is_renormalised=False)
    router = init_weights(Router(8, options), 0)
    x = random_input(1, 40)
    before = router(x)
    router.correction[3] = 10.0
    after = router(x)
    assert (after.experts == 3).all() and not (before.experts == 3).all()
    assert torch.equal(after.weights[..., 0], after.logits.sigmoid()[..., 3])
    router.correct(after.loads, rate=20.0)
    assert not (router(x).experts == 3).any()
    with pytest.raises(ConfigError, match="only 'sigmoid'"):
        Router(8, SMALL).correct(after.loads, 0.1)


def test_routing_stays_float32_under_autocast():
    layer = make_layer(SMALL)
    x = random_input()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = layer.router(x)
    assert routing.logits.dtype == torch.float32
    assert torch.equal(routing.logits, layer.router(x).logits)


# --- losses -------------------------------------------------------------------------------------------------------


def test_balance_loss_is_one_when_even_and_E_when_collapsed():
    even = torch.eye(4)[None].repeat(1, 2, 1) * 1e4  # each token is sure of another expert
    routing = Routing(even, even.softmax(-1), torch.ones(1, 8, 1), even.argmax(-1, keepdim=True))
    assert torch.allclose(load_balancing_loss(routing), torch.ones(1))
    one = torch.zeros(1, 8, 4)
    one[..., 2] = 1e4
    routing = Routing(one, one.softmax(-1), torch.ones(1, 8, 1), one.argmax(-1, keepdim=True))
    assert torch.allclose(load_balancing_loss(routing), torch.full((1,), 4.0))
    assert load_variation(routing.loads) == pytest.approx(math.sqrt(3))


def test_balance_loss_is_that_of_the_paper():
    routing = uneven_routing(batch=3)
    for row in range(3):
        counts = torch.bincount(routing.experts[row].flatten(), minlength=4) / (10 * 2)
        mean = routing.probs[row].mean(0)
        assert torch.allclose(load_balancing_loss(routing)[row], 4 * (counts * mean).sum())
        assert torch.allclose(router_z_loss(routing)[row], routing.logits[row].exp().sum(-1).log().square().mean())


@pytest.mark.peer
def test_balance_loss_is_that_of_transformers_for_one_layer_and_row():
    theirs = pytest.importorskip("transformers.models.mixtral.modeling_mixtral").load_balancing_loss_func
    routing = uneven_routing(batch=1)
    expected = theirs((routing.logits[0],), num_experts=4, top_k=2)
    assert torch.allclose(2 * load_balancing_loss(routing)[0], expected)


def test_padding_is_left_out_of_losses_and_loads():
    routing = uneven_routing(batch=1, length=10)
    more = uneven_routing(batch=1, length=6, seed=3)
    joined = Routing(*(torch.cat((a, b), 1) for a, b in zip(routing[:4], more[:4], strict=True)))
    padded = joined._replace(is_token=(torch.arange(16) < 10)[None])
    for name, losses in auxiliary_losses([padded]).items():
        assert torch.allclose(losses, auxiliary_losses([routing])[name]), name
        assert not torch.allclose(auxiliary_losses([joined])[name], losses), f"{name}: padding would have changed it"
    assert torch.equal(padded.loads, routing.loads)
    nothing = joined._replace(is_token=torch.zeros(1, 16, dtype=torch.bool))
    assert all(losses.isfinite().all() for losses in auxiliary_losses([nothing]).values())


@pytest.mark.parametrize("loss", [load_balancing_loss, router_z_loss])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_losses_reach_the_router(loss, score):
    layer = make_layer(replace(SMALL, score=score))
    loss(layer.router(random_input())).sum().backward()
    assert layer.router.weight.grad.norm() > 0


def test_routings_are_recorded_inside_the_with_alone():
    layer = make_layer(SMALL)
    x, is_token = random_input(), torch.ones(2, 11, dtype=torch.bool)
    with record_routing(is_token) as outer:
        layer(x)
        with record_routing() as inner:
            layer(x)
            layer(x)
    layer(x)
    assert len(outer) == 1 and len(inner) == 2
    assert outer[0].is_token is is_token and inner[0].is_token is None


# --- capacity -----------------------------------------------------------------------------------------------------


def test_capacity_drops_the_last_of_an_overloaded_expert():
    logits = torch.zeros(1, 6, 3)
    logits[..., 0] = 5.0
    logits[..., 1] = 2.0
    routing = Routing(logits, logits.softmax(-1), torch.ones(1, 6, 2), logits.topk(2, -1).indices)
    kept = keep_within_capacity(routing, 1.0)  # 6 tokens, 2 choices, 3 experts: 4 each
    assert kept.is_kept[0, :, 0].tolist() == [True] * 4 + [False] * 2
    assert kept.is_kept[0, :, 1].tolist() == [True] * 4 + [False] * 2
    assert kept.num_dropped == 4 and routing.num_dropped == 0
    assert keep_within_capacity(routing, 1.5).num_dropped == 0


def test_first_choices_go_before_second_ones():
    first, second = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]]), torch.zeros(1, 4, 2)
    routing = Routing(second, second.softmax(-1), torch.ones(1, 4, 2), first[None])
    kept = keep_within_capacity(routing, 0.5)  # two places an expert
    assert kept.is_kept[0].tolist() == [[True, False]] * 4


def test_capacity_counts_a_row_by_itself_and_no_padding():
    routing = uneven_routing(batch=3)
    whole = keep_within_capacity(routing, 1.0)
    for row in range(3):
        alone = keep_within_capacity(Routing(*(x[row : row + 1] for x in routing[:4])), 1.0)
        assert torch.equal(alone.is_kept[0], whole.is_kept[row])
    is_token = (torch.arange(10) >= 4).expand(3, 10)
    padded = keep_within_capacity(routing._replace(is_token=is_token), 1.0)
    cut = keep_within_capacity(Routing(*(x[:, 4:] for x in routing[:4])), 1.0)
    assert torch.equal(padded.is_kept[:, 4:], cut.is_kept) and not padded.is_kept[:, :4].any()
    assert padded.num_dropped == cut.num_dropped > 0


def test_what_is_dropped_is_not_computed_and_only_in_training():
    layer = make_layer(replace(SMALL, capacity_factor=0.5))
    x = random_input()
    with record_routing() as routings:
        trained = layer.train()(x)
        asked = layer.eval()(x)
    assert routings[0].num_dropped > 0 and routings[1].num_dropped == 0
    assert (trained - combine_experts_plain(x, routings[0], layer.experts)).abs().max() < 1e-5
    assert (asked - combine_experts_plain(x, routings[1], layer.experts)).abs().max() < 1e-5


def test_all_dropped_gives_zero():
    layer = make_layer(SMALL)
    x = random_input()
    routing = layer.router(x)
    with torch.no_grad():
        nothing = combine_experts(x, routing._replace(is_kept=torch.zeros(2, 11, 2, dtype=torch.bool)), layer.experts)
    assert torch.equal(nothing, torch.zeros_like(x))


# --- first values and refusals ------------------------------------------------------------------------------------


def test_first_weights_cover_the_router_and_its_correction():
    with torch.device("meta"):
        layer = SparseMoe(8, VARIANTS["sigmoid in groups"])
    layer = layer.to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        torch.nn.init.constant_(tensor, float("nan"))
    init_weights(layer, 0)
    assert all(tensor.isfinite().all() for tensor in (*layer.parameters(), *layer.buffers()))
    assert 0.015 < layer.router.weight.std() < 0.025 and not layer.router.correction.any()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"top_k": 7}, "among 6 experts"),
        ({"num_groups": 4}, "groups must divide"),
        ({"num_groups": 3, "num_kept_groups": 4}, "no more be kept"),
        ({"num_groups": 6, "num_kept_groups": 2, "score": "sigmoid"}, "needs two"),
        ({"num_groups": 3, "num_kept_groups": 1, "top_k": 3}, "among 2 experts"),
        ({"score": "relu"}, "known: softmax, sigmoid"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"capacity_factor": 0.0}, "must be above 0"),
        ({"balance_coefficient": -1.0}, "none may be below 0"),
        ({"has_shared_gate": True}, "nothing to weigh"),
    ],
)
def test_refuses_contradictory_settings(changes, match):
    with pytest.raises(ConfigError, match=match):
        replace(SMALL, **changes)
