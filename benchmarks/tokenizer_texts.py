"""Texts for the tokenizer benchmarks, by language and domain, from the data folder; not a benchmark itself."""

import csv
import gzip
import io
import json
import zipfile
from pathlib import Path

Texts = list[str]


def english(folder: Path, num_bytes: int = 1 << 62) -> Texts:
    """Return English prose: the part of WikiText-2, then books, cut to about ``num_bytes``."""
    files = [folder / "text/wikitext2/train_part.txt.gz", *sorted((folder / "text/gutenberg").glob("*.txt.gz"))]
    texts, size = [], 0
    for file in files:
        if "die_verwandlung" in file.name:
            continue
        text = gzip.decompress(file.read_bytes()).decode("utf-8", errors="replace").replace("<|", "< |")
        texts.append(text[: num_bytes - size])
        size += len(texts[-1])
        if size >= num_bytes:
            break
    return texts


def wikitext(folder: Path) -> str:
    """Return the part of WikiText-2 that is there."""
    text = gzip.decompress((folder / "text/wikitext2/train_part.txt.gz").read_bytes()).decode("utf-8")
    return text.replace("<|", "< |")


def contracts(folder: Path) -> tuple[Texts, Texts]:
    """Return 120 commercial contracts of CUAD to train on, and 30 that are held out."""
    lines = gzip.decompress((folder / "text/legal/cuad_contracts.jsonl.gz").read_bytes()).decode("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    return [text for i, text in enumerate(texts) if i % 5], texts[::5]


def abstracts(folder: Path) -> tuple[Texts, Texts]:
    """Return English medical abstracts: nine tenths, and the tenth that is held out."""
    packed = io.BytesIO(gzip.decompress((folder / "text/medical_abstracts_tc_test.csv.gz").read_bytes()))
    rows = [row[1] for row in csv.reader(io.TextIOWrapper(packed, encoding="utf-8"))][1:]
    return [text for i, text in enumerate(rows) if i % 10], rows[::10]


def parallel(folder: Path, titles: tuple[str, ...] = ()) -> dict[str, Texts]:
    """Return the same paragraphs in English and German (XQuAD), of some articles or of all."""
    found = {}
    for language in ("en", "de"):
        data = json.loads((folder / f"retrieval/squad/xquad_{language}.json").read_text(encoding="utf-8"))["data"]
        found[language] = [p["context"] for a in data if not titles or a["title"] in titles for p in a["paragraphs"]]
    return found


def german_book(folder: Path) -> str:
    """Return the German book."""
    return gzip.decompress((folder / "text/gutenberg/de_die_verwandlung_22367.txt.gz").read_bytes()).decode("utf-8")


def declaration(folder: Path) -> dict[str, str]:
    """Return the Universal Declaration of Human Rights by language, as far as it is UTF-8."""
    found = {}
    with zipfile.ZipFile(folder / "text/nltk/udhr2.zip") as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".txt"):
                try:
                    found[Path(name).stem] = archive.read(name).decode("utf-8")
                except UnicodeDecodeError:
                    continue
    return found
