"""The loop: any split of a batch gives the same gradient, and a resumed run ends where an uninterrupted one does."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.data.load import Batch, RowLoader, repeat_rows
from modelwright.data.pack import IGNORED, Rows, pack_rows, stream_rows
from modelwright.models.llama import Llama, LlamaConfig
from modelwright.nn.init import init_weights
from modelwright.optim.build import AdamWConfig, MuonConfig, OptimizerConfig
from modelwright.optim.schedule import ScheduleConfig
from modelwright.train.checkpoint import CheckpointConfig, checkpoints
from modelwright.train.loop import LoopConfig, Run, train
from modelwright.train.objective import CausalLanguageModeling

SHAPE = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, max_seq_len=32, tie_embeddings=True
)


def tiny_model(seed=0):
    return init_weights(Llama(SHAPE), seed)


def counting_documents(num=40):
    """Texts a model can learn: each counts upwards from somewhere, modulo the vocabulary."""
    return [
        (np.arange(length) + start) % 63 + 1
        for start, length in zip(range(num), [30 + i % 17 for i in range(num)], strict=True)
    ]


def stream_loader(batch_size=4, shuffle_labels=False):
    def make(epoch):
        rows = stream_rows(counting_documents(), 16, 0, seed=epoch)
        if shuffle_labels:
            labels = np.random.default_rng(epoch).permutation(rows.labels.ravel()).reshape(rows.labels.shape)
            return Rows(rows.input_ids, labels)
        return rows

    return RowLoader(make, batch_size)


def plain_loop(**changes):
    optimizer = OptimizerConfig(name="adamw", adamw=AdamWConfig(learning_rate=5e-3))
    base = LoopConfig(num_steps=10, micro_batch_size=4, precision="fp32", compile=False, optimizer=optimizer)
    return replace(base, **changes)


def gradients(model, loader, config):
    run = Run(model, CausalLanguageModeling(), loader, config)
    seen = {}
    run.optimizer.step = lambda: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    run.do_step()
    return seen


def sft_rows():
    examples = []
    for i in range(12):
        ids = list((np.arange(6 + i % 5) * 3 + i) % 63 + 1)
        examples.append((ids, [False, False] + [True] * (len(ids) - 2)))
    return examples


@pytest.mark.parametrize("kind", ["stream", "conversations"])
def test_accumulated_micro_batches_give_the_gradient_of_one_batch(kind):
    def loader(size):
        if kind == "stream":
            return stream_loader(size)
        return RowLoader(repeat_rows(pack_rows(sft_rows(), 20, 0), seed=0), size)

    config = plain_loop(max_grad_norm=None)
    whole = gradients(tiny_model(), loader(4), replace(config, micro_batch_size=4))
    split = gradients(tiny_model(), loader(1), replace(config, micro_batch_size=1, grad_accum_steps=4))
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-4, atol=1e-6)


def test_packed_loss_is_the_sum_of_separate_losses_and_documents_do_not_see_each_other():
    examples = sft_rows()
    model = tiny_model().eval()
    objective = CausalLanguageModeling()
    packed = RowLoader(lambda _: pack_rows(examples, 32, 0), 100).next_batch()
    together = objective.loss(model, packed)
    alone = 0.0
    for ids, mask in examples:
        inputs = torch.tensor([ids[:-1]])
        labels = torch.tensor([[i if m else IGNORED for i, m in zip(ids[1:], mask[1:], strict=True)]])
        alone += objective.loss(model, Batch(inputs, labels))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)

    changed = packed.input_ids.clone()
    changed[0, 0] = 63 - changed[0, 0]  # a token of the first document of the first row
    before = model(packed.input_ids, positions=packed.positions, mask=packed.mask).logits
    after = model(changed, positions=packed.positions, mask=packed.mask).logits
    first = int((packed.positions[0] == 0).nonzero()[1])  # where the second document begins
    assert not torch.equal(before[0, 0], after[0, 0])
    assert torch.equal(before[0, first:], after[0, first:])


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("stop_at", [3, 7, 8])  # before, at and after the end of the first pass over the rows
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, name, stop_at):
    saved = CheckpointConfig(every=1)
    loop = plain_loop(num_steps=12, optimizer=OptimizerConfig(name=name), checkpoint=saved, precision=None)
    unsaved = replace(loop, checkpoint=CheckpointConfig())
    whole = train(tiny_model(), CausalLanguageModeling(), stream_loader(11), unsaved)

    def kill(run, report):
        if report.step == stop_at + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), CausalLanguageModeling(), stream_loader(11), loop, folder=tmp_path, hooks=[kill])
    resumed = train(tiny_model(seed=5), CausalLanguageModeling(), stream_loader(11), loop, folder=tmp_path)
    assert resumed.losses == whole.losses
    for (key, value), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), key


def test_resume_with_changed_settings_is_refused_and_names_them(tmp_path):
    loop = plain_loop(num_steps=3, checkpoint=CheckpointConfig(every=1))
    train(tiny_model(), CausalLanguageModeling(), stream_loader(), loop, folder=tmp_path)
    changed = replace(loop, num_steps=5, seed=9)
    with pytest.raises(ConfigError, match=r"num_steps was 3, is now 5; seed was 0, is now 9"):
        train(tiny_model(), CausalLanguageModeling(), stream_loader(), changed, folder=tmp_path)


def test_damaged_checkpoint_is_named(tmp_path):
    loop = plain_loop(num_steps=3, checkpoint=CheckpointConfig(every=1))
    train(tiny_model(), CausalLanguageModeling(), stream_loader(), loop, folder=tmp_path)
    file = checkpoints(tmp_path)[-1] / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="step-00000003 is damaged"):
        train(tiny_model(), CausalLanguageModeling(), stream_loader(), loop, folder=tmp_path)


def test_only_the_newest_checkpoints_are_kept_and_a_model_folder_is_in_each(tmp_path):
    loop = plain_loop(num_steps=6, checkpoint=CheckpointConfig(every=1, num_kept=2))
    train(tiny_model(), CausalLanguageModeling(), stream_loader(), loop, folder=tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000005", "step-00000006"]
    assert json.loads((checkpoints(tmp_path)[0] / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_learns_to_count_and_cannot_learn_shuffled_labels(name):
    rules = {
        "muon": OptimizerConfig(name="muon", muon=MuonConfig(learning_rate=0.02, adamw_learning_rate=0.02)),
        "adamw": OptimizerConfig(name="adamw", adamw=AdamWConfig(learning_rate=1e-2)),
    }
    loop = plain_loop(num_steps=80, optimizer=rules[name], schedule=ScheduleConfig(name="cosine", warmup_steps=5))
    learned = train(tiny_model(), CausalLanguageModeling(), stream_loader(8), loop)
    control = train(tiny_model(), CausalLanguageModeling(), stream_loader(8, shuffle_labels=True), loop)
    assert learned.losses[-1][1] < 1.0 < 3.5 < control.losses[-1][1]


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_weights():
    model = tiny_model()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    before = model.embed.weight.clone()
    with pytest.raises(ConfigError, match="stopped at step 4: 4 steps in a row.*not finite"):
        train(model, CausalLanguageModeling(), stream_loader(), plain_loop())
    assert torch.equal(model.embed.weight, before)


def test_every_parameter_is_under_exactly_one_rule():
    model = tiny_model()
    run = Run(model, CausalLanguageModeling(), stream_loader(), plain_loop(optimizer=OptimizerConfig(name="muon")))
    places = [id(p) for p in run.optimizer.parameters()]
    assert sorted(places) == sorted(id(p) for p in model.parameters())
    assert all(group["params"] for group in run.optimizer.groups())


@pytest.mark.slow
def test_compiled_step_equals_eager_within_rounding():
    eager = train(tiny_model(), CausalLanguageModeling(), stream_loader(), plain_loop())
    compiled = train(tiny_model(), CausalLanguageModeling(), stream_loader(), plain_loop(compile=True))
    assert compiled.is_compiled
    for (_, a), (_, b) in zip(eager.losses, compiled.losses, strict=True):
        assert a == pytest.approx(b, rel=1e-3)
