"""Chat templates from the command line."""

import json
import shutil

from tests.conftest import Toy

from modelwright.cli.main import main


def test_a_template_is_shown_checked_and_designed(toy: Toy, tmp_path, capfd):
    folder = tmp_path / "tokenizer"
    shutil.copytree(toy.tokenizer, folder)
    (tmp_path / "design.yaml").write_text(
        "like: chatml\nroles:\n"
        "  narrator: {prefix: '<|im_start|>narrator\\n', suffix: '<|im_end|>', is_trained: true}\n"
        "generation_prompt: '<|im_start|>'\n"
    )
    assert main(["template", "design", str(folder), "--file", str(tmp_path / "design.yaml")]) == 0
    assert "trains the stop" in capfd.readouterr().out
    assert "narrator" in (folder / "chat_template.jinja").read_text()
    assert main(["template", "check", str(folder)]) == 0
    rows = [{"instruction": "Say hi [bold]", "input": "", "output": "hi"}]
    (tmp_path / "talk.json").write_text(json.dumps(rows))
    assert main(["template", "show", str(folder), "--data", str(tmp_path / "talk.json")]) == 0
    shown = capfd.readouterr().out
    assert "user\nSay hi [bold]<|im_end|>" in shown.replace("⟦", "").replace("⟧", "")
    assert "⟦assistant\nhi⟧⟦<|im_end|>⟧" in shown and "tokens are trained" in shown


def test_a_wrong_template_is_told_and_the_status_says_so(toy: Toy, tmp_path, capfd):
    folder = tmp_path / "tokenizer"
    shutil.copytree(toy.tokenizer, folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")
    assert main(["template", "check", str(folder)]) == 1
    assert "not today" in capfd.readouterr().out
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert main(["template", "check", str(folder)]) == 1
    assert "does not stop a model" in capfd.readouterr().out
    (folder / "chat_template.jinja").write_text("{% for %}")
    assert main(["template", "check", str(folder)]) == 1
    assert "not valid Jinja" in capfd.readouterr().err
