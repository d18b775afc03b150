"""Texts one after another, from wherever they stand, with no more in memory than one document.

JSON lines give their ``text``; plain text comes in pieces that end with a line, or else a word; data sets that
``mw data`` made give their training or held-out part; other formats are read file by file. Training a tokenizer reads
this way, so its memory follows the number of different words and not the length of the text.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from modelwright.base.artifact import MANIFEST, read_manifest
from modelwright.base.errors import DataError
from modelwright.base.logs import get_logger
from modelwright.data import PARSERS
from modelwright.data.read import read_documents
from modelwright.data.shards import find_shards, read_texts
from modelwright.data.text_lines import SetAside, text_lines

PIECE_CHARS = 1 << 20
_LINES = (".jsonl", ".ndjson")
_WHOLE_BYTES = 1 << 24  # plain text up to this is read at once, by the reader that mends encodings

logger = get_logger(__name__)


def stream_texts(paths: Sequence[Path], *, held_out: bool = False, set_aside: SetAside | None = None) -> Iterator[str]:
    """Yield the texts of data sets, files and folders, in order; folders by the names of their files.

    Args:
        paths: Data sets, ``.txt``, ``.jsonl`` or other documents, and folders of them.
        held_out: Yield the held-out part of data sets, and nothing of the rest.
        set_aside: Gets the place of each line or file that is damaged, and why; None: the first one is an error,
            but for files in a folder, which are left out with a warning.

    Raises:
        DataError: A path does not exist, is an artifact of another kind, or (see ``set_aside``) is damaged.
    """
    for path in paths:
        if (path / MANIFEST).is_file():
            yield from _of_dataset(path, "validation" if held_out else "train", set_aside)
        elif not held_out:
            yield from _of_path(path, set_aside)


def _of_dataset(path: Path, part: str, set_aside: SetAside | None) -> Iterator[str]:
    kind = read_manifest(path).kind
    if kind != "dataset":
        raise DataError(f"{path} is an artifact of kind {kind!r}; expected a dataset, as mw data makes it.")
    if find_shards(path, part):  # a data set may have no held-out part
        yield from read_texts(path, part, set_aside)


def _of_path(path: Path, set_aside: SetAside | None) -> Iterator[str]:
    if not path.exists():
        raise DataError(f"{path} does not exist. Give text files (.txt, .jsonl), folders of them, or data sets.")
    if path.is_file():
        yield from _of_file(path, set_aside)
        return
    known = {*PARSERS, *_LINES}
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in known and _is_plain(file, path)]
    if not files:
        raise DataError(f"{path} holds nothing readable. Expected files of {' '.join(sorted(known))}.")
    for file in files:
        try:
            yield from _of_file(file, set_aside)
        except DataError as error:
            if set_aside is not None:
                set_aside(str(file), str(error))
            else:
                logger.warning("left out: %s", error)


def _is_plain(file: Path, root: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.is_file() and not file.is_symlink() and not is_hidden


def _of_file(path: Path, set_aside: SetAside | None) -> Iterator[str]:
    if path.suffix.lower() in _LINES:
        yield from text_lines(path, set_aside)
    elif path.suffix.lower() == ".txt" and path.stat().st_size > _WHOLE_BYTES:
        yield from _of_long_text(path)
    else:
        for document in read_documents(path).documents:
            yield document.text


def _of_long_text(path: Path) -> Iterator[str]:
    rest = ""
    try:
        with open(path, encoding="utf-8-sig") as handle:
            while piece := handle.read(PIECE_CHARS):
                piece = rest + piece
                end = max(piece.rfind("\n"), 0) or max(piece.rfind(" "), 0) or len(piece)
                yield piece[:end]
                rest = piece[end:] if end < len(piece) else ""
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}); long files are not mended. Convert it.") from error
    if rest:
        yield rest
