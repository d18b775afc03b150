"""Sparse mixture of experts: a router sends each token to a few of many feed-forward halves and weighs what they say.

Every token reaches the experts it chose (dropless): tokens are sorted by expert, each expert computes its own in one
product, and the results are added back. With a capacity factor, training drops what goes beyond an expert's share.
Routing is float32 throughout, under autocast too. The layer runs outside torch.compile: how many tokens an expert gets
is known only when the step runs.

The losses that keep the load even are defined for one layer and one row (GShard's "group"), over its tokens alone:
padding is left out, and since every row has its own, a batch may be cut into micro-batches anywhere.

Source: Shazeer et al. 2017, arXiv 1701.06538; Lepikhin et al. 2020, arXiv 2006.16668 (GShard: groups, capacity);
Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6 (Switch: load balancing); Zoph et al. 2022, arXiv 2202.08906,
equation 5 (z-loss); DeepSeek-AI 2024, arXiv 2405.04434 (groups of experts, shared experts) and arXiv 2412.19437,
equations 12 to 20 (sigmoid scores, correction of the choice). Not here: experts spread over several devices.
B, T, D, F, E as everywhere; k experts a token, n tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.nn.init import STD
from modelwright.nn.mlp import GatedMlp

SCORES = ("softmax", "sigmoid")


@dataclass(frozen=True)
class MoeOptions:
    """How the experts of a layer are chosen and trained; the same for all layers of a model."""

    num_experts: int
    top_k: int
    expert_size: int  # width F of each expert
    score: str = "softmax"  # over all experts; or "sigmoid", each by itself, with a correction of the choice
    is_renormalised: bool = True  # the weights of the chosen experts are made to sum to 1
    scale: float = 1.0  # factor on the weights, after that
    num_groups: int = 1  # experts stand in so many groups,
    num_kept_groups: int = 1  # of which a token chooses from the best so many
    shared_size: int = 0  # width of the expert that every token passes; 0: there is none
    has_shared_gate: bool = False  # a sigmoid of the token weighs the shared expert
    balance_coefficient: float = 0.001  # weight of the load-balancing loss in training
    z_coefficient: float = 0.0  # weight of the router z-loss in training
    capacity_factor: float | None = None  # in training an expert takes this times its even share; None: all

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "expert_size", "num_groups", "num_kept_groups"):
            value = getattr(self, name)
            if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if self.score not in SCORES:
            raise ConfigError(f"score is {self.score!r}; known: {', '.join(SCORES)}.")
        if self.num_experts % self.num_groups or self.num_kept_groups > self.num_groups:
            raise ConfigError(
                f"num_experts is {self.num_experts}, num_groups {self.num_groups}, num_kept_groups "
                f"{self.num_kept_groups}; the groups must divide the experts, and no more be kept than there are."
            )
        if self.score == "sigmoid" and self.num_groups > 1 and self.num_experts < 2 * self.num_groups:
            raise ConfigError(
                f"num_experts is {self.num_experts} in {self.num_groups} groups; a group's score is that of its best "
                "two experts, so it needs two."
            )
        reachable = self.num_kept_groups * (self.num_experts // self.num_groups)
        if self.top_k > reachable:
            raise ConfigError(f"top_k is {self.top_k}; a token can choose among {reachable} experts only.")
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ConfigError(f"capacity_factor is {self.capacity_factor}; it must be above 0, or left out.")
        if min(self.balance_coefficient, self.z_coefficient, self.shared_size) < 0:
            raise ConfigError(
                f"balance_coefficient is {self.balance_coefficient}, z_coefficient {self.z_coefficient}, shared_size "
                f"{self.shared_size}; none may be below 0."
            )
        if self.has_shared_gate and not self.shared_size:
            raise ConfigError("has_shared_gate is set, but shared_size is 0; there is nothing to weigh.")


class Routing(NamedTuple):
    """Where one layer sent the tokens of a forward pass."""

    logits: Tensor  # (B, T, E) float32
    probs: Tensor  # (B, T, E) float32, the scores made to sum to 1
    weights: Tensor  # (B, T, k) float32
    experts: Tensor  # (B, T, k) the chosen ones
    is_token: Tensor | None = None  # (B, T) False at padding; None: there is none
    is_kept: Tensor | None = None  # (B, T, k) False where an expert was full; None: nothing was dropped

    @property
    def loads(self) -> Tensor:
        """Tokens that chose each expert, padding left out: (E,), whole numbers."""
        return self._choices().sum((0, 1))

    @property
    def num_dropped(self) -> int:
        """Choices of tokens that were not computed."""
        if self.is_kept is None:
            return 0
        dropped = ~self.is_kept if self.is_token is None else ~self.is_kept & self.is_token[..., None]
        return int(dropped.sum())

    def _choices(self) -> Tensor:
        """Return how often each token chose each expert, 0 at padding: (B, T, E)."""
        chosen = torch.zeros_like(self.logits, dtype=torch.long).scatter_(-1, self.experts, 1)
        return chosen if self.is_token is None else chosen * self.is_token[..., None]

    def row_means(self, values: Tensor) -> Tensor:
        """Average (B, T, ...) over the tokens of each row: (B, ...)."""
        if self.is_token is None:
            return values.mean(1)
        shape = (*self.is_token.shape, *[1] * (values.dim() - 2))
        counts = self.is_token.sum(1).clamp(min=1).view(-1, *[1] * (values.dim() - 2))
        return (values * self.is_token.view(shape)).sum(1) / counts


def load_balancing_loss(routing: Routing) -> Tensor:
    """Return ``E * sum_e f_e P_e`` for each row, (B,).

    f_e is the fraction of the row's choices that fell on expert e, P_e the mean over its tokens of the probability of
    e: 1 when the load is even, E when everything goes to one. f has no gradient; it reaches the router through P.
    That of transformers is k times this and takes all layers, and all rows, as one.
    """
    choices = routing._choices().to(routing.probs.dtype) / routing.experts.shape[-1]
    fraction = routing.row_means(choices)  # (B, E), sums to 1
    return routing.logits.shape[-1] * (fraction * routing.row_means(routing.probs)).sum(-1)


def router_z_loss(routing: Routing) -> Tensor:
    """Return the mean square of ``log sum_e exp(logit_e)`` over each row's tokens, (B,): it keeps logits small."""
    return routing.row_means(routing.logits.logsumexp(-1).square())


