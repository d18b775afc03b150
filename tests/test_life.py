"""The whole life at toy size: documents to cited answers, killed and taken up again, and every promise on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import modelwright as mw
from modelwright.base.artifact import lineage
from modelwright.base.errors import DataError
from modelwright.ops.life import Life, LifeConfig
from modelwright.ops.quickstart import ask_examples, plan_steps, run_quickstart
from modelwright.rag.embed import MissingEmbedderError, find_embedder

REPORT_KEYS = {
    "pretrain": {"tokens_per_second", "mfu_fraction", "bits_per_byte", "unigram_bits_per_byte", "ngram5_bits_per_byte"},
    "retrieval": {"bm25", "dense", "fused"},
    "citations": {"checked", "exact"},
}
SUBJECTS = (
    "leave",
    "travel",
    "security",
    "expenses",
    "equipment",
    "meetings",
    "training",
    "parking",
    "visitors",
    "records",
)


def write_handbook(folder: Path) -> Path:
    """Write a small handbook whose sections answer questions."""
    folder.mkdir()
    for i, subject in enumerate(SUBJECTS):
        sections = [f"# {subject.title()} policy\n\nThis page explains how {subject} is handled in the organisation.\n"]
        for j, word in enumerate(("requests", "limits", "approval", "exceptions")):
            sections.append(
                f"\n## {subject.title()} {word}\n\nEvery {subject} {word.rstrip('s')} is decided within {i + j + 2} "
                f"working days by the {subject} office. Staff write form {subject[:2].upper()}-{i}{j} and keep a "
                f"copy for {j + 1} years.\n"
            )
        (folder / f"{subject}.md").write_text("".join(sections), encoding="utf-8")
    (folder / "broken.pdf").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    try:
        find_embedder()
    except MissingEmbedderError:
        pytest.skip("the sentence encoder package is not installed")
    root = tmp_path_factory.mktemp("life")
    config = LifeConfig(
        docs=write_handbook(root / "handbook"), minutes=0.08, out=root / "run", vocab_size=400, num_questions=20
    )
    return config, run_quickstart(config)


def test_report_has_every_promised_figure(toy):
    config, report = toy
    written = json.loads((config.out / "report.json").read_text())
    assert written.keys() == report.keys()
    for part, keys in REPORT_KEYS.items():
        assert keys <= written[part].keys()
    for bits in ("int8", "int4"):
        assert {"size_bytes", "perplexity_ratio", "kl_divergence"} <= written["compress"][bits].keys()
    for scores in written["retrieval"].values():
        assert {"recall_at_1", "recall_at_5", "recall_at_10", "mrr", "num_questions"} <= scores.keys()
    assert [s["name"] for s in written["steps"]][0] == "documents" and written["total_seconds"] > 0
    assert written["peak_memory_bytes"] > 0
    text = (config.out / "report.md").read_text()
    assert "broken.pdf" in text and "loss-pre-train.png" in text
    assert (config.out / "loss-pre-train.png").read_bytes().startswith(b"\x89PNG")


def test_answers_quote_the_files_byte_for_byte(toy):
    config, report = toy
    assert report["citations"]["exact"] == report["citations"]["checked"] > 0
    index = mw.Index.open(config.out / "index")
    answer = mw.ask(index, "Within how many working days is a travel request decided?")
    assert answer.is_supported and answer.citations
    for cited in answer.citations:
        file = (config.docs / cited.doc).read_text(encoding="utf-8")
        assert file[cited.start : cited.end] == cited.quote and cited.quote in answer.text
    assert any(cited.doc == "travel.md" for cited in answer.citations)
    unknown = mw.ask(index, "What is the boiling point of tungsten hexafluoride?")
    assert not unknown.is_supported and not unknown.citations
    assert len(ask_examples(config, None)) == 3


def test_served_names_work_on_what_was_made(toy):
    config, _ = toy
    model, tokenizer = mw.load_model(config.out / "chat"), mw.load_tokenizer(config.out / "chat")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Who decides?"}], add_generation_prompt=True)
    import torch

    assert model(torch.tensor([ids])).logits.shape == (1, len(ids), tokenizer.vocab_size)
    params = mw.SamplingParams(temperature=0, max_tokens=5)
    for folder in ("chat", "int8", "int4"):
        completion = mw.LLM(config.out / folder).generate(["Every travel"], params)[0]
        assert completion.finish_reason in ("length", "stop") and len(completion.token_ids) <= 5


def test_lineage_walks_back_to_the_documents(toy):
    config, _ = toy
    for folder in ("int4", "index"):
        steps = lineage(config.out / folder)
        assert steps[-1].kind == "documents" and all(step.state == "same" for step in steps)


def test_a_second_run_does_nothing_and_a_changed_document_is_noticed(toy):
    config, report = toy
    life = Life(config.out)
    assert all(life.is_done(step) for step in plan_steps(config, life))
    again = run_quickstart(config)
    assert again["steps"] == report["steps"]
    (config.docs / "travel.md").write_text("# Travel\n\nEverything about travel is new.\n", encoding="utf-8")
    assert not life.is_done(plan_steps(config, life)[0])


def test_nothing_readable_stops_with_what_was_looked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"\.pdf"):
        run_quickstart(LifeConfig(docs=tmp_path / "empty", out=tmp_path / "run"))
    assert not (tmp_path / "run" / "documents").exists()


def test_killed_quickstart_goes_on_after_the_last_finished_step(toy, tmp_path):
    config, _ = toy
    docs = write_handbook(tmp_path / "handbook")
    command = [sys.executable, "-c", "from modelwright.cli.main import run; run()", "quickstart", str(docs)]
    command += ["--no-serve", "--minutes", "0.08", "--out", str(tmp_path / "run")]
    environment = os.environ | {"MODELWRIGHT_COMPILE": "0"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "tokenizer" / "manifest.json").is_file() and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = (tmp_path / "run" / "documents" / "manifest.json").stat().st_mtime_ns
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "1/9 documents" in done.stdout and "kept, took" in done.stdout and done.stdout.count("[1]") >= 2
    assert (tmp_path / "run" / "documents" / "manifest.json").stat().st_mtime_ns == first
    shutil.rmtree(tmp_path / "run")
