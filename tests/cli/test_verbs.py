"""Every verb on real artifacts at toy size, and on what it must refuse."""

import io
import json
import shutil
from pathlib import Path

import pytest
import yaml
from tests.conftest import Toy

from modelwright.base.artifact import read_manifest, verify
from modelwright.cli.main import main

Shown = pytest.CaptureFixture[str]


def refused(capsys: Shown, *arguments: object) -> str:
    """Run a command that must end with code 1 and return its message."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    return shown


def done(capsys: Shown, *arguments: object) -> str:
    """Run a command that must succeed and return what it printed."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return shown.out


@pytest.fixture(scope="session")
def toy_index(toy: Toy) -> Path:
    folder = toy.documents.parent / "index"
    assert main(["index", str(toy.documents), "--out", str(folder), "--has_vectors=false"]) == 0
    return folder


def write_recipe(folder: Path, **values: object) -> Path:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    return recipe


def pretrain_recipe(toy: Toy, folder: Path) -> Path:
    return write_recipe(
        folder,
        method="pretrain",
        data=str(toy.data),
        tokenizer=str(toy.tokenizer),
        out=str(folder / "model"),
        max_seq_len=64,
        shape={"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64},
        loop={"num_steps": 4, "micro_batch_size": 2, "compile": False, "checkpoint": {"every": 2}},
    )


def test_data_prints_the_funnel_and_names_what_could_not_be_read(toy: Toy, tmp_path: Path, capsys: Shown):
    folder = tmp_path / "docs"
    shutil.copytree(toy.documents, folder)
    (folder / "empty.pdf").write_bytes(b"")
    (folder / "fake.docx").write_bytes(b"PK\x03\x04 not really")
    arguments = ["data", str(folder), "--out", str(tmp_path / "data"), "--validation_fraction=0.2"]
    assert main(arguments) == 3  # done, but something was set aside
    shown = capsys.readouterr().out
    assert "near duplicates" in shown and "instruction pairs" in shown
    assert "not read empty.pdf" in shown and "not read fake.docx" in shown
    assert verify(tmp_path / "data").parents[0].kind == "documents"
    assert verify(tmp_path / "data-pairs").kind == "dataset"
    strict = refused(capsys, "data", folder, "--out", tmp_path / "strict", "--strict")
    assert "empty.pdf" in strict and not (tmp_path / "strict").exists()


def test_data_refuses_folders_without_anything_to_read(tmp_path: Path, capsys: Shown):
    assert "does not exist" in refused(capsys, "data", tmp_path / "none", "--out", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    message = refused(capsys, "data", tmp_path / "empty", "--out", tmp_path / "out")
    assert "empty" in message and ".md" in message
    assert not (tmp_path / "out").exists()


def test_data_refuses_a_misspelt_setting(toy: Toy, tmp_path: Path, capsys: Shown):
    message = refused(capsys, "data", toy.documents, "--out", tmp_path / "out", "--min_char=3")
    assert "Did you mean min_chars?" in message


def test_tokenizer_prints_bytes_per_token_beside_raw_bytes(toy: Toy, tmp_path: Path, capsys: Shown):
    shown = done(capsys, "tokenizer", "train", toy.data, "--out", tmp_path / "tokenizer", "--vocab-size", 400)
    assert "400 tokens" in shown and "raw bytes: 1.00" in shown
    assert read_manifest(tmp_path / "tokenizer").measured["bytes_per_token"] > 1


def test_tokenizer_refuses_what_is_no_data_set_and_sizes_without_room(toy: Toy, tmp_path: Path, capsys: Shown):
    train = ("tokenizer", "train", "--out", tmp_path / "t")
    assert "does not exist" in refused(capsys, *train, tmp_path / "none")
    assert "kind 'model'" in refused(capsys, *train, toy.model)
    assert "259" in refused(capsys, *train, toy.data, "--vocab-size", 100)
    assert "unigram" in refused(capsys, *train, toy.data, "--algorithm", "unigrm")


def test_tokenizers_of_every_algorithm_are_made_from_files_compared_and_audited(tmp_path: Path, capsys: Shown):
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    folders = [tmp_path / name for name in ("bpe", "unigram", "wordpiece")]
    for folder in folders:
        call = ("tokenizer", "train", text, "--algorithm", folder.name, "--vocab-size", 450, "--out", folder)
        assert "450 tokens" in done(capsys, *call)
    rows = json.loads(done(capsys, "tokenizer", "compare", *folders, "--on", text, "--json"))
    assert [row["vocab_size"] for row in rows] == [450] * 3
    assert all(row["bytes_per_token"] > 1.5 and row["fertility"] > 1 for row in rows)
    assert "fertility" in done(capsys, "tokenizer", "compare", *folders, "--on", text)
    found = json.loads(done(capsys, "tokenizer", "audit", folders[0], "--json"))
    assert len(found["invalid_utf8"]) >= 128 and found["duplicates"] == []
    assert "no UTF-8: " in done(capsys, "tokenizer", "audit", folders[0])


def test_tokenizer_transplant_makes_a_model_and_says_what_it_cost(toy: Toy, tmp_path: Path, capsys: Shown):
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    done(capsys, "tokenizer", "train", text, "--algorithm", "unigram", "--vocab-size", 450, "--out", tmp_path / "other")
    call = ("tokenizer", "transplant", toy.model, "--to", tmp_path / "other")
    shown = done(capsys, *call, "--out", tmp_path / "moved", "--data", toy.data)
    assert "-> 450 tokens" in shown and "bits per byte" in shown
    manifest = verify(tmp_path / "moved")
    assert {parent.kind for parent in manifest.parents} == {"model", "tokenizer", "dataset"}
    assert manifest.measured["bits_per_byte_after"] > 0
    assert "not measured" in done(capsys, *call, "--out", tmp_path / "again", "--way", "pieces")
    assert "the model itself" in refused(capsys, *call, "--out", toy.model)
    assert "known: adapt" in refused(capsys, *call, "--out", tmp_path / "no", "--way", "magic")
    assert "does not exist" in refused(
        capsys, "tokenizer", "transplant", toy.model, "--to", tmp_path / "x", "--out", text
    )


def test_tokenizer_audit_looks_into_a_model(toy: Toy, capsys: Shown):
    found = json.loads(done(capsys, "tokenizer", "audit", toy.model, "--model", toy.model, "--json"))
    assert len(found["glitches"]["certain"]) >= 13 and 0 <= found["glitches"]["agreement"] <= 1
    assert "glitch tokens: " in done(capsys, "tokenizer", "audit", toy.tokenizer, "--model", toy.model)
    shown = done(capsys, "tokenizer", "audit", toy.tokenizer, "--model", toy.model, "--ask", "all")
    assert "does not repeat ordinary tokens either" in shown  # three steps of training teach no copying
    assert "--ask is 'some'" in refused(capsys, "tokenizer", "audit", toy.tokenizer, "--ask", "some")


def test_plan_prints_memory_by_part_and_changes_nothing(toy: Toy, tmp_path: Path, capsys: Shown):
    recipe = pretrain_recipe(toy, tmp_path)
    shown = done(capsys, "plan", recipe)
    for part in ("parameters", "FLOPs", "weights", "gradients", "optimizer", "activations", "KV cache", "time"):
        assert part in shown
    figures = json.loads(done(capsys, "plan", recipe, "--json", "--loop.num_steps=8"))
    assert figures["num_steps"] == 8 and figures["fits"]
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_plan_says_when_a_run_will_not_fit(toy: Toy, tmp_path: Path, capsys: Shown):
    recipe = pretrain_recipe(toy, tmp_path)
    huge = ["--shape.hidden_size=65536", "--shape.intermediate_size=262144", "--shape.num_layers=100"]
    message = refused(capsys, "plan", recipe, *huge)
    assert "will not fit" in message and "TB" in message and "loop.micro_batch_size" in message


def test_train_refuses_a_misspelt_field_and_a_missing_recipe(toy: Toy, tmp_path: Path, capsys: Shown):
    recipe = pretrain_recipe(toy, tmp_path)
    assert "Did you mean loop.num_steps?" in refused(capsys, "train", recipe, "--loop.num_step=3")
    recipe.write_text(recipe.read_text().replace("num_layers", "num_layer"))
    assert "Did you mean shape.num_layers?" in refused(capsys, "train", recipe)
    assert "does not exist" in refused(capsys, "train", tmp_path / "none.yaml")
    assert not (tmp_path / "model").exists()


def test_a_run_that_was_broken_off_is_resumed_when_asked_and_never_lost_silently(
    toy: Toy, tmp_path: Path, capsys: Shown, monkeypatch: pytest.MonkeyPatch
):
    recipe = pretrain_recipe(toy, tmp_path)
    assert "no unfinished run" in refused(capsys, "train", recipe, "--resume")

    def break_off(run: object, report: object) -> None:
        if report.step == 3:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("modelwright.cli.train.tell", break_off)
        assert main(["train", str(recipe)]) == 130
    assert (tmp_path / "model.run").is_dir() and not (tmp_path / "model").exists()
    message = refused(capsys, "train", recipe)
    assert "--resume" in message and "--restart" in message
    assert "contradict" in refused(capsys, "train", recipe, "--resume", "--restart")
    assert "num_steps" in done(capsys, "train", recipe, "--resume")
    resumed = (tmp_path / "model" / "model.safetensors").read_bytes()
    done(capsys, "train", recipe, f"--out={tmp_path / 'again'}")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == resumed
    assert not (tmp_path / "model.run").exists()


@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_prints_sizes_and_what_was_lost(bits: int, toy: Toy, tmp_path: Path, capsys: Shown):
    out = tmp_path / "small"
    shown = done(capsys, "quantize", toy.model, "--bits", bits, "--out", out, "--data", toy.data)
    assert f"{bits} bits a weight" in shown and "perplexity x" in shown and "KL divergence" in shown
    assert verify(out).settings["bits"] == bits
    assert "not measured" in done(capsys, "quantize", toy.model, "--bits", bits, "--out", out)


def test_quantize_refuses_other_widths_and_its_own_model(toy: Toy, tmp_path: Path, capsys: Shown):
    assert "2, 4, 8 bits" in refused(capsys, "quantize", toy.model, "--bits", 3, "--out", tmp_path / "x")
    assert "the model itself" in refused(capsys, "quantize", toy.model, "--out", toy.model)
    assert "none" in refused(capsys, "quantize", tmp_path / "none", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_damaged_model_is_refused_by_name(toy: Toy, tmp_path: Path, capsys: Shown):
    broken = tmp_path / "broken"
    shutil.copytree(toy.model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for arguments in (["quantize", broken, "--out", tmp_path / "x"], ["eval", broken, "--data", toy.data]):
        assert "model.safetensors" in refused(capsys, *arguments)


def test_ask_prints_numbered_citations(toy_index: Path, toy: Toy, capsys: Shown):
    shown = done(capsys, "ask", toy_index, "What does textwrap.dedent do?")
    assert "[1] textwrap.md, characters" in shown
    assert "not written by a model" in shown
    answer = json.loads(done(capsys, "ask", toy_index, "What does textwrap.dedent do?", "--json"))
    for citation in answer["citations"]:
        text = (toy.documents / citation["doc"]).read_text(encoding="utf-8")
        assert text[citation["start"] : citation["end"]] == citation["quote"]


def test_ask_can_let_a_model_write(toy_index: Path, toy: Toy, capsys: Shown):
    answer = json.loads(done(capsys, "ask", toy_index, "What is bisect?", "--model", toy.model, "--json", "--k", 1))
    assert answer["mode"] in ("generated", "extractive")


def test_ask_refuses_what_is_no_index(toy: Toy, tmp_path: Path, capsys: Shown):
    assert "is not an artifact" in refused(capsys, "ask", tmp_path, "Why?")
    assert "kind 'model'" in refused(capsys, "ask", toy.model, "Why?")


def test_index_refuses_an_empty_folder_and_keeps_the_old_index(toy_index: Path, tmp_path: Path, capsys: Shown):
    copy = tmp_path / "index"
    shutil.copytree(toy_index, copy)
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, "index", tmp_path / "empty", "--out", copy, "--has_vectors=false")
    assert verify(copy).kind == "index"


def test_eval_of_a_model_stands_beside_n_grams(toy: Toy, capsys: Shown):
    shown = done(capsys, "eval", toy.model, "--data", toy.data)
    assert "5-gram" in shown and "unigram" in shown and "does not beat" in shown
    figures = json.loads(done(capsys, "eval", toy.model, "--data", toy.data, "--json"))
    assert figures["ngram5_bits_per_byte"] < figures["unigram_bits_per_byte"] < figures["bits_per_byte"]


def test_eval_of_an_index_gives_recall_and_exact_citations(toy_index: Path, capsys: Shown):
    figures = json.loads(done(capsys, "eval", toy_index, "--num-questions", 20, "--json"))
    scores = figures["retrieval"]["bm25"]
    assert 0.5 < scores["recall_at_1"] <= scores["recall_at_5"] <= scores["recall_at_10"] <= 1
    assert figures["citations"]["exact"] == figures["citations"]["checked"] > 0
    assert "recall@5" in done(capsys, "eval", toy_index, "--num-questions", 20)


def test_eval_of_a_model_without_text_says_what_is_missing(toy: Toy, capsys: Shown):
    assert "--data" in refused(capsys, "eval", toy.model)


def test_chat_answers_piped_turns_remembers_and_forgets(toy: Toy, capsys: Shown, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n/new\nhello\n/quit\nnever read\n"))
    shown = done(capsys, "chat", toy.model, "--max-tokens", 8, "--seed", 1)
    first, between, second = shown.partition("begun anew\n")
    assert between and first.strip() and first == second


def test_chat_refuses_settings_out_of_range_before_loading(tmp_path: Path, capsys: Shown):
    assert "temperature is -1" in refused(capsys, "chat", tmp_path, "--temperature", -1)


def test_a_turn_that_is_too_long_is_taken_back(toy: Toy, capsys: Shown, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 1000 + "\nhello\n"))
    assert main(["chat", str(toy.model), "--max-tokens", "3"]) == 0
    shown = capsys.readouterr()
    assert "context" in shown.err and shown.out.strip()


def test_serve_refuses_when_there_is_nothing_to_serve(toy: Toy, tmp_path: Path, capsys: Shown):
    assert "nothing to serve" in refused(capsys, "serve", "--port", 0)
    assert "no-index" in refused(capsys, "serve", "--port", 0, "--index", tmp_path / "no-index")


def test_lineage_walks_back_to_the_documents(toy: Toy, tmp_path: Path, capsys: Shown):
    shown = done(capsys, "lineage", toy.model, "--check")
    assert shown.index("model") < shown.index("dataset") < shown.index("documents") < shown.index("tokenizer")
    assert "same" in shown and "sealed" in shown
    copy = tmp_path / "moved"
    shutil.copytree(toy.model, copy)
    assert "missing" in done(capsys, "lineage", copy)
    assert "is missing" in refused(capsys, "lineage", copy, "--check")
    (copy / "config.json").write_text("{}")
    assert "has changed" in refused(capsys, "lineage", copy, "--check")
