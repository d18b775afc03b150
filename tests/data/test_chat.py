"""Conversations come back as written, and each wrong line is named."""

import pytest

from modelwright.base.errors import DataError
from modelwright.base.types import Message
from modelwright.data.chat import read_conversations, write_conversations

GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'


def test_what_was_written_is_read(tmp_path):
    conversations = [
        (Message("user", "a\u2028\r\n\x00<|im_end|>"), Message("assistant", "\U0001f600")),
        (Message("system", ""), Message("user", ""), Message("assistant", "b"), Message("user", "c")),
    ]
    assert write_conversations(tmp_path / "c.jsonl", conversations) == 2
    assert list(read_conversations(tmp_path / "c.jsonl")) == conversations


def test_text_parts_are_joined_and_other_keys_ignored(tmp_path):
    parts = '[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]'
    (tmp_path / "c.jsonl").write_text(
        f'\n{{"id": 7, "messages": [{{"role": "user", "content": {parts}, "name": "x"}}, '
        '{"role": "assistant", "content": "c", "weight": 1}]}\n\n'
    )
    assert list(read_conversations(tmp_path / "c.jsonl")) == [(Message("user", "ab"), Message("assistant", "c"))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "line 3: not valid JSON"),
        ("[" * 100_000, "line 3: n"),
        ("[1]", "line 3: a JSON list"),
        ('{"prompt": "a", "completion": "b"}', "line 3: keys are completion, prompt; expected"),
        ('{"messages": []}', "line 3: messages is \\[\\]"),
        ('{"messages": ["hi"]}', "line 3, message 1 is 'hi'"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "message 1: the role is 'bot'; known: system"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 1: the content is None"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "pictures are not read"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message has the role assistant"),
        ('{"messages": [{"role": "assistant", "content": ""}]}', "content is empty"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(tmp_path, line, message):
    (tmp_path / "c.jsonl").write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(DataError, match=message):
        list(read_conversations(tmp_path / "c.jsonl"))


def test_files_that_hold_nothing_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\n")
    for name, message in (
        ("none", "does not exist"),
        (".", "is a folder"),
        ("empty.jsonl", "no conversation"),
        ("latin.jsonl", "not valid UTF-8"),
    ):
        with pytest.raises(DataError, match=message):
            list(read_conversations(tmp_path / name))
