"""Reading a folder: exact text, every refusal by name and reason, nothing outside the folder, the same order always."""

import contextlib
import io
import os
import zipfile
from pathlib import Path

import pytest

from modelwright.base.artifact import read_manifest, verify
from modelwright.base.errors import DataError, MissingExtraError
from modelwright.base.registry import lookup
from modelwright.data import PARSERS, parse
from modelwright.data.entry import Limits
from modelwright.data.ocr import has_ocr
from modelwright.data.read import load_documents, load_failures, read_documents, write_documents
from modelwright.data.source import ReadConfig

docx = pytest.importorskip("docx")
pytest.importorskip("pypdfium2")
pytest.importorskip("trafilatura")


def make_pdf(pages, encrypted=False):
    """A small PDF written by hand: one line of Helvetica a page."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, text in enumerate(pages):
        content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET"
        font = "/Resources << /Font << /F1 3 0 R >> >>"
        objects.append(f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] {font} /Contents {5 + 2 * i} 0 R >>")
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    if encrypted:
        objects.append(f"<< /Filter /Standard /V 1 /R 2 /O <{'11' * 32}> /U <{'22' * 32}> /P -44 >>")
    body, offsets = "%PDF-1.4\n", []
    for number, item in enumerate(objects, start=1):
        offsets.append(len(body))
        body += f"{number} 0 obj\n{item}\nendobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    extra = f" /Encrypt {len(objects)} 0 R /ID [<00> <00>]" if encrypted else ""
    trailer = f"trailer << /Root 1 0 R /Size {len(objects) + 1}{extra} >>\nstartxref\n{len(body)}\n%%EOF\n"
    return (body + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{trailer}").encode("latin-1")


def make_docx():
    document = docx.Document()
    document.core_properties.title = "Travel rules"
    document.add_heading("Travel", level=1)
    document.add_paragraph("Book the train first.")
    document.add_paragraph("Keep receipts", style="List Bullet")
    table = document.add_table(rows=1, cols=2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "Meals", "30 a day"
    held = io.BytesIO()
    document.save(held)
    return held.getvalue()


PAGE = """<html><head><meta charset="iso-8859-1"><title>Caf\xe9 &amp; bar</title></head><body>
<nav><a href="/">Home</a> <a href="/x">Menu of the site</a></nav><main><article><h1>Opening hours</h1>
<p>The caf\xe9 opens at eight in the morning on every weekday, and an hour later on Saturdays and on Sundays.</p>
<p>It closes when the last guest has gone, which in summer may be well after midnight.</p></article></main>
<footer>Copyright footer</footer></body></html>"""


def reason_of(result, name):
    return {failure.path: failure.reason for failure in result.failures}[name]


@contextlib.contextmanager
def without_root():
    """Be an ordinary user for a while: root may open anything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_every_format_is_read_in_order_with_its_title(tmp_path):
    (tmp_path / "b.md").write_bytes(b"---\r\nx: 1\r\n---\r\n# The title #\r\n\r\nBody.\r\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.TXT").write_text("plain")
    (tmp_path / "a.html").write_bytes(PAGE.encode("latin-1"))
    (tmp_path / "d.pdf").write_bytes(make_pdf(["First page here", "Second page here"]))
    (tmp_path / "e.docx").write_bytes(make_docx())
    (tmp_path / "code.py").write_text("x = 1")
    (tmp_path / ".hidden.md").write_text("hidden")
    result = read_documents(tmp_path)
    assert [d.id for d in result.documents] == ["a.html", "b.md", "d.pdf", "e.docx", "sub/c.TXT"]
    assert [d.title for d in result.documents] == ["Caf\xe9 & bar", "The title", "d", "Travel rules", "c"]
    assert result.others == {".py": 1} and not result.failures
    page, markdown, pdf, word, plain = (d.text for d in result.documents)
    assert markdown.encode() == (tmp_path / "b.md").read_bytes()  # line ends and all
    assert "# Opening hours" in page and "caf\xe9 opens at eight" in page
    assert "Menu of the site" not in page and "footer" not in page
    assert word == "# Travel\n\nBook the train first.\n\n- Keep receipts\n\nMeals | 30 a day\n"
    offsets = result.documents[2].metadata["pages"]
    assert [pdf[offset:].split()[0] for offset in offsets] == ["First", "Second"]
    assert plain == "plain"


def test_a_byte_order_mark_stays_so_that_offsets_are_file_offsets(tmp_path):
    (tmp_path / "a.md").write_bytes("\ufeff# T\u00eftle\n".encode())
    (tmp_path / "b.txt").write_bytes("\ufeffna\u00efve".encode("utf-16-le"))
    (tmp_path / "c.txt").write_bytes("\ufeffna\u00efve".encode("utf-32-be"))
    first, second, third = read_documents(tmp_path).documents
    assert first.text.encode() == (tmp_path / "a.md").read_bytes() and first.title == "T\u00eftle"
    assert second.text.encode("utf-16-le") == (tmp_path / "b.txt").read_bytes()
    assert second.metadata == {"encoding": "utf-16-le"} and third.text == "\ufeffna\u00efve"


