"""Pipeline parallelism: each rank holds some of a decoder's layers, and micro-batches pass through all ranks.

The layers are cut into stages of nearly equal numbers; the first also embeds, the last also has the last norm and the
output matrix. Micro-batches are those of ``grad_accum_steps``. With ``1f1b`` a rank has one stage and does one forward
and one backward pass in turn; with ``interleaved`` it has several, far apart, and waits less. Names of parameters stay
those of the whole model. An embedding that is also the output matrix stands on the first and on the last rank; the two
add their gradients, and stay equal.

Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2. The schedules are those of torch.distributed.pipelining.
Not here: objectives that do more than one loss from the last hidden state; evaluation during the run.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor

from modelwright.base.errors import ConfigError
from modelwright.models.decoder import Decoder
from modelwright.models.moe_decoder import MoeDecoder
from modelwright.train.objective import Objective

if TYPE_CHECKING:
    from modelwright.train.loop import Run
    from modelwright.train.parallel import ParallelConfig

_LAST_PARTS = ("norm", "lm_head")


class Segment(nn.Module):
    """One stage: some layers, and what comes before the first or after the last of all. Children keep their names."""

    def __init__(self, model: Decoder, layers: dict[str, nn.Module], *, is_first: bool, is_last: bool):
        super().__init__()
        self.is_first, self.is_last = is_first, is_last
        # The decoder itself is asked to embed and for positions; it is no child, so that its weights are not counted.
        object.__setattr__(self, "decoder", model)
        for name, child in model.named_children():
            has_weights = next(child.parameters(), None) is not None
            is_mine = is_last if name in _LAST_PARTS else is_first or not has_weights
            if name != "layers" and is_mine:
                self.add_module(name, child)
        self.layers = nn.ModuleDict(layers)
        self.run: Run | None = None

    def forward(self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Map token ids (B, T) in the first stage, else the stream (B, T, D), to the stream."""
        assert self.run is not None
        decoder: Decoder = self.decoder  # type: ignore[assignment]
        with self.run.autocast():
            if self.is_first:
                x = decoder.embed_tokens(x, positions)
            places = decoder.positional(x, positions, None)
            for layer in self.layers.values():
                x = layer(x, places, mask, None)
            return self.norm(x) if self.is_last else x  # type: ignore[operator,no-any-return]


class Held(nn.Module):
    """All that one rank holds, under the names of the whole model."""

    def __init__(self, config: Any, segments: Sequence[Segment]):
        super().__init__()
        self.config = config
        layers: dict[str, nn.Module] = {}
        for segment in segments:
            layers |= dict(segment.layers.named_children())
            for name, child in segment.named_children():
                if name != "layers":
                    self.add_module(name, child)
        self.layers = nn.ModuleDict(layers)


