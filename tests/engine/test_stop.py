"""Stop strings: found across pieces, never shown in part, and nothing else is delayed."""

from hypothesis import given
from hypothesis import strategies as st

from modelwright.engine.stop import Speech, StopFinder

TEXT = st.text("ab\u00e9", max_size=14)
STOPS = st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3)


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: the shortest prefix that ends in a stop string, without the longest such stop string."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(TEXT, STOPS, st.lists(st.integers(0, 14), max_size=6))
def test_any_cutting_gives_the_same_text_and_shows_no_part_of_a_stop(text: str, stops: list[str], cuts: list[int]):
    expected, is_stopped = cut_at_stop(text, stops)
    finder, shown = StopFinder(stops), ""
    ends = sorted({min(c, len(text)) for c in cuts} | {len(text)})
    for start, end in zip([0, *ends], ends, strict=False):
        shown += finder.push(text[start:end])
        assert expected.startswith(shown), "showed text that is not part of the answer"
        if not finder.is_stopped:
            held = end - len(shown)
            assert held == 0 or any(s.startswith(text[len(shown) : end]) for s in stops), "held back without need"
    assert shown + finder.finish() == expected and finder.is_stopped == is_stopped


def test_before_min_tokens_nothing_stops():
    finder = StopFinder(["ab"])
    assert finder.push("ab a", can_stop=False) == "ab a"
    assert finder.push("b") == "b" and not finder.is_stopped  # it began too early
    assert finder.push(" ab") == " " and finder.is_stopped


def test_after_a_stop_nothing_is_shown():
    finder = StopFinder(["x"])
    assert finder.push("ax b") == "a" and finder.push("more") == "" and finder.finish() == ""


def test_without_a_tokenizer_there_is_no_text():
    speech = Speech(None, ["x"])
    assert speech.push(3) == "" and speech.finish() == "" and not speech.is_stopped
