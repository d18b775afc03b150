"""Two processes train what one trains; their checkpoints are read by any other layout; what does not fit is refused."""

import shutil

import pytest
import torch
from tests.train.parallel_work import toy_model, train_family, train_toy, train_with

from modelwright.base.errors import ConfigError, DeviceError
from modelwright.models.weights import load_model
from modelwright.train.checkpoint import checkpoints
from modelwright.train.parallel import ParallelConfig
from modelwright.train.ranks import POOL
from modelwright.train.recompute import RecomputeConfig
from modelwright.train.sharded import checkpoint_to_hf

ONE = ParallelConfig()
LAYOUTS = {
    "data": ParallelConfig(data=2),
    "shard": ParallelConfig(shard=2),
    "tensor": ParallelConfig(tensor=2),
    "pipeline": ParallelConfig(pipeline=2),
    "context": ParallelConfig(context=2),
}
OTHERS = {
    "zero 2": ParallelConfig(shard=2, zero=2),
    "zero 1": ParallelConfig(shard=2, zero=1),
    "interleaved": ParallelConfig(pipeline=2, schedule="interleaved"),
}
PRODUCTS = {
    "shard x tensor": ParallelConfig(shard=2, tensor=2),
    "data x shard": ParallelConfig(data=2, shard=2),
    "data x tensor": ParallelConfig(data=2, tensor=2),
    "data x pipeline": ParallelConfig(data=2, pipeline=2),
    "shard x pipeline": ParallelConfig(shard=2, pipeline=2),
    "tensor x pipeline": ParallelConfig(tensor=2, pipeline=2),
    "shard x context": ParallelConfig(shard=2, context=2),
    "tensor x context": ParallelConfig(tensor=2, context=2),
    "pipeline x context": ParallelConfig(pipeline=2, context=2),
}


def assert_same_run(found, expected):
    weights, losses, norms = found
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected[1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected[2][-len(norms) :]), rtol=1e-3, atol=1e-5)
    assert weights.keys() == expected[0].keys()
    for name, weight in expected[0].items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-2, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def alone():
    return train_toy(ONE)


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_train_what_one_trains(name, alone):
    assert_same_run(POOL.call(2, train_toy, LAYOUTS[name])[0], alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_ways_of_two_ranks_train_what_one_trains(name, alone):
    assert_same_run(POOL.call(2, train_toy, OTHERS[name])[0], alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_degrees_train_what_one_rank_trains(name, alone):
    assert_same_run(POOL.call(4, train_toy, PRODUCTS[name])[0], alone)


@pytest.mark.slow
def test_eight_ranks_in_three_dimensions_train_what_one_trains(alone):
    assert_same_run(POOL.call(8, train_toy, ParallelConfig(shard=2, tensor=2, pipeline=2))[0], alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shard", "tensor", "pipeline", "context"])
def test_heads_with_norms_and_windows_are_cut_rightly(name):
    for model in ({"tie": False, "family": "qwen3"}, {"tie": False, "family": "mistral"}):
        expected = train_toy(ONE, model=model)
        found = POOL.call(2, train_family, LAYOUTS[name], model)[0]
        assert_same_run(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["muon", "lion"])
@pytest.mark.parametrize("name", ["shard", "tensor", "pipeline"])
def test_rules_that_see_whole_matrices_see_them(rule, name):
    changes = {"optimizer": rule, "num_steps": 3}
    found, expected = POOL.call(2, train_with, LAYOUTS[name], changes)[0], train_with(ONE, changes)
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(expected[1]), rtol=2e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "shard", "tensor", "pipeline", "context"])
def test_recomputed_blocks_train_the_same(name, alone):
    assert_same_run(POOL.call(2, train_with, LAYOUTS[name], {"recompute": RecomputeConfig("layers")})[0], alone)


def test_a_checkpoint_of_shards_goes_on_alone_and_in_a_pipeline(tmp_path, alone):
    folder = tmp_path / "run"
    whole = POOL.call(2, train_toy, LAYOUTS["shard"], folder)[0]
    assert_same_run(whole, alone)
    assert [path.name for path in checkpoints(folder)] == [f"step-{step:08d}" for step in range(1, 6)]
    assert not list(folder.glob(".step*"))
    for step in (3, 4, 5):
        shutil.rmtree(folder / f"step-{step:08d}")
    for name in ("alone", "pipeline"):
        shutil.copytree(folder, tmp_path / name)
    again = POOL.call(2, train_toy, LAYOUTS["shard"], folder)[0]
    assert all(torch.equal(again[0][name], whole[0][name]) for name in whole[0]), "the same layout: bit for bit"
    assert_same_run(train_toy(ONE, tmp_path / "alone"), alone)
    assert_same_run(POOL.call(2, train_toy, LAYOUTS["pipeline"], tmp_path / "pipeline")[0], alone)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["one", "tensor", "pipeline", "data"])
@pytest.mark.parametrize("then", ["one", "tensor", "pipeline", "shard", "context"])
def test_a_run_goes_on_in_another_layout(first, then, tmp_path, alone):
    layouts = {"one": ONE, **LAYOUTS}

    def go(name):
        return train_toy(ONE, tmp_path) if name == "one" else POOL.call(2, train_toy, layouts[name], tmp_path)[0]

    go(first)
    for path in checkpoints(tmp_path)[2:]:
        shutil.rmtree(path)
    assert_same_run(go(then), alone)


def test_a_checkpoint_of_ranks_becomes_one_model_folder(tmp_path, alone):
    POOL.call(2, train_toy, LAYOUTS["tensor"], tmp_path / "run")
    out = checkpoint_to_hf(checkpoints(tmp_path / "run")[-1], tmp_path / "model")
    found = load_model(out)
    assert type(found) is type(toy_model())
    averaged = alone[0]  # the run ends as its average, the checkpoint holds the weights beside it
    assert found.state_dict().keys() == averaged.keys()
    assert all(found.state_dict()[n].shape == t.shape for n, t in averaged.items())


def test_degrees_that_do_not_fit_the_launch_are_refused():
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 4"):
        train_toy(ParallelConfig(shard=2, tensor=2))
    with pytest.raises(DeviceError, match="which is 3 processes, and 2 were started"):
        POOL.call(2, train_toy, ParallelConfig(shard=3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero": 2}, "shard is 1"),
        ({"schedule": "interleaved"}, "pipeline is 1"),
        ({"schedule": "gpipe", "pipeline": 2}, "known: 1f1b, interleaved"),
        ({"stages_per_rank": 3, "pipeline": 2}, "schedule is 1f1b"),
        ({"tensor": 0}, "must be at least 1"),
        ({"gather": "bf16"}, "nothing is gathered"),
        ({"dead_after_seconds": 0}, "must be above 0"),
    ],
)
def test_settings_without_effect_or_meaning_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "changes", "message"),
    [
        (LAYOUTS["shard"], {"optimizer": "adamw8bit"}, "kept by blocks"),
        (LAYOUTS["tensor"], {"optimizer": "adafactor"}, "kept by blocks"),
        (LAYOUTS["shard"], {"compile": True}, "not combined"),
        (LAYOUTS["pipeline"], {"model": {"layers": 1}}, "2 stages, and the model has 1 layers"),
        (LAYOUTS["pipeline"], {"micro_batch_size": 8, "grad_accum_steps": 1}, "at least one a rank"),
    ],
)
def test_what_would_train_otherwise_is_refused_by_name(parallel, changes, message):
    with pytest.raises(DeviceError, match=message):
        POOL.call(2, train_with, parallel, changes)
