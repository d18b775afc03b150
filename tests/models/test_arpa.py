"""ARPA files: what is written is what KenLM reads and scores; what is read back is the same model."""

import math

import numpy as np
import pytest
from tests.models.test_ngram_smoothing import WORDS, random_sentences

from modelwright.base.errors import DataError
from modelwright.models import SMOOTHINGS
from modelwright.models.ngram import NgramModel

# Written in the layout of SRILM: comments, tabs, orders without weights at the top, no entry for the unknown word.
SMALL = """made by hand

\\data\\
ngram 1=4
ngram 2=3

\\1-grams:
-99\t<s>\t-0.30103
-0.30103\t</s>
-0.6020600\ta\t-0.1
-0.6020600\tb\t-0.2

\\2-grams:
-0.1\t<s> a
-0.2 a b
-0.3\tb </s>

\\end\\
"""


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("order", [1, 2, 4])
def test_a_model_read_back_is_the_same(smoothing, order, tmp_path):
    model = NgramModel.train(random_sentences(1), order, smoothing)
    model.save_arpa(tmp_path / "model.arpa")
    back = NgramModel.load_arpa(tmp_path / "model.arpa")
    assert (back.order, back.vocabulary) == (order, model.vocabulary)
    for sentence in random_sentences(2, words=[*WORDS, "never"]):
        assert back.log_probs(sentence) == pytest.approx(model.log_probs(sentence), abs=1e-9)
        assert back.distribution(sentence).sum() == pytest.approx(1, abs=1e-9)


@pytest.mark.peer
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("order", [2, 3, 5])
def test_kenlm_scores_our_files_as_we_do(smoothing, order, tmp_path):
    kenlm = pytest.importorskip("kenlm", reason="pip install kenlm (built from source: wants a C++ compiler)")
    model = NgramModel.train(random_sentences(3, num=200), order, smoothing)
    model.save_arpa(tmp_path / "model.arpa")
    theirs = kenlm.Model(str(tmp_path / "model.arpa"))
    assert theirs.order == order
    for sentence in [*random_sentences(4, words=[*WORDS, "never", "seen"]), []]:
        text = " ".join(sentence)
        each = [score for score, _, _ in theirs.full_scores(text)]
        assert model.log_probs(sentence) / math.log(10) == pytest.approx(each, abs=1e-4)
        assert model.log_prob(sentence) / math.log(10) == pytest.approx(theirs.score(text), abs=1e-4)
        assert model.log_prob(sentence, end=False) / math.log(10) == pytest.approx(
            theirs.score(text, eos=False), abs=1e-4
        )
        assert model.perplexity(sentence) == pytest.approx(theirs.perplexity(text), rel=1e-4)


def test_a_file_of_another_program_is_read(tmp_path):
    (tmp_path / "small.arpa").write_text(SMALL)
    model = NgramModel.load_arpa(tmp_path / "small.arpa")
    assert model.vocabulary == ["</s>", "a", "b", "<unk>"] and model.num_ngrams == (4, 3)
    assert model.log_probs("a b") / math.log(10) == pytest.approx([-0.1, -0.2, -0.3])
    assert model.log_probs("b a") / math.log(10) == pytest.approx([-0.30103 - 0.60206, -0.2 - 0.60206, -0.1 - 0.30103])
    assert np.isfinite(model.log_prob("never"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("\\end\\", ""), r"line 18: the file ends too early"),
        (("ngram 2=3", "ngram 2=2"), r"expected '\\\\end\\\\', found 'b </s>|expected '\\\\end\\\\', found '-0.3"),
        (("ngram 1=4", "ngram 1=3"), r"line \d+: expected '\\\\2-grams:'"),
        (("ngram 2=3", "ngram 3=3"), r"expected 'ngram 2=COUNT', found 'ngram 3=3'"),
        (("-0.2 a b", "-0.2 a"), r"expected a log10 probability, 2 words, found '-0.2 a'"),
        (("-0.2 a b", "0.2 a b"), r"expected a log10 probability"),
        (("-0.2 a b", "nan a b"), r"expected a log10 probability"),
        (("-0.2 a b", "-0.2 c b"), r"2-gram 'c b' above uses 'c', which is not in the file"),
        (("-0.2 a b", "-0.2 <s> a"), r"a 2-gram above stands twice"),
        (("-0.6020600\tb", "-0.6020600\ta"), r"a word stands twice"),
        (("-0.30103\t</s>", "-0.30103\tz"), r"the 1-grams lack '</s>'"),
        (("\\data\\", "data"), r"the file ends too early"),
    ],
)
def test_damaged_files_are_refused_by_line(change, message, tmp_path):
    (tmp_path / "bad.arpa").write_text(SMALL.replace(*change))
    with pytest.raises(DataError, match=message) as error:
        NgramModel.load_arpa(tmp_path / "bad.arpa")
    assert str(tmp_path / "bad.arpa") in str(error.value)


def test_other_refusals(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        NgramModel.load_arpa(tmp_path / "none.arpa")
    (tmp_path / "packed.arpa").write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        NgramModel.load_arpa(tmp_path / "packed.arpa")
    with pytest.raises(DataError, match="'a b' is empty or holds white space"):
        NgramModel.train([["a b", "c"]], 2).save_arpa(tmp_path / "never.arpa")
    assert not (tmp_path / "never.arpa").exists()
