"""``kill -9`` in the middle of `mw train`: with --resume it ends bit for bit where an unharmed run does."""

import os
import signal
import subprocess
import sys
import time

import pytest

from modelwright.base.files import hash_file
from modelwright.base.types import Document
from modelwright.data.pipeline import prepare_artifact
from modelwright.data.read import ReadResult, write_documents
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.tokenizer.train import train_bpe
from modelwright.train.checkpoint import checkpoints

SETTINGS = (
    "--loop.num_steps=40",
    "--loop.checkpoint.every=4",
    "--loop.micro_batch_size=4",
    "--loop.compile=false",
    "--max_seq_len=64",
    "--shape.hidden_size=32",
    "--shape.num_layers=2",
    "--shape.num_heads=2",
    "--shape.intermediate_size=64",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    from modelwright.base.artifact import new_artifact

    root = tmp_path_factory.mktemp("training")
    texts = [
        " ".join(f"Rule {i}.{j}: whoever keeps {i * j} boxes in room {j} writes form {i}." for j in range(30))
        for i in range(12)
    ]
    documents = [Document(f"rules-{i}.md", text) for i, text in enumerate(texts)]
    write_documents(ReadResult(documents, [], {}), root / "documents")
    prepare_artifact(root / "documents", root / "data")
    with new_artifact(root / "tokenizer", "tokenizer", parents=[root / "data"]) as (folder, _):
        train_bpe(texts, 350).save(folder)
    assert load_tokenizer(root / "tokenizer").vocab_size <= 350
    return root


def command(root, out):
    recipe = root / f"{out}.yaml"
    recipe.write_text(f"method: pretrain\ndata: {root / 'data'}\ntokenizer: {root / 'tokenizer'}\nout: {root / out}\n")
    return [sys.executable, "-c", "from modelwright.cli.main import run; run()", "train", str(recipe), *SETTINGS]


def test_killed_run_equals_unharmed_run(prepared):
    quiet = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL, "timeout": 120}
    subprocess.run(command(prepared, "whole"), check=True, **quiet)
    del quiet["timeout"]
    process = subprocess.Popen(command(prepared, "killed"), **quiet)
    deadline = time.monotonic() + 90
    while not checkpoints(prepared / "killed.run") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (prepared / "killed").exists(), "the run was over before it was killed"
    assert checkpoints(prepared / "killed.run")
    subprocess.run([*command(prepared, "killed"), "--resume"], check=True, **quiet)
    assert hash_file(prepared / "killed" / "model.safetensors") == hash_file(prepared / "whole" / "model.safetensors")
    assert not (prepared / "killed.run").exists()
