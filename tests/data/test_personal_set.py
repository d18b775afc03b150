"""On a generated, labelled set whose values and templates the detector was not built from, F2 keeps its level."""

import importlib.util
from pathlib import Path

import pytest

from modelwright.data.personal_data import ALL
from modelwright.data.scrub import find_personal
from modelwright.data.tagger_patterns import PATTERNS, PLAIN

pytest.importorskip("faker")
_SPEC = importlib.util.spec_from_file_location("pii", Path(__file__).parents[2] / "benchmarks/pii.py")
assert _SPEC and _SPEC.loader
pii = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(pii)


def test_f2_is_far_above_patterns_and_gazetteer():
    texts = pii.Generated(7).texts(120)
    assert pii.measure(texts, lambda text: find_personal(text, ALL))["f2"] >= 0.85
    assert pii.measure(texts, pii.gazetteer())["f2"] < 0.6


def test_the_set_shares_no_template_and_no_name_with_the_training_text():
    assert not set(pii.TEMPLATES) & {*PATTERNS, *PLAIN}
    made = pii.Generated(8)
    texts = made.texts(120)
    people = [text[f.start : f.end] for text, labels in texts for f in labels if f.kind == "person"]
    assert len(people) > 20
    assert not [p for p in people for w in p.lower().split() if len(w) > 2 and w in made._known]
    assert made.texts(5) != texts[:5] and pii.Generated(8).texts(120) == texts