def bomb(declared=None):
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("word/document.xml", b"\0" * 25_000_000)
    data = held.getvalue()
    if declared is not None:  # a directory that lies about the size
        data = data.replace((25_000_000).to_bytes(4, "little"), declared.to_bytes(4, "little"))
    return data


def plain_zip():
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("holiday.jpg", "x")
    return held.getvalue()


BAD_FILES = {
    "empty.pdf": (b"", "empty (0 bytes)"),
    "cut.pdf": (make_pdf(["Hello"])[:150], "damaged or truncated PDF"),
    "locked.pdf": (make_pdf(["Hello"], encrypted=True), "encrypted PDF"),
    "no.pdf": (b"hello", "not a PDF"),
    "scan.pdf": (make_pdf([""]), "no text layer"),
    "photos.docx": (plain_zip(), "without word/document.xml"),
    "cut.docx": (make_docx()[:-500], "not a whole zip archive"),
    "locked.docx": (b"\xd0\xcf\x11\xe0" + b"x" * 600, "encrypted .docx"),
    "bomb.docx": (bomb(), "zip bomb"),
    "liar.docx": (bomb(declared=100), "damaged .docx"),
    "latin.txt": ("caf\xe9".encode("latin-1"), "not valid UTF-8: byte 0xe9 at offset 3"),
    "utf16.txt": ("no mark".encode("utf-16-le"), "NUL characters"),
    "blank.md": (b"\xef\xbb\xbf \r\n\t", "only white space"),
    "empty.html": (b"<html></html>", "no text"),
    "odd.html": (b'<meta charset="klingon"><p>x</p>', "unknown encoding 'klingon'"),
}


def test_each_bad_file_is_named_with_its_reason_and_the_rest_is_read(tmp_path):
    for name, (data, _) in BAD_FILES.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text("good")
    result = read_documents(tmp_path)
    assert [d.id for d in result.documents] == ["good.txt"]
    for name, (_, reason) in BAD_FILES.items():
        assert reason in reason_of(result, name), name
    assert [f.path for f in result.failures] == sorted(BAD_FILES)


def test_a_huge_single_line_is_refused_by_size_and_a_large_one_read(tmp_path):
    with open(tmp_path / "huge.txt", "wb") as handle:
        for _ in range(50):
            handle.write(b"a" * 1_000_000)
    (tmp_path / "large.txt").write_bytes(b"word " * 2_000_000)
    result = read_documents(tmp_path)
    assert [len(d.text) for d in result.documents] == [10_000_000]
    assert "50.0 MB of text" in reason_of(result, "huge.txt") and "split the file" in reason_of(result, "huge.txt")
    with pytest.raises(DataError, match="one file may have 1.0 kB"):
        read_documents(ReadConfig(str(tmp_path), limits=Limits(file_bytes=1000)))
    with pytest.raises(parse.Unreadable, match="a page may have 8.0 MB"):
        parse.parse_html(b"<p>" * 3_000_000)


