"""From a recipe file: every method of few parameters, both templates, and what makes no sense is refused."""

from pathlib import Path

import pytest
import torch
import yaml
from tests.conftest import Toy

import modelwright as mw
from modelwright.base.artifact import verify
from modelwright.base.env import data_folder
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import write_json
from modelwright.cli.recipe import read_training_recipe
from modelwright.models.weights import load_model
from modelwright.nn.adalora import AdaLoraConfig, AdaLoraLinear
from modelwright.nn.adapters import adapter_layers
from modelwright.train.adapter import load_adapter
from modelwright.train.finetune import FinetuneConfig, row_length, run_finetune
from modelwright.train.loop import LoopConfig
from modelwright.train.plan import plan_run

SMALL = {"loop": {"num_steps": 4, "micro_batch_size": 2, "compile": False, "precision": "fp32"}, "max_seq_len": 128}
# What a recipe writes for each method; the toy's matrices are 32 x 32 and 64 x 32.
METHODS = {
    "LoRA": {"lora": {"rank": 4}},
    "rsLoRA": {"lora": {"rank": 4, "use_rslora": True}},
    "LoRA+": {"lora": {"rank": 4, "rate_ratio": 16}},
    "DoRA": {"lora": {"rank": 4, "use_dora": True}},
    "PiSSA": {"lora": {"rank": 4, "init": "pissa"}},
    "QPiSSA": {"lora": {"rank": 4, "init": "pissa"}, "load_in_4bit": True},
    "LoftQ": {"lora": {"rank": 4, "init": "loftq"}, "load_in_4bit": True},
    "QLoRA": {"lora": {"rank": 4, "targets": ["q_proj", "v_proj"]}, "load_in_4bit": True},
    "AdaLoRA": {"peft": "adalora", "adalora": {"rank": 4, "target_rank": 2, "warmup_fraction": 0.0, "every": 1}},
    "IA3": {"peft": "ia3"},
    "bottleneck": {"peft": "bottleneck", "bottleneck": {"width": 4}},
    "prefix": {"peft": "prefix", "prefix": {"num_tokens": 4}},
    "prompt": {"peft": "prompt", "prompt": {"num_tokens": 4}},
}
# Of each of the two layers: q, k, v, o are 32 x 32; gate and up 64 x 32, down 32 x 64.
LORA = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
TRAINED = {
    **dict.fromkeys(("LoRA", "rsLoRA", "LoRA+", "PiSSA", "QPiSSA", "LoftQ"), LORA),
    "DoRA": LORA + 2 * (4 * 32 + 2 * 64 + 32),
    "QLoRA": 2 * 4 * 2 * (32 + 32),
    "AdaLoRA": LORA + 2 * 7 * 4,
    "IA3": 2 * (32 + 32 + 64),
    "bottleneck": 2 * 2 * (2 * 4 * 32 + 4 + 32),
    "prefix": 2 * 2 * 4 * 32,
    "prompt": 4 * 32,
}
UNMERGED = {"bottleneck", "prefix", "prompt"}


def read(toy: Toy, out: Path, changes: dict, *arguments: str) -> FinetuneConfig:
    values = {"method": "finetune", "data": str(toy.pairs), "base": str(toy.model), "out": str(out)}
    recipe = out.parent / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**values, **SMALL, **changes}))
    return read_training_recipe(recipe, arguments)[1]


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_reaches_every_method(toy: Toy, tmp_path: Path, name: str):
    config = read(toy, tmp_path / "out", METHODS[name])
    result = run_finetune(config)
    figures = result.figures
    assert figures["validation_loss"] < figures["validation_loss_before"]
    assert figures["trained_parameters"] == TRAINED[name]
    assert verify(config.adapter_folder).kind == "adapter"
    base = load_model(toy.model, dtype=torch.float32)
    if "load_in_4bit" in METHODS[name]:
        base = mw.FastModel.from_pretrained(toy.model, load_in_4bit=True).model
    load_adapter(base, config.adapter_folder)
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        beside = base(ids).logits.float()
        assert (beside - load_model(toy.model)(ids).logits).abs().max() > 1e-4
        if name in UNMERGED:
            assert result.out == config.adapter_folder and not config.out.exists()
            assert (result.out / "tokenizer.json").is_file()
        else:
            assert result.out == config.out and verify(config.out).kind == "model"
            merged = load_model(config.out)(ids).logits.float()
            loose = 0.05 if "load_in_4bit" in METHODS[name] else 1e-4
            torch.testing.assert_close(merged, beside, rtol=loose, atol=loose)


@pytest.mark.parametrize("name", ["prompt", "AdaLoRA", "QPiSSA"])
def test_a_plan_knows_what_a_method_trains(toy: Toy, tmp_path: Path, name: str):
    assert plan_run(read(toy, tmp_path / "out", METHODS[name])).gradient_bytes == 4 * TRAINED[name]


def test_the_budget_of_ranks_falls_from_a_recipe_and_in_the_trainer(toy: Toy, tmp_path: Path):
    config = read(toy, tmp_path / "out", METHODS["AdaLoRA"])
    run_finetune(config)
    model = load_model(toy.model)
    load_adapter(model, config.adapter_folder)
    layers = [layer for layer in adapter_layers(model).values() if isinstance(layer, AdaLoraLinear)]
    live = [int((layer.lora_e != 0).sum()) for layer in layers]
    assert sum(live) == 2 * len(layers) and max(live) <= 4
    fast = mw.FastModel.from_pretrained(toy.model, max_seq_len=128, dtype=torch.float32)
    fast.with_adapter(AdaLoraConfig(rank=4, target_rank=2, warmup_fraction=0.0, every=1, targets=("q_proj", "up_proj")))
    rows = [{"instruction": f"Say {word}.", "output": f"{word} {word}"} for word in ("one", "two", "six")]
    mw.Trainer(fast, rows, template="alpaca", num_steps=5, warmup_steps=0, precision="fp32").train()
    layers = [layer for layer in fast.model.modules() if isinstance(layer, AdaLoraLinear)]
    assert len(layers) == 4 and sum(int(layer.kept.sum()) for layer in layers) == 8


