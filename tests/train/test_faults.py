"""What goes wrong: NaN, spikes, divergence, bad batches, a full disk, no memory, another machine. Nothing is lost."""

import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tests.train.test_loop import plain_loop, stream_loader, tiny_model

from modelwright.base.errors import ConfigError, DataError, DeviceError
from modelwright.data.load import Batch
from modelwright.data.pack import IGNORED
from modelwright.optim.build import AdamWConfig, OptimizerConfig
from modelwright.train.batches import check_batch
from modelwright.train.checkpoint import CheckpointConfig, checkpoints
from modelwright.train.loop import Run, train
from modelwright.train.objective import CausalLanguageModeling
from modelwright.train.watchdog import MIN_SEEN, Watchdog, WatchdogConfig


class Broken(CausalLanguageModeling):
    """An objective whose loss is multiplied by something at the given calls."""

    def __init__(self, factors):
        super().__init__()
        self.factors, self.calls = dict(factors), 0

    def loss(self, model, batch):
        self.calls += 1
        return super().loss(model, batch) * self.factors.get(self.calls, 1.0)


def weights_of(run):
    return {n: p.detach().clone() for n, p in run.model.named_parameters()}


def test_one_batch_with_nan_is_skipped_and_the_run_goes_on():
    reports = []
    run = train(
        tiny_model(),
        Broken({4: math.nan}),
        stream_loader(),
        plain_loop(num_steps=8),
        hooks=[lambda run, report: reports.append(report)],
    )
    assert [r.is_skipped for r in reports] == [False] * 3 + [True] + [False] * 4
    assert [step for step, _ in run.losses] == [1, 2, 3, 5, 6, 7, 8]
    assert run.watchdog.skipped[0][0] == 4 and "not finite" in run.watchdog.skipped[0][1]
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_a_spike_is_skipped_and_the_same_loss_without_it_is_not():
    config = plain_loop(num_steps=MIN_SEEN + 6)
    spiked = train(tiny_model(), Broken({MIN_SEEN + 2: 50.0}), stream_loader(), config)
    assert [step for step, _ in spiked.watchdog.skipped] == [MIN_SEEN + 2]
    assert "spike" in spiked.watchdog.skipped[0][1]
    plain = train(tiny_model(), CausalLanguageModeling(), stream_loader(), config)
    assert plain.watchdog.skipped == []


def test_bad_steps_in_a_row_go_back_to_the_checkpoint_and_on_with_other_data(tmp_path):
    config = plain_loop(
        num_steps=10, checkpoint=CheckpointConfig(every=4), watchdog=WatchdogConfig(max_skips=1, max_rollbacks=2)
    )
    seen = []
    run = train(
        tiny_model(),
        Broken({6: math.nan, 7: math.nan}),
        stream_loader(11),
        config,
        folder=tmp_path,
        hooks=[lambda run, report: seen.append((run.step, report.is_skipped))],
    )
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9, 10]
    assert run.watchdog.num_rollbacks == 1 and [step for step, _ in run.watchdog.skipped] == [6, 7]
    assert [step for step, _ in run.losses] == list(range(1, 11))
    # Seven batches until the return to step 4, six more to step 10: the bad ones are not seen again.
    plain = stream_loader(11)
    for _ in range(13):
        plain.next_batch()
    assert run.loader.state() == plain.state()


def test_a_killed_run_that_had_gone_back_ends_as_an_unharmed_one(tmp_path):
    config = plain_loop(
        num_steps=10, checkpoint=CheckpointConfig(every=4), watchdog=WatchdogConfig(max_skips=1, max_rollbacks=2)
    )

    class BadData(CausalLanguageModeling):
        """Bad by what is in the batch, as real data is: a resumed run meets it again."""

        def loss(self, model, batch):
            return super().loss(model, batch) * (math.nan if int(batch.input_ids.sum()) in bad else 1.0)

    loader, bad = stream_loader(11), set()
    sums = [int(loader.next_batch().input_ids.sum()) for _ in range(7)]
    bad |= set(sums[5:7])
    whole = train(tiny_model(), BadData(), stream_loader(11), config, folder=tmp_path / "whole")

    def kill(run, report):
        if run.step == 5 and run.watchdog.num_rollbacks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), BadData(), stream_loader(11), config, folder=tmp_path / "killed", hooks=[kill])
    resumed = train(tiny_model(3), BadData(), stream_loader(11), config, folder=tmp_path / "killed")
    assert whole.watchdog.num_rollbacks == resumed.watchdog.num_rollbacks == 1
    for name, value in weights_of(whole).items():
        assert torch.equal(value, weights_of(resumed)[name]), name


