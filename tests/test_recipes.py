"""Every recipe loads, can be planned, and runs at toy size through overrides alone."""

import json
import re
from pathlib import Path

import pytest
import yaml
from tests.conftest import Toy

from modelwright.base.artifact import lineage, verify
from modelwright.base.errors import ConfigError
from modelwright.base.files import write_jsonl
from modelwright.base.registry import lookup
from modelwright.cli.recipe import read_training_recipe
from modelwright.models.weights import load_model
from modelwright.train import METHODS
from modelwright.train.plan import plan_run

# Recipes of data are run by the tests of the room.
ALL = [p for p in sorted((Path(__file__).parents[1] / "recipes").glob("*/*.yaml")) if p.parent.name != "data"]
# Those of tasks with a head of their own are run by tests/test_task_recipes.py.
RECIPES = [p for p in ALL if p.parent.name in ("pretrain", "finetune")]
IDS = [f"{path.parent.name}/{path.stem}" for path in RECIPES]

TINY = [
    "--minutes=none",
    "--loop.num_steps=3",
    "--loop.micro_batch_size=2",
    "--loop.compile=false",
    "--max_seq_len=128",
]
TINY_SHAPE = ["--shape.hidden_size=32", "--shape.num_layers=1", "--shape.num_heads=2", "--shape.intermediate_size=64"]


def tiny_arguments(recipe: Path, toy: Toy, out: Path) -> list[str]:
    values = yaml.safe_load(recipe.read_text())
    if "base" in values and values["method"] == "pretrain":
        return [f"--data={toy.data}", f"--tokenizer={toy.model}", f"--base={toy.model}", f"--out={out}", *TINY]
    if values["method"] == "pretrain":
        # The test is one process.
        alone = ["--loop.parallel.shard=1", "--loop.parallel.zero=3"] if "parallel" in values.get("loop", {}) else []
        return [f"--data={toy.data}", f"--tokenizer={toy.tokenizer}", f"--out={out}", *TINY, *TINY_SHAPE, *alone]
    data, length = toy.pairs, 128
    if "pairs" in values:  # rows of the fields that its pattern names
        data = out.parent / "rows.jsonl"
        fields = {name for text in values["pairs"].values() for name in re.findall(r"\{(\w+)\}", text)}
        write_jsonl(data, [{name: f"{name} {i}" for name in fields} for i in range(30)])
    elif values.get("template") == "alpaca":
        data, length = out.parent / "alpaca.jsonl", 256  # the prompt itself is long in so small a vocabulary
        write_jsonl(data, [{"instruction": f"Say {i}.", "input": "", "output": f"{i}"} for i in range(30)])
    return [f"--data={data}", f"--base={toy.model}", f"--out={out}", *TINY, f"--max_seq_len={length}"]


def test_there_are_recipes_for_every_method():
    assert {path.parent.name for path in ALL} == set(METHODS)


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_every_recipe_loads_and_says_what_it_is_for(recipe: Path):
    method, config = read_training_recipe(recipe)
    assert method == recipe.parent.name
    assert config.out.parts[0] == "runs"
    assert recipe.read_text().startswith("# ")


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_every_recipe_can_be_planned(recipe: Path, toy: Toy, tmp_path: Path):
    _, config = read_training_recipe(recipe, tiny_arguments(recipe, toy, tmp_path / "out"))
    plan = plan_run(config)
    assert plan.fits
    assert plan.num_steps == 3
    made = plan.weight_bytes + plan.gradient_bytes + plan.optimizer_bytes + plan.activation_bytes
    peak = plan.peak
    made += peak.logits_bytes + peak.allocator_bytes + peak.loading_bytes + peak.checkpoint_bytes
    assert plan.total_bytes == made + peak.framework_bytes - peak.shared_bytes
    assert plan.batch.largest_recomputed >= plan.batch.largest_micro_batch > 2
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_every_recipe_runs_at_toy_size(recipe: Path, toy: Toy, tmp_path: Path):
    out = tmp_path / "out"
    method, config = read_training_recipe(recipe, tiny_arguments(recipe, toy, out))
    result = lookup(METHODS, method, "method")(config)
    assert len(result.losses) == 3
    assert verify(out).kind == "model"
    assert load_model(out).config.vocab_size == load_model(toy.model).config.vocab_size
    assert "documents" in {ancestor.kind for ancestor in lineage(out)}
    assert {ancestor.state for ancestor in lineage(out)} == {"same"}


def test_a_recipe_with_minutes_derives_its_plan_from_this_machine(toy: Toy, tmp_path: Path):
    recipe = next(path for path in RECIPES if path.parent.name == "pretrain" and path.stem == "quickstart")
    where = [f"--data={toy.data}", f"--tokenizer={toy.tokenizer}", f"--out={tmp_path / 'out'}"]
    short = plan_run(read_training_recipe(recipe, [*where, "--minutes=0.05"])[1])
    long = plan_run(read_training_recipe(recipe, [*where, "--minutes=5"])[1])
    assert long.total_flops > 5 * short.total_flops and long.estimated_seconds > 5 * short.estimated_seconds


def test_an_adapter_costs_gradients_and_optimizer_state_for_itself_alone(toy: Toy, tmp_path: Path):
    recipe = next(path for path in RECIPES if path.parent.name == "finetune" and path.stem == "quickstart")
    arguments = tiny_arguments(recipe, toy, tmp_path / "out")
    adapter = plan_run(read_training_recipe(recipe, arguments)[1])
    everything = plan_run(read_training_recipe(recipe, [*arguments, "--lora=none"])[1])
    trained = adapter.parameters - everything.parameters
    assert 0 < trained < everything.parameters
    assert adapter.gradient_bytes == 4 * trained
    assert 8 * trained <= adapter.optimizer_bytes < 8.3 * trained  # AdamW: two moments, and a count for each tensor
    assert everything.gradient_bytes == 4 * everything.parameters


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: x\n", r"has no method .*Add a line method: pretrain, finetune"),
        ("method: pretrian\n", r"method is 'pretrian'.*Did you mean 'pretrain'"),
        (
            "method: pretrain\ndata: x\ntokenizer: t\nout: o\nminuts: 3\n",
            r"minuts is not a setting\. Did you mean minutes",
        ),
        ("method: pretrain\ndata: x\ntokenizer: t\nout: o\n", r"gives no minutes"),
        (
            "method: pretrain\ndata: x\ntokenizer: t\nout: o\nminutes: 1\nloop: {optimizer: {name: adan}}\n",
            r"optimizer\.name is 'adan'; known: adafactor, adamw",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(tmp_path: Path, text: str, message: str):
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_training_recipe(recipe)
