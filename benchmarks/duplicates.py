"""Near-duplicates beside datasketch, datatrove and rensa: speed on one core, the S-curve, precision and recall.

    python benchmarks/duplicates.py --data FOLDER [--documents 3000] [--rounds 3] [--json FILE]

FOLDER holds ``text/c4_sample.jsonl.gz`` (300 web pages); more documents are made of them by replacing words. All work
on the same texts, the same sets of word 5-grams where they let us choose, in one process on one thread. `ratio` is
ours / rival in documents or signatures a second; medians of the rounds. Rows:

- text to verdicts: signatures of 128 places and a banded index (datasketch: MinHashLSH at the same threshold), with and
  without the exact check that only we make;
- text to signatures: datatrove's shingles (of words between blanks) and 14 x 8 places against our 112; rensa's;
- hashes to signatures: rensa's two sketches given the same 64-bit hashes, against ours: the kernels alone;
- the S-curve: how far the measured rate of proposals is from the theory, in points, by similarity and size;
- labelled pairs: precision and recall at 0.8 of pairs whose exact similarity is counted on sets of word tuples.
"""

import argparse
import gzip
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = "1"  # before the libraries are imported

import numpy as np
from datasketch import MinHash, MinHashLSH
from datatrove.pipeline.dedup import minhash as trove_minhash
from rensa import RMinHash

from modelwright.base.measured import write_result
from modelwright.base.types import Document
from modelwright.data.dedup import NearDuplicates
from modelwright.data.minhash import Bands, band_keys, sign_sets
from modelwright.data.shingles import Words, hash_grams, hash_words, mix, plain_words

THRESHOLD, NUM_HASHES = 0.8, 128
PACKAGES = ("numpy", "datasketch", "datatrove", "rensa")
Row = dict[str, Any]


