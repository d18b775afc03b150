"""What was trained on is flagged by how much of it was seen; the index is the one that the pipeline removes by."""

import json
import shutil

import pytest
from tests.conftest import Toy

from modelwright.base.errors import DataError
from modelwright.base.files import write_jsonl
from modelwright.base.types import Document
from modelwright.cli.main import main
from modelwright.data.decontaminate import Decontaminate
from modelwright.evaluate.contamination import find_contamination, open_index


def words(first: int, num: int) -> str:
    return " ".join(f"word{first + i}" for i in range(num))


ITEMS = [
    Document("whole", words(0, 40)),
    Document("third", words(100, 42)),
    Document("unseen", words(200, 40)),
    Document("short", "too few words"),
]
TRAINING = [
    Document("copy", f"A page. {words(0, 40)} The end."),
    Document("piece", f"Another. {words(100, 14)} And on."),
    Document("chance", words(200, 12)),  # one word fewer than counts
    Document("tiny", "too few words"),
]


def test_items_are_flagged_by_the_share_that_was_seen():
    found = find_contamination(open_index(ITEMS), TRAINING)
    assert [(row.item, row.document) for row in found.items] == [("whole", "copy"), ("third", "piece")]
    assert [row.covered_fraction for row in found.items] == pytest.approx([1.0, 14 / 42])
    assert found.seen == {"whole"} and (found.num_items, found.num_too_short) == (4, 1)
    assert find_contamination(open_index(ITEMS), []).seen == set()


def test_the_index_is_shared_with_the_step_that_removes(tmp_path):
    made = open_index(ITEMS, tmp_path / "index")
    again = open_index(ITEMS, tmp_path / "index")
    assert again.num_grams == made.num_grams and find_contamination(again, TRAINING).seen == {"whole"}
    step = Decontaminate(index=tmp_path / "index")
    assert [bool(step.reason(document)) for document in TRAINING] == [True, True, False, False]
    left = [document for document in TRAINING if not step.reason(document)]
    assert find_contamination(again, left).items == []
    with pytest.raises(DataError, match="other with its text is not among them"):
        open_index([Document("other", words(0, 40))], tmp_path / "index")


def test_eval_flags_what_the_model_was_trained_on(toy: Toy, tmp_path, capfd):
    data = tmp_path / "data"
    shutil.copytree(toy.data, data)
    command = ["eval", str(toy.model), "--data", str(data), "--check-contamination", "--json"]
    assert main(command) == 0
    clean = json.loads(capfd.readouterr().out)
    assert clean["contamination"]["num_items_seen"] == 0
    assert clean["contamination"]["bits_per_byte_of_unseen"] == pytest.approx(clean["bits_per_byte"])
    held_out = [json.loads(line) for line in (data / "validation.jsonl").read_text(encoding="utf-8").splitlines()]
    write_jsonl(tmp_path / "leak.jsonl", [{"id": "leak", "text": held_out[0]["text"]}])
    shared = ["--trained-on", str(tmp_path / "leak.jsonl"), "--index", str(tmp_path / "index")]
    assert main([*command, *shared]) == 0
    leaked = json.loads(capfd.readouterr().out)["contamination"]
    assert leaked["num_items_seen"] == 1 and leaked["items"][0]["item"] == held_out[0]["id"]
    assert (tmp_path / "index" / "manifest.json").is_file()
    assert main(["eval", str(toy.model), "--data", str(data), "--check-contamination", *shared]) == 0
    assert "held-out documents were seen in training" in capfd.readouterr().out
    assert main(["eval", str(toy.model), "--data", str(data), "--index", "x"]) == 1
    assert "Add --check-contamination" in capfd.readouterr().err
