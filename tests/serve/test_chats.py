"""Conversations that are kept, and what of them a model is shown."""

import stat
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.base.errors import ConfigError, DataError, RequestError
from modelwright.base.types import Completion, Message, Usage
from modelwright.serve.chats import SUMMARY_PREFIX, Chats, Memory, MemoryConfig


def words(messages):
    """A token a word and one a message."""
    return sum(1 + len(message.content.split()) for message in messages)


def exchange(i, length=1):
    return [Message("user", f"q{i} " + "x " * (length - 1)), Message("assistant", f"a{i}")]


def talk(chats, num_exchanges, system="", length=1):
    chat = chats.new(system)
    for i in range(num_exchanges):
        chats.add(chat.id, exchange(i, length))
    return chats.find(chat.id)


class Summarizer:
    """A `ChatModel` that sums up by the questions it is shown."""

    def __init__(self):
        self.prompts = []

    def chat(self, messages, params):
        self.prompts.append(messages[0].content)
        said = [word for word in messages[0].content.split() if word[0] == "q" and word[1:].isdecimal()]
        return Completion(f"asked {said[0]} to {said[-1]}", (), "stop", Usage(1, 1))

    def stream(self, messages, params):
        raise NotImplementedError


def test_turns_come_back_in_order_from_another_process_and_thread(tmp_path):
    path = tmp_path / "deep" / "chats.sqlite"
    chats = Chats(path)
    chat = chats.new("Be brief.")
    threads = [threading.Thread(target=chats.add, args=(chats.new().id, exchange(i))) for i in range(8)]
    for thread in threads:
        thread.start()
    chats.add(chat.id, [Message("user", "Ünicode  ☃\nline"), Message("assistant", "")])
    for thread in threads:
        thread.join()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = Chats(path)
    found = again.find(chat.id)
    assert (found.title, found.system, found.num_turns) == ("Ünicode ☃ line", "Be brief.", 2)
    assert again.turns(chat.id) == [Message("user", "Ünicode  ☃\nline"), Message("assistant", "")]
    assert len(again.all()) == 9 and again.all()[0].id == max(c.id for c in again.all())
    again.delete(chat.id)
    assert chats.turns(chat.id) == [] and len(chats.all()) == 8
    with pytest.raises(RequestError, match="no conversation"):
        again.find(chat.id)
    (tmp_path / "not.sqlite").write_text("nonsense " * 100)
    with pytest.raises(DataError, match="no store of conversations"):
        Chats(tmp_path / "not.sqlite")


def test_owners_do_not_see_each_other():
    chats = Chats()
    mine, theirs = chats.new(owner="alice"), chats.new(owner="bob")
    assert [c.id for c in chats.all("alice")] == [mine.id]
    with pytest.raises(RequestError):
        chats.find(theirs.id, "alice")


def test_a_window_shows_the_last_exchanges():
    chats = Chats()
    chat = talk(chats, 10, "Be brief.")
    shown = Memory(chats, MemoryConfig("window", num_exchanges=3), words).recall(chat, "new")
    assert [m.content.strip() for m in shown] == ["Be brief.", "q8", "a8", "q9", "a9", "new"]
    assert len(Memory(chats, MemoryConfig("all"), words).recall(chat, "new")) == 22
    assert len(Memory(chats, MemoryConfig("window", num_exchanges=99), words).recall(chat, "new")) == 22


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=12), st.integers(4, 60), st.integers(1, 4))
def test_tokens_are_never_exceeded_and_no_exchange_is_halved(lengths, most, asked):
    chats = Chats()
    chat = chats.new("Be brief.")
    for i, length in enumerate(lengths):
        chats.add(chat.id, exchange(i, length))
    memory = Memory(chats, MemoryConfig("tokens", max_tokens=most), words)
    if words([Message("system", "Be brief."), Message("user", "x " * asked)]) > most:
        with pytest.raises(RequestError, match="Shorten it"):
            memory.recall(chat, "x " * asked)
        return
    shown = memory.recall(chat, "x " * asked)
    assert words(shown) <= most and [m.role for m in shown[:2]] == ["system", "user"]
    whole = [*chats.turns(chat.id), Message("user", "x " * asked)]
    assert shown[1:] == whole[len(whole) - len(shown) + 1 :]
    dropped = len(whole) - len(shown) + 1
    if dropped:  # one exchange more would not have fitted
        assert words([shown[0], *whole[dropped - 2 :]]) > most


def test_what_falls_out_is_summed_up_once_and_carried_on():
    chats, model = Chats(), Summarizer()
    memory = Memory(chats, MemoryConfig("summary", max_tokens=40), words, model)
    chat = chats.new("Be brief.")
    for i in range(30):
        shown = memory.recall(chat, f"q{i} x x")
        assert words(shown) <= 40 and shown[-1].content == f"q{i} x x"
        chats.add(chat.id, [Message("user", f"q{i} x x"), Message("assistant", f"a{i}")])
    text, covered = chats.summary(chat.id)
    assert text.startswith("asked q0 to q") and covered > 30  # the first question lives on in summaries of summaries
    assert shown[0].role == "system" and SUMMARY_PREFIX + text in shown[0].content and "Be brief." in shown[0].content
    assert 3 <= len(model.prompts) <= 12  # every few turns, not at each
    assert all(prompt.count(f"user: {SUMMARY_PREFIX}") == (i > 0) for i, prompt in enumerate(model.prompts))
    before = len(model.prompts)
    memory.recall(chat, "again")
    memory.recall(chat, "again")
    assert len(model.prompts) - before <= 1
    short = Memory(chats, MemoryConfig("summary", max_tokens=4000), words, Summarizer())
    assert len(short.recall(talk(chats, 3), "new")) == 7


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match="memory.kind is 'elephant'; known: all"):
        MemoryConfig("elephant")
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        MemoryConfig(max_tokens=0)
    with pytest.raises(ConfigError, match="needs a model that writes"):
        Memory(Chats(), MemoryConfig("summary"), words)
