"""Text from pictures: scanned pages and image files, through the program Tesseract.

The picture is decoded here, where its size is known before its pixels are (a picture of 50,000 by 50,000 is a bomb),
turned to grey, and handed over as a plain bitmap, one page at a time, with a limit of time. Tesseract runs with one
thread, so that the same picture gives the same text.
Source: R. Smith, "An Overview of the Tesseract OCR Engine", ICDAR 2007. Not done: layout, tables, handwriting.
"""

import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from modelwright.base.errors import ConfigError, MissingExtraError
from modelwright.data.entry import Unreadable

MAX_PIXELS = 100 * 10**6  # of one page: A4 at 900 dots an inch has 78 million
MAX_FRAMES = 1000
_MIN_SIDE = 8

NEED = "OCR needs the program tesseract, which is not installed; on Debian or Ubuntu: apt-get install tesseract-ocr"


@dataclass(frozen=True)
class OcrConfig:
    """How pictures are read."""

    language: str = "eng"  # Tesseract's names, joined by +: "eng+deu"; each is a Debian package tesseract-ocr-xxx
    dots_per_inch: int = 300  # at which a page of a PDF is drawn
    page_seconds: float = 60.0
    enabled: bool = True

    def __post_init__(self) -> None:
        if not self.language.replace("+", "").replace("_", "").replace("/", "").isalnum():
            raise ConfigError(f"ocr.language is {self.language!r}; expected names joined by +, such as eng or eng+deu.")
        if not 50 <= self.dots_per_inch <= 1200 or self.page_seconds <= 0:
            raise ConfigError("ocr.dots_per_inch must be from 50 to 1200 and ocr.page_seconds above 0.")


def has_ocr() -> bool:
    """Tell whether Tesseract is installed."""
    return shutil.which("tesseract") is not None


def read_picture(picture: Any, config: OcrConfig) -> str:
    """Return the text in a Pillow image, paragraphs parted by an empty line; empty if there is none.

    Raises:
        Unreadable: Tesseract or its language is not installed, the picture is too large, or it took too long.
    """
    program = shutil.which("tesseract")
    if program is None:
        raise Unreadable(NEED)
    if picture.width * picture.height > MAX_PIXELS:
        raise Unreadable(f"a picture of {picture.width} by {picture.height}; at most {MAX_PIXELS // 10**6} megapixels")
    if min(picture.size) < _MIN_SIDE:
        return ""
    grey = _flatten(picture)
    # A plain bitmap in a file: Tesseract reads its standard input as a list of file names in some versions.
    with tempfile.NamedTemporaryFile(suffix=".pgm") as held:
        grey.save(held, format="PPM")
        held.flush()
        command = [program, held.name, "stdout", "-l", config.language, "--dpi", str(config.dots_per_inch)]
        try:
            done = subprocess.run(
                [*command, "--psm", "3"],
                capture_output=True,
                timeout=config.page_seconds,
                env={**os.environ, "OMP_THREAD_LIMIT": "1", "LC_ALL": "C"},
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Unreadable(f"OCR took longer than {config.page_seconds:g} s a page") from None
    # With one language of several missing Tesseract reads on with the others and says so only here.
    if done.returncode or b"Failed loading language" in done.stderr:
        raise Unreadable(_explain(done.stderr.decode("utf-8", "replace"), config))
    text = done.stdout.decode("utf-8", "replace").replace("\f", "")
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def _explain(said: str, config: OcrConfig) -> str:
    if "language" in said and ("load" in said or "traineddata" in said):
        packages = " ".join(f"tesseract-ocr-{name.replace('_', '-')}" for name in config.language.split("+"))
        return f"OCR has no language {config.language!r}; on Debian or Ubuntu: apt-get install {packages}"
    line = next((line for line in said.splitlines() if line.strip()), "no message")
    return f"OCR failed ({line[:160]})"


def _flatten(picture: Any) -> Any:
    """Turn to grey, on white where the picture is transparent."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        from PIL import Image

        clear = picture.convert("RGBA")
        ground = Image.new("RGBA", clear.size, "white")
        picture = Image.alpha_composite(ground, clear)
    return picture.convert("L")


def read_image_file(data: bytes, config: OcrConfig, on_page: Callable[[], None] = lambda: None) -> list[str]:
    """Return the text of each frame of an image file (a TIFF may hold many pages).

    Raises:
        Unreadable: It is damaged, too large, or OCR is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("pillow", "vision", "Reading images") from None
    if not has_ocr():
        raise Unreadable(NEED)
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    texts = []
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "TIFF", "WEBP")) as image:
            for frame in _frames(image):
                texts.append(read_picture(frame, config))
                on_page()
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise Unreadable(f"damaged or oversized picture ({str(error)[:160]})") from None
    return texts


def _frames(image: Any) -> Iterator[Any]:
    number = getattr(image, "n_frames", 1)
    if number > MAX_FRAMES:
        raise Unreadable(f"holds {number} pictures; at most {MAX_FRAMES}")
    for index in range(number):
        if number > 1:
            image.seek(index)
        if image.width * image.height > MAX_PIXELS:
            raise Unreadable(f"a picture of {image.width} by {image.height}; at most {MAX_PIXELS // 10**6} megapixels")
        yield image
