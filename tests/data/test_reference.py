"""The default corpus: complete, the same every time, free of this machine, and harmless to the caller."""

import os
import re
import sys
from pathlib import Path

import pytest

from modelwright.base.errors import DataError
from modelwright.base.files import hash_folder
from modelwright.data import interpreter_pages, reference
from modelwright.data.reference import write_reference


@pytest.fixture
def pages(reference_folder):
    return reference_folder


def test_there_is_a_page_for_each_module_that_matters(pages):
    names = {page.stem for page in pages.glob("*.md")}
    assert {"json", "json.decoder", "textwrap", "os", "os.path", "builtins", "asyncio", "email.message"} <= names
    assert len(names) > 400
    assert sum(page.stat().st_size for page in pages.glob("*.md")) > 2_000_000
    assert not {name for name in names if name.startswith(("antigravity", "this", "idlelib", "test.", "_"))}


def test_a_page_holds_docstring_classes_methods_and_functions_with_signatures(pages):
    text = (pages / "json.md").read_text(encoding="utf-8")
    assert text.startswith("# json\n\nJSON (JavaScript Object Notation)")
    assert "\n## json.dumps(obj, *, skipkeys=False, ensure_ascii=True," in text
    assert "\n## class json.JSONDecoder(*, object_hook=None," in text
    assert "\n### json.JSONDecoder.decode(s, " in text
    assert "\nDeserialize ``fp`` (a ``.read()``-supporting file-like object" in text


def test_the_same_interpreter_writes_the_same_bytes(pages, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("MY_PASSWORD", "hunter2hunter2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')")
    write_reference(tmp_path / "again")
    assert hash_folder(tmp_path / "again") == hash_folder(pages)


def test_no_page_tells_of_this_machine(pages):
    for page in pages.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"0x[0-9a-f]{9,}>", text), page
        assert sys.prefix not in text, page
        assert os.environ.get("HOME", "/root") + "/" not in text, page
        assert "environ({" not in text, page


def test_the_callers_process_imports_nothing(tmp_path):
    before = set(sys.modules)
    write_reference(tmp_path / "pages")
    assert not {name for name in set(sys.modules) - before if name in sys.stdlib_module_names and name != "queue"}


def test_headings_are_ours_only(pages):
    heading = re.compile(r"# [\w.]+$|## (class )?[\w.]+(\(.*)?$|### [\w.]+(\(.*)?$")
    for page in pages.glob("*.md"):
        if page.stem.startswith("language."):
            continue
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("#"):
                assert heading.match(line), (page, line)


def test_a_module_that_crashes_or_hangs_costs_only_its_own_page(tmp_path, monkeypatch):
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "a_crash.py").write_text("import os; os.abort()")
    (stubs / "b_hang.py").write_text("import time; time.sleep(60)")
    (stubs / "c_exit.py").write_text("raise SystemExit(3)")
    (stubs / "d_print.py").write_text('"""Fine."""\nprint("noise"); input()')
    (stubs / "e_fine.py").write_text('"""Fine too."""')
    monkeypatch.setattr(reference, "MODULE_SECONDS", 1.0)
    command = reference._command
    paths = [str(stubs), str(reference._PROGRAM.parent)]
    program = f"import sys; sys.path[:0] = {paths!r}; import interpreter_pages as p; p.main(sys.argv[1])"

    def with_stubs(*arguments):
        return [*command(*arguments)[:4], "-c", program, *arguments]

    monkeypatch.setattr(reference, "_command", with_stubs)
    work = tmp_path / "work"
    work.mkdir()
    names = ["a_crash", "b_hang", "c_exit", "d_print", "e_fine"]
    with reference.bar("test") as shown:
        while names:
            names = reference._write_pages(names, work, shown)
    assert {page.name for page in work.iterdir()} == {"e_fine.md"}  # d_print asked for input and got end of file


def test_a_default_value_never_shows_what_it_holds():
    shown = interpreter_pages._show_default
    assert shown(os.environ) == "<_Environ>"
    assert shown(object()) == "<object>"
    assert shown("/home/someone/file") == "'...'"
    assert shown(int) == "int"
    assert shown((1, "a")) == "(1, 'a')"
    assert shown((1,)) == "(1,)"


def test_another_folder_is_never_replaced(tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(DataError, match="already holds other files"):
        write_reference(tmp_path)
    assert (tmp_path / "notes.md").read_text() == "mine"
    with pytest.raises(DataError, match="is a file"):
        write_reference(tmp_path / "notes.md")


def test_topics_become_markdown():
    text = "Title\n*****\n\nSome text.\n\n\nPart\n====\n\n  code\n  ----\n"
    assert interpreter_pages.render_topic(text) == "# Title\n\nSome text.\n\n\n## Part\n\n  code\n  ----\n"


def test_a_folder_named_from_here_gets_the_same_pages(pages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert write_reference(Path("runs/reference")) == len(list(pages.glob("*.md")))
    assert hash_folder(tmp_path / "runs" / "reference") == hash_folder(pages)
