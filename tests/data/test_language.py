"""Languages are learned from a page each, judged by letters alone, and the reason names the one that was found."""

import pickle
import zipfile

import pytest

from modelwright.base.env import data_folder
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.types import Document
from modelwright.data.classify import FeatureConfig
from modelwright.data.language import LanguageFilter, train_languages

SMALL = FeatureConfig("character", (1, 2, 3), 1 << 13)
ENGLISH = ["all human beings are born free", "they are equal in dignity and rights", "the law is the same for everyone"]
GERMAN = [
    "alle Menschen sind frei geboren",
    "sie sind gleich an W\u00fcrde und Rechten",
    "das Gesetz ist f\u00fcr alle da",
]
GREEK = [
    "\u03cc\u03bb\u03bf\u03b9 \u03bf\u03b9 \u03ac\u03bd\u03b8\u03c1\u03c9\u03c0\u03bf\u03b9",
    "\u03b5\u03bb\u03b5\u03cd\u03b8\u03b5\u03c1\u03bf\u03b9 \u03ba\u03b1\u03b9 \u03af\u03c3\u03bf\u03b9",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("languages") / "model"
    classifier, _ = train_languages({"eng": ENGLISH, "deu": GERMAN, "ell": GREEK}, SMALL)
    classifier.save(folder)
    return folder


def reason(step, text):
    return step.reason(Document("x", text))


def test_keeps_the_wanted_language_and_names_the_other(model):
    step = pickle.loads(pickle.dumps(LanguageFilter(("eng",), model)))
    assert reason(step, "The rights of all human beings are the same.") == ""
    assert reason(step, "Die Menschen sind alle gleich vor dem Gesetz.") == "language deu, wanted eng"
    assert reason(LanguageFilter(("deu", "ell"), model), "Die Menschen sind alle gleich.") == ""


def test_too_little_to_tell(model):
    step = LanguageFilter(("eng",), model)
    assert reason(step, "123 abcdefghi 456!") == "9 letters, too few to tell the language; at least 10"
    assert "too few" in reason(step, "") and "too few" in reason(step, "1" * 100_000)
    assert "letters" not in reason(step, "abcdefghij")
    # A script that no training text has is told with no confidence.
    assert "only at 0." in reason(step, "\u4e2d\u6587" * 20)


def test_the_edge_of_the_confidence(model):
    text = "frei und gleich free and equal"
    _, confidence = LanguageFilter(("eng", "deu"), model).identify(text)
    for change, is_kept in ((-1e-6, True), (1e-6, False)):
        bound = min(1.0, confidence + change)
        if bound != 1.0:
            assert (reason(LanguageFilter(("eng", "deu"), model, bound), text) == "") == is_kept


def test_refusals(model):
    with pytest.raises(ConfigError, match="keep is empty"):
        LanguageFilter(())
    with pytest.raises(ConfigError, match="from 0 to 1"):
        LanguageFilter(min_confidence=2)
    with pytest.raises(ConfigError, match="does not know: deu, ell, eng"):
        reason(LanguageFilter(("fra",), model), ENGLISH[0])
    with pytest.raises(DataError, match="no text of 'fra'"):
        train_languages({"eng": ENGLISH, "fra": [" "]}, SMALL)
    with pytest.raises(DataError, match="two kinds"):
        train_languages({"eng": ENGLISH}, SMALL)


@pytest.mark.peer
def test_without_a_model_lingua_is_asked():
    pytest.importorskip("lingua")
    assert reason(LanguageFilter(("eng",)), "The rights of all human beings are the same everywhere.") == ""
    assert "language " in reason(LanguageFilter(("en",)), "Die Menschen sind alle gleich vor dem Gesetz.")


def test_declarations_of_human_rights_in_twenty_languages():
    folder = data_folder()
    if folder is None:
        pytest.skip("needs MODELWRIGHT_DATA")
    names = "eng deu fra spa ita nld swe pol ces hun fin tur rus ukr ell_monotonic bul cmn_hans jpn hin vie".split()
    with zipfile.ZipFile(folder / "text/nltk/udhr2.zip") as archive:
        pieces = {
            name: [line.strip() for line in archive.read(f"udhr2/{name}.txt").decode().splitlines() if len(line) > 30]
            for name in names
        }
    _, figures = train_languages(pieces, SMALL)
    assert figures.num_languages == 20 and figures.num_held_out > 150
    assert figures.accuracy > 0.97 and figures.shuffled_accuracy < 0.2
