"""Requests of one conversation go to one replica, loads stay bounded, and few keys move when replicas come and go."""

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from modelwright.serve.placement import is_pinned, placed, placement_key, ranked

REPLICAS = [f"replica-{i}" for i in range(5)]


def chat(*texts: str) -> dict[str, Any]:
    roles = ["user", "assistant"]
    return {"model": "m", "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def test_the_turns_of_one_conversation_have_one_key_and_others_have_others():
    path = "/v1/chat/completions"
    first, later = chat("Hello"), chat("Hello", "Hi", "And now?")
    assert placement_key(path, first) == placement_key(path, later)
    assert placement_key(path, first) != placement_key(path, chat("Goodbye"))
    assert placement_key(path, first, "alice") != placement_key(path, first, "bob")
    same = {"model": "m", "prompt": "x" * 600}
    assert placement_key("/v1/completions", same) == placement_key("/v1/completions", {**same, "prompt": "x" * 900})


@given(
    st.dictionaries(st.text(max_size=8), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5))
)
def test_every_body_has_a_key(body: dict[str, Any]):
    assert isinstance(placement_key("/v1/chat/completions", body), str)
    assert isinstance(placement_key("/v1/chat/completions", {"messages": body, "prompt": body, "input": [body]}), str)


def test_only_the_keys_of_a_lost_replica_move():
    keys = [f"key {i}" for i in range(1000)]
    before = {key: ranked(key, REPLICAS)[0] for key in keys}
    after = {key: ranked(key, REPLICAS[1:])[0] for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != REPLICAS[0])
    counts = Counter(before.values())
    assert len(counts) == 5 and max(counts.values()) < 1.3 * min(counts.values())


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.text())
def test_a_busy_replica_is_passed_over_and_none_is_forgotten(numbers: list[int], key: str):
    loads = {f"r{i}": number for i, number in enumerate(numbers)}
    order = placed(key, loads)
    assert sorted(order) == sorted(loads)
    assert loads[order[0]] < 1.25 * (sum(numbers) + 1) / len(numbers) + 1


def test_one_hot_key_is_spread_and_a_pinned_one_is_not():
    loads = dict.fromkeys(REPLICAS, 0)
    for _ in range(100):
        loads[placed("hot", loads)[0]] += 1
    assert max(loads.values()) <= 26
    loads = dict.fromkeys(REPLICAS, 0)
    for _ in range(100):
        loads[placed("hot", loads, float("inf"))[0]] += 1
    assert max(loads.values()) == 100
    assert is_pinned("/v1/responses/x") and not is_pinned("/v1/chat/completions")
