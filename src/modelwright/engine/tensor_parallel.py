"""One model computed by several processes of this machine: tensor parallelism for serving.

Each rank has a part of the heads and of the hidden layer of every block, and the keys and values of its own heads. The
calling process is rank 0: it schedules, tells the others which tokens of which requests a step has, adds up the parts
behind attention and behind the feed-forward half of each block with them, and alone applies the output matrix and
draws. The other ranks are processes that torch.multiprocessing starts. They meet in a group of their own, gloo between
CPUs and nccl between GPUs, so that a process that is part of a larger group (a trainer's) can serve too.

A rank that ends or fails is noticed by its closed connection, at once; one that stands still, after `PATIENCE`. The
step then fails with an error that names it, the other ranks are ended, and so is every later step.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3. Not here: several machines, a cut embedding and output matrix
(each rank maps the first, rank 0 alone reads the second), low-bit weights, experts, adapters, recurrent layers.
"""

import copy
import signal
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, DeviceError
from modelwright.engine.runner import PagedState, Runner, Span, StepPlan
from modelwright.engine.scheduler import Chunk
from modelwright.models.cut import layer_cuts
from modelwright.nn.linear import replace_module

PATIENCE = timedelta(seconds=120)  # for a rank that does not answer in the middle of a step
START_SECONDS = 900.0  # for a rank to load its part
END_SECONDS = 5.0  # for ranks to end, or to say why they failed, before they are killed
HERE = "127.0.0.1"
SETTING = "tensor_parallel"
ADVICE = "Serve it by one process."


class Exchange:
    """Sums over the ranks, in the middle of a step."""

    def __init__(self, num_ranks: int):
        self.num_ranks = num_ranks
        self.group: Any = None  # the process group, once all have met
        self.is_open = False  # only while all ranks compute the same step

    def join(self, device: torch.device, port: int, rank: int) -> None:
        """Meet the other ranks."""
        store = dist.TCPStore(HERE, port, self.num_ranks, is_master=False, timeout=PATIENCE)
        self.meet(device, store, rank)

    def meet(self, device: torch.device, store: Any, rank: int) -> None:
        """Meet the other ranks through a store."""
        if device.type == "cuda":
            options: Any = dist.ProcessGroupNCCL.Options()
            options._timeout = PATIENCE
            self.group = dist.ProcessGroupNCCL(store, rank, self.num_ranks, options)
        else:
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._timeout = PATIENCE
            options._devices = [gloo.create_device(hostname=HERE)]
            self.group = gloo(store, rank, self.num_ranks, options)

    def add_up(self, x: Tensor) -> Tensor:
        """Return the sum of every rank's tensor.

        Raises:
            ConfigError: The other ranks are not computing.
        """
        if not self.is_open:
            raise ConfigError(
                f"The model is cut over {self.num_ranks} processes ({SETTING}) and was called outside of the "
                "engine's steps, where the others do not compute. Load it in one process for this."
            )
        x = x.contiguous()
        self.group.allreduce([x]).wait()
        return x


