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
from modelwright.data.token_shards import write_token_shards
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
    tokenizer = load_tokenizer(root / "tokenizer")
    assert tokenizer.vocab_size <= 350
    write_token_shards(texts[:4], tokenizer, root / "tokens")
    return root


def command(root, out, data):
    recipe = root / f"{out}.yaml"
    recipe.write_text(f"method: pretrain\ndata: {data}\ntokenizer: {root / 'tokenizer'}\nout: {root / out}\n")
    return [sys.executable, "-c", "from modelwright.cli.main import run; run()", "train", str(recipe), *SETTINGS]


def data_of(root, kind):
    if kind == "data set":
        return str(root / "data")
    sources = f"[{{path: {root / 'data'}, weight: 3}}, {{path: {root / 'tokens'}, weight: 1}}]"
    order = "rows: documents, curriculum: {kind: competence}, difficulty: {by: length}, num_workers: 1"
    return f"{{sources: {sources}, temperature: 2, {order}}}"


@pytest.mark.parametrize("kind", ["data set", pytest.param("mixture", marks=pytest.mark.slow)])
def test_killed_run_equals_unharmed_run(prepared, kind):
    data, whole, killed = data_of(prepared, kind), f"whole {kind}", f"killed {kind}"
    quiet = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL, "timeout": 120}
    subprocess.run(command(prepared, whole, data), check=True, **quiet)
    del quiet["timeout"]
    process = subprocess.Popen(command(prepared, killed, data), **quiet)
    deadline, run = time.monotonic() + 90, prepared / f"{killed}.run"
    while not checkpoints(run) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (prepared / killed).exists(), "the run was over before it was killed"
    assert checkpoints(run)
    subprocess.run([*command(prepared, killed, data), "--resume"], check=True, **quiet)
    assert hash_file(prepared / killed / "model.safetensors") == hash_file(prepared / whole / "model.safetensors")
    assert not run.exists()
