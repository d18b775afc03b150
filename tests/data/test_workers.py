"""A worker that dies costs the one document that killed it, and is replaced."""

import json
from pathlib import Path

from tests.data.trial_steps import AtLeast, DropCopies, Trouble

from modelwright.data.plan import PipelineConfig, SourceConfig, name_step
from modelwright.data.run import RunParams, RunResult, run_pipeline
from modelwright.data.shards import ShardConfig, Slice, read_shards
from modelwright.data.work import Task
from modelwright.data.workers import WORKER, _cut


def run(tmp_path: Path, texts: list[str], trouble: Trouble, document_seconds: float = 600) -> RunResult:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    config = PipelineConfig(
        source=(SourceConfig(str(source)),),
        steps=tuple(name_step(type(step).__name__, step) for step in (AtLeast(2), DropCopies(), trouble)),
        out=tmp_path / "out",
        shard=ShardConfig(documents=10),
        document_seconds=document_seconds,
    )
    return run_pipeline(config, RunParams(num_workers=2))


def test_documents_that_kill_their_worker_are_set_aside_and_all_others_go_on(tmp_path: Path):
    texts = [f"document {i}" for i in range(30)]
    texts[4], texts[5], texts[29] = "DIE 4", "SEGFAULT 5", "DIE 29"
    result = run(tmp_path, texts, Trouble())
    assert [(row["id"], row["step"], row["position"]) for row in result.asides] == [
        ("d4", WORKER, "in.jsonl:5"),
        ("d5", WORKER, "in.jsonl:6"),
        ("d29", WORKER, "in.jsonl:30"),
    ]
    assert "killed (signal 9)" in result.asides[0]["reason"] and "SIGSEGV" in result.asides[1]["reason"]
    assert [d.id for d in read_shards(tmp_path / "out")] == [f"d{i}" for i in range(30) if i not in (4, 5, 29)]
    assert result.funnel.tallies["Trouble"].documents_out == 27
    assert result.funnel.tallies[WORKER].documents_aside == 3


def test_a_death_by_chance_costs_nothing(tmp_path: Path):
    texts = ["one", "ONCE", "three"]
    result = run(tmp_path, texts, Trouble(once_file=str(tmp_path / "once")))
    assert not result.asides and (tmp_path / "once").exists()
    assert [d.text for d in read_shards(tmp_path / "out")] == texts


def test_a_document_that_takes_too_long_is_set_aside(tmp_path: Path):
    result = run(tmp_path, ["one", "HANG", "three"], Trouble(), document_seconds=1.5)
    assert [row["id"] for row in result.asides] == ["d1"]
    assert "longer than 1.5 s" in result.asides[0]["reason"]
    assert [d.text for d in read_shards(tmp_path / "out")] == ["one", "three"]


def test_a_dead_task_is_cut_around_its_suspect_or_in_halves():
    task = Task(3, Slice("f", "f", 0, 99, 1, 20), 4, 12)
    bounds = [[(part.start, part.stop) for part in _cut(task, row)] for row in (4, 7, 11, None, 15)]
    assert bounds == [
        [(4, 5), (5, 12)],
        [(4, 7), (7, 8), (8, 12)],
        [(4, 11), (11, 12)],
        [(4, 8), (8, 12)],
        [(4, 8), (8, 12)],
    ]
