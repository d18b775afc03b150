"""Every recipe keeps its invariances at toy size, and a broken objective or optimizer is caught."""

from dataclasses import replace
from pathlib import Path

import pytest

from modelwright.base.config import read_recipe
from modelwright.cli.main import main
from modelwright.cli.recipe import read_training_recipe
from modelwright.data.pack import IGNORED
from modelwright.train import CHECKS, METHODS, SUBJECTS
from modelwright.train.objective import CausalLanguageModeling
from modelwright.train.selfcheck import check_accumulation, check_packing, pretrain_subject, self_check

ROOT = Path(__file__).parents[2] / "recipes"
RECIPES = [path for path in sorted(ROOT.glob("*/*.yaml")) if read_recipe(path).get("method") in SUBJECTS]
FAST = [name for name in CHECKS if name != "compiling" and not name.startswith("ranks")]
RANKS = [name for name in CHECKS if name.startswith("ranks") and name != "ranks_2x2"]


def test_every_method_can_be_checked():
    assert set(SUBJECTS) == set(METHODS)
    assert {read_recipe(path)["method"] for path in RECIPES} == set(SUBJECTS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_keeps_its_invariances(recipe):
    method, config = read_training_recipe(recipe)
    for finding in self_check(method, config, FAST):
        # What a method has none of (an output matrix to cut, blocks to compute again) is said in the row.
        assert finding.holds or (finding.holds is None and finding.note), finding


@pytest.mark.parametrize("name", RANKS)
def test_two_processes_take_the_step_of_one(name):
    method, config = read_training_recipe(ROOT / "pretrain" / "small.yaml")
    finding = self_check(method, config, [name])[0]
    assert finding.holds, finding


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_is_the_same_on_ranks(recipe):
    method, config = read_training_recipe(recipe)
    for finding in self_check(method, config, [*RANKS, "ranks_2x2"]):
        # Adapters and models that a layout cannot cut are refused by name, and the row says so.
        assert finding.holds or (finding.holds is None and "loop.parallel" in finding.note), finding


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_is_the_same_compiled(recipe):
    method, config = read_training_recipe(recipe)
    assert self_check(method, config, ["compiling"])[0].holds


class MeanOfMeans(CausalLanguageModeling):
    """The mistake that the field made for years: each micro-batch is averaged by itself."""

    def step(self, run, batches):
        for batch in batches:
            run.backward(self.loss(run.model, batch) / self.count_trained(batch) / len(batches))
        return 0.0, 1, run.update(0.0)


class BlindToDocuments(CausalLanguageModeling):
    """Positions begin anew, but attention crosses from one document to the next."""

    def loss(self, model, batch):
        return super().loss(model, replace(batch, mask=None))


def test_wrong_objectives_are_caught():
    _, config = read_training_recipe(ROOT / "pretrain" / "small.yaml")
    subject = pretrain_subject(config)
    averaged = check_accumulation(replace(subject, make_objective=MeanOfMeans))
    assert averaged.holds is False and averaged.largest_difference > 1e-2
    crossing = check_packing(replace(subject, make_objective=BlindToDocuments))
    assert crossing.holds is False and crossing.largest_difference > 1e-2
    assert IGNORED == -100


def test_the_verb_prints_rows_and_says_by_its_code_whether_they_hold(capsys):
    recipe = str(ROOT / "finetune" / "all_weights.yaml")
    assert main(["selfcheck", recipe, "--only", "accumulation,packing", "--json"]) == 0
    rows = capsys.readouterr().out
    assert '"name": "accumulation 1x8 = 8x1"' in rows and '"largest_difference"' in rows and '"bound"' in rows
    assert main(["selfcheck", recipe, "--only", "pieces"]) == 0
    assert "cross-entropy in pieces = plain  yes" in capsys.readouterr().out
    assert main(["selfcheck", recipe, "--only", "spelling"]) == 1
    assert "known" in capsys.readouterr().err
