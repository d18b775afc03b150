"""Formats of conversations: real files come back equal, what a format cannot hold is refused by line and field."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.base import env
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.types import Message, ToolCall
from modelwright.data import FORMATS
from modelwright.data.chat import read_conversations
from modelwright.data.conversation import Conversation, difference
from modelwright.data.convert import (
    convert_file,
    detect_format,
    find_format,
    read_conversation,
    read_items,
    reduce_to,
    write_conversation,
)

CALLS = (
    Message("user", "weather in Rome and Oslo?"),
    Message("assistant", "", (ToolCall("a7", "weather", '{"city": "Rome"}'), ToolCall("b8", "weather", "{oops"))),
    Message("tool", "21", tool_call_id="a7", name="weather"),
    Message("tool", "-3", tool_call_id="b8"),
    Message("assistant", "21 and -3"),
)
TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},)
ROWS = {
    "alpaca": {"instruction": "Add", "input": "2 and 3", "output": "5", "source": "x"},
    "self-instruct": {"id": "t1", "instruction": "Add", "instances": [{"input": "1 1", "output": "2"}], "name": "add"},
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "Brief."},
            {"from": "user", "value": "hi", "weight": 0},
            {"from": "function_call", "value": '{"name":"f","arguments":{"a": "\\u00e9"}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "yo"},
        ],
        "tools": '[{"name": "f", "parameters": {}}]',
    },
    "messages": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "bo"},
            {"role": "assistant", "content": "b", "weight": 1},
        ],
        "parallel_tool_calls": False,
    },
    "preference": {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "c"}],
        "score": 0.5,
    },
    "preference-text": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "preference-whole": {
        "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],
    },
    "preference-sharegpt": {
        "conversations": [{"from": "human", "value": "a"}],
        "chosen": {"from": "gpt", "value": "b"},
        "rejected": {"from": "gpt", "value": "c"},
    },
    "hh": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:c"},
    "kto": {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
        "label": False,
    },
    "kto-text": {"prompt": "a", "completion": "b", "label": True},
    "kto-messages": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "label": True,
    },
    "kto-sharegpt": {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "kto_tag": False,
    },
    "completion": {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    },
    "completion-text": {"prompt": "a", "completion": "b"},
}


def kin(name: str) -> list[str]:
    return [other for other in FORMATS if find_format(other).kind == find_format(name).kind]


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_told_and_comes_back_equal_through_every_format_that_can_hold_it(name: str):
    row = ROWS[name]
    assert detect_format(row) == name
    held = 0
    for other in kin(name):
        conversation = read_conversation(row, name)
        try:
            there = json.loads(json.dumps(write_conversation(conversation, other)))
        except DataError as error:
            assert f"the format {other}" in str(error)
            continue
        held += 1
        back = write_conversation(read_conversation(there, other), name)
        back.pop("layout", None)
        assert back == row, other
    assert held >= 2 or name == "sharegpt"


@pytest.mark.parametrize(
    ("name", "num_refused"),
    [
        ("instruct/alpaca_5000.json.gz", 2),  # two answers are empty
        ("instruct/gpteacher_roleplay.json.gz", 0),
        ("instruct/glaive_toolcall_300.json.gz", 0),
        ("instruct/self_instruct_seed_tasks.jsonl", 0),
        ("preference/dpo_en_300.json.gz", 0),
        ("preference/kto_en_300.json.gz", 0),
    ],
)
def test_real_files_come_back_equal(name: str, num_refused: int, tmp_path):
    folder = env.data_folder()
    if folder is None:
        pytest.skip("MODELWRIGHT_DATA is not set")
    source = folder / name
    middle = {"chat": "messages", "preference": "preference", "label": "kto"}
    first = next(iter(read_items(source))).row
    known = detect_format(first)
    there = convert_file(source, tmp_path / "there.jsonl.gz", middle[find_format(known).kind])
    assert len(there.set_aside) == num_refused and there.num_written == there.num_read - num_refused
    convert_file(tmp_path / "there.jsonl.gz", tmp_path / "back.json", known)
    back = json.loads((tmp_path / "back.json").read_text())
    refused = {aside.where for aside in there.set_aside}
    wanted = [item.row for item in read_items(source) if item.where not in refused]
    assert [{k: v for k, v in row.items() if k != "layout"} for row in back] == wanted


def test_calls_of_tools_keep_their_ids_names_and_broken_arguments():
    conversation = Conversation(CALLS, TOOLS)
    row = json.loads(json.dumps(write_conversation(conversation, "sharegpt")))
    assert [turn["from"] for turn in row["conversations"]] == [
        "human", "function_call", "observation", "observation", "gpt",
    ]  # fmt: skip
    assert not difference(read_conversation(row, "sharegpt"), conversation)
    assert write_conversation(conversation, "messages")["messages"][1]["content"] is None


def test_finetuning_reads_calls_of_tools(tmp_path):
    made = {"messages": write_conversation(Conversation(CALLS), "messages")["messages"]}
    (tmp_path / "c.jsonl").write_text(json.dumps(made))
    assert list(read_conversations(tmp_path / "c.jsonl")) == [CALLS]


turns = st.lists(
    st.tuples(st.text(max_size=8), st.text(min_size=1, max_size=8)).map(
        lambda pair: (Message("user", pair[0]), Message("assistant", pair[1]))
    ),
    min_size=1,
    max_size=3,
).map(lambda pairs: tuple(turn for pair in pairs for turn in pair))


@given(turns, st.booleans(), st.sampled_from(sorted(FORMATS)))
@settings(max_examples=200, deadline=None)
def test_whatever_is_written_reads_back_the_same_or_is_refused(messages, has_system: bool, name: str):
    messages = (Message("system", "s"), *messages) if has_system else messages
    form = find_format(name)
    conversation = Conversation(messages)
    if form.kind == "preference":
        conversation = Conversation(messages, chosen=(Message("assistant", "x"),), rejected=messages[-1:])
    elif form.kind == "label":
        conversation = Conversation(messages, label=True)
    try:
        row = write_conversation(conversation, name)
    except DataError:
        assert name not in ("messages", "sharegpt", "preference", "kto", "kto-messages", "kto-sharegpt"), (
            "these hold every conversation of text"
        )
        return
    assert not difference(read_conversation(json.loads(json.dumps(row)), name), conversation)


def test_an_edited_conversation_drops_what_was_kept_of_its_old_form():
    conversation = read_conversation(ROWS["sharegpt"], "sharegpt")
    row = write_conversation(conversation, "messages")
    row["messages"][1]["content"] = "changed"
    back = write_conversation(read_conversation(row, "messages"), "sharegpt")
    assert back["conversations"][1] == {"from": "human", "value": "changed"}
    assert back["conversations"][2] == ROWS["sharegpt"]["conversations"][2]


def test_plain_rows_have_the_formats_keys_alone():
    for name, row in ROWS.items():
        written = write_conversation(read_conversation(row, name), name, plain=True)
        assert set(written) <= {*row, "system", "tools", "input"} - {"source", "score", "name", "id"}


def test_pairs_and_labels_are_reduced_only_when_asked():
    pair = read_conversation(ROWS["preference-text"], "preference-text")
    assert [(c.messages[-1].content, c.label) for c in reduce_to(pair, "kto")] == [("b", True), ("c", False)]
    assert [c.messages[-1].content for c in reduce_to(pair, "messages", "chosen")] == ["b"]
    with pytest.raises(DataError, match="a preference example, and messages holds chat examples"):
        write_conversation(reduce_to(pair, "messages")[0], "messages")
    bad = read_conversation(ROWS["kto"], "kto")
    assert reduce_to(bad, "messages", "chosen") == [] and len(reduce_to(bad, "messages", "both")) == 1


@pytest.mark.parametrize(
    ("conversation", "name", "message"),
    [
        (Conversation((Message("user", "a"), Message("user", "b"), Message("assistant", "c"))), "alpaca", "user, user"),
        (Conversation(CALLS), "alpaca", "tools is a tool or a call"),
        (Conversation((Message("developer", "a"), Message("assistant", "c"))), "sharegpt", r"messages\[1\].role"),
        (
            Conversation((Message("user", ""), Message("assistant", "text", (ToolCall("1", "f", "{}"),)))),
            "sharegpt",
            r"messages\[2\].content is a text beside tool_calls",
        ),
        (
            Conversation(
                (Message("user", "a\n\nHuman: b"),),
                chosen=(Message("assistant", "c"),),
                rejected=(Message("assistant", "d"),),
            ),
            "hh",
            r"messages\[1\].content would not come back",
        ),
        (Conversation(CALLS, extra={"conversations": 3}), "sharegpt", "conversations is a key of the row"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_its_field(conversation, name, message):
    with pytest.raises(DataError, match=message):
        write_conversation(conversation, name)


def lines(*rows: object) -> str:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


GOOD = {"instruction": "a", "input": "", "output": "b"}


@pytest.mark.parametrize(
    ("line", "where", "message"),
    [
        ('{"instruction": ', "line 3", "not valid JSON"),
        ("[" * 50_000, "line 3", "n"),
        ("[1]", "line 3", "a JSON list; expected an object"),
        ('{"instruction": "a", "output": "\\ud800"}', "line 3", "surrogate"),
        ({"instruction": "a", "output": 3}, "line 3", "output is 3; expected text"),
        ({"instruction": "a", "output": ""}, "line 3", "output is empty"),
        ({"instruction": "a", "history": ["x"], "output": "b"}, "line 3", "history is"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "line 3", "expected a list of"),
        ("\x00", "line 3", "not valid JSON"),
    ],
)
def test_a_wrong_line_is_set_aside_by_its_number_and_the_rest_goes_on(tmp_path, line, where, message):
    (tmp_path / "in.jsonl").write_text(lines(GOOD, "", line, GOOD))
    made = convert_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "messages")
    assert (made.num_read, made.num_written) == (3, 2)
    assert where in made.set_aside[0].where and message in made.set_aside[0].reason
    with pytest.raises(DataError, match=where):
        convert_file(tmp_path / "in.jsonl", tmp_path / "strict.jsonl", "messages", strict=True)
    assert not (tmp_path / "strict.jsonl").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [{"from": "alien", "value": "x"}]}, r"conversations\[1\].from is 'alien'; known: human"),
        ({"conversations": [{"from": "human", "value": None}]}, r"conversations\[1\].value is None"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, r"conversations\[1\].value is no JSON"),
        ({"conversations": [{"from": "function_call", "value": "3"}]}, 'expected {"name"'),
        ({"conversations": [3]}, r"conversations\[1\] is 3"),
        ({"conversations": []}, "expected a list"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "no message has the role assistant"),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [{}]}]}, r"tool_calls\[0\] is {}"),
        ({"messages": [{"role": "user", "content": "", "tool_calls": 3}]}, "tool_calls is 3"),
        ({"messages": [{"role": "tool", "content": "", "tool_call_id": 3}]}, "tool_call_id is 3"),
        ({"messages": [{"role": "user", "content": "x"}], "label": "yes"}, "no message has the role"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "label is 'yes'; expected true or false"),
        ({"chosen": "\n\nHuman: x\n\nAssistant: y", "rejected": "z"}, "rejected is 'z'; expected a transcript"),
        ({"instruction": "a", "instances": []}, r"instances is \[\]"),
        ({"text": "plain"}, r"no format has these keys: text \(str\). Known: self-instruct"),
    ],
)
def test_a_wrong_field_is_named(row, message):
    with pytest.raises(DataError, match=message):
        read_conversation(row, detect_format(row, "line 1"), "line 1")


def test_arrays_are_read_in_pieces_with_their_line_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("modelwright.data.convert._PIECE_CHARS", 7)
    rows = [{"instruction": f"question {i}", "input": "", "output": "é" * i + "x"} for i in range(12)]
    (tmp_path / "in.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    items = list(read_items(tmp_path / "in.json"))
    assert [item.row for item in items] == rows
    assert items[3].where.endswith("item 4 (line 17)")
    cut = (tmp_path / "in.json").read_text()[:-30]
    (tmp_path / "cut.json").write_text(cut)
    *good, bad = list(read_items(tmp_path / "cut.json"))
    assert [item.row for item in good] == rows[:11] and "item 12" in bad.where and "not valid JSON" in bad.reason


def test_a_line_too_long_is_passed_over_without_being_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("modelwright.data.convert._PIECE_CHARS", 64)
    (tmp_path / "in.jsonl").write_text(lines(GOOD, "x" * 5000, GOOD, "[" + "y" * 5000))
    items = list(read_items(tmp_path / "in.jsonl", max_item_chars=200))
    assert [item.row for item in items] == [GOOD, None, GOOD, None]
    assert items[1].reason == items[3].reason == "longer than 200 characters" and items[3].where.endswith("line 4")


def test_bytes_that_are_no_text_and_a_broken_gzip_are_told(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"instruction": "\xff", "output": "b"}\n')
    assert "not valid UTF-8 (byte 0xff)" in list(read_items(tmp_path / "latin.jsonl"))[1].reason
    packed = gzip.compress(lines(*[GOOD] * 50).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-12])
    assert "the rest cannot be read" in list(read_items(tmp_path / "cut.jsonl.gz"))[-1].reason
    with pytest.raises(DataError, match="does not exist"):
        list(read_items(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="is a folder"):
        list(read_items(tmp_path))


def test_a_file_without_conversations_and_wrong_names_are_refused(tmp_path):
    (tmp_path / "in.jsonl").write_text("3\n")
    with pytest.raises(DataError, match=r"no conversation in the format messages: 1 entries.*line 1: a JSON int"):
        convert_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "messages")
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(ConfigError, match="Did you mean 'alpaca'"):
        convert_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "alpca")
    with pytest.raises(DataError, match="known: chosen, both"):
        convert_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "alpaca", take="none")


def test_the_verb_says_what_was_set_aside_and_its_status_tells(tmp_path, capfd):
    from modelwright.cli.main import main

    (tmp_path / "in.jsonl").write_text(lines(GOOD, {"instruction": "a", "output": None}))
    command = ["convert-chat", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--to", "sharegpt"]
    assert main([*command, "--removed", str(tmp_path / "removed.jsonl")]) == 3
    assert "1 of 2 entries, alpaca to sharegpt" in capfd.readouterr().out
    assert json.loads((tmp_path / "removed.jsonl").read_text())["reason"].startswith("output is None")
    assert main([*command, "--strict"]) == 1
