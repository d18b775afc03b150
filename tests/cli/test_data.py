"""``mw data`` runs pipelines and single steps, tells by its exit status what became of them, and keeps its old form."""

import json
from pathlib import Path

import pytest

from modelwright.base.artifact import verify
from modelwright.cli.main import main
from modelwright.models.ngram import NgramModel

RECIPE = Path(__file__).parents[2] / "recipes" / "data" / "web.yaml"
SECRET = "ghp_" + "a8Fk29dLq0ZxW7mN3bVc5RtY1uIoP4sGhJ6e"
PAGE = (
    "The river runs through the old town, and the people of the town have built their houses on both of its sides. "
    "They say that it was here before the first stone was laid, and that it will be here when the last one falls.\n"
)


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def mw(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["data", *map(str, arguments)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_a_pipeline_file_is_run_and_the_status_tells_what_was_set_aside(tmp_path: Path, capsys):
    source = write_rows(
        tmp_path / "in.jsonl", {"id": "a", "text": "One  text \r\n"}, "{broken", {"id": "b", "text": "Two"}
    )
    recipe = tmp_path / "pipeline.yaml"
    recipe.write_text(f"source: {source}\nsteps: [clean]\nout: {tmp_path / 'out'}\n")
    code, out, _ = mw(capsys, "run", recipe, "--workers", 1)
    assert code == 3
    assert "set aside in.jsonl, line 2: not valid JSON" in out and "2 documents" in out and "funnel.html" in out
    assert verify(tmp_path / "out").kind == "dataset"
    assert [row["text"] for row in read_rows(tmp_path / "out" / "train.jsonl")] == ["One  text\n", "Two\n"]
    code, out, _ = mw(capsys, "run", recipe, "--workers", 1)
    assert code == 3 and "was made by an earlier run" in out
    code, _, err = mw(capsys, "run", recipe, "--workers", 1, "--strict", "--out", tmp_path / "strict")
    assert code == 1 and "in.jsonl, line 2 cannot be used" in err and not (tmp_path / "strict").exists()
    code, _, _ = mw(
        capsys, "run", recipe, "--source", write_rows(tmp_path / "good.jsonl", {"text": "x"}), "--workers", 1
    )
    assert code == 0


def test_wrong_pipelines_are_refused_with_the_nearest_name(tmp_path: Path, capsys):
    recipe = tmp_path / "pipeline.yaml"
    recipe.write_text("source: x\nsteps: [claen]\nout: y\n")
    code, _, err = mw(capsys, "run", recipe)
    assert code == 1 and "Did you mean 'clean'?" in err
    recipe.write_text("source: x\nsteps: [{step: gopher_quality, min_word: 3}]\nout: y\n")
    code, _, err = mw(capsys, "run", recipe)
    assert code == 1 and "steps[0].min_word is not a setting. Did you mean steps[0].min_words?" in err
    assert mw(capsys, "run", recipe, "--wokers", 3)[0] == 2
    code, _, err = mw(capsys, "run", tmp_path / "none.yaml")
    assert code == 1 and "does not exist" in err


def test_clean_keeps_every_field_and_the_order(tmp_path: Path, capsys):
    rows = [
        {"text": "a \r\n", "id": 7, "url": {"x": [1]}},
        {"id": "b", "text": "fine\n", "title": "T", "metadata": {"k": 1}},
    ]
    source = write_rows(tmp_path / "in.jsonl", *rows)
    code, out, _ = mw(capsys, "clean", source, tmp_path / "out.jsonl", "--workers", 1)
    assert code == 0 and "2 documents of 2: 0 removed, 1 changed" in out
    assert read_rows(tmp_path / "out.jsonl") == [{**rows[0], "text": "a\n"}, rows[1]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    write_rows(source, *rows, "[")
    assert mw(capsys, "clean", source, tmp_path / "out.jsonl", "--workers", 1)[0] == 3
    assert read_rows(tmp_path / "out.jsonl.aside.jsonl")[0]["position"] == "in.jsonl, line 3"
    code, _, err = mw(capsys, "clean", source, tmp_path / "x.jsonl", "--workers", 1, "--strict")
    assert code == 1 and "line 3" in err and not (tmp_path / "x.jsonl").exists()
    code, _, err = mw(capsys, "clean", source, source)
    assert code == 1 and "is the input" in err
    assert "is not a file" in mw(capsys, "clean", tmp_path / "none", tmp_path / "x")[2]


def test_dedup_keeps_the_first_and_lists_what_it_removed(tmp_path: Path, capsys):
    near = PAGE.replace("stone", "brick")
    rows = [
        {"id": name, "text": text} for name, text in (("a", PAGE), ("b", "Another page."), ("c", PAGE), ("d", near))
    ]
    source = write_rows(tmp_path / "in.jsonl", *rows)
    removed = tmp_path / "removed.jsonl"
    code, *_ = mw(
        capsys, "dedup", source, tmp_path / "o.jsonl", "--threshold", 0.7, "--removed", removed, "--workers", 1
    )
    assert code == 0 and [row["id"] for row in read_rows(tmp_path / "o.jsonl")] == ["a", "b"]
    reasons = {row["id"]: (row["step"], row["reason"]) for row in read_rows(removed)}
    assert reasons["c"][0] == "exact_duplicates" and reasons["d"][0] == "near_duplicates"
    assert all("a" in reason for _, reason in reasons.values())
    mw(capsys, "dedup", source, tmp_path / "o.jsonl", "--threshold", 1, "--workers", 1)
    assert [row["id"] for row in read_rows(tmp_path / "o.jsonl")] == ["a", "b", "d"]


def test_scrub_reports_spans_and_never_a_value(tmp_path: Path, capsys):
    source = write_rows(tmp_path / "in.jsonl", {"id": "a", "text": f"Mail jo@acme.org, key {SECRET}."}, "{broken")
    code, out, err = mw(capsys, "scrub", source, tmp_path / "o.jsonl", "--report", tmp_path / "report.jsonl")
    assert code == 3 and "line 2" in out
    assert read_rows(tmp_path / "o.jsonl")[0]["text"] == "Mail [email], key [secret]."
    written = out + err + (tmp_path / "report.jsonl").read_text()
    assert SECRET not in written and "jo@acme.org" not in written
    assert '"start": 5, "end": 16' in written


def test_scrub_takes_mode_and_kinds(tmp_path: Path, capsys, monkeypatch):
    source = write_rows(tmp_path / "in.jsonl", {"id": "a", "text": "Mail jo@acme.org from 192.0.2.7."})
    out = tmp_path / "o.jsonl"

    def scrubbed(*options: object) -> str:
        assert mw(capsys, "scrub", source, out, *options)[0] == 0
        return str(read_rows(out)[0]["text"])

    assert scrubbed("--kinds", "ip_address") == "Mail jo@acme.org from [ip_address]."
    assert scrubbed("--kinds", "email", "--mode", "remove") == "Mail  from 192.0.2.7."
    (tmp_path / "secret").write_text("sixteen random characters\n")
    options = ("--kinds", "email", "--mode", "pseudonym", "--secret-file", tmp_path / "secret")
    first, second = scrubbed(*options), scrubbed(*options)
    assert first == second and "jo@acme.org" not in first and "@example.com" in first
    for wrong, why in (
        (("--mode", "hide"), "known: mask, pseudonym, remove"),
        (("--kinds", "email,names"), "kinds holds 'names'"),
        (("--secret-file", tmp_path / "secret"), "only pseudonyms take a secret"),
    ):
        code, _, err = mw(capsys, "scrub", source, out, *wrong)
        assert code == 1 and why in err


@pytest.mark.parametrize("kind", ["n-grams", "decoder"])
def test_a_pipeline_file_removes_by_the_perplexity_of_a_model_trained_here(tmp_path: Path, capsys, toy, kind):
    model, most = toy.model, 500.0  # three steps of training: nearly as many guesses as there are tokens
    if kind == "n-grams":
        model, most = tmp_path / "pages.arpa", 60.0
        NgramModel.train(PAGE.split(". "), order=2).save_arpa(model)
    rows = [{"id": "page", "text": PAGE}, {"id": "noise", "text": "qzx vvk 0x3f;; " * 20}]
    source, recipe = write_rows(tmp_path / "in.jsonl", *rows), tmp_path / "pipeline.yaml"
    step = f"{{step: perplexity, max_perplexity: {most}, model: {model}}}"
    recipe.write_text(f"source: {source}\nsteps: [{step}]\nout: {tmp_path / 'out'}\n")
    code, out, err = mw(capsys, "run", recipe, "--workers", 2)
    assert code == 0, out + err
    kept = [row["id"] for row in read_rows(tmp_path / "out" / "train.jsonl")]
    removed = [(row["id"], row["reason"]) for row in read_rows(tmp_path / "out" / "removed.jsonl")]
    assert len(kept) + len(removed) == 2 and all("perplexity" in reason for _, reason in removed)
    if kind == "n-grams":
        assert kept == ["page"]
    recipe.write_text(f"source: {source}\nsteps: [perplexity]\nout: {tmp_path / 'none'}\n")
    code, _, err = mw(capsys, "run", recipe)
    assert code == 1 and "perplexity.model is None; expected the folder of a language model" in err


def test_decontaminate_removes_what_stands_in_an_evaluation_set(tmp_path: Path, capsys):
    source = write_rows(
        tmp_path / "in.jsonl", {"id": "a", "text": f"Here it is: {PAGE}"}, {"id": "b", "text": "Another page."}
    )
    against = write_rows(tmp_path / "test.jsonl", {"id": "q", "text": PAGE})
    arguments = ("decontaminate", source, tmp_path / "o.jsonl", "--against", against, "--removed", tmp_path / "r.jsonl")
    assert mw(capsys, *arguments, "--workers", 1)[0] == 0
    assert [row["id"] for row in read_rows(tmp_path / "o.jsonl")] == ["b"]
    assert [row["id"] for row in read_rows(tmp_path / "r.jsonl")] == ["a"]


def test_the_recipe_for_web_pages_runs(tmp_path: Path, capsys):
    rows = [
        {"id": str(i), "text": PAGE + f"Page number {i} ends here, in the middle of the town. " * 3} for i in range(6)
    ]
    source = write_rows(tmp_path / "in.jsonl", *rows, {"id": "short", "text": "Buy now"})
    code, out, err = mw(capsys, "run", RECIPE, "--source", source, "--out", tmp_path / "out", "--workers", 1)
    assert code == 0, err
    removed = {row["id"]: row["step"] for row in read_rows(tmp_path / "out" / "removed.jsonl")}
    assert "short" in removed and "near_duplicates" in set(removed.values()) | {"near_duplicates"}


def test_the_help_teaches_every_part(capsys):
    code, out, _ = mw(capsys, "--help")
    assert code == 0
    for word in ("run", "prepare", "clean", "dedup", "scrub", "decontaminate", "scrape", "Exit status"):
        assert word in out
