"""Progress: silent where nobody watches, and numbers that people can read."""

import time

import pytest

from modelwright.base.progress import Stopwatch, bar, human_bytes, human_count, track


def test_without_a_terminal_nothing_is_drawn(capsys: pytest.CaptureFixture[str]):
    with bar("outer", 2) as shown:
        shown.advance()
        shown.describe("note")
        shown.total(3)
        assert list(track([1, 2, 3], "inner")) == [1, 2, 3]
    assert capsys.readouterr().out == ""


def test_tracking_a_stream_of_unknown_length_yields_everything():
    assert list(track((n for n in range(5)), "numbers")) == list(range(5))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (3.4e6, "3.4 MB"), (5e12, "5.0 TB"), (5e16, "50000.0 TB")],
)
def test_sizes(count: float, text: str):
    assert human_bytes(count) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0"), (999, "999"), (1500, "1.5k"), (4.2e6, "4.2M"), (7e9, "7.0G")])
def test_counts(count: float, text: str):
    assert human_count(count) == text


def test_a_stopwatch_runs():
    watch = Stopwatch()
    first = watch.seconds
    time.sleep(0.002)
    assert 0 <= first < watch.seconds
