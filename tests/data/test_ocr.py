"""Pictures and scanned pages through Tesseract: the words are read, bombs and a missing program are said."""

import io
import os
import struct
import zlib

import pytest

from modelwright.base.errors import ConfigError
from modelwright.data import ocr
from modelwright.data.entry import Failure, Unreadable
from modelwright.data.ocr import OcrConfig, has_ocr, read_picture
from modelwright.data.parse import parse_image, parse_pdf
from modelwright.data.source import ReadConfig, iterate_documents

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("pypdfium2")
from PIL import ImageDraw, ImageFont  # noqa: E402

needs_ocr = pytest.mark.skipif(not has_ocr(), reason="apt-get install tesseract-ocr")
WORDS = "The ferry leaves at noon"


def picture(text=WORDS, mode="L"):
    image = Image.new(mode, (900, 120), "white" if mode != "RGBA" else (0, 0, 0, 0))
    ink = 0 if mode == "L" else (0, 0, 0, 255) if mode == "RGBA" else "black"
    ImageDraw.Draw(image).text((30, 30), text, fill=ink, font=ImageFont.load_default(size=48))
    return image


def saved(image, kind, **settings):
    held = io.BytesIO()
    image.save(held, format=kind, **settings)
    return held.getvalue()


@needs_ocr
def test_words_in_pictures_and_pages_are_read(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(picture(mode="RGBA"), "PNG"))  # ink on glass: white is put behind
    (tmp_path / "b.jpg").write_bytes(saved(picture(), "JPEG"))
    pages = [picture("Page one"), picture("Page two")]
    (tmp_path / "c.tiff").write_bytes(saved(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    (tmp_path / "d.pdf").write_bytes(saved(picture("A scanned page"), "PDF", resolution=100))
    (tmp_path / "e.png").write_bytes(saved(Image.new("L", (300, 200), "white"), "PNG"))
    found = list(iterate_documents(tmp_path))
    documents = {item.id: item for item in found if not isinstance(item, Failure)}
    assert {name: d.text.split() for name, d in documents.items()} == {
        "a.png": WORDS.split(),
        "b.jpg": WORDS.split(),
        "c.tiff": "Page one Page two".split(),
        "d.pdf": "A scanned page".split(),
    }
    assert documents["c.tiff"].metadata == {"ocr_pages": [1, 2], "pages": [0, len("Page one\n\n")]}
    assert documents["d.pdf"].metadata["ocr_pages"] == [1]
    assert [(f.path, f.reason) for f in found if isinstance(f, Failure)] == [
        ("e.png", "OCR found no text in the picture")
    ]
    assert read_picture(picture(), OcrConfig()) == read_picture(picture(), OcrConfig())


def test_without_the_program_the_error_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(ocr.shutil, "which", lambda name: None)
    (tmp_path / "a.png").write_bytes(saved(picture(), "PNG"))
    with pytest.raises(Unreadable, match="apt-get install tesseract-ocr"):
        parse_image((tmp_path / "a.png").read_bytes())
    scan = saved(picture(), "PDF")
    with pytest.raises(Unreadable, match="have no text layer: OCR needs (.|\n)*apt-get install tesseract-ocr"):
        parse_pdf(scan)
    with pytest.raises(Unreadable, match="ocr.enabled is off"):
        parse_pdf(scan, OcrConfig(enabled=False))


@needs_ocr
def test_a_missing_language_names_its_package_and_a_slow_page_is_stopped():
    with pytest.raises(Unreadable, match="no language 'eng\\+xyz'(.|\n)*tesseract-ocr-xyz"):
        read_picture(picture(), OcrConfig(language="eng+xyz"))
    with pytest.raises(Unreadable, match=r"longer than 0.001 s a page"):
        read_picture(picture(), OcrConfig(page_seconds=0.001))
    for settings in ({"language": "eng; rm -rf /"}, {"language": ""}, {"dots_per_inch": 1}, {"page_seconds": 0}):
        with pytest.raises(ConfigError):
            OcrConfig(**settings)


def png_that_claims(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 10**6)) + chunk(b"IEND", b"")
    )


@needs_ocr
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png_that_claims(50_000, 50_000), "picture"),
        (png_that_claims(12_000, 12_000), "12000 by 12000|exceeds limit"),
        (b"not a picture", "damaged"),
        (saved(picture(), "PNG")[:400], "damaged"),
        (saved(Image.new("L", (40, 40)), "GIF"), "damaged"),
    ],
    ids=["bomb", "large", "text", "cut", "gif"],
)
def test_bombs_and_damaged_pictures_are_refused(data, reason):
    with pytest.raises(Unreadable, match=reason):
        parse_image(data)


@pytest.mark.skipif("MODELWRIGHT_DATA" not in os.environ, reason="needs MODELWRIGHT_DATA")
@needs_ocr
def test_a_real_scan_is_read_and_a_page_of_text_needs_no_ocr():
    folder = os.path.join(os.environ["MODELWRIGHT_DATA"], "retrieval", "pdf")
    (contract,) = iterate_documents(ReadConfig(f"{folder}/contract_a.pdf", ocr=OcrConfig(enabled=False)))
    assert len(contract.metadata["pages"]) == 10 and "ocr_pages" not in contract.metadata