def test_a_learning_rate_that_diverges_stops_with_its_name():
    wild = OptimizerConfig(name="adamw", adamw=AdamWConfig(learning_rate=30.0))
    config = plain_loop(num_steps=400, optimizer=wild, schedule=replace(plain_loop().schedule, warmup_steps=60))
    with pytest.raises(ConfigError, match=r"diverges|not finite") as caught:
        train(tiny_model(), CausalLanguageModeling(), stream_loader(8), config)
    assert "learning rates" in str(caught.value)


def test_a_rate_that_throws_the_weights_away_at_once_is_stopped_where_it_happened():
    wild = OptimizerConfig(name="adamw", adamw=AdamWConfig(learning_rate=50.0))
    config = plain_loop(num_steps=60, optimizer=wild, schedule=replace(plain_loop().schedule, warmup_steps=2))
    with pytest.raises(
        ConfigError, match=r"far above 4\.\d+, where the run began.*it diverges.*learning rates"
    ) as caught:
        train(tiny_model(), CausalLanguageModeling(), stream_loader(8), config)
    assert "stopped at step 5:" in str(caught.value) or "stopped at step 6:" in str(caught.value)


def test_a_finite_loss_without_finite_gradients_is_no_level_to_stay_at():
    dog = Watchdog(WatchdogConfig(max_skips=1))
    for step in range(MIN_SEEN):
        assert dog.is_good(step, 4.0, 1.0)
    for step in (20, 21):
        assert not dog.is_good(step, 3.0, math.nan)
    assert dog.wants_rollback
    with pytest.raises(ConfigError, match=r"not finite \(loss 3.0, gradient norm nan\)"):
        dog.accept_or_stop(21, 3.0)


def test_a_new_level_below_the_first_loss_is_accepted():
    dog = Watchdog(WatchdogConfig(max_skips=1))
    for step in range(MIN_SEEN):
        assert dog.is_good(step, 4.0, 1.0)
    for step in range(40):
        assert dog.is_good(step, 1.0, 1.0)
    assert not dog.is_good(60, 2.5, 1.0) and not dog.wants_rollback
    assert not dog.is_good(61, 2.5, 1.0) and dog.wants_rollback
    dog.accept_or_stop(61, 2.5)
    assert dog.is_good(62, 2.5, 1.0)


def test_a_data_set_without_a_trainable_token_is_stopped():
    class Unlabelled:
        def next_batch(self):
            return Batch(torch.ones(2, 8, dtype=torch.long), torch.full((2, 8), IGNORED))

    with pytest.raises(ConfigError, match="no trainable token"):
        train(tiny_model(), CausalLanguageModeling(), Unlabelled(), plain_loop())


@dataclass(frozen=True)
class Series:
    input_ids: torch.Tensor
    values: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            Batch(torch.full((2, 4), 64), torch.zeros(2, 4, dtype=torch.long)),
            r"input_ids holds 64 at row 0, position 0",
        ),
        (Batch(torch.zeros(2, 4, dtype=torch.long), torch.full((2, 4), 99)), r"labels holds 99 .* 0 to 63, or -100"),
        (Batch(torch.zeros(2, 4, dtype=torch.long), torch.full((2, 4), -1)), r"labels holds -1 "),
        (Batch(*[torch.zeros(1, 33, dtype=torch.long)] * 2), r"33 tokens, and the model reads at most 32"),
        (
            Series(torch.zeros(1, 2, dtype=torch.long), torch.tensor([0.0, math.nan])),
            r"values of a batch holds nan at \[1\]",
        ),
    ],
)
def test_bad_batches_are_named_before_they_are_used(batch, message):
    with pytest.raises(DataError, match=message):
        check_batch(tiny_model(), batch)


def test_out_of_memory_says_what_to_change():
    class Greedy(CausalLanguageModeling):
        def loss(self, model, batch):
            return super().loss(model, batch) + torch.empty(1 << 50).sum()

    with pytest.raises(DeviceError, match=r"micro_batch_size=2 with loop.grad_accum_steps=2.*recompute") as caught:
        train(tiny_model(), Greedy(), stream_loader(), plain_loop())
    assert "mw plan" in str(caught.value)


