"""A forecaster's run: the held-out part leaks nowhere, and the baselines are named when they win."""

from pathlib import Path

import numpy as np
import torch

from modelwright.cli.main import main
from modelwright.models.series import SeriesConfig
from modelwright.models.weights import load_model
from modelwright.train.forecast import ForecastConfig, run_forecast, verdict
from modelwright.train.loop import LoopConfig

LOOP = LoopConfig(num_steps=8, micro_batch_size=16, compile=False, precision="fp32")  # every known window once


def write_prices(file: Path, values: np.ndarray) -> Path:
    file.write_text("\n".join(["Date,Close", *(f"{i},{value:.6f}" for i, value in enumerate(values))]) + "\n")
    return file


def walk(num: int = 150) -> np.ndarray:
    return 100 + np.random.default_rng(0).normal(0, 1, num).cumsum()


def run(tmp_path: Path, name: str, values: np.ndarray):
    data = write_prices(tmp_path / f"{name}.csv", values)
    model = SeriesConfig(window=8, hidden_size=4)
    return run_forecast(ForecastConfig(data, "Close", tmp_path / name, model=model, loop=LOOP))


def test_the_held_out_part_reaches_neither_the_weights_nor_the_baselines(tmp_path: Path):
    changed = walk()
    edge = 8 + int((len(changed) - 8) * 0.8)  # the first held-out target
    changed[edge:] += 300
    first, second = run(tmp_path, "first", walk()), run(tmp_path, "second", changed)
    weights = [load_model(result.out).state_dict() for result in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    changed[edge - 1] += 1  # the control: the last value that is known does
    third = load_model(run(tmp_path, "third", changed).out).state_dict()
    assert not all(torch.equal(weights[0][name], third[name]) for name in third)


def test_on_a_random_walk_the_last_value_is_said_to_win(tmp_path: Path):
    figures = run(tmp_path, "walk", walk(400)).figures
    assert figures["rmse"] > 0.95 * figures["naive_rmse"]
    assert verdict({**figures, "rmse": figures["naive_rmse"]}).startswith(("The last value", "The linear model"))
    assert verdict({"rmse": 1.0, "naive_rmse": 2.0, "linear_rmse": 1.5}) == (
        "This model is the best forecast here (error 1); next is the linear model, 1.5."
    )
    nearly = verdict({"rmse": 0.999, "naive_rmse": 1.0, "linear_rmse": 1.5})
    assert nearly == "The last value is the best forecast here (error 1); this model, 0.999, is within 1% of it."


def test_the_command_says_who_won(tmp_path: Path, capsys):
    data = write_prices(tmp_path / "prices.csv", walk())
    recipe = Path(__file__).parents[2] / "recipes" / "forecast" / "stock.yaml"
    tiny = ["--loop.num_steps=2", "--loop.compile=false", f"--data={data}", f"--out={tmp_path / 'out'}"]
    assert main(["train", str(recipe), *tiny]) == 0
    assert "is the best forecast here" in " ".join(capsys.readouterr().out.split())
