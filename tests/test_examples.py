"""Every example is short and runs as its docstring says, in an interpreter of its own."""

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
