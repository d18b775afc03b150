"""Token shards from the command line."""

from tests.conftest import Toy

from modelwright.base.artifact import lineage
from modelwright.cli.main import main


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
