"""Token shards from the command line."""

from tests.conftest import Toy

from modelwright.base.artifact import lineage
from modelwright.cli.main import main
from modelwright.data.token_shards import TokenShards


def test_shards_are_made_from_a_data_set_and_know_it(toy: Toy, tmp_path, capfd):
    out = tmp_path / "tokens"
    command = ["shards", str(toy.data), "--tokenizer", str(toy.tokenizer), "--out", str(out), "--row-len", "256"]
    assert main(command) == 0
    shown = capfd.readouterr().out
    assert "tokens of" in shown and "cuts through documents" in shown
    assert {"tokens", "dataset", "tokenizer", "documents"} <= {ancestor.kind for ancestor in lineage(out)}


def test_a_row_without_text_is_named(toy: Toy, tmp_path, capfd):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    command = ["shards", str(tmp_path / "in.jsonl"), "--tokenizer", str(toy.tokenizer), "--out", str(tmp_path / "o")]
    assert main(command) == 1
    assert "entry 2: text is None" in capfd.readouterr().err


def test_difficulties_are_kept_beside_the_tokens(toy: Toy, tmp_path, capfd):
    (tmp_path / "in.jsonl").write_text('{"text": "a b", "level": 2}\n{"text": "c", "level": 0.5}\n')
    command = ["shards", str(tmp_path / "in.jsonl"), "--tokenizer", str(toy.tokenizer), "--out", str(tmp_path / "o")]
    assert main([*command, "--difficulty", "level"]) == 0
    assert TokenShards(tmp_path / "o").difficulties().tolist() == [2.0, 0.5]
    assert main([*command, "--difficulty", "rank"]) == 1
    assert "entry 1: rank is None; expected a number" in capfd.readouterr().err
