"""Token shards from the command line."""

from tests.conftest import Toy

from modelwright.base.artifact import lineage
from modelwright.base.files import read_jsonl
from modelwright.cli.data_run import EXIT_SET_ASIDE
from modelwright.cli.main import main
from modelwright.data.token_shards import TokenShards


def test_shards_are_made_from_a_data_set_and_know_it(toy: Toy, tmp_path, capfd):
    out = tmp_path / "tokens"
    command = ["shards", str(toy.data), "--tokenizer", str(toy.tokenizer), "--out", str(out), "--row-len", "256"]
    assert main(command) == 0
    shown = capfd.readouterr().out
    assert "tokens of" in shown and "cuts through documents" in shown
    assert {"tokens", "dataset", "tokenizer", "documents"} <= {ancestor.kind for ancestor in lineage(out)}


def test_a_line_that_cannot_be_used_is_set_aside_and_strict_stops(toy: Toy, tmp_path, capfd):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n{"text": \n{"text": "c"}\n')
    out, source = tmp_path / "o", str(tmp_path / "in.jsonl")
    command = ["shards", source, "--tokenizer", str(toy.tokenizer), "--out", str(out)]
    assert main([*command, "--strict"]) == 1
    assert 'line 2: expected an object with a "text"' in capfd.readouterr().err and not out.exists()
    assert main(command) == EXIT_SET_ASIDE
    assert "line 2" in capfd.readouterr().out
    rows = list(read_jsonl(tmp_path / "o.aside.jsonl"))
    assert [row["position"].rpartition(" ")[2] for row in rows] == ["2", "3"]
    assert TokenShards(out).num_documents == 2
    learn = ["tokenizer", "train", source, "--vocab-size", "300", "--out", str(tmp_path / "t")]
    assert main([*learn, "--strict"]) == 1 and not (tmp_path / "t").exists()
    assert main(learn) == EXIT_SET_ASIDE and (tmp_path / "t" / "tokenizer.json").is_file()
    assert len(list(read_jsonl(tmp_path / "t.aside.jsonl"))) == 2


def test_difficulties_are_kept_beside_the_tokens(toy: Toy, tmp_path, capfd):
    (tmp_path / "in.jsonl").write_text('{"text": "a b", "level": 2}\n{"text": "c", "level": 0.5}\n')
    command = ["shards", str(tmp_path / "in.jsonl"), "--tokenizer", str(toy.tokenizer), "--out", str(tmp_path / "o")]
    assert main([*command, "--difficulty", "level"]) == 0
    assert TokenShards(tmp_path / "o").difficulties().tolist() == [2.0, 0.5]
    assert main([*command, "--difficulty", "rank"]) == 1
    assert "entry 1: rank is None; expected a number" in capfd.readouterr().err