def auxiliary_losses(routings: Sequence[Routing]) -> dict[str, Tensor]:
    """Return both losses of every layer that routes, each (L, B)."""
    return {
        "load_balancing": torch.stack([load_balancing_loss(routing) for routing in routings]),
        "router_z": torch.stack([router_z_loss(routing) for routing in routings]),
    }


def load_variation(loads: Tensor) -> float:
    """Return the coefficient of variation of the experts' loads (E,): 0 when even, sqrt(E - 1) when one has all.

    >>> load_variation(torch.tensor([3, 3, 3, 3])), round(load_variation(torch.tensor([12, 0, 0, 0])), 6)
    (0.0, 1.732051)
    """
    return float(loads.double().std(correction=0) / loads.double().mean())


class _Recording(NamedTuple):
    routings: list[Routing]
    is_token: Tensor | None


_recording: ContextVar[_Recording | None] = ContextVar("recorded_routing", default=None)


@contextmanager
def record_routing(is_token: Tensor | None = None) -> Iterator[list[Routing]]:
    """Collect the `Routing` of every sparse layer that runs inside the ``with``, in their order.

    Args:
        is_token: (B, T) False at padding, which is left out of loads, losses and capacity; None: there is none.
    """
    recording = _Recording([], is_token)
    token = _recording.set(recording)
    try:
        yield recording.routings
    finally:
        _recording.reset(token)


class Router(nn.Module):
    """Scores the experts for each token and chooses."""

    correction: Tensor | None

    def __init__(self, hidden_size: int, options: MoeOptions):
        super().__init__()
        self.options = options
        self.weight = nn.Parameter(torch.empty(options.num_experts, hidden_size))
        # (E,) added to the scores for the choice, not for the weights; no gradient reaches it
        self.register_buffer("correction", torch.zeros(options.num_experts) if options.score == "sigmoid" else None)

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Draw the matrix as every other, and correct nothing yet."""
        self.weight.copy_(torch.empty(self.weight.shape).normal_(0.0, STD, generator=generator))
        if self.correction is not None:
            self.correction.zero_()

    def forward(self, x: Tensor) -> Routing:
        """Route (B, T, D)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())  # (B, T, E)
        if self.options.score == "softmax":
            scores = probs = logits.softmax(-1)
        else:
            scores = logits.sigmoid()
            probs = scores / scores.sum(-1, keepdim=True)
        ranking = scores.detach() if self.correction is None else scores.detach() + self.correction.float()
        experts = self._among_best_groups(ranking).topk(self.options.top_k, dim=-1).indices  # (B, T, k)
        weights = scores.gather(-1, experts)
        if self.options.is_renormalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(logits, probs, weights * self.options.scale, experts)

    def _among_best_groups(self, ranking: Tensor) -> Tensor:
        """Put the experts of all but the best groups out of reach: (B, T, E)."""
        o = self.options
        if o.num_groups == 1:
            return ranking
        grouped = ranking.unflatten(-1, (o.num_groups, -1))  # (B, T, G, E/G)
        # The best expert stands for a group (DeepSeek-V2), or the best two (V3).
        best = grouped.amax(-1) if o.score == "softmax" else grouped.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept.scatter_(-1, best.topk(o.num_kept_groups, dim=-1).indices, True)
        return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)

    @torch.no_grad()
    def correct(self, loads: Tensor, rate: float) -> None:
        """Make overloaded experts a little less likely to be chosen, and the others more: balance without a loss.

        Args:
            loads: (E,) tokens that chose each expert in the last step.
            rate: How far a correction moves.

        Raises:
            ConfigError: The scores are a softmax, which has no correction.
        """
        if self.correction is None:
            raise ConfigError(f"score is {self.options.score!r}; only 'sigmoid' routers have a correction.")
        mean = loads.double().mean()
        self.correction += rate * torch.sign(mean - loads.double()).to(self.correction)


