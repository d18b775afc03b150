"""A pipeline gives the same bytes whoever runs it and whenever it is killed, and accounts for everything."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.data import trial_steps

import modelwright.data
from modelwright.base.artifact import lineage, read_manifest, verify
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.types import Document
from modelwright.data.pipeline import load_dataset
from modelwright.data.plan import read_pipeline
from modelwright.data.read import ReadResult, write_documents
from modelwright.data.run import RunParams, RunResult, run_pipeline
from modelwright.data.shards import read_shards

ROOT = Path(__file__).parents[2]
SECRET = "ghp_" + "a8Fk29dLq0ZxW7mN3bVc5RtY1uIoP4sGhJ6e"


@pytest.fixture(autouse=True)
def _trial_steps(monkeypatch: pytest.MonkeyPatch):
    for name, target in trial_steps.TABLE.items():
        monkeypatch.setitem(modelwright.data.STEPS, name, target)


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def some_texts(count: int) -> list[str]:
    return ["short" if i % 10 == 3 else f"document {i % 40} of some length" for i in range(count)]


def run(source: Path, out: Path, steps: list | None = None, *, params: RunParams | None = None, **values) -> RunResult:
    steps = ["shout", "at_least", "drop_copies", "shout"] if steps is None else steps
    values = {"shard": {"documents": 8, "out_bytes": 800}, **values}
    config = read_pipeline({"source": str(source), "steps": steps, "out": str(out), **values})
    return run_pipeline(config, params or RunParams(num_workers=1))


def hashed_files(out: Path) -> dict[str, bytes]:
    """Everything that the content hash covers."""
    return {
        p.name: p.read_bytes() for p in out.iterdir() if p.name not in ("manifest.json", "funnel.json", "funnel.html")
    }


def test_the_bytes_are_the_same_for_any_number_of_workers_and_size_of_pieces(tmp_path: Path):
    source = write_lines(tmp_path / "in.jsonl", some_texts(100))
    for workers in (1, 2, 4):
        run(source, tmp_path / f"out{workers}", params=RunParams(num_workers=workers))
    first = hashed_files(tmp_path / "out1")
    assert hashed_files(tmp_path / "out2") == hashed_files(tmp_path / "out4") == first
    assert verify(tmp_path / "out1").hash == verify(tmp_path / "out4").hash
    assert [name for name in sorted(first) if name.startswith("train")] == [f"train-0000{i}.jsonl" for i in range(6)]
    assert all(len(content) <= 800 for name, content in first.items() if name.startswith("train"))
    kept = [d.id for d in read_shards(tmp_path / "out1")]
    assert kept == [f"d{i}" for i in range(40) if i % 10 != 3]


def test_every_document_is_accounted_for(tmp_path: Path):
    source = write_lines(tmp_path / "in.jsonl", some_texts(50))
    result = run(source, tmp_path / "out")
    tallies = result.funnel.tallies
    assert list(tallies) == ["read", "shout", "at_least", "drop_copies", "shout 2"]
    for above, below in zip(list(tallies.values()), list(tallies.values())[1:], strict=False):
        assert (above.documents_out, above.bytes_out) == (below.documents_in, below.bytes_in)
    assert all(t.documents_in == t.documents_out + t.documents_removed + t.documents_aside for t in tallies.values())
    assert tallies["shout"].documents_changed == 50 and tallies["shout 2"].documents_changed == 0
    removed = [json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()]
    assert [(r["id"], r["step"], r["reason"]) for r in removed][:2] == [
        ("d3", "at_least", "too short: 5 characters, at least 10"),
        ("d13", "at_least", "too short: 5 characters, at least 10"),
    ]
    assert {(r["id"], r["reason"]) for r in removed if r["step"] == "drop_copies"} >= {("d40", "same as d0")}
    funnel = json.loads((tmp_path / "out" / "funnel.json").read_text())
    (short,) = next(step for step in funnel["steps"] if step["step"] == "at_least")["reasons"]
    assert (short["kind"], short["count"]) == ("too short: … characters, at least …", 5)
    assert short["samples"][0] == {"id": "d3", "reason": "too short: 5 characters, at least 10", "text": "SHORT"}
    assert funnel["num_read"] == 50 and funnel["documents_per_second"] > 0


def test_a_run_that_is_done_is_not_done_again(tmp_path: Path):
    source = write_lines(tmp_path / "in.jsonl", some_texts(20))
    assert not run(source, tmp_path / "out").was_done
    assert not (tmp_path / "out.work").exists()
    made = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    again = run(source, tmp_path / "out")
    assert again.was_done and again.funnel.num_documents == 18
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == made
    write_lines(source, some_texts(21))
    assert not run(source, tmp_path / "out").was_done  # the input is another
    assert not run(source, tmp_path / "out", format="parquet").was_done


def test_changed_settings_redo_what_depends_on_them_alone(tmp_path: Path):
    source = write_lines(tmp_path / "in.jsonl", some_texts(60))
    keep = RunParams(num_workers=1, keeps_work=True)
    steps = ["shout", "drop_copies", {"step": "at_least", "chars": 10}]
    run(source, tmp_path / "out", steps, params=keep)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out.work").rglob("*.done")}
    steps[2] = {"step": "at_least", "chars": 24}
    run(source, tmp_path / "out", steps, params=keep)
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "out.work").rglob("*.done")}
    assert {p: after[p] for p in before} == before
    assert {p.parent.name[:6] for p in after.keys() - before.keys()} == {"pass-1"}
    run(source, tmp_path / "fresh", steps)
    assert hashed_files(tmp_path / "out") == hashed_files(tmp_path / "fresh")


KILLED = """
import sys
from pathlib import Path
import modelwright.data
from tests.data import trial_steps, test_run
from modelwright.data.run import RunParams
if __name__ == "__main__":
    modelwright.data.STEPS.update(trial_steps.TABLE)
    test_run.run(Path(sys.argv[1]), Path(sys.argv[2]), test_run.SLOW, params=RunParams(num_workers=2, keeps_work=True))