FILL = """
import resource, signal, sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.train.test_loop import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def fill(run, report):
    while report.step >= 2 and not checkpoints(Path(sys.argv[1])):
        time.sleep(0.01)  # the thread may still be writing
    if report.step == 3:  # from now on no file may grow beyond this: the state does not fit
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
loop = plain_loop(num_steps=5, checkpoint=CheckpointConfig(every=2))
train(tiny_model(), CausalLanguageModeling(), stream_loader(), loop, folder=Path(sys.argv[1]), hooks=[fill])
"""


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint_and_no_scraps(tmp_path):
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", FILL, str(tmp_path), root], capture_output=True, text=True, cwd=root)
    assert done.returncode == 1 and "DeviceError" in done.stderr and "(File too large); nothing was" in done.stderr
    assert "a checkpoint was not written, the one before it stays" in done.stderr  # at step 4; at the last one it stops
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]
    loop = plain_loop(num_steps=5, checkpoint=CheckpointConfig(every=2))
    whole = train(tiny_model(), CausalLanguageModeling(), stream_loader(), replace(loop, checkpoint=CheckpointConfig()))
    resumed = train(tiny_model(1), CausalLanguageModeling(), stream_loader(), loop, folder=tmp_path)
    assert resumed.losses == whole.losses


KILL = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.train.test_loop import *
from modelwright.train import checkpoint
write = checkpoint.write_tensors
def save_and_die(path, tensors):
    if "step-00000004" in str(path):  # in the middle of the second checkpoint, in the writing thread
        Path(path).write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, tensors)
checkpoint.write_tensors = save_and_die
loop = plain_loop(num_steps=9, checkpoint=CheckpointConfig(every=2))
train(tiny_model(), CausalLanguageModeling(), stream_loader(), loop, folder=Path(sys.argv[1]))
"""


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path):
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", KILL, str(tmp_path), root], capture_output=True, text=True, cwd=root)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000002"]
    assert len(os.listdir(tmp_path)) == 2  # and what was being written
    loop = plain_loop(num_steps=9, checkpoint=CheckpointConfig(every=2))
    whole = train(tiny_model(), CausalLanguageModeling(), stream_loader(), replace(loop, checkpoint=CheckpointConfig()))
    resumed = train(tiny_model(1), CausalLanguageModeling(), stream_loader(), loop, folder=tmp_path)
    assert resumed.losses == whole.losses
    assert sorted(os.listdir(tmp_path)) == ["step-00000008", "step-00000009"]


def test_an_evaluation_that_fails_costs_no_step(tmp_path):
    def evaluate(run, report):
        if report.step == 6:
            raise RuntimeError("out of memory in the evaluation")

    loop = plain_loop(num_steps=6, checkpoint=CheckpointConfig(every=3))
    with pytest.raises(RuntimeError, match="evaluation"):
        train(tiny_model(), CausalLanguageModeling(), stream_loader(), loop, folder=tmp_path, hooks=[evaluate])
    assert checkpoints(tmp_path)[-1].name == "step-00000006"
    resumed = train(tiny_model(2), CausalLanguageModeling(), stream_loader(), loop, folder=tmp_path)
    assert resumed.step == 6 and len(resumed.losses) == 6


def test_what_the_thread_writes_is_the_step_it_was_asked_for_and_not_a_later_one(tmp_path):
    slow, quick = tmp_path / "slow", tmp_path / "quick"
    for folder, is_asynchronous in ((slow, True), (quick, False)):
        saved = CheckpointConfig(every=3, num_kept=9, is_asynchronous=is_asynchronous)
        loop = plain_loop(num_steps=9, checkpoint=saved)
        train(tiny_model(), CausalLanguageModeling(), stream_loader(), loop, folder=folder)
    for a, b in zip(checkpoints(slow), checkpoints(quick), strict=True):
        for file in sorted(b.iterdir()):
            assert (a / file.name).read_bytes() == file.read_bytes(), file


def test_fp8_is_refused_by_name_where_there_is_none():
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        pytest.skip("this machine has it")
    with pytest.raises(DeviceError, match="fp8.*compute capability"):
        Run(tiny_model(), CausalLanguageModeling(), stream_loader(), plain_loop(precision="fp8"))
    with pytest.raises(ConfigError, match="known: bf16, fp16, fp32, fp8"):
        plain_loop(precision="fp4")
