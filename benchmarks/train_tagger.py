"""Train the tagger that is part of the package, and write its file.

    python benchmarks/train_tagger.py --data FOLDER [--out src/modelwright/data/tagger.safetensors]

Made sentences, and from FOLDER/text plain lines and common words: fourteen English books of Project Gutenberg, the
sample of C4, PubMedQA. No labelled text of anybody is used, and of no text anything but the hashes of common words is
in the file.
About 65 seconds on one core.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

from modelwright.base import env
from modelwright.data.tagger import SHIPPED
from modelwright.data.tagger_training import TaggerConfig, train_tagger

NUM_BOOKS = 14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=env.data_folder())
    parser.add_argument("--out", type=Path, default=SHIPPED)
    options = parser.parse_args()
    folder = options.data / "text"
    books = sorted((folder / "gutenberg").glob("[!d]*.txt.gz"))[:NUM_BOOKS]
    texts = [gzip.decompress(book.read_bytes()).decode("utf-8", "replace") for book in books]
    texts += [json.loads(line)["text"] for line in gzip.open(folder / "c4_sample.jsonl.gz", "rt")]
    texts += [str(row) for row in json.loads(gzip.decompress((folder / "pubmedqa_pqal.json.gz").read_bytes())).values()]
    begun = time.perf_counter()
    train_tagger(TaggerConfig(), texts).save(options.out)
    print(f"{options.out}: {options.out.stat().st_size:,} bytes, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
