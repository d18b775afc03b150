"""Training and encoding of tokenizers beside the library ``tokenizers``, and BPE, Unigram, WordPiece beside each other.

    python benchmarks/tokenizer.py --data FOLDER [--megabytes 100] [--vocab-size 32000] [--rounds 3] [--json FILE]

FOLDER holds ``text/wikitext2`` and ``text/gutenberg``. Where they are shorter than asked the Python sources of the
interpreter and of the installed packages follow, each different file once, so that 100 MB repeat nothing; the row says
how much there was. Rows: seconds of the readable BPE training (counting included) beside the library's on one thread,
with equal merges or an error; megabytes of memory that its words and pairs take; encoding through `Tokenizer` beside
the bare library. `ratio` is ours / rival. Medians of the rounds. Seconds are those of the processor, not of the clock,
so that other work on the machine does not count.
"""

import argparse
import gzip
import hashlib
import json
import os
import statistics
import sysconfig
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before the library is imported

import tokenizers

from modelwright.base.measured import write_result
from modelwright.tokenizer.byte_level import cut_text, spell
from modelwright.tokenizer.compare import measure
from modelwright.tokenizer.merges import count_words, learn_merges
from modelwright.tokenizer.plain_bpe import PlainBPE, train_plain
from modelwright.tokenizer.subwords import train_unigram, train_wordpiece
from modelwright.tokenizer.train import train_bpe, word_splitter

Row = dict[str, Any]


def read_text(folder: Path, num_bytes: int) -> str:
    """Return about ``num_bytes`` of English and, behind it, of Python; or all there is."""
    files = [folder / "text/wikitext2/train_part.txt.gz", *sorted((folder / "text/gutenberg").glob("*.txt.gz"))]
    sources = {Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))}
    parts, size, seen = [], 0, set()
    for file in (*files, *(file for root in sorted(sources) for file in sorted(root.rglob("*.py")))):
        data = file.read_bytes()
        data = gzip.decompress(data) if file.suffix == ".gz" else data
        if (digest := hashlib.sha256(data).digest()) in seen:
            continue
        seen.add(digest)
        part = data.decode("utf-8", errors="replace").replace("<|", "< |")
        parts.append(part[: num_bytes - size])
        size += len(parts[-1].encode("utf-8"))
        if size >= num_bytes:
            break
    return "\n".join(parts)


def timed(work: Callable[[], Any], rounds: int) -> tuple[float, list[float], Any]:
    """Return the median of the seconds, all of them, and the last result."""
    seconds, result = [], None
    for _ in range(rounds):
        start = time.process_time()
        result = work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), seconds, result


def make_row(name: str, ours: float, rival: float, rival_name: str, unit: str, runs: dict[str, list[float]]) -> Row:
    return {
        "name": name,
        "ours": ours,
        "rival": rival,
        "rival_name": rival_name,
        "ratio": ours / rival,
        "unit": unit,
        "runs": runs,
    }


def training_row(texts: list[str], size_mb: float, vocab_size: int, rounds: int) -> Row:
    ours, our_runs, plain = timed(lambda: train_plain(texts, vocab_size), rounds)
    rival, rival_runs, fast = timed(lambda: train_bpe(texts, vocab_size), rounds)
    check_same(plain, json.loads(fast.to_json())["model"]["merges"])
    name = f"readable BPE training, {size_mb:.1f} MB, {vocab_size} pieces, same merges"
    return make_row(
        name, ours, rival, f"tokenizers {tokenizers.__version__}", "s of CPU", {"ours": our_runs, "rival": rival_runs}
    )


def check_same(plain: PlainBPE, merges: list[list[str]]) -> None:
    spelled = [[spell(plain.pieces[left]), spell(plain.pieces[right])] for left, right in plain.merges]
    if spelled != merges:
        raise SystemExit("the merges differ from the library's")


def memory_row(texts: list[str], vocab_size: int) -> Row:
    """Peak memory of learning from the text once and from four times the text: words decide, not length."""
    cut = word_splitter().pre_tokenize_str
    peaks = []
    for times in (4, 1):
        tracemalloc.start()
        counts = count_words((text for _ in range(times) for text in texts), lambda text: [w for w, _ in cut(text)])
        learn_merges(counts, sorted({char for word in counts for char in word}), vocab_size)
        peaks.append(tracemalloc.get_traced_memory()[1] / 1e6)
        tracemalloc.stop()
    runs = {"ours": peaks[:1], "rival": peaks[1:]}
    return make_row("peak memory, four times the text", peaks[0], peaks[1], "the text once", "MB", runs)


def encoding_row(texts: list[str], vocab_size: int, rounds: int) -> Row:
    """Documents of ordinary length through `Tokenizer.encode_batch` and through the bare library."""
    size_mb = sum(len(text.encode("utf-8")) for text in texts) / 1e6
    fast = train_bpe(texts, vocab_size)
    bare = tokenizers.Tokenizer.from_str(fast.to_json())
    documents = [piece for text in texts for piece in cut_text(text, 4000)]
    fast.encode_batch(documents[:50])
    bare.encode_batch_fast(documents[:50])
    seconds, our_runs, rows = timed(lambda: fast.encode_batch(documents), rounds)
    rival, rival_runs, encodings = timed(lambda: [e.ids for e in bare.encode_batch_fast(documents)], rounds)
    if rows != encodings:
        raise SystemExit("the ids differ from the library's")
    runs = {"ours": [size_mb / s for s in our_runs], "rival": [size_mb / s for s in rival_runs]}
    return make_row(
        f"encoding, {size_mb:.1f} MB, one thread",
        size_mb / seconds,
        size_mb / rival,
        "tokenizers",
        "MB a second of CPU",
        runs,
    )


def algorithm_rows(texts: list[str], vocab_size: int) -> list[Row]:
    """Bytes per token on text that was not trained on, Unigram and WordPiece beside BPE."""
    text = "".join(texts)
    train, held_out = [text[: len(text) * 9 // 10]], [text[len(text) * 9 // 10 :]]
    base = measure(train_bpe(train, vocab_size), held_out).bytes_per_token
    rows = []
    for name, learn in (("Unigram", train_unigram), ("WordPiece", train_wordpiece)):
        found = measure(learn(train, vocab_size), held_out).bytes_per_token
        rows.append(make_row(f"{name}, {vocab_size} pieces, held-out", found, base, "BPE", "bytes per token", {}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MODELWRIGHT_DATA"), help="Folder of the texts.")
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=3, help="Of encoding.")
    parser.add_argument("--training-rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give --data FOLDER, or set MODELWRIGHT_DATA")
    text = read_text(arguments.data, int(arguments.megabytes * 1e6))
    texts, size_mb = cut_text(text, 50_000), len(text.encode("utf-8")) / 1e6
    few = texts[: min(len(texts), 40)]  # two megabytes
    rows = [
        training_row(texts, size_mb, arguments.vocab_size, arguments.training_rounds),
        memory_row(few, arguments.vocab_size // 4),
        encoding_row(texts[:400], arguments.vocab_size, arguments.rounds),
        *algorithm_rows(few, min(8000, arguments.vocab_size)),
    ]
    for row in rows:
        rival = f"{row['rival_name']} {row['rival']:.2f} ({row['ratio']:.2f}x)"
        print(f"{row['name']}: {row['ours']:.2f} {row['unit']}, {rival}")
    if arguments.json:
        write_result(arguments.json, {"rows": rows}, packages=("tokenizers",))


if __name__ == "__main__":
    main()
