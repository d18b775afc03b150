"""Carry a model and its tokenizer from one format of the ecosystem into another.

Read are folders with safetensors, GGUF files and llama2.c checkpoints; written are folders that `transformers` loads,
and GGUF files. A folder gets a manifest that names where it came from; a single GGUF file says so in its metadata.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelwright.base.artifact import MANIFEST, Parent, new_artifact, read_manifest
from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import hash_file
from modelwright.base.logs import get_logger
from modelwright.base.progress import bar
from modelwright.models.gguf import DTYPES, write_gguf
from modelwright.models.weights import load_model, save_model
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.formats import OTHER_FILES, load_tokenizer

FORMATS = ("hf", "gguf")
FOLDER_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
MODEL_FILE = "model.gguf"

logger = get_logger(__name__)


@dataclass(frozen=True)
class Converted:
    """What became of a model."""

    path: Path
    architecture: str
    num_parameters: int
    dtype: str
    vocab_size: int | None  # of the tokenizer that came along; None: there was none
    original_size_bytes: int
    size_bytes: int


def convert(source: Path, out: Path, to: str, dtype: str | None = None, tokenizer: Path | None = None) -> Converted:
    """Write a model in another format.

    Args:
        source: A model's folder, or a GGUF or llama2.c file.
        out: For ``hf`` a folder; for ``gguf`` a file that ends with .gguf, or a folder that gets one.
        to: ``hf`` or ``gguf``.
        dtype: Of the matrices; None: as the source has them (float32 where it has blocks).
        tokenizer: Where the tokenizer is; None: inside or beside the source.

    Raises:
        ConfigError: The format, dtype or place is wrong, the family cannot be said in the format, or the tokenizer is
            larger than the model.
        CheckpointError: The source is damaged or of an unknown kind.
    """
    source, out = Path(source), Path(out)
    _check(source, out, to, dtype)
    with bar("convert", 2) as shown:
        shown.describe(f"reading {source.name}")
        is_plain = dtype is None or dtype in FOLDER_DTYPES
        wanted = FOLDER_DTYPES[dtype] if dtype is not None and to == "hf" else None
        file = _model_file(source)
        model = load_model(file, dtype=wanted)
        found = _find_tokenizer(file, tokenizer)
        _check_vocabulary(model, found)
        shown.advance()
        shown.describe(f"writing {out.name}")
        name = (dtype if is_plain else None) or _dtype_of(model)
        settings = {"to": to, "dtype": dtype or name}
        if out.suffix == ".gguf":
            write_gguf(model, found, out, dtype or name, note=json.dumps([asdict(p) for p in _parents(source)]))
        else:
            _write_folder(model, found, source, out, settings)
    return Converted(
        path=out,
        architecture=model.config.to_hf()["architectures"][0],  # type: ignore[operator, union-attr]
        num_parameters=sum(p.numel() for p in model.parameters()),
        dtype=dtype or name,
        vocab_size=None if found is None else found.vocab_size,
        original_size_bytes=_size(file),
        size_bytes=_size(out),
    )


def _check(source: Path, out: Path, to: str, dtype: str | None) -> None:
    """Refuse by name what could only fail later."""
    if to not in FORMATS:
        raise ConfigError(f"--to is {to!r}; models are written as {' or '.join(FORMATS)}. Choose one of these.")
    known = DTYPES if to == "gguf" else tuple(FOLDER_DTYPES)
    if dtype is not None and dtype not in known:
        raise ConfigError(f"--dtype is {dtype!r}; {to} is written as {', '.join(known)}. Choose one of these.")
    if out.exists() and source.exists() and out.resolve() == source.resolve():
        raise ConfigError(f"The target is {out}, the source itself, which would be lost. Give another path.")
    if out.suffix == ".gguf" and (to != "gguf" or out.is_dir()):
        what = "a folder" if out.is_dir() else f"a file's name, and {to} is a folder"
        raise ConfigError(f"The target {out} is {what}. Give another path.")
    if out.suffix != ".gguf" and out.is_file():
        raise ConfigError(f"The target {out} is a file; expected a folder to make, or a name that ends with .gguf.")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise ConfigError(
            f"The target folder {out} holds files that no verb of mw made, and would be replaced. Give a new folder."
        )


def _model_file(source: Path) -> Path:
    """Return what is to be loaded: a folder may hold nothing but one GGUF file."""
    if source.is_dir() and not (source / "config.json").is_file():
        files = sorted(source.glob("*.gguf"))
        if len(files) == 1:
            return files[0]
    return source


def _find_tokenizer(source: Path, given: Path | None) -> Tokenizer | None:
    if given is not None:
        return load_tokenizer(given)
    if source.suffix == ".gguf":
        try:
            return load_tokenizer(source)
        except DataError as error:
            logger.warning("no tokenizer comes along: %s", error)
            return None
    folder = source if source.is_dir() else source.parent
    names = ("tokenizer.json", *OTHER_FILES)
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files and source.is_file():
        files = sorted({*folder.glob("tok*.model"), *folder.glob("tok*.bin")} - {source})
        if len(files) > 1:
            raise ConfigError(
                f"Beside {source} stand several tokenizers: {', '.join(file.name for file in files)}. Give --tokenizer."
            )
    if not files:
        logger.warning("no tokenizer comes along: there is none in %s; give --tokenizer", folder)
        return None
    return load_tokenizer(folder if source.is_dir() else files[0])


def _check_vocabulary(model: nn.Module, tokenizer: Tokenizer | None) -> None:
    num_rows = getattr(model.config, "vocab_size", None)
    if tokenizer is not None and num_rows is not None and tokenizer.vocab_size > num_rows:
        raise ConfigError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model {num_rows} rows in its embedding. Give the "
            "model's own with --tokenizer."
        )


def _dtype_of(model: nn.Module) -> str:
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    most = max(sizes, key=sizes.__getitem__)
    return next((name for name, dtype in FOLDER_DTYPES.items() if dtype == most), "f32")


def _parents(source: Path) -> list[Parent]:
    """Return the source as a parent: by its manifest, or a single file by its hash."""
    folder = source if source.is_dir() else source.parent
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        return [Parent(folder.name, manifest.kind, manifest.hash)]
    return [Parent(source.name, "file", hash_file(source))] if source.is_file() else []


def _write_folder(
    model: nn.Module, tokenizer: Tokenizer | None, source: Path, out: Path, settings: dict[str, Any]
) -> None:
    folder = source if source.is_dir() else source.parent
    parents = [folder] if (folder / MANIFEST).is_file() else []
    if not parents:  # a foreign file: its name and hash are all that is known
        settings = settings | {"source": [asdict(parent) for parent in _parents(source)] or str(source)}
    with new_artifact(out, "model", settings=settings, parents=parents) as (work, measured):
        if settings["to"] == "gguf":
            write_gguf(model, tokenizer, work / MODEL_FILE, settings["dtype"])
        else:
            save_model(model, work)
            if tokenizer is not None:
                tokenizer.save(work)
        measured.update(original_size_bytes=_size(_model_file(source)), size_bytes=_size(work))


def _size(path: Path) -> int:
    """Return the bytes of a model's weights."""
    if path.is_file():
        return path.stat().st_size
    patterns = ("*.safetensors", "*.gguf", "*.bin")
    return sum(file.stat().st_size for pattern in patterns for file in path.glob(pattern))