def test_links_out_of_the_tree_loops_and_pipes_are_refused(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "s.txt").write_text("secret")
    root = tmp_path / "docs"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.txt").write_text("a")
    (root / "out.txt").symlink_to("../secret/s.txt")
    (root / "sub" / "outdir").symlink_to(tmp_path / "secret")
    (root / "sub" / "up").symlink_to("..")
    (root / "inner.txt").symlink_to("sub/a.txt")
    (root / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(root / "pipe.txt")
    result = read_documents(root)
    assert [d.id for d in result.documents] == ["sub/a.txt"]
    assert [f.path for f in result.failures] == ["loop.txt", "out.txt", "pipe.txt", "sub/outdir"]
    assert "out of the folder" in reason_of(result, "out.txt") and "out of the folder" in reason_of(
        result, "sub/outdir"
    )
    assert "circle" in reason_of(result, "loop.txt") and "pipe" in reason_of(result, "pipe.txt")
    assert result.others == {"link": 2}
    (tmp_path / "alias").symlink_to(root)
    assert [d.id for d in read_documents(tmp_path / "alias").documents] == ["sub/a.txt"]
    assert [d.id for d in read_documents(root / "inner.txt").documents] == ["inner.txt"]


def test_a_folder_or_file_without_permission_is_named(tmp_path):
    root = tmp_path / "docs"
    for name in ("closed", "open"):
        (root / name).mkdir(parents=True)
        (root / name / "a.txt").write_text("a")
    (root / "mine.txt").write_text("mine")
    for folder in (tmp_path, *list(tmp_path.parents)[:-2]):
        if folder.owner() != "root" or os.geteuid() == 0:
            with contextlib.suppress(PermissionError):
                folder.chmod(folder.stat().st_mode | 0o055)
    (root / "closed").chmod(0)
    (root / "mine.txt").chmod(0)
    try:
        with without_root():
            result = read_documents(root)
            with pytest.raises(DataError, match="closed"):
                read_documents(root / "closed")
    finally:
        (root / "closed").chmod(0o755)
    assert [d.id for d in result.documents] == ["open/a.txt"]
    assert reason_of(result, "closed") == "cannot be opened: permission denied"
    assert reason_of(result, "mine.txt") == "cannot be opened: permission denied"


def test_nothing_readable_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_documents(tmp_path / "none")
    with pytest.raises(DataError, match=r"looked for .arrow .bz2 .csv(.|\n)*It holds no files"):
        read_documents(tmp_path)
    (tmp_path / "a.py").write_text("x")
    (tmp_path / "b.pdf").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 could not be read:\n  b.pdf: empty \(0 bytes\)\nOther files there: 1 .py"):
        read_documents(tmp_path)
    with pytest.raises(DataError, match="is a .py; expected one of"):
        read_documents(tmp_path / "a.py")
    with pytest.raises(DataError, match="empty"):
        read_documents(tmp_path / "b.pdf")


def test_a_name_that_is_not_utf8_is_reported(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with open(os.fsencode(tmp_path) + b"/b\xff.txt", "w") as handle:
        handle.write("b")
    result = read_documents(tmp_path)
    assert len(result.documents) == 1 and "not valid UTF-8" in result.failures[0].reason
    result.failures[0].path.encode("utf-8")


@pytest.mark.parametrize(
    ("module", "package", "name"),
    [("pypdfium2", "pypdfium2", "a.pdf"), ("docx", "python-docx", "a.docx"), ("trafilatura", "trafilatura", "a.htm")],
)
def test_a_missing_parser_names_the_extra(tmp_path, monkeypatch, module, package, name):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(MissingExtraError, match=rf"{package}(.|\n)*modelwright\[docs\]"):
        read_documents(tmp_path)


def test_the_artifact_gives_back_what_was_written(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_bytes("line\r\nseparator \u2028 \x0b end \U0001f600".encode())
    (tmp_path / "docs" / "b.pdf").write_bytes(make_pdf(["Hello"]))
    (tmp_path / "docs" / "c.txt").write_bytes(b"\xff")
    result = read_documents(tmp_path / "docs")
    write_documents(result, tmp_path / "out")
    assert load_documents(tmp_path / "out") == result.documents
    assert load_failures(tmp_path / "out") == result.failures
    manifest = verify(tmp_path / "out")
    assert manifest.kind == "documents" and manifest.measured["num_documents"] == 2
    first_hash = read_manifest(tmp_path / "out").hash
    write_documents(read_documents(tmp_path / "docs"), tmp_path / "out")
    assert read_manifest(tmp_path / "out").hash == first_hash


def test_a_foreign_or_damaged_artifact_is_refused(tmp_path):
    with pytest.raises(DataError, match="not an artifact"):
        load_documents(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    write_documents(read_documents(tmp_path), tmp_path / "out")
    (tmp_path / "out" / "documents.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(DataError, match="not a document"):
        load_documents(tmp_path / "out")


def test_html_in_an_unknown_shape_still_gives_its_words():
    assert "bare words" in parse.parse_html(b"<p>bare words</p>").text
    parse.parse_html(b"<p>lone &#xD800; surrogate</p>").text.encode("utf-8")
    with pytest.raises(parse.Unreadable, match="no text"):
        parse.parse_html(b"<div>" * 5000 + b"deep" + b"</div>" * 5000)


def test_every_parser_in_the_table_is_there():
    for suffix in PARSERS:
        assert callable(lookup(PARSERS, suffix, "format"))


@pytest.mark.skipif("MODELWRIGHT_DATA" not in os.environ, reason="needs MODELWRIGHT_DATA")
def test_real_pdfs_give_their_text_page_by_page():
    result = read_documents(Path(os.environ["MODELWRIGHT_DATA"], "retrieval", "pdf"))
    documents = {document.id: document for document in result.documents}
    guide = documents["federal_plain_language_guidelines_2011.pdf"]
    assert guide.title == "Federal Plain Language Guidelines" and len(guide.metadata["pages"]) == 118
    assert "Write short sentences" in guide.text and "\r" not in guide.text and "\ufffe" not in guide.text
    assert guide.metadata["pages"] == sorted(guide.metadata["pages"])
    if has_ocr():
        assert "DISTRICT COURT" in documents["scanned_no_text.pdf"].text.upper()
        assert documents["scanned_no_text.pdf"].metadata["ocr_pages"] == [1, 2]
    else:
        assert "apt-get install tesseract-ocr" in reason_of(result, "scanned_no_text.pdf")
