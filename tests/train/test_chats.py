"""Conversations from files of any form: patterns, templates, what is held out, and the order of a curriculum."""

import gzip
import json

import numpy as np
import pytest
from tests.conftest import Toy

from modelwright.base.env import data_folder
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import write_jsonl
from modelwright.data.curriculum import CurriculumConfig
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.train.chats import PairConfig, chat_examples, pack_chats, read_chats, read_parts, with_template

TASK = PairConfig("{text}\nTests:\n{tests}", "{code}", system="Write {language}.")
ROW = {
    "text": "Add two.",
    "tests": ["add(1, 2) == 3", "add(0, 0) == 0"],
    "code": "def add(a, b): ...\n",
    "language": "Go",
}


def test_a_pattern_makes_a_conversation_of_any_row():
    chat = TASK.read(ROW, "row 1")
    assert [(m.role, m.content) for m in chat.messages] == [
        ("system", "Write Go."),
        ("user", "Add two.\nTests:\nadd(1, 2) == 3\nadd(0, 0) == 0"),
        ("assistant", "def add(a, b): ..."),
    ]
    braces = PairConfig("{{}} {n}", "{n}").read({"n": 3}, "row 1")
    assert [m.content for m in braces.messages] == ["{} 3", "3"]
    dolly = PairConfig("{instruction}\n\n{context}", "{response}")
    row = {"instruction": "Name a color.", "context": None, "response": "Red"}
    assert dolly.read(row, "row 1").messages[0].content == "Name a color."
    # What a row says is not taken for a pattern.
    assert PairConfig("{n}", "{n}").read({"n": "{x}"}, "row 1").messages[0].content == "{x}"


def test_wrong_patterns_and_rows_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"pairs\.prompt is '\{text'.*a brace twice"):
        PairConfig("{text", "{code}")
    with pytest.raises(ConfigError, match=r"\{a\.b\} is no field"):
        PairConfig("{a.b}", "{code}")
    with pytest.raises(ConfigError, match=r"\{\} is no field"):
        PairConfig("{}", "{code}")
    with pytest.raises(ConfigError, match="names no field, so all rows would have one answer"):
        PairConfig("{text}", "yes")
    with pytest.raises(DataError, match=r"row 2 has no field 'code'; it has text.*Mend the pattern"):
        read_chats([{"text": "a", "code": "b"}, {"text": "a"}], PairConfig("{text}", "{code}"))
    with pytest.raises(DataError, match="row 1: the answer .* is empty"):
        read_chats([{"text": "a", "code": " "}], PairConfig("{text}", "{code}"))


def test_formats_are_told_by_their_keys_and_preferences_are_refused(tmp_path):
    alpaca = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(3)]
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(alpaca).encode()))
    assert [chat.messages[-1].content for chat in read_chats(tmp_path / "a.json.gz")] == ["0", "1", "2"]
    with pytest.raises(DataError, match=r"preferences, no conversations.*--take chosen"):
        read_chats([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(DataError, match="no row"):
        read_chats([])
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{{oh\n")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: not valid JSON"):
        read_chats(tmp_path / "bad.jsonl")


def test_a_few_rows_without_an_answer_are_left_out_and_said(capsys):
    rows = [{"instruction": f"Say {i}.", "output": str(i) if i != 7 else ""} for i in range(40)]
    assert len(read_chats(rows)) == 39
    assert "1 of 40 rows are left out; the first: row 8: output is empty" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(DataError, match="row 8: output is empty"):
        read_chats(rows[:19])


def test_one_file_gives_a_part_that_is_held_out(tmp_path):
    rows = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(45)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    train, held_out = read_parts(tmp_path / "a.jsonl")
    said = [[chat.messages[-1].content for chat in part] for part in (train, held_out)]
    assert said[1] == ["19", "39"] and len(said[0]) == 43 and not set(said[0]) & set(said[1])
    write_jsonl(tmp_path / "b.jsonl", rows[:3])
    assert [len(part) for part in read_parts(tmp_path / "b.jsonl")] == [2, 1]
    write_jsonl(tmp_path / "c.jsonl", rows[:1])
    with pytest.raises(DataError, match="holds one example"):
        read_parts(tmp_path / "c.jsonl")


def test_the_alpaca_prompt_is_learned_from_the_answer_on(toy: Toy):
    tokenizer = with_template(load_tokenizer(toy.model), "alpaca")
    chats = read_chats([{"instruction": "Say no.", "input": "Loud.", "output": "No!"}])
    (ids, mask) = chat_examples(chats, tokenizer)[0]
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert "### Instruction:\nSay no.\n\nLoud.\n\n### Response:\nNo!" in text
    learned = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m], skip_special_tokens=True)
    assert learned == "No!"
    assert mask[-1]  # the end of the text too


def make_examples(num=200):
    rng = np.random.default_rng(0)
    return [([7] * n, [False] + [True] * (n - 1)) for n in rng.integers(3, 60, num)]


def longest_of_rows(loader, num_rows: int) -> np.ndarray:
    """The length of the longest conversation of each row, over one epoch of batches of 4."""
    batches = [loader.next_batch() for _ in range(num_rows // 4)]
    return np.concatenate([batch.positions.max(1).values.numpy() for batch in batches])


def test_a_curriculum_goes_from_short_to_long_and_then_at_random():
    examples = make_examples()
    config = CurriculumConfig("sorted")
    packed = pack_chats(examples, 64, 0, config)
    plain = pack_chats(examples, 64, 0)
    assert packed.rows.num_trained_tokens == plain.rows.num_trained_tokens
    assert packed.rows.num_examples == plain.rows.num_examples == 200

    loader = packed.loader(4, 0, config)
    sizes, later = longest_of_rows(loader, len(packed.rows)), longest_of_rows(loader, len(packed.rows))
    assert np.corrcoef(sizes, np.arange(len(sizes)))[0, 1] > 0.85
    assert abs(np.corrcoef(later, np.arange(len(later)))[0, 1]) < 0.4
    unordered = longest_of_rows(packed.loader(4, 0, CurriculumConfig("random")), len(packed.rows))
    assert abs(np.corrcoef(unordered, np.arange(len(unordered)))[0, 1]) < 0.4


def test_a_curriculum_leaves_out_what_does_not_fit_and_says_so():
    examples = [([1] * 5, [True] * 5), ([1] * 500, [True] * 500), ([1] * 4, [False] * 4)]
    packed = pack_chats(examples, 16, 0, CurriculumConfig("stages"))
    assert (packed.rows.num_examples, packed.rows.num_dropped) == (1, 2)
    with pytest.raises(DataError, match="None of the 1 examples can be trained on"):
        pack_chats(examples[1:2], 16, 0, CurriculumConfig("stages"))


def test_real_files_are_read():
    folder = data_folder()
    if folder is None:
        pytest.skip("MODELWRIGHT_DATA is not set")
    code = folder / "eval" / "mbpp.jsonl.gz"
    if not code.is_file():
        pytest.skip("MBPP is not there")
    pattern = PairConfig("{text}\nYour code should pass these tests:\n{test_list}", "{code}")
    chats = read_chats(code, pattern)
    assert len(chats) == 974 and all("assert" in chat.messages[0].content for chat in chats)
    assert len(read_chats(folder / "instruct" / "alpaca_gpt4_1k.json.gz")) == 999