"""
SLOW = [{"step": "shout", "seconds": 0.01}, {"step": "drop_copies", "seconds": 0.3}, {"step": "shout", "seconds": 0.01}]


def markers(work: Path, stage: str) -> int:
    return len(list(work.glob(f"{stage}-*/*.done")))


STAGES: dict[str, Callable[[Path], bool]] = {
    "reading": lambda work: markers(work, "read") >= 1,
    "first pass": lambda work: markers(work, "pass-0") >= 1,
    "decision": lambda work: markers(work, "pass-0") == 5,
    "second pass": lambda work: markers(work, "pass-1") >= 1,
    "end": lambda work: markers(work, "pass-1") == 5 or any(work.parent.glob(".out.*.tmp")),
}


@pytest.mark.parametrize(
    "stage", [pytest.param(s, marks=[pytest.mark.slow] if s in ("reading", "second pass") else []) for s in STAGES]
)
def test_a_run_killed_in_any_stage_goes_on_and_gives_the_same(stage: str, tmp_path: Path):
    source = tmp_path / "docs"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.md").write_text(f"page {i % 2} of some length\n")
    write_lines(source / "lines.jsonl", some_texts(30))
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.Popen([sys.executable, str(script), str(source), str(tmp_path / "out")], env=env)
    work, deadline = tmp_path / "out.work", time.monotonic() + 60
    while not STAGES[stage](work):
        assert time.monotonic() < deadline and process.poll() is None, f"{stage} was never reached"
        time.sleep(0.001)
    process.kill()
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in work.rglob("*.done")}
    assert done
    run(source, tmp_path / "out", SLOW, params=RunParams(num_workers=1, keeps_work=True))
    assert {p: p.stat().st_mtime_ns for p in done} == done  # no piece was done twice
    texts = ["PAGE 0 OF SOME LENGTH\n", "PAGE 1 OF SOME LENGTH\n", *(text.upper() for text in some_texts(30))]
    assert [d.text for d in read_shards(tmp_path / "out")] == list(dict.fromkeys(texts))
    assert not list(tmp_path.glob(".out.*")), "what the killed run left beside its output is cleared away"


def test_malformed_lines_are_set_aside_by_number_and_the_rest_goes_on(tmp_path: Path):
    source = tmp_path / "in.jsonl"
    good = json.dumps({"id": "a", "text": "a good document"}).encode()
    lines = [
        good,
        b'{"id": "b", "text": "broken',
        b"[1, 2]",
        b'{"id": "c", "body": "no text"}',
        b'{"id": "d", "text": null}',
        b'{"id": "e", "text": "\xff\xfe"}',
        b"",
        b"[" * 100_000,
        b'{"id": "f", "text": "' + b"x" * 5000 + b'"}',
        b'{"id": "g", "text": "half \\ud800 pair"}',
        b'{"text": "it has no id"}',
        good.replace(b'"a"', b'"z"'),
    ]
    source.write_bytes(b"\n".join(lines))
    result = run(source, tmp_path / "out", ["shout"], max_line_bytes=4000, shard={"documents": 3})
    asides = {row["position"].rpartition(" ")[2]: row["reason"] for row in result.asides}
    assert set(asides) == {"2", "3", "4", "5", "6", "8", "9"}
    assert "not valid JSON" in asides["2"] and "4,000 bytes" in asides["9"]
    ids = [document.id for document in read_shards(tmp_path / "out")]
    assert ids == ["a", "g", "in.jsonl#11", "z"]
    listed = [json.loads(line) for line in (tmp_path / "out" / "aside.jsonl").read_text().splitlines()]
    assert listed == result.asides
    with pytest.raises(DataError, match="in.jsonl, line 2 cannot be used"):
        run(source, tmp_path / "strict", ["shout"], params=RunParams(num_workers=1, is_strict=True))
    with pytest.raises(DataError, match="line 2 cannot be used"):  # also when an earlier run had set it aside
        run(source, tmp_path / "out", ["shout"], max_line_bytes=4000, shard={"documents": 3},
            params=RunParams(num_workers=1, is_strict=True))  # fmt: skip


def test_a_step_that_raises_sets_its_document_aside_without_its_secrets(tmp_path: Path):
    source = write_lines(
        tmp_path / "in.jsonl", ["fine", f"RAISE {SECRET} jo@acme.org", "EXHAUST", "EMPTY", "also fine"]
    )
    result = run(source, tmp_path / "out", ["trouble", "at_least"], params=RunParams(num_workers=2))
    assert [(row["id"], row["step"], row["position"]) for row in result.asides] == [
        ("d1", "trouble", "in.jsonl:2"),
        ("d2", "trouble", "in.jsonl:3"),
    ]
    assert result.asides[0]["reason"].startswith("ValueError: cannot take RAISE")
    written = "".join(file.read_text(encoding="utf-8") for file in (tmp_path / "out").iterdir())
    assert SECRET not in written and "jo@acme.org" not in written
    assert "nothing is left of its text" in (tmp_path / "out" / "removed.jsonl").read_text()


def test_sources_of_several_kinds_are_read_in_order_with_their_licences(tmp_path: Path):
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.md").write_text("# A\n\na page of some length\n")
    write_lines(folder / "b.jsonl", ["a line of some length", "another line of some length"])
    (folder / "sub" / "c.txt").write_text("a text of some length\n")
    (folder / "empty.txt").write_text("")
    write_documents(ReadResult([Document("own", "made before, of some length")]), tmp_path / "documents")
    source = [{"path": str(folder), "licence": "CC0-1.0"}, str(tmp_path / "documents")]
    config = read_pipeline({"source": source, "steps": ["shout"], "out": str(tmp_path / "out")})
    result = run_pipeline(config, RunParams(num_workers=2))
    documents = list(read_shards(tmp_path / "out"))
    assert [d.id for d in documents] == ["a.md", "d0", "d1", "sub/c.txt", "own"]
    assert [d.metadata.get("licence") for d in documents] == ["CC0-1.0"] * 4 + [None]
    assert [row["position"] for row in result.asides] == ["empty.txt"]
    manifest = read_manifest(tmp_path / "out")
    first, second = manifest.settings["source"]
    assert (first["licence"], first["num_files"]) == ("CC0-1.0", 4) and len(first["hash"]) == 64
    assert manifest.settings["steps"] == [{"step": "shout", "seconds": 0.0}]
    assert [ancestor.kind for ancestor in lineage(tmp_path / "out")] == ["dataset", "documents"]
    assert second["licence"] == ""


def test_parquet_holds_the_same_documents_and_the_split_is_that_of_preparation(tmp_path: Path):
    pytest.importorskip("pyarrow")
    source = write_lines(tmp_path / "in.jsonl", [f"document {i} of some length" for i in range(60)])
    run(source, tmp_path / "lines", ["shout"], validation_fraction=0.2)
    run(source, tmp_path / "parquet", ["shout"], validation_fraction=0.2, format="parquet")
    train, validation = load_dataset(tmp_path / "lines")
    assert load_dataset(tmp_path / "parquet") == (train, validation)
    assert len(train) + len(validation) == 60 and 4 <= len(validation) <= 24
    assert train[0].metadata == {"shouted": True}
    before = hashed_files(tmp_path / "parquet")
    run(
        source,
        tmp_path / "again",
        ["shout"],
        validation_fraction=0.2,
        format="parquet",
        params=RunParams(num_workers=2),
    )
    assert hashed_files(tmp_path / "again") == before


def test_two_documents_with_one_id_are_told_apart(tmp_path: Path):
    source = tmp_path / "in.jsonl"
    rows = [("x", "one text here"), ("x", "another text"), ("x#2", "a third one"), ("x", "one text here")]
    source.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in rows))
    run(source, tmp_path / "out", ["drop_copies"])
    assert [d.text for d in read_shards(tmp_path / "out")] == ["one text here", "another text", "a third one"]


def test_nothing_else_is_overwritten_or_read_into_itself(tmp_path: Path):
    source = write_lines(tmp_path / "in.jsonl", some_texts(3))
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="which holds something that mw did not make"):
        run(source, tmp_path / "precious", ["shout"])
    with pytest.raises(ConfigError, match="lie in one another"):
        run(tmp_path, tmp_path / "out", ["shout"])
    with pytest.raises(DataError, match="does not exist"):
        run(tmp_path / "none", tmp_path / "out", ["shout"])
    with pytest.raises(ConfigError, match="engine is 'spark'; known: local, ray"):
        run(source, tmp_path / "out", ["shout"], params=RunParams(engine="spark"))
    with pytest.raises(ConfigError, match="Add --engine ray"):
        run(source, tmp_path / "out", ["shout"], params=RunParams(address="host:1"))


def test_a_decision_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def decide(self: object, signatures: object) -> dict[str, str]:
        raise KeyError("lost")

    monkeypatch.setattr(trial_steps.DropCopies, "decide", decide)
    source = write_lines(tmp_path / "in.jsonl", some_texts(3))
    with pytest.raises(DataError, match="The step drop_copies could not decide: KeyError"):
        run(source, tmp_path / "out", ["drop_copies"])


def test_the_page_of_the_funnel_escapes_what_documents_say_and_fetches_nothing(tmp_path: Path):
    source = write_lines(tmp_path / "in.jsonl", ["<b>hi", "a document of some length"])
    run(source, tmp_path / "out", ["at_least"])
    page = (tmp_path / "out" / "funnel.html").read_text()
    assert "&lt;b&gt;hi" in page and "<b>hi" not in page
    assert "http" not in page and "<script" not in page
    assert "too short: … characters" in page and "in.jsonl" in page


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_documents(tmp_path: Path):
    peaks = []
    for count in (20_000, 200_000):
        source = tmp_path / f"{count}.jsonl"
        with open(source, "w") as handle:
            handle.writelines(f'{{"id": "d{i}", "text": "document number {i} of some length"}}\n' for i in range(count))
        script = tmp_path / "measured.py"
        script.write_text(MEASURED)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        arguments = [sys.executable, str(script), str(source), str(tmp_path / f"out{count}")]
        shown = subprocess.run(arguments, env=env, capture_output=True, text=True, check=True).stdout
        peaks.append([int(word) for word in shown.split()])
    (small, small_worker), (large, large_worker) = peaks
    assert large - small < 20_000 and large_worker - small_worker < 20_000  # kilobytes; the texts alone are 13,000 more


MEASURED = """
import resource, sys
from pathlib import Path
import modelwright.data
from tests.data import trial_steps, test_run
from modelwright.data.run import RunParams
if __name__ == "__main__":
    modelwright.data.STEPS.update(trial_steps.TABLE)
    params = RunParams(num_workers=1)
    test_run.run(Path(sys.argv[1]), Path(sys.argv[2]), ["shout", "at_least"], params=params, shard={"documents": 1000})
    print(*(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""