class Pipeline:
    """The stages of this rank, and the way of micro-batches through all of them."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, config: "ParallelConfig", device: torch.device):
        if not isinstance(model, Decoder) or isinstance(model, MoeDecoder):
            raise ConfigError(
                f"loop.parallel.pipeline is {mesh.size()}; {type(model).__name__} is no plain decoder. Use shard."
            )
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.device, self.config = device, config
        per_rank = config.stages_per_rank if config.schedule == "interleaved" else 1
        self.num_stages = self.size * per_rank
        num_layers = len(model.layers)
        if num_layers < self.num_stages:
            raise ConfigError(
                f"loop.parallel asks for {self.num_stages} stages, and the model has {num_layers} layers. Lower "
                "pipeline or stages_per_rank."
            )
        self.is_tied = bool(model.tied_names())
        self.indices = list(range(self.rank, self.num_stages, self.size))
        self.segments = self._cut(model, num_layers)
        self.model = Held(model.config, self.segments)
        self._schedules: dict[int, Any] = {}
        self._loss: Any = None

    def _cut(self, model: Decoder, num_layers: int) -> list[Segment]:
        bounds = [num_layers * i // self.num_stages for i in range(self.num_stages + 1)]
        has_first, has_last = 0 in self.indices, self.num_stages - 1 in self.indices
        if has_last and not has_first and self.is_tied:
            model.lm_head.weight = nn.Parameter(_copied(model.lm_head.weight), model.lm_head.weight.requires_grad)
        mine = {}
        for index in self.indices:
            layers = {str(i): model.layers[i] for i in range(bounds[index], bounds[index + 1])}
            mine[index] = Segment(model, layers, is_first=index == 0, is_last=index == self.num_stages - 1)
        kept = {id(m) for segment in mine.values() for m in segment.modules()}
        for name, child in list(model.named_children()):
            if name == "layers":
                model.layers = nn.ModuleList()
            elif id(child) not in kept:
                model._modules[name] = None
        return list(mine.values())

    def is_second_copy(self, name: str) -> bool:
        """Tell whether a parameter is counted on another rank already."""
        return self.is_tied and name == "lm_head.weight"

    def find_loss(self, objective: Objective) -> Any:
        """Return the objective's loss of the output matrix, the last hidden state and the labels.

        Raises:
            ConfigError: The objective is not one loss of the last hidden state.
        """
        loss_of = getattr(objective, "loss_of_hidden", None)
        if loss_of is None or type(objective).step is not Objective.step:
            raise ConfigError(
                f"loop.parallel.pipeline is {self.size}, and {type(objective).__name__} is more than one loss of the "
                "last hidden state. Use shard or tensor."
            )
        return loss_of

    def accumulate(self, run: "Run", objective: Objective, batches: Sequence[Any], num_trained: float) -> Tensor:
        """Pass the micro-batches through all stages, forward and back; return the summed loss on every rank."""
        loss_of = self.find_loss(objective)
        scale = run.precision.scale

        def loss(hidden: Tensor, labels: Tensor) -> Tensor:
            with run.autocast():
                return loss_of(self.segments[-1].lm_head, hidden, labels) * (scale / num_trained)

        self._loss = loss
        for segment in self.segments:
            segment.run = run
        batches = [batch.to(run.device) for batch in batches]
        given = {name: _join(batches, name) for name in ("positions", "mask")}
        kwargs: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        losses: list[Tensor] = []
        if self.num_stages - 1 in self.indices:
            kwargs |= {"target": _join(batches, "labels"), "losses": losses}
        inputs = (_join(batches, "input_ids"),) if 0 in self.indices else ()
        self._schedule(len(batches)).step(*inputs, **kwargs)
        self._meet_tied()
        total = torch.zeros((), device=run.device)
        for value in losses:
            total += value.detach() * (num_trained / scale)
        dist.all_reduce(total, group=self.group)
        return total

    def _schedule(self, num_micro: int) -> Any:
        if num_micro not in self._schedules:
            if num_micro < self.size:
                raise ConfigError(
                    f"A pipeline of {self.size} ranks gets {num_micro} micro-batches an update; it needs at least one "
                    "a rank, and wastes little with four. Raise loop.grad_accum_steps and lower micro_batch_size."
                )
            stages = [
                PipelineStage(segment, index, self.num_stages, self.device, group=self.group)
                for index, segment in zip(self.indices, self.segments, strict=True)
            ]
            options: dict[str, Any] = {"loss_fn": lambda h, y: self._loss(h, y), "scale_grads": False}
            if self.config.schedule == "interleaved":
                made: Any = ScheduleInterleaved1F1B(stages, num_micro, **options)  # type: ignore[arg-type]
            else:
                made = Schedule1F1B(stages[0], num_micro, **options)
            self._schedules[num_micro] = made
        return self._schedules[num_micro]

    def _meet_tied(self) -> None:
        """Add the gradients of the two copies of a tied matrix."""
        if not self.is_tied:
            return
        last = (self.num_stages - 1) % self.size
        for rank, name, other in ((0, "embed", last), (last, "lm_head", 0)):
            if self.rank == rank and other != rank:
                weight = getattr(self.model, name).weight
                if weight.grad is None:  # frozen
                    continue
                if isinstance(weight, DTensor):  # a cut matrix's gradient may come whole, or as parts of a sum
                    weight.grad = weight.grad.redistribute(placements=weight.placements)
                gradient = weight.grad
                mine = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                theirs = torch.empty_like(mine)
                peer = dist.get_global_rank(self.group, other)
                works = dist.batch_isend_irecv(
                    [
                        dist.P2POp(dist.isend, mine.contiguous(), peer, self.group),
                        dist.P2POp(dist.irecv, theirs, peer, self.group),
                    ]
                )
                for work in works:
                    work.wait()
                # The same order of the two on both ranks, so that both copies stay equal to the last bit.
                mine.copy_(mine + theirs if rank == 0 else theirs + mine)

    def gather(self, mine: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of all stages on the first rank of the pipeline; elsewhere what was given."""
        shapes = {name: (tuple(t.shape), t.dtype) for name, t in mine.items()}
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, shapes, group=self.group)
        found, seen = dict(mine), set(everyones[0])
        first = dist.get_global_rank(self.group, 0)
        for rank in range(1, self.size):
            for name, (shape, dtype) in everyones[rank].items():
                if name in seen:
                    continue
                seen.add(name)
                if self.rank == rank:
                    dist.send(mine[name].contiguous(), first, self.group)
                elif self.rank == 0:
                    found[name] = torch.empty(shape, dtype=dtype)
                    dist.recv(found[name], dist.get_global_rank(self.group, rank), self.group)
        return found


def _copied(weight: Tensor) -> Tensor:
    return weight.detach().clone()


def _join(batches: Sequence[Any], name: str) -> Tensor | None:
    values = [getattr(batch, name) for batch in batches]
    return None if values[0] is None else torch.cat(values)