class RowPart(nn.Module):
    """Some rows of a linear layer; what they give is added up over the ranks, and the bias once."""

    def __init__(self, weight: Tensor, bias: Tensor | None, exchange: Exchange):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.exchange = exchange

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., a part of the inputs) to (..., all outputs)."""
        out = self.exchange.add_up(nn.functional.linear(x, self.weight))
        return out if self.bias is None else out + self.bias


@torch.no_grad()
def cut_model(model: Any, rank: int, exchange: Exchange) -> Any:
    """Return one rank's part of a model; what is not cut is shared with the given one.

    Raises:
        ConfigError: The model has layers that are not cut here, or sizes that do not divide.
    """
    num_ranks = exchange.num_ranks
    cuts = layer_cuts(model, num_ranks, setting=SETTING, advice=ADVICE)
    kept: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    made = copy.deepcopy(model, kept)
    for name, cut in cuts.items():
        layer: Any = made.get_submodule(name)
        size = layer.out_features if cut == "columns" else layer.in_features
        if size % num_ranks:
            raise ConfigError(
                f"{SETTING} is {num_ranks}, and {name} has {size} {'outputs' if cut == 'columns' else 'inputs'}, which "
                "it does not divide. Choose a degree that divides them."
            )
        mine = slice(rank * size // num_ranks, (rank + 1) * size // num_ranks)
        if cut == "rows":
            part: nn.Module = RowPart(layer.weight[:, mine].contiguous(), layer.bias, exchange)
        else:
            part = nn.Linear(layer.in_features, size // num_ranks, bias=layer.bias is not None, device="meta")
            part.weight = nn.Parameter(layer.weight[mine].clone(), requires_grad=False)
            if layer.bias is not None:
                part.bias = nn.Parameter(layer.bias[mine].clone(), requires_grad=False)
        replace_module(made, name, part)
    layout = [cache._replace(num_kv_heads=cache.num_kv_heads // num_ranks) for cache in model.cache_layout()]
    made.cache_layout = lambda: layout
    return made.eval()


@dataclass(frozen=True)
class Told:
    """What another rank has to know of a request's tokens in a step: a `Span`."""

    start: int
    token_ids: list[int]
    block_table: list[int]
    num_rows: int

    @property
    def computed_end(self) -> int:
        """One past the last position that is computed."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class Sizes:
    """What the cache of every rank has in common, and how far steps are padded."""

    num_blocks: int
    block_size: int
    kv_dtype: str | None
    min_rows: int
    num_threads: int


class Ranks:
    """The other processes, as rank 0 sees them.

    Args:
        load: Loads the whole model on a device, by its name; it is pickled for the other processes.
        num_ranks: All of them, this one included.
    """

    def __init__(self, load: Callable[[str], Any], num_ranks: int):
        self.num_ranks = num_ranks
        self.exchange = Exchange(num_ranks)
        self.error: DeviceError | None = None  # why no step can be computed any more
        self._load = load
        self._others: list[tuple[Any, Connection]] = []
        self.close = weakref.finalize(self, _end, self._others)

    def cut(self, model: Any) -> Any:
        """Return rank 0's part of the model; raises as `cut_model`.

        Raises:
            DeviceError: There are fewer GPUs than ranks.
        """
        device = next(model.parameters()).device
        if device.type == "cuda" and torch.cuda.device_count() < self.num_ranks:
            raise DeviceError(
                f"{SETTING} is {self.num_ranks} and there are {torch.cuda.device_count()} GPUs; each rank needs one. "
                "Ask for fewer ranks, or for the CPU."
            )
        return cut_model(model, 0, self.exchange)

    def start(self, device: torch.device, sizes: Sizes) -> None:
        """Start the other processes and meet them.

        Raises:
            DeviceError: One of them did not come up.
        """
        context = torch.multiprocessing.get_context("spawn")
        # No port is chosen here: the store takes a free one.
        store = dist.TCPStore(HERE, 0, self.num_ranks, is_master=True, wait_for_workers=False, timeout=PATIENCE)
        for rank in range(1, self.num_ranks):
            mine, theirs = context.Pipe()
            place = f"cuda:{rank}" if device.type == "cuda" else device.type
            work = (theirs, (rank, self.num_ranks, store.port), place, self._load, sizes)
            process = context.Process(target=serve_rank, args=work, daemon=True, name=f"tensor-rank-{rank}")
            process.start()
            theirs.close()
            self._others.append((process, mine))
        try:
            for rank in range(1, self.num_ranks):
                self._wait_until_loaded(rank)
            self.exchange.meet(device, store, 0)
        except (RuntimeError, EOFError, OSError) as error:
            raise self._fail(error) from error
        self._store = store  # its server lives as long as the group

    def _wait_until_loaded(self, rank: int) -> None:
        process, link = self._others[rank - 1]
        stop = time.monotonic() + START_SECONDS
        while not link.poll(0.2):
            if not process.is_alive() or time.monotonic() > stop:
                raise EOFError
        said = link.recv()
        if said != "ready":
            raise EOFError(f"rank {rank} did not come up:\n{said}")

    @contextmanager
    def computing(self, spans: Sequence[Span]) -> Iterator[None]:
        """Have the other ranks compute a step along with what is computed here.

        Raises:
            DeviceError: One of them has died or failed, now or before.
        """
        if self.error is not None:
            raise self.error
        num_threads = torch.get_num_threads()
        try:
            told = [Told(s.start, list(s.token_ids), list(s.block_table), s.num_rows) for s in spans]
            for _, link in self._others:
                link.send(told)
            self.exchange.is_open = True
            torch.set_num_threads(max(1, num_threads // self.num_ranks))
            yield
        except BaseException as error:  # half a step leaves the ranks at different places
            raise self._fail(error) from error
        finally:
            self.exchange.is_open = False
            torch.set_num_threads(num_threads)

    def _fail(self, error: BaseException) -> BaseException:
        """End all ranks; return the error that names the one to blame, or the given one if none is."""
        stop = time.monotonic() + END_SECONDS
        blame = _blame(self._others, error)
        while blame is None and time.monotonic() < stop and isinstance(error, (RuntimeError, EOFError, OSError)):
            time.sleep(0.05)
            blame = _blame(self._others, error)
        if blame is None:
            blame = f"no rank has ended; rank 0 met {type(error).__name__}: {error}"
        self.error = DeviceError(
            f"The model is cut over {self.num_ranks} processes and a step was not finished: {blame}. All ranks have "
            "ended with it. Start the engine again."
        )
        self.close()
        return self.error if isinstance(error, (RuntimeError, EOFError, OSError)) else error


def _blame(others: Sequence[tuple[Any, Connection]], error: BaseException) -> str | None:
    """Return which rank ended, and what it said."""
    if isinstance(error, EOFError) and error.args:
        return str(error)
    for rank, (process, link) in enumerate(others, start=1):
        try:
            if link.poll():
                return f"rank {rank} failed:\n{link.recv()}"
        except (EOFError, OSError):
            process.join(1)
        if not process.is_alive():
            return f"rank {rank} has died (exit code {process.exitcode})"
    return None


def _end(others: list[tuple[Any, Connection]]) -> None:
    """End the other ranks: a closed link tells them to, and what stays is killed."""
    for _, link in others:
        link.close()
    stop = time.monotonic() + END_SECONDS
    for process, _ in others:
        process.join(max(0.1, stop - time.monotonic()))
        if process.is_alive():
            process.kill()
    others.clear()


class TensorRunner(Runner):
    """Rank 0 of the runners: computes steps together with the other ranks."""

    def __init__(
        self, model: nn.Module, ranks: Ranks, *, num_blocks: int, block_size: int, kv_dtype: str | None = None
    ):
        super().__init__(model, num_blocks=num_blocks, block_size=block_size, kv_dtype=kv_dtype)
        self.ranks = ranks
        num_threads = max(1, torch.get_num_threads() // ranks.num_ranks)
        ranks.start(self.device, Sizes(num_blocks, block_size, kv_dtype, self.planner.min_rows, num_threads))

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute a step's tokens on all ranks; return what `Runner.run` returns.

        Raises:
            DeviceError: A rank has died or failed.
        """
        with self.ranks.computing(chunks):
            return super().run(chunks)


