"""Every recipe of a task with a head of its own runs at toy size, and wrong data is named by its row."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import yaml
from tokenizers import models, pre_tokenizers, processors

from modelwright.base.artifact import verify
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import write_jsonl
from modelwright.base.registry import lookup
from modelwright.cli.recipe import read_training_recipe
from modelwright.cli.train_tracking import tell, tracked
from modelwright.models.bert import ARCHITECTURES, BertConfig
from modelwright.models.sentence import SentenceEncoder, load_sentence_encoder, save_sentence_encoder
from modelwright.models.t5 import T5, T5Config
from modelwright.models.weights import load_model, save_model
from modelwright.nn.init import init_weights
from modelwright.train import METHODS
from modelwright.train.forecast import read_column
from modelwright.train.plan import plan_run
from modelwright.train.tracking import TrackingConfig

METHODS_HERE = ("masked", "write", "classify", "embed", "forecast")
RECIPES = [p for p in sorted((Path(__file__).parents[1] / "recipes").glob("*/*.yaml")) if p.parent.name in METHODS_HERE]
WORDS = [f"word{i}" for i in range(60)]
GOOD, BAD = WORDS[:10], WORDS[10:20]


def write_tokenizer(folder: Path, special: list[str], has_ends: bool) -> int:
    vocabulary = {token: i for i, token in enumerate([*special, *WORDS])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=special[2]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(special)
    if has_ends:
        first, last = (("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"]))
        backend.post_processor = processors.BertProcessing(last, first)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return len(vocabulary)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    size = write_tokenizer(root / "encoder", ["[PAD]", "[MASK]", "[UNK]", "[CLS]", "[SEP]"], True)
    shape = BertConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=1,
        num_heads=2,
        max_seq_len=512,
        num_token_types=2,
    )
    save_sentence_encoder(SentenceEncoder(init_weights(ARCHITECTURES["BertModel"](shape), 0)), root / "encoder")
    size = write_tokenizer(root / "t5", ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(100))], False)
    t5 = T5Config(vocab_size=size, hidden_size=32, head_dim=8, intermediate_size=48, num_layers=1, num_heads=4)
    save_model(init_weights(T5(t5), 0), root / "t5")
    return {"encoder": root / "encoder", "t5": root / "t5"}


def sentence(random, words, length=8):
    return " ".join(random.choice(words, length))


def rows_of(recipe: str, labels, num: int, seed: int):
    random = np.random.default_rng(seed)
    names = list(labels or ["first", "second"])
    for i in range(num):
        name = names[i % len(names)]
        text = sentence(random, [*(GOOD if i % len(names) else BAD), *WORDS[20:24]])
        if recipe == "reranker":
            yield {"text": text, "pair": sentence(random, WORDS), "label": float(i % 2)}
        elif recipe in ("summaries", "translation"):
            yield {"source": text, "target": " ".join(text.split()[:3])}
        else:
            yield {"text": text, "label": name}


@pytest.fixture
def toy_data(tmp_path):
    def make(recipe: Path, num=24):
        values = yaml.safe_load(recipe.read_text())
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        if recipe.parent.name == "forecast":
            lines = ["Date,Close", *(f"{i},{100 + np.sin(i / 3):.4f}" for i in range(120))]
            (folder / "prices.csv").write_text("\n".join(lines) + "\n")
            return folder / "prices.csv"
        for seed, part in enumerate(("train", "validation")):
            write_jsonl(folder / f"{part}.jsonl", list(rows_of(recipe.stem, values.get("labels"), num, seed)))
        return folder

    return make


def arguments(recipe: Path, data: Path, bases, out: Path):
    method = recipe.parent.name
    tiny = [f"--data={data}", f"--out={out}", "--loop.num_steps=3", "--loop.micro_batch_size=4", "--loop.compile=false"]
    if method == "forecast":
        return tiny
    base = bases["t5" if method == "write" else "encoder"]
    more = ["--sizes=8"] if method == "embed" and "sizes" in recipe.read_text() else []
    return [*tiny, *more, f"--base={base}", "--max_seq_len=32"]


def run(recipe, toy_data, bases, out, changes=()):
    method, config = read_training_recipe(recipe, [*arguments(recipe, toy_data(recipe), bases, out), *changes])
    return lookup(METHODS, method, "method")(config)


def find(name: str) -> Path:
    return next(path for path in RECIPES if f"{path.parent.name}/{path.stem}" == name)


def test_there_are_recipes_for_every_task():
    assert {path.parent.name for path in RECIPES} == set(METHODS_HERE)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_recipe_runs_at_toy_size(recipe, toy_data, bases, tmp_path, capsys):
    method, config = read_training_recipe(recipe, arguments(recipe, toy_data(recipe), bases, tmp_path / "out"))
    with tracked(config, TrackingConfig(to=("files",), plots=False)) as hooks:  # as mw train runs it
        result = lookup(METHODS, method, "method")(config, hooks=[tell, *hooks])
    shown = capsys.readouterr().out
    assert ("batch 1: " in shown and "batch 2: " in shown) == (method != "forecast"), shown
    assert len((tmp_path / "out-tracking" / "steps.jsonl").read_text().splitlines()) == 3
    assert len(result.losses) == 3 and all(np.isfinite(loss) for _, loss in result.losses)
    assert verify(result.out).kind == "model"
    scored = [name for name in result.figures if f"{name}_before" in result.figures]
    assert scored, result.figures
    kept = json.loads((result.out / "training.json").read_text())
    assert kept["figures"] == result.figures
    if recipe.parent.name == "forecast":
        assert load_model(result.out).config.window == 20
    elif recipe.parent.name == "embed":
        assert load_sentence_encoder(result.out).pooling == "mean"
    else:
        assert load_model(result.out).config.vocab_size > 60
        assert (result.out / "tokenizer.json").is_file()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_recipe_can_be_planned(recipe, toy_data, bases, tmp_path):
    _, config = read_training_recipe(recipe, arguments(recipe, toy_data(recipe), bases, tmp_path / "out"))
    plan = plan_run(config)
    assert plan.fits and plan.num_steps == 3
    assert plan.weight_bytes >= 4 * plan.parameters
    assert 0.9 * 8 * plan.parameters < plan.optimizer_bytes < 1.02 * 8 * plan.parameters  # AdamW; a pooler may rest
    assert plan.flops_per_token > plan.matmul_parameters
    assert plan.batch.largest_recomputed >= plan.batch.largest_micro_batch > 4
    assert not (tmp_path / "out").exists()


def test_a_recipe_learns_its_classes_and_not_shuffled_ones(toy_data, bases, tmp_path):
    recipe = find("classify/reviews")
    longer = [
        "--loop.optimizer.name=adamw",
        "--loop.num_steps=40",
        "--loop.micro_batch_size=8",
        "--loop.optimizer.adamw.learning_rate=0.003",
    ]
    found = run(recipe, toy_data, bases, tmp_path / "out", longer).figures
    assert found["accuracy"] > 0.9 > found["accuracy_before"]
    folder = toy_data(recipe)
    rows = list(rows_of("reviews", ["negative", "positive"], 24, 0))
    labels = np.random.default_rng(0).permutation([row["label"] for row in rows])
    write_jsonl(folder / "train.jsonl", [{**r, "label": str(n)} for r, n in zip(rows, labels, strict=True)])
    _, config = read_training_recipe(recipe, [*arguments(recipe, folder, bases, tmp_path / "other"), *longer])
    assert lookup(METHODS, "classify", "method")(config).figures["accuracy"] < 0.85
    assert load_model(tmp_path / "out").config.labels.names == ("negative", "positive")


def test_labels_out_of_range_are_named_by_their_row(toy_data, bases, tmp_path):
    recipe = find("classify/reviews")
    folder = toy_data(recipe)
    rows = list(rows_of("reviews", ["negative", "positive"], 6, 0))
    for wrong in ("neutral", 2, -1, None):
        write_jsonl(folder / "train.jsonl", [*rows, {"text": "word1", "label": wrong}])
        _, config = read_training_recipe(recipe, arguments(recipe, folder, bases, tmp_path / "out"))
        with pytest.raises(DataError, match=rf"row 7 has the label {wrong!r}; expected one of negative, positive"):
            lookup(METHODS, "classify", "method")(config)
    write_jsonl(folder / "train.jsonl", [*rows, {"text": 3, "label": "positive"}])
    with pytest.raises(DataError, match="row 7 has the fields text, label"):
        lookup(METHODS, "classify", "method")(config)
    scored = find("classify/reranker")
    write_jsonl(folder / "train.jsonl", [{"text": "a", "pair": "b", "label": "high"}])
    _, config = read_training_recipe(scored, arguments(scored, folder, bases, tmp_path / "out"))
    with pytest.raises(DataError, match="row 1 has the label 'high'; expected a finite number"):
        lookup(METHODS, "classify", "method")(config)


def test_wrong_tokenizers_and_models_are_refused(toy_data, bases, tmp_path):
    with pytest.raises(ConfigError, match=r"max_seq_len is 600; the encoder reads at most 512"):
        run(find("classify/finance"), toy_data, bases, tmp_path / "out", ["--max_seq_len=600"])
    with pytest.raises(ConfigError, match=r"no token for a mode of UL2 \(\[NLU\]\)"):
        run(find("write/denoise"), toy_data, bases, tmp_path / "out", ["--denoise=ul2"])
    with pytest.raises(ConfigError, match="expected an encoder-decoder such as T5"):
        run(find("write/summaries"), toy_data, bases, tmp_path / "out", [f"--base={bases['encoder']}"])
    plain = tmp_path / "plain"
    write_tokenizer(plain, ["[PAD]", "x", "[UNK]", "[CLS]", "[SEP]"], True)
    for name in ("config.json", "model.safetensors"):
        (plain / name).write_bytes((bases["encoder"] / name).read_bytes())
    with pytest.raises(ConfigError, match=r"no mask token \(\[MASK\], <mask>\)"):
        run(find("masked/domain"), toy_data, bases, tmp_path / "out", [f"--base={plain}"])
    write_tokenizer(bases["t5"].parent / "bare", ["<pad>", "</s>", "<unk>"], False)
    for name in ("config.json", "model.safetensors"):
        (bases["t5"].parent / "bare" / name).write_bytes((bases["t5"] / name).read_bytes())
    with pytest.raises(ConfigError, match=r"no sentinels \(<extra_id_0>\)"):
        run(find("write/denoise"), toy_data, bases, tmp_path / "out", [f"--base={bases['t5'].parent / 'bare'}"])


def test_a_gap_in_a_series_is_named(tmp_path):
    file = tmp_path / "prices.csv"
    file.write_text("Date,Close\n1,10\n2,\n3,12\n")
    with pytest.raises(DataError, match="row 2 has '' for Close"):
        read_column(file, "Close")
    with pytest.raises(DataError, match="no column 'close'; it has Date, Close"):
        read_column(file, "close")
