"""One function per file format: bytes in, text out.

Text files keep their exact content, so an offset into the document is an offset into the file. For HTML, PDF and DOCX
the document is the extracted text, and offsets point into that. A file that cannot be read raises `Unreadable` with
the reason in words. Every reader bounds what it will unpack. Pictures, and pages of a PDF that are pictures, are read
by OCR where Tesseract is installed (data/ocr.py).
"""

import codecs
import html
import io
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from modelwright.base.errors import MissingExtraError
from modelwright.base.progress import human_bytes
from modelwright.data.entry import Unreadable
from modelwright.data.ocr import NEED, OcrConfig, has_ocr, read_image_file, read_picture

MAX_TEXT_BYTES = 32 * 10**6  # of one document; the longest novels have 6 MB
MAX_HTML_BYTES = 8 * 10**6  # the extractor takes 9 s a megabyte of dense markup
MAX_UNPACKED_BYTES = 256 * 10**6  # of one .docx archive
MAX_PAGES = 10_000
MAX_DRAWN_PIXELS = 50 * 10**6  # of a page that goes to OCR
_MAX_NUL_FRACTION = 0.01

# The longer marks first: UTF-32 in little-endian order begins with the mark of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]{1,40})""", re.IGNORECASE)
_TITLE = re.compile(r"<title[^>]*>(.{1,500}?)</title>", re.IGNORECASE | re.DOTALL)
_HEADING = re.compile(r"^\ufeff?#{1,6}[ \t]+(.+?)(?:[ \t]+#+)?[ \t\r]*$", re.MULTILINE)


@dataclass(frozen=True)
class Parsed:
    """What one file gave."""

    text: str
    title: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