@pytest.mark.parametrize("name", ["AdaLoRA", "prompt", "QPiSSA"])
def test_a_stopped_run_ends_like_an_unharmed_one(toy: Toy, tmp_path: Path, name: str):
    def stop(run, report):
        if report.step == 3:
            raise InterruptedError

    whole = read(toy, tmp_path / "whole", METHODS[name], "--loop.checkpoint.every=1")
    run_finetune(whole)
    config = read(toy, tmp_path / "out", METHODS[name], "--loop.checkpoint.every=1")
    with pytest.raises(InterruptedError):
        run_finetune(config, hooks=[stop])
    run_finetune(config)
    file = "adapter_model.safetensors"
    assert (config.adapter_folder / file).read_bytes() == (whole.adapter_folder / file).read_bytes()


def test_an_override_of_the_loop_leaves_the_rest_of_the_method_s_loop(toy: Toy, tmp_path: Path):
    plain = read(toy, tmp_path / "out", {})
    assert plain.loop.optimizer.name == "adamw" and plain.loop.optimizer.adamw.weight_decay == 0.0
    assert plain.loop.schedule.name == "cosine" and plain.loop.num_steps == 4
    changed = read(toy, tmp_path / "out", {}, "--loop.optimizer.adamw.learning_rate=0.5", "--lora.rank=2").loop
    assert (changed.optimizer.adamw.learning_rate, changed.optimizer.adamw.weight_decay) == (0.5, 0.0)
    # Another rule keeps the section that it reads; those of others would be refused and fall back.
    lean = read(toy, tmp_path / "out", {}, "--loop.optimizer.name=adamw8bit").loop.optimizer
    assert lean.adamw == plain.loop.optimizer.adamw
    assert read(toy, tmp_path / "out", {}, "--loop.optimizer.name=muon").loop.optimizer == LoopConfig().optimizer
    assert read(toy, tmp_path / "out", {}, "--lora.rank=2").lora.alpha == 32.0


def test_settings_that_make_no_sense_are_refused(toy: Toy, tmp_path: Path):
    def refuses(changes: dict, message: str, error: type = ConfigError) -> None:
        with pytest.raises(error, match=message):
            run_finetune(read(toy, tmp_path / "out", changes))

    refuses({"peft": "adalora", "lora": {"rank": 3}}, "peft is 'adalora', but the section lora was set")
    refuses({"adalora": {"rank": 12}}, "section adalora was set, which has no effect.*choose peft: adalora")
    refuses({"peft": "adlora"}, "peft is 'adlora'.*Did you mean 'adalora'")
    refuses({"template": "vicuna"}, "template is 'vicuna'; known: chat, alpaca")
    refuses({"lora": None, "load_in_4bit": True}, "weights of 4 bits cannot be trained")
    refuses({"max_seq_len": 4096}, "max_seq_len is 4096; this model reads 2 to 512 tokens")
    refuses({**METHODS["prefix"], "max_seq_len": 510}, "reads 2 to 508 tokens beside 4 virtual ones")
    refuses({"data": str(tmp_path / "none.json")}, "none.json does not exist", DataError)
    refuses({"base": str(tmp_path)}, "has no tokenizer.json", DataError)
    assert row_length(read(toy, tmp_path / "out", {**METHODS["prompt"], "max_seq_len": None}), 512) == 508


def test_alpaca_rows_in_one_file_train_with_the_alpaca_prompt(toy: Toy, tmp_path: Path):
    rows = [{"instruction": f"Say {i}.", "output": f"{i} {i}"} for i in range(60)]
    (tmp_path / "a.json").write_text(yaml.safe_dump(rows))
    config = read(toy, tmp_path / "out", {"data": str(tmp_path / "a.json"), "template": "alpaca", "max_seq_len": 256})
    with pytest.raises(DataError, match="not valid JSON"):
        run_finetune(config)
    write_json(tmp_path / "a.json", rows)
    result = run_finetune(config)
    assert result.figures["num_conversations"] == 57
    assert "### Instruction" in (result.out / "chat_template.jinja").read_text()


def test_recipes_train_on_real_data(toy: Toy, tmp_path: Path):
    folder = data_folder()
    if folder is None or not (folder / "eval" / "mbpp.jsonl.gz").is_file():
        pytest.skip("MODELWRIGHT_DATA is not set, or MBPP is not there")
    root = Path(__file__).parents[2] / "recipes" / "finetune"
    tiny = [f"--base={toy.model}", "--loop.num_steps=2", "--loop.micro_batch_size=1", "--loop.grad_accum_steps=1"]
    for name, file in (("code", "eval/mbpp.jsonl.gz"), ("alpaca", "instruct/alpaca_gpt4_1k.json.gz")):
        arguments = [*tiny, f"--data={folder / file}", f"--out={tmp_path / name}", "--loop.compile=false"]
        result = run_finetune(read_training_recipe(root / f"{name}.yaml", arguments)[1])
        assert result.figures["num_conversations"] > 300 and len(result.losses) == 2