@torch.inference_mode()
def _compute(runner: Runner, plan: StepPlan) -> None:
    """Do a step's work up to the output matrix."""
    state = PagedState(runner.stores, plan)
    runner.model.hidden(plan.input_ids, positions=plan.positions, state=state)


def serve_rank(
    link: Connection, meeting: tuple[int, int, int], device_name: str, load: Callable[[str], Any], sizes: Sizes
) -> None:
    """Compute steps as a rank other than 0 until the link is closed; the main function of its process.

    Args:
        link: To rank 0.
        meeting: This rank, how many there are, and the port where they meet.
        device_name: Where this rank computes.
        load: Loads the whole model on a device.
        sizes: Of the cache.
    """
    rank, num_ranks, port = meeting
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 hears it and ends the others
    torch.set_num_threads(sizes.num_threads)
    try:
        exchange = Exchange(num_ranks)
        model = cut_model(load(device_name), rank, exchange)
        runner = Runner(model, num_blocks=sizes.num_blocks, block_size=sizes.block_size, kv_dtype=sizes.kv_dtype)
        runner.planner.min_rows = sizes.min_rows
        link.send("ready")
        exchange.join(runner.device, port, rank)
        exchange.is_open = True
        while True:
            _compute(runner, runner.planner.plan(link.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # rank 0 has closed the link
    except BaseException:  # rank 0 is told, whatever it was
        try:
            link.send(traceback.format_exc(limit=-3))
        except OSError:
            return