def keep_within_capacity(routing: Routing, capacity_factor: float) -> Routing:
    """Drop the choices that go beyond an expert's share of its row: ``ceil(capacity_factor * k * n / E)`` of n tokens.

    First choices go before second ones, and earlier tokens before later ones.
    """
    batch, length, top_k = routing.experts.shape
    num_experts = routing.logits.shape[-1]
    is_token = routing.is_token
    if is_token is None:
        is_token = torch.ones(batch, length, dtype=torch.bool, device=routing.experts.device)
    capacity = (capacity_factor * top_k * is_token.sum(1) / num_experts).ceil()  # (B,)
    queue = routing.experts.transpose(1, 2).flatten(1)  # (B, k * T)
    chosen = F.one_hot(queue, num_experts) * is_token.repeat(1, top_k)[..., None]
    rank = chosen.cumsum(1).gather(-1, queue[..., None])[..., 0]  # 1 for the first that an expert takes
    is_kept = (rank <= capacity[:, None]).view(batch, top_k, length).transpose(1, 2)
    return routing._replace(is_kept=is_kept & is_token[..., None])


def combine_experts(x: Tensor, routing: Routing, experts: nn.ModuleList) -> Tensor:
    """Return the weighted sum of what each token's experts make of it, (B, T, D)."""
    top_k, num_experts = routing.experts.shape[-1], len(experts)
    flat = x.reshape(-1, x.shape[-1])  # (n, D)
    chosen = routing.experts.flatten()  # (n * k,)
    if routing.is_kept is not None:
        chosen = torch.where(routing.is_kept.flatten(), chosen, num_experts)
    order = chosen.argsort(stable=True)  # by expert; the dropped ones stand last
    counts = chosen.bincount(minlength=num_experts + 1).tolist()[:num_experts]
    order = order[: sum(counts)]
    token = order // top_k
    pieces = flat[token].split(counts)
    # In training an expert that nobody chose computes nothing too, so that its gradient is zero and not missing.
    outputs = [
        expert(piece)
        for expert, piece in zip(experts, pieces, strict=True)
        if len(piece) or (torch.is_grad_enabled() and x.requires_grad)
    ]
    if not outputs:
        return torch.zeros_like(x)
    weighted = torch.cat(outputs) * routing.weights.flatten()[order, None]  # float32
    total = torch.zeros(flat.shape, dtype=weighted.dtype, device=x.device).index_add(0, token, weighted)
    return total.to(x.dtype).view(x.shape)


def combine_experts_plain(x: Tensor, routing: Routing, experts: nn.ModuleList) -> Tensor:
    """Compute what `combine_experts` computes one token at a time: the readable twin that tests compare with."""
    rows = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            out = torch.zeros_like(x[b, t])
            for j, e in enumerate(routing.experts[b, t].tolist()):
                if routing.is_kept is None or routing.is_kept[b, t, j]:
                    out = out + routing.weights[b, t, j] * experts[e](x[b, t])
            rows.append(out)
    return torch.stack(rows).view(x.shape)


class SparseMoe(nn.Module):
    """The feed-forward half of a block as a mixture: chosen experts, and a shared one where a family has it."""

    def __init__(self, hidden_size: int, options: MoeOptions):
        super().__init__()
        self.options = options
        self.router = Router(hidden_size, options)
        self.experts = nn.ModuleList(GatedMlp(hidden_size, options.expert_size) for _ in range(options.num_experts))
        self.shared = GatedMlp(hidden_size, options.shared_size) if options.shared_size else None
        self.shared_gate = nn.Linear(hidden_size, 1, bias=False) if options.has_shared_gate else None

    def output_layers(self) -> list[nn.Linear]:
        """Return the layers that write into the residual stream."""
        halves = [*self.experts, *([] if self.shared is None else [self.shared])]
        return [half.down for half in halves]  # type: ignore[misc]

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        recording = _recording.get()
        routing = self.router(x)
        if recording is not None:
            routing = routing._replace(is_token=recording.is_token)
        if self.training and self.options.capacity_factor is not None:
            routing = keep_within_capacity(routing, self.options.capacity_factor)
        if recording is not None:
            recording.routings.append(routing)
        y = combine_experts(x, routing, self.experts)
        if self.shared is None:
            return y
        shared = self.shared(x)
        return y + (shared if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * shared)