def read_pages(folder: Path) -> list[str]:
    with gzip.open(folder / "text/c4_sample.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def alter(text: str, num_changes: int, rng: random.Random) -> str:
    words = text.split()
    for _ in range(num_changes):
        at = rng.randrange(len(words))
        change = rng.choice(["replace", "drop", "insert"])
        words[at : at + (change != "insert")] = [] if change == "drop" else [f"new{rng.randrange(10**9)}"]
        words = words or ["x"]
    return " ".join(words)


def make_documents(pages: list[str], count: int) -> list[str]:
    rng = random.Random(0)
    more = [alter(rng.choice(pages), rng.choice([0, 2, 8, 32, 128]), rng) for _ in range(count - len(pages))]
    return [*pages, *more][:count]


def grams_of(text: str) -> list[str]:
    words = plain_words(text)
    return [" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))]


def timed(work: Callable[[], Any], rounds: int) -> list[float]:
    work()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


def datasketch_signature(text: str) -> MinHash:
    signature = MinHash(num_perm=NUM_HASHES)
    signature.update_batch([gram.encode() for gram in grams_of(text)])
    return signature


def datasketch_verdicts(texts: list[str]) -> int:
    index, found = MinHashLSH(threshold=THRESHOLD, num_perm=NUM_HASHES), 0
    for number, text in enumerate(texts):
        signature = datasketch_signature(text)
        if index.query(signature):
            found += 1
        else:
            index.insert(str(number), signature)
    return found


def our_verdicts(step: NearDuplicates, documents: list[Document]) -> int:
    signs = step.sign_all(documents)
    return len(step.decide((d.id, sign) for d, sign in zip(documents, signs, strict=True)))


def our_signatures(texts: list[str], num_hashes: int) -> Any:
    return [sign_sets(hash_grams(hash_words(texts[i : i + 256]), 5), num_hashes) for i in range(0, len(texts), 256)]


class Blanks:
    """Words for datatrove."""

    def word_tokenize(self, text: str) -> list[str]:
        """Return what stands between blanks."""
        return text.split()


def speed_rows(texts: list[str], rounds: int) -> list[Row]:
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    # Its own tokenizer needs spaCy and is slower; cutting at blanks is in its favour.
    trove_minhash.load_word_tokenizer = lambda language: Blanks()
    trove = trove_minhash.MinhashDedupSignature("unused", config=trove_minhash.MinhashConfig(n_grams=5))
    words = hash_grams(hash_words(texts), 5)
    hashes = [words.of(i).tolist() for i in range(len(words))]
    few = texts[: max(50, len(texts) // 10)]  # the slow ones; rates are per document
    runs = {
        "ours verdicts": (documents, lambda: our_verdicts(NearDuplicates(num_hashes=128, check=False), documents)),
        "ours checked": (documents, lambda: our_verdicts(NearDuplicates(num_hashes=128), documents)),
        "ours 112": (texts, lambda: our_signatures(texts, 112)),
        "ours 128": (texts, lambda: our_signatures(texts, NUM_HASHES)),
        "ours kernel": (texts, lambda: sign_sets(words, NUM_HASHES)),
        "datasketch verdicts": (few, lambda: datasketch_verdicts(few)),
        "datasketch": (few, lambda: [datasketch_signature(text) for text in few]),
        "datatrove": (few, lambda: [trove.get_signature(trove.get_shingles(text)) for text in few]),
        "rensa": (texts, lambda: RMinHash.digest_matrix_from_token_sets([grams_of(t) for t in texts], 128, 42)),
        "rensa rho": (texts, lambda: RMinHash.digest_matrix_from_token_sets_rho([grams_of(t) for t in texts], 128, 42)),
        "rensa kernel": (texts, lambda: RMinHash.digest_matrix_from_token_hash_sets(hashes, 128, 42)),
        "rensa rho kernel": (texts, lambda: RMinHash.digest_matrix_from_token_hash_sets_rho(hashes, 128, 42)),
    }
    rates = {name: [len(given) / s for s in timed(work, rounds)] for name, (given, work) in runs.items()}
    pairs = [
        ("text to verdicts, bands alone", "ours verdicts", "datasketch verdicts", "datasketch"),
        ("text to verdicts, each proposal checked (ours alone)", "ours checked", "datasketch verdicts", "datasketch"),
        ("text to signatures of 128", "ours 128", "datasketch", "datasketch"),
        ("text to signatures of 112", "ours 112", "datatrove", "datatrove"),
        ("text to signatures of 128", "ours 128", "rensa", "rensa R-MinHash"),
        ("text to signatures of 128", "ours 128", "rensa rho", "rensa Rho"),
        ("hashes to signatures of 128", "ours kernel", "rensa kernel", "rensa R-MinHash"),
        ("hashes to signatures of 128", "ours kernel", "rensa rho kernel", "rensa Rho"),
    ]
    return [make_row(name, rates[ours], rates[rival], rival_name) for name, ours, rival, rival_name in pairs]


def make_row(name: str, ours: list[float], rival: list[float], rival_name: str) -> Row:
    medians = statistics.median(ours), statistics.median(rival)
    return {
        "name": name,
        "ours": medians[0],
        "rival": medians[1],
        "rival_name": rival_name,
        "ratio": medians[0] / medians[1],
        "unit": "documents/s",
        "runs": {"ours": ours, "rival": rival},
    }


def curve_rows(num_pairs: int) -> list[Row]:
    """Measured and expected rate of proposals of sets made to have a given similarity."""
    rows = []
    rng = np.random.default_rng(1)
    for bands in (Bands(25, 5), Bands(14, 8)):
        for size in (50, 200, 800):
            for similarity in (0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9):
                common = round(2 * size * similarity / (1 + similarity))
                exact = common / (2 * size - common)
                hits = 0
                for _ in range(0, num_pairs, 1000):
                    members = mix(rng.integers(0, 2**64, (1000, 2 * size - common), dtype=np.uint64))
                    sets = (members[:, :size], members[:, size - common :])
                    signed = [sign_sets(Words(s.reshape(-1), np.arange(1001) * size), bands.num_hashes) for s in sets]
                    first, second = (band_keys(s, bands) for s in signed)
                    hits += int((first == second).any(axis=1).sum())
                expected = bands.proposal_rate(exact)
                rows.append(
                    {
                        "name": f"proposals, {bands.num_bands} x {bands.band_size}, {size} members, at {exact:.3f}",
                        "ours": hits / num_pairs,
                        "rival": expected,
                        "rival_name": "theory",
                        "ratio": hits / num_pairs / expected,
                        "unit": "share of pairs",
                        "runs": {"pairs": num_pairs, "points_off": 100 * (hits / num_pairs - expected)},
                    }
                )
    return rows


def labelled_rows(pages: list[str], num_pairs: int) -> list[Row]:
    """Precision and recall at the threshold, against similarities counted on sets of word tuples."""
    rng = random.Random(2)
    pairs = []
    while len(pairs) < num_pairs:
        words = plain_words(rng.choice(pages))
        start = rng.randrange(max(1, len(words) - 200))
        text = " ".join(f"{w}{len(pairs)}" if rng.random() < 0.3 else w for w in words[start : start + 400])
        if len(text.split()) >= 100:
            pairs.append((text, alter(text, rng.randrange(0, 16), rng)))
    truth = []
    for pair in pairs:
        sets = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in map(plain_words, pair)]
        truth.append(len(sets[0] & sets[1]) / len(sets[0] | sets[1]) >= THRESHOLD)
    documents = [Document(f"{i}.{side}", text) for i, pair in enumerate(pairs) for side, text in enumerate(pair)]
    rows = []
    for name, step in (("checked", NearDuplicates()), ("bands alone", NearDuplicates(num_hashes=128, check=False))):
        decisions = step.decide((d.id, s) for d, s in zip(documents, step.sign_all(documents), strict=True))
        found = [decisions.get(f"{i}.1", ("", 0))[0] == f"{i}.0" for i in range(len(pairs))]
        rows += rates_of(
            f"{name}, {sum(truth)} of {num_pairs} pairs at 0.8 or more", found, truth, datasketch_pairs(pairs)
        )
    return rows


def datasketch_pairs(pairs: list[tuple[str, str]]) -> list[bool]:
    found = []
    for first, second in pairs:
        index = MinHashLSH(threshold=THRESHOLD, num_perm=NUM_HASHES)
        index.insert("0", datasketch_signature(first))
        found.append(bool(index.query(datasketch_signature(second))))
    return found


def rates_of(name: str, ours: list[bool], truth: list[bool], rival: list[bool]) -> list[Row]:
    rows = []
    for measure, of in (("precision", lambda found: found), ("recall", lambda found: truth)):
        values = []
        for found in (ours, rival):
            both = sum(f and t for f, t in zip(found, truth, strict=True))
            values.append(both / max(1, sum(of(found))))
        rows.append(
            {
                "name": f"{measure}, {name}",
                "ours": values[0],
                "rival": values[1],
                "rival_name": "datasketch",
                "ratio": values[0] / values[1],
                "unit": "share",
                "runs": {"pairs": len(truth)},
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=20_000, help="of sets, for each point of the S-curve")
    parser.add_argument("--labelled", type=int, default=2000, help="pairs of texts")
    parser.add_argument("--parts", nargs="+", default=["speed", "curve", "labelled"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pages = read_pages(options.data)
    texts = make_documents(pages, options.documents)
    made = {
        "speed": lambda: speed_rows(texts, options.rounds),
        "curve": lambda: curve_rows(options.pairs),
        "labelled": lambda: labelled_rows(pages, options.labelled),
    }
    rows = [row for part in options.parts for row in made[part]()]
    for row in rows:
        print(f"{row['ours']:>12.4g} {row['rival']:>12.4g} {row['ratio']:>8.3f}  {row['name']} | {row['rival_name']}")
    off = [abs(row["runs"]["points_off"]) for row in rows if "points_off" in row["runs"]]
    if off:
        print(f"S-curve: at most {max(off):.2f} points off, {statistics.mean(off):.2f} in the mean")
    if options.json:
        mean_chars = statistics.mean(map(len, texts))
        settings = {"documents": len(texts), "mean_chars": mean_chars, "max_points_off": max(off, default=None)}
        write_result(options.json, {"settings": settings, "rows": rows}, PACKAGES)


if __name__ == "__main__":
    main()