def parse_text(data: bytes) -> Parsed:
    """Decode a text file exactly: UTF-8, or what a byte-order mark at its start says.

    The mark stays in the text as U+FEFF and line ends stay as they are, so that character ``i`` of the document is
    character ``i`` of the file; `modelwright.data.clean` removes the mark later. No other encoding is guessed.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    text = _decode(data, encoding)
    num_nuls = text.count("\0")
    if num_nuls > _MAX_NUL_FRACTION * len(text):
        raise Unreadable(f"holds {num_nuls} NUL characters: not text, or UTF-16 without a byte-order mark")
    return Parsed(text, metadata={} if encoding == "utf-8" else {"encoding": encoding})


def _decode(data: bytes, encoding: str) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise Unreadable(
            f"holds {human_bytes(len(data))} of text; a document may have {human_bytes(MAX_TEXT_BYTES)}: split the file"
        )
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"not valid {encoding.upper()}: byte 0x{data[error.start]:02x} at offset {error.start}; save it as UTF-8"
        ) from None


def parse_markdown(data: bytes) -> Parsed:
    """Decode Markdown exactly; the first heading is the title."""
    parsed = parse_text(data)
    heading = _HEADING.search(parsed.text, 0, 20_000)
    return Parsed(parsed.text, heading[1].strip() if heading else "", parsed.metadata)


def parse_html(data: bytes) -> Parsed:
    """Extract the main text of a page as Markdown, without menus and footers.

    The encoding is that of the byte-order mark, else of ``<meta charset>``, else UTF-8.
    """
    try:
        import trafilatura
    except ImportError:
        raise MissingExtraError("trafilatura", "docs", "Reading .html files") from None
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it reports short pages as errors; we say it ourselves
    if len(data) > MAX_HTML_BYTES:
        raise Unreadable(f"has {human_bytes(len(data))}; a page may have {human_bytes(MAX_HTML_BYTES)}: split it")
    text = _decode_html(data)
    if not re.search("<html", text[:5000], re.IGNORECASE):
        text = f"<html><body>{text}</body></html>"  # a fragment, which the extractor would refuse
    try:
        body = trafilatura.extract(text, output_format="markdown", include_comments=False, include_links=False)
        body = body or trafilatura.html2txt(text)  # a page too short to tell main text from menu
    except Exception as error:  # the extractor walks trees of any shape: RecursionError, lxml's errors and others
        raise Unreadable(f"damaged HTML ({type(error).__name__}: {str(error)[:120]})") from None
    if not body or not body.strip():
        raise Unreadable("the page holds no text")
    title = _TITLE.search(text, 0, 200_000)
    clean_title = _encodable(" ".join(html.unescape(title[1]).split())) if title else ""
    return Parsed(_encodable(body).strip("\n") + "\n", clean_title)


def _decode_html(data: bytes) -> str:
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    declared = _CHARSET.search(data, 0, 4096)
    if encoding is None and declared:
        encoding = declared[1].decode("ascii").lower()
        # As browsers do: pages that say Latin-1 or ASCII are written in its superset.
        encoding = "cp1252" if encoding in ("iso-8859-1", "latin-1", "latin1", "ascii", "us-ascii") else encoding
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError:
        raise Unreadable(f"declares the unknown encoding {encoding!r}") from None
    return _decode(data, encoding or "utf-8").lstrip("\ufeff").replace("\0", "")


def parse_pdf(data: bytes, ocr: OcrConfig | None = None, on_page: Callable[[], None] = lambda: None) -> Parsed:
    """Read a PDF page by page; ``metadata["pages"]`` holds the offset at which each page begins.

    A page without a text layer that holds a picture is read by OCR; ``metadata["ocr_pages"]`` lists those, counted from
    1, and ``metadata["pages_not_read"]`` those that could not be read. ``on_page`` is called after each page.
    """
    try:
        import pypdfium2
    except ImportError:
        raise MissingExtraError("pypdfium2", "docs", "Reading .pdf files") from None
    if b"%PDF-" not in data[:1024]:
        raise Unreadable("not a PDF: the header %PDF- is missing")
    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise Unreadable("encrypted PDF: it needs a password; save a copy without one") from None
        raise Unreadable(f"damaged or truncated PDF ({error})") from None
    reader = _PdfReader(pdf, ocr or OcrConfig(), on_page)
    try:
        if not 0 < len(pdf) <= MAX_PAGES:
            raise Unreadable(f"the PDF has {len(pdf)} pages; expected 1 to {MAX_PAGES}")
        title = _encodable((pdf.get_metadata_dict().get("Title") or "").strip())
        text, pages = _join_pages(reader.pages())
    except pypdfium2.PdfiumError as error:
        raise Unreadable(f"damaged PDF ({error})") from None
    finally:
        pdf.close()
    if not text.strip():
        why = reader.why_not or "and no picture that OCR could read"
        raise Unreadable(f"the PDF's {len(pages)} pages have no text layer: {why}")
    found = {"pages": pages, "ocr_pages": reader.ocr_pages, "pages_not_read": reader.not_read}
    return Parsed(text, title, {key: value for key, value in found.items() if value})


class _PdfReader:
    """The pages of one PDF, and which of them were pictures."""

    def __init__(self, pdf: Any, ocr: OcrConfig, on_page: Callable[[], None]):
        self._pdf = pdf
        self._ocr = ocr
        self._on_page = on_page
        self._can_read = ocr.enabled and has_ocr()
        self.ocr_pages: list[int] = []
        self.not_read: list[int] = []
        self.why_not = ""

    def pages(self) -> Iterator[str]:
        for number in range(1, len(self._pdf) + 1):
            page = self._pdf[number - 1]
            text = _page_text(page)
            if not text.strip() and _has_picture(page):
                text = self._read_picture(page, number)
            page.close()
            yield text
            self._on_page()

    def _read_picture(self, page: Any, number: int) -> str:
        if not self._can_read:
            self.why_not = NEED if self._ocr.enabled else "its pages are pictures, and ocr.enabled is off"
            self.not_read.append(number)
            return ""
        width, height = page.get_size()
        scale = self._ocr.dots_per_inch / 72
        # A page may claim any size; draw it as large as a picture may be.
        scale = min(scale, (MAX_DRAWN_PIXELS / max(1.0, width * height)) ** 0.5)
        try:
            text = read_picture(page.render(scale=scale, grayscale=True).to_pil(), self._ocr)
        except Unreadable as error:
            self.why_not = str(error)
            self.not_read.append(number)
            return ""
        self.ocr_pages.append(number)
        return _encodable(text)


def _page_text(page: Any) -> str:
    layer = page.get_textpage()
    text = layer.get_text_bounded()
    layer.close()
    # PDFium marks a word divided at a line end with U+FFFE (or U+0002): join its halves.
    text = re.sub("[\ufffe\x02](\r?\n)?", "", text).replace("\r\n", "\n").replace("\r", "\n")
    return _encodable(text.replace("\0", "")).strip("\n")


def _has_picture(page: Any) -> bool:
    from pypdfium2 import raw

    # Shapes count too: a page may be drawn as outlines of letters. A loop of forms within forms ends at the depth.
    kinds = [raw.FPDF_PAGEOBJ_IMAGE, raw.FPDF_PAGEOBJ_PATH, raw.FPDF_PAGEOBJ_SHADING]
    return next(iter(page.get_objects(filter=kinds, max_depth=4)), None) is not None


def parse_image(data: bytes, ocr: OcrConfig | None = None, on_page: Callable[[], None] = lambda: None) -> Parsed:
    """Read the text in a picture by OCR; ``metadata["pages"]`` holds where each page of a TIFF begins."""
    pages = read_image_file(data, ocr or OcrConfig(), on_page)
    text, offsets = _join_pages(iter(_encodable(page) for page in pages))
    if not text.strip():
        raise Unreadable("OCR found no text in the picture")
    numbers = list(range(1, len(pages) + 1))
    return Parsed(
        text.rstrip("\n") + "\n", metadata={"ocr_pages": numbers, **({"pages": offsets} if len(pages) > 1 else {})}
    )


def _join_pages(pages: Iterator[str]) -> tuple[str, list[int]]:
    parts, offsets, length = [], [], 0
    for page in pages:
        offsets.append(length)
        parts.append(page + "\n\n")
        length += len(parts[-1])
        if length > MAX_TEXT_BYTES:
            raise Unreadable(f"holds more than {human_bytes(MAX_TEXT_BYTES)} of text: split the file")
    return "".join(parts), offsets


def parse_docx(data: bytes) -> Parsed:
    """Read a Word document in order: headings as Markdown headings, list items, tables row by row."""
    try:
        import docx
    except ImportError:
        raise MissingExtraError("python-docx", "docs", "Reading .docx files") from None
    _check_docx_archive(data)
    try:
        document = docx.Document(io.BytesIO(data))
        blocks = [_docx_block(block) for block in document.iter_inner_content()]
        title = _encodable((document.core_properties.title or "").strip())
    except Exception as error:  # python-docx raises whatever its walk through the XML runs into
        raise Unreadable(f"damaged .docx ({type(error).__name__}: {str(error)[:120]})") from None
    text = _encodable("\n\n".join(block for block in blocks if block.strip()))
    if not text:
        raise Unreadable("the document holds no text")
    if len(text) > MAX_TEXT_BYTES:
        raise Unreadable(f"holds more than {human_bytes(MAX_TEXT_BYTES)} of text: split the file")
    return Parsed(text + "\n", title)


def _check_docx_archive(data: bytes) -> None:
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise Unreadable("an encrypted .docx or an old .doc; save it as an open .docx")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise Unreadable(f"not a .docx: not a whole zip archive ({error})") from None
    if "word/document.xml" not in {info.filename for info in infos}:
        raise Unreadable("not a .docx: a zip archive without word/document.xml")
    unpacked = sum(info.file_size for info in infos)
    if unpacked > MAX_UNPACKED_BYTES or len(infos) > 20_000:
        raise Unreadable(
            f"unpacks to {human_bytes(unpacked)} in {len(infos)} parts; at most {human_bytes(MAX_UNPACKED_BYTES)}"
        )
    if any(info.file_size > 20 * 10**6 and info.file_size > 200 * info.compress_size for info in infos):
        raise Unreadable("a part is packed more than 200 to 1: this looks like a zip bomb")


def _docx_block(block: Any) -> str:
    if hasattr(block, "rows"):
        rows = (" | ".join(" ".join(cell.text.split()) for cell in row.cells) for row in block.rows)
        return "\n".join(rows)
    style = (block.style.name or "") if block.style is not None else ""
    text = block.text.strip()
    level = re.fullmatch(r"Heading ([1-6])", style)
    if level and text:
        return f"{'#' * int(level[1])} {text}"
    if style == "Title" and text:
        return f"# {text}"
    return f"- {text}" if style.startswith("List") and text else text


def _encodable(text: str) -> str:
    """Replace lone surrogates, which extracted text may hold and no file can."""
    return text.encode("utf-8", "replace").decode("utf-8")
