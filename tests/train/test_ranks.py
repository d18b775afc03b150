"""Two processes with unequal numbers of trained tokens take the step that one process takes with all rows."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import torch
from tests.train.test_loop import plain_loop, sft_rows, tiny_model

from modelwright.data.load import Batch, RowLoader
from modelwright.data.pack import IGNORED, pack_rows
from modelwright.train.loop import Layout, Run
from modelwright.train.objective import CausalLanguageModeling

ROOT = Path(__file__).parents[2]


class Summed(Layout):
    """The plainest of parallel layouts: gradients are added over ranks after the last micro-batch."""

    def __init__(self):
        self.model = None

    def place(self, model, device):
        self.model = model.to(device)
        return self.model

    @contextlib.contextmanager
    def micro_step(self, *, is_last):
        yield
        if is_last:
            for parameter in self.model.parameters():
                torch.distributed.all_reduce(parameter.grad)


class Part:
    """The rows of one rank, of which the first rank's are almost all prompt."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def next_batch(self):
        whole = RowLoader(lambda _: pack_rows(sft_rows(), 20, 0), 4).next_batch()
        labels = whole.labels.clone()
        labels[:2, 3:] = IGNORED
        part = slice(None) if self.size == 1 else slice(2 * self.rank, 2 * self.rank + 2)
        return Batch(whole.input_ids[part], labels[part], whole.positions[part], whole.mask[part])


def take_steps(rank, size):
    """Do two clipped steps and return the weights, loss, token count and norm of the second."""
    config = plain_loop(micro_batch_size=4 // size, max_grad_norm=0.1)
    run = Run(tiny_model(), CausalLanguageModeling(), Part(rank, size), config, Summed() if size > 1 else None)
    run.do_step()
    report = run.do_step()
    return [p.detach() for p in run.model.parameters()], report.loss, report.num_trained_tokens, report.gradient_norm


def test_two_ranks_are_one(tmp_path):
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); from tests.train.test_ranks import take_steps\n"
        "rank = int(sys.argv[2])\n"
        "meet = dict(init_method=f'file://{sys.argv[3]}/meet', rank=rank, world_size=2)\n"
        "torch.distributed.init_process_group('gloo', **meet)\n"
        "torch.save(take_steps(rank, 2), f'{sys.argv[3]}/rank{rank}.pt')\n"
        "torch.distributed.destroy_process_group()\n"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(rank), str(tmp_path)], env=env) for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    weights, loss, num_trained, norm = take_steps(0, 1)
    for rank in (0, 1):
        theirs = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert theirs[2] == num_trained
        torch.testing.assert_close(
            torch.tensor([theirs[1], theirs[3]]), torch.tensor([loss, norm]), rtol=1e-5, atol=1e-6
        )
        for mine, other in zip(weights, theirs[0], strict=True):
            torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-6)
