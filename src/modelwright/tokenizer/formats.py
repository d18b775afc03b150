"""Read tokenizers from the files of the ecosystem.

A folder holds ``tokenizer.json`` (the vocabulary and its rules) and, each optional: ``tokenizer_config.json`` and
``special_tokens_map.json`` (which token plays which part), ``chat_template.jinja``, and the model's ``config.json`` and
``generation_config.json``, whose ``eos_token_id`` says what ends a completion. Writing is `Tokenizer.save`.

Single files are told apart by their first bytes: GGUF (the vocabulary inside), SentencePiece ``.model``, tiktoken
ranks, and the ``tokenizer.bin`` of llama2.c. A folder without ``tokenizer.json`` may hold one of the last three.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from modelwright.base.errors import DataError
from modelwright.base.files import read_json
from modelwright.base.logs import get_logger
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.gguf_vocab import read_gguf_tokenizer
from modelwright.tokenizer.llama2c import read_llama2c_tokenizer
from modelwright.tokenizer.sentencepiece import build_tokenizer, is_sentencepiece, read_sentencepiece
from modelwright.tokenizer.special import ROLES
from modelwright.tokenizer.tiktoken import is_tiktoken, read_tiktoken

OTHER_FILES = ("tokenizer.model", "spiece.model", "spm.model", "tokenizer.tiktoken", "tokenizer.bin")

logger = get_logger(__name__)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder, a ``tokenizer.json`` and the files beside it, or one file of another format.

    Raises:
        DataError: There is no such file, or it is no tokenizer; the message names it and says what to do.
        CheckpointError: A GGUF file is damaged.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    folder = file.parent
    if path.is_dir() and not file.is_file():
        file = next((folder / name for name in OTHER_FILES if (folder / name).is_file()), file)
    if file.suffix != ".json" and file.is_file():
        return _load_other(file)
    backend = _read_backend(path, file)
    config = _read_optional(folder / "tokenizer_config.json")
    roles = _read_roles(folder, config)
    known = backend.get_vocab(with_added_tokens=True)
    unknown = sorted(f"{role} {text!r}" for role, text in roles.items() if text not in known)
    if unknown:
        logger.warning("%s names tokens that tokenizer.json does not have; left out: %s", folder, ", ".join(unknown))
        roles = {role: text for role, text in roles.items() if text in known}
    return Tokenizer(
        backend,
        roles=roles,
        chat_template=_read_template(folder, config),
        stop_ids=_read_stop_ids(folder),
        settings={key: value for key, value in config.items() if key not in (*ROLES, "chat_template")},
    )


def _load_other(file: Path) -> Tokenizer:
    """Load a single file that is no JSON; its first bytes tell what it is."""
    with open(file, "rb") as handle:
        head = handle.read(4096)
    if head.startswith(b"GGUF"):
        return read_gguf_tokenizer(file)
    if is_tiktoken(head):
        return read_tiktoken(file)
    if file.suffix == ".bin":
        return read_llama2c_tokenizer(file)
    if is_sentencepiece(head):
        config = _read_optional(file.parent / "tokenizer_config.json")
        return build_tokenizer(
            read_sentencepiece(file),
            str(file),
            add_bos=bool(config.get("add_bos_token")),
            add_eos=bool(config.get("add_eos_token")),
            chat_template=_read_template(file.parent, config),
        )
    raise DataError(
        f"{file} is no tokenizer that is read here. Expected a folder, tokenizer.json, GGUF, a SentencePiece .model, a "
        "tiktoken file or a llama2.c tokenizer (.bin). Check the path."
    )


def _read_backend(path: Path, file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        if not path.exists():
            raise DataError(f"{path} does not exist; expected a folder with tokenizer.json, or that file.")
        others = sorted(p.name for p in file.parent.iterdir() if p.name.startswith(("tokenizer", "vocab", "merges")))
        raise DataError(
            f"{path} has no tokenizer.json (it has {', '.join(others) or 'no tokenizer files'}). Train one with "
            "'mw tokenizer', or convert with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
        )
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise DataError(
            f"{file} is JSON, but no tokenizer: it has no 'model' part. Expected a tokenizer.json as written by "
            "Tokenizer.save, transformers or the tokenizers library."
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every fault in the file
        raise DataError(
            f"{file} cannot be used as a tokenizer: {error}. It may be damaged; fetch or train it again."
        ) from error


def _read_optional(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content = read_json(file)
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}; expected a JSON object.")
    return content


def _read_roles(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role; an entry is a text, or an object with ``content``."""
    roles = {}
    for source in (_read_optional(folder / "special_tokens_map.json"), config):
        for role in ROLES:
            entry = source.get(role)
            text = entry.get("content") if isinstance(entry, Mapping) else entry
            if isinstance(text, str) and text:
                roles[role] = text
    return roles


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template file wins over the entry in tokenizer_config.json, which may list several by name."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    entry = config.get("chat_template")
    if isinstance(entry, list):
        named = {item.get("name"): item.get("template") for item in entry if isinstance(item, Mapping)}
        entry = named.get("default")
    return entry if isinstance(entry, str) and entry else None


def _read_stop_ids(folder: Path) -> tuple[int, ...]:
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _read_optional(folder / name).get("eos_token_id")
        found += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(i for i in dict.fromkeys(found) if isinstance(i, int) and i >= 0)
