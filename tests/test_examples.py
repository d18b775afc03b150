"""Every example is short and runs as its docstring says, in an interpreter of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import Toy

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
MAX_LINES = 60


def run_example(name: str, *arguments: object) -> str:
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_short_says_how_it_is_run_and_has_a_test(example: Path):
    text = example.read_text()
    assert text.count("\n") <= MAX_LINES
    assert f"python examples/{example.name}" in text
    assert f'run_example("{example.name}"' in Path(__file__).read_text()


def test_ask_documents_prints_an_answer_with_citations(toy: Toy, tmp_path: Path):
    for name in ("textwrap.md", "bisect.md"):
        shutil.copy(toy.documents / name, tmp_path / name)
    shown = run_example("ask_documents.py", tmp_path, "What does textwrap.dedent do?")
    assert "[1] textwrap.md, characters" in shown


def test_train_tiny_learns_and_writes(toy: Toy, tmp_path: Path):
    shown = run_example("train_tiny.py", toy.documents, tmp_path / "out", 30)
    before, after = (float(word) for word in shown.split("\n")[0].split() if word.replace(".", "").isdigit())
    assert after < before - 0.5
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_generate_is_repeatable(toy: Toy):
    prompts = ("The ", "A list")
    first = run_example("generate.py", toy.model, *prompts)
    assert first == run_example("generate.py", toy.model, *prompts)
    assert first.startswith("The ") and "tokens, " in first


def test_inspect_model_prints_probabilities(toy: Toy):
    lines = run_example("inspect_model.py", toy.model, "The function").splitlines()
    assert len(lines) == 5 and all("%" in line for line in lines)


def test_ngram_text_orders_the_smoothings_and_writes(tmp_path: Path):
    line = "the {} sat on the {} and the {} looked at the {}"
    words = ("cat", "dog", "bird", "cow", "mat", "sea")
    text = [line.format(*(words[(i * k + k) % 6] for k in (1, 2, 3, 5))) for i in range(200)]
    (tmp_path / "text.txt").write_text("\n".join(text))
    shown = run_example("ngram_text.py", tmp_path / "text.txt").splitlines()
    perplexity = {row.split()[0]: float(row.split()[1]) for row in shown[:4]}
    assert perplexity["modified_kneser_ney"] < perplexity["laplace"]
    assert len(shown) == 7 and shown[4].startswith("the ")


def test_reverse_strings_learns_and_shows_its_attention():
    lines = run_example("reverse_strings.py", 120).splitlines()
    assert int(lines[0].split()[0]) >= 190
    first = [float(number) for number in lines[2].split()[1:]]
    assert lines[2].split()[0] == "d" and sum(first) > 0.95


def test_docstring_dataset_grows_two_seeds_and_refuses_what_is_bad(tmp_path: Path):
    shown = run_example("docstring_dataset.py", tmp_path / "out", 30)
    assert shown.startswith("2 seeds -> 30 examples") and "'known'" in shown and "'refusal'" in shown
    assert "no language model" in (tmp_path / "out" / "train.jsonl").read_text()


def test_role_play_template_passes_its_checks_and_trains_the_game_master():
    shown = run_example("role_play_template.py")
    assert "wrong" not in shown
    assert "[narrator\nThe hinges give way, and cold air meets you.]" in shown and "[I force" not in shown


def test_arithmetic_dataset_keeps_the_held_out_sums_apart_and_writes_them_right(tmp_path: Path):
    assert "300 sums" in run_example("arithmetic_dataset.py", tmp_path, 300)
    seen = {}
    for part in ("train", "validation"):
        rows = [json.loads(line)["messages"] for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()]
        seen[part] = {row[0]["content"] for row in rows}
        for question, answer in ([message["content"].replace(" ", "") for message in row] for row in rows):
            a, _, b = question.removesuffix("=").partition("+")
            assert int(answer[::-1]) == int(a) + int(b)
    assert len(seen["validation"]) == 15 and not seen["train"] & seen["validation"]
