"""Which language is it? Our classifier, lingua and langid on pieces of the Universal Declaration of Human Rights.

    python benchmarks/language.py --data FOLDER [--json FILE]

FOLDER holds ``text/nltk/udhr2.zip``: 388 files; files of one language (two scripts, two countries)
are one label. Every second line of 30 characters and more trains our classifier, the others test it, so it has seen the
document's subject and the libraries have not: the figure for our own says what a page of each language is worth, not
that it beats them elsewhere. Rows: accuracy on the languages that both know, at 40 and 100 characters, and ours on all.
"""

import argparse
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import py3langid
from lingua import Language, LanguageDetectorBuilder

from modelwright.base.measured import write_result
from modelwright.data.classify import TextClassifier, fit_bayes
from modelwright.data.language import CHARACTERS

LENGTHS = (40, 100)
MAX_TESTS = 4  # pieces of a language


def read_pieces(folder: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return (language, piece) to train and to test on."""
    train: list[tuple[str, str]] = []
    test: dict[str, list[str]] = {}
    with zipfile.ZipFile(folder / "text/nltk/udhr2.zip") as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".txt")):
            code = Path(name).stem.split("_")[0]
            lines = [" ".join(line.split()) for line in archive.read(name).decode("utf-8").splitlines()]
            lines = [line for line in lines if len(line) >= 30]
            train += [(code, line) for line in lines[::2]]
            test.setdefault(code, []).extend(line for line in lines[1::2] if len(line) >= LENGTHS[-1])
    return train, [(code, line) for code, lines in test.items() for line in lines[:: max(1, len(lines) // MAX_TESTS)]]


def share(test: Sequence[tuple[str, str]], length: int, told: Callable[[list[str]], list[str]]) -> float:
    found = told([text[:length] for _, text in test])
    return sum(code == name for (code, _), name in zip(test, found, strict=True)) / len(test)


def rows_of(classifier: TextClassifier, test: list[tuple[str, str]]) -> list[dict[str, Any]]:
    detector = LanguageDetectorBuilder.from_all_languages().build()
    long_code = {language.iso_code_639_1.name.lower(): language.iso_code_639_3.name.lower() for language in languages()}

    def ask_lingua(texts: list[str]) -> list[str]:
        found = [detector.detect_language_of(text) for text in texts]
        return [language.iso_code_639_3.name.lower() if language else "" for language in found]

    def ask_langid(texts: list[str]) -> list[str]:
        return [long_code.get(py3langid.classify(text)[0], "") for text in texts]

    known = set(long_code.values()) & set(classifier.labels)
    # The archive calls Chinese by its variety and lingua by the macrolanguage; such pairs are left out, not guessed.
    common = [(code, text) for code, text in test if code in known]
    rows = []
    for length in LENGTHS:
        for name, ask in (("lingua", ask_lingua), ("py3langid", ask_langid)):
            ours, rival = share(common, length, classifier.predict), share(common, length, ask)
            rows.append(
                {
                    "name": f"accuracy at {length} characters, {len({c for c, _ in common})} languages in common",
                    "ours": ours,
                    "rival": rival,
                    "rival_name": name,
                    "ratio": ours / rival,
                    "unit": "share",
                    "runs": {"pieces": len(common)},
                }
            )
        everything = share(test, length, classifier.predict)
        chance = 1 / len(classifier.labels)
        rows.append(
            {
                "name": f"accuracy at {length} characters, all {len(classifier.labels)} languages",
                "ours": everything,
                "rival": chance,
                "rival_name": "chance",
                "ratio": everything / chance,
                "unit": "share",
                "runs": {"pieces": len(test)},
            }
        )
    return rows


def languages() -> list[Any]:
    return list(Language.all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    train, test = read_pieces(options.data)
    classifier = fit_bayes([text for _, text in train], [code for code, _ in train], CHARACTERS)
    rows = rows_of(classifier, test)
    for row in rows:
        print(f"{row['ours']:.4f} {row['rival']:.4f}  {row['name']} | {row['rival_name']}")
    if options.json:
        write_result(options.json, {"rows": rows}, ("numpy", "lingua-language-detector", "py3langid"))


if __name__ == "__main__":
    main()
