"""An answer anywhere in a long context is whole in some stretch, and decoding finds it again."""

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from modelwright.base.errors import ConfigError, DataError
from modelwright.data.answers import best_answers, cut_context, no_answer_score

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [f"w{i}" for i in range(100)]
QUESTION, CONTEXT = "w1 w2 w3", " ".join(WORDS)


@pytest.fixture
def backend():
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    found = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return found


def answer_at(first, num):
    text = " ".join(WORDS[first : first + num])
    return CONTEXT.index(text), text


@pytest.mark.parametrize("first", range(0, 96, 5))
def test_every_answer_is_whole_in_a_stretch_and_found_again(backend, first):
    answer = answer_at(first, 4)
    stretches = cut_context(backend, QUESTION, CONTEXT, answer, max_tokens=26, stride=8)
    assert all(len(s.ids) <= 26 for s in stretches) and len(stretches) > 5
    assert any(s.labels != (0, 0) for s in stretches)
    starts, ends = [], []
    for stretch in stretches:
        first_logits, last_logits = np.zeros((2, len(stretch.ids)), np.float32)
        first_logits[stretch.labels[0]], last_logits[stretch.labels[1]] = 5.0, 5.0
        starts.append(first_logits)
        ends.append(last_logits)
    best = best_answers(stretches, starts, ends, CONTEXT)[0]
    assert (best.start, best.text, best.score) == (*answer, 10.0)


def test_spans_are_in_order_in_the_context_and_not_too_long(backend):
    stretches = cut_context(backend, QUESTION, "w5 w6 w7 w8", None, max_tokens=26, stride=4)
    assert [s.labels for s in stretches] == [(0, 0)]
    random = np.random.default_rng(0)
    first, last = random.normal(size=(2, len(stretches[0].ids))).astype(np.float32)
    first[1] = last[1] = 100.0  # the question is no answer
    found = best_answers(stretches, [first], [last], "w5 w6 w7 w8", max_answer_tokens=2)
    assert all(len(a.text.split()) <= 2 and a.score < 50 for a in found)
    assert [a.score for a in found] == sorted((a.score for a in found), reverse=True)
    assert no_answer_score([first], [last]) == pytest.approx(float(first[0] + last[0]))


def test_wrong_places_and_no_room_are_refused(backend):
    with pytest.raises(DataError, match="answer 'w9' at character 0, where the context has 'w0'"):
        cut_context(backend, QUESTION, CONTEXT, (0, "w9"), max_tokens=26, stride=8)
    with pytest.raises(ConfigError, match="leaves 4 tokens of context, and the stride is 8"):
        cut_context(backend, QUESTION, CONTEXT, None, max_tokens=10, stride=8)
