"""``mw plan``: what is compute-optimal, what a run costs, and refusals."""

import json
from pathlib import Path

import pytest

from modelwright.base.errors import ConfigError
from modelwright.cli.main import main
from modelwright.cli.plan_optimal import read_prices


def test_the_best_size_for_a_budget_is_printed(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--flops", "5.76e23", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert 15 < rows["corrected"]["tokens_per_parameter"] < 25
    assert main(["plan", "--parameters", "1e9"]) == 0
    assert "Besiroglu" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--flops", "1e20", "--tokens", "1e9"], ["r.yaml", "--tokens", "1e9"]])
def test_one_question_at_a_time(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *arguments]) == 1
    assert "Give a recipe, or one of --flops" in capsys.readouterr().err


def test_a_budget_below_zero_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--tokens=-5"]) == 1
    assert "tokens is -5" in capsys.readouterr().err


def test_prices_are_an_hour(tmp_path: Path):
    table = tmp_path / "prices.yaml"
    table.write_text("h100: 2.5\nmine: 0\n")
    assert read_prices(table, 7200) == {"h100": 5.0, "mine": 0.0}
    table.write_text("h100: dear\n")
    with pytest.raises(ConfigError, match="price of h100"):
        read_prices(table, 1)
