"""Vocabularies inside GGUF files (``tokenizer.ggml.*``): read into a `Tokenizer`, and written from one.

Three kinds: ``llama`` (scored SentencePiece pieces; ``t5`` is its Unigram twin), ``gpt2`` (byte-level BPE with merges;
how text is cut into words is told by a name, whose patterns stand in a table here) and ``bert`` (WordPiece, with
word beginnings marked instead of continuations). A tokenizer that these keys cannot say in full is written with its
whole tokenizer.json beside them (``tokenizer.huggingface.json``), which is then what is read back.

Source: ggml, docs/gguf.md; llama.cpp, src/llama-vocab.cpp (names and patterns).
Not done: RWKV and PLaMo vocabularies, WordPiece that keeps capitals but drops accents.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from modelwright.base.errors import DataError
from modelwright.base.gguf_file import GgufFile
from modelwright.base.logs import get_logger
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    PieceModel,
    add_around,
    build_tokenizer,
    to_piece_model,
)

logger = get_logger(__name__)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN2 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4O = _CASED % (f"{_ENGLISH}?", f"{_ENGLISH}?") + r"|\p{N}{1,3}" + _CASED_REST
TEKKEN = _CASED % ("", "") + r"|\p{N}" + _CASED_REST
_CJK = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Name in tokenizer.ggml.pre -> patterns; each cuts what the one before left whole.
PATTERNS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (GPT2,),
    "llama-bpe": (LLAMA3,),
    "dbrx": (LLAMA3,),
    "qwen2": (QWEN2,),
    "gpt-4o": (GPT4O,),
    "tekken": (TEKKEN,),
    "starcoder": (r"\p{N}", GPT2),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3),
}
_SAME = {
    "gpt-2": "phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat mpt olmo jais roberta-bpe trillion mamba",
    "llama-bpe": "llama3 llama-v3 falcon3 pixtral",
    "dbrx": "smaug-bpe glm4 chatglm-bpe",
    "qwen2": "stablelm2 deepseek-r1-qwen megrez hunyuan kormo grok-2",
    "gpt-4o": "llama4",
    "starcoder": "refact command-r smollm codeshell exaone minerva-7b",
    "deepseek-v3": "hunyuan-dense",
}
PATTERNS |= {name: PATTERNS[first] for first, names in _SAME.items() for name in names.split()}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")  # a word that is a piece is not cut
_ROLE_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # the format's own spelling
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
_KEYS = "tokenizer.ggml."


def read_gguf_tokenizer(path: str | Path) -> Tokenizer:
    """Make a tokenizer of the vocabulary in a GGUF file.

    Raises:
        CheckpointError: The file is damaged.
        DataError: It has no vocabulary, one of a kind that is not read here, or one whose parts do not fit together.
    """
    metadata = GgufFile(path).metadata
    values = {key.removeprefix(_KEYS): value for key, value in metadata.items() if key.startswith(_KEYS)}
    template = metadata.get("tokenizer.chat_template")
    whole = metadata.get("tokenizer.huggingface.json")
    pieces = values.get("tokens")
    if not isinstance(pieces, list) or not pieces or not isinstance(pieces[0], str):
        raise DataError(f"{path} holds no vocabulary ({_KEYS}tokens). Give the tokenizer's own file.")
    types = _listed(path, values, "token_type", len(pieces), NORMAL)
    num_used = len(pieces)  # the rest only fills up the rows of the embedding
    while types[num_used - 1] == UNUSED and pieces[num_used - 1] == f"[PAD{num_used - 1}]" and num_used > 1:
        num_used -= 1
    values |= {key: values[key][:num_used] for key in ("tokens", "token_type", "scores") if key in values}
    pieces, types = pieces[:num_used], types[:num_used]
    roles = _read_roles(path, values, pieces)
    if isinstance(whole, str):
        return _from_whole(path, whole, {role: pieces[index] for role, index in roles.items()}, template)
    kind = values.get("model")
    if kind in ("llama", "t5"):
        model = PieceModel(
            kind="bpe" if kind == "llama" else "unigram",
            pieces=pieces,
            scores=_listed(path, values, "scores", len(pieces), 0.0),
            types=types,
            byte_fallback=BYTE in types,
            add_dummy_prefix=bool(values.get("add_space_prefix", True)),
            remove_extra_whitespaces=bool(values.get("remove_extra_whitespaces", kind == "t5")),
            charsmap=bytes(values.get("precompiled_charsmap", b"")),
            roles={"unk_token": 0, **roles} if UNKNOWN in types[:1] else roles,
        )
        add_bos, add_eos = values.get("add_bos_token", kind == "llama"), values.get("add_eos_token", kind == "t5")
        return build_tokenizer(model, str(path), add_bos=add_bos, add_eos=add_eos, chat_template=template)
    if kind == "gpt2":
        return _byte_level(path, values, pieces, types, roles, template)
    if kind == "bert":
        return _word_piece(path, pieces, types, roles)
    raise DataError(f"{path} has a vocabulary of kind {kind!r}; read are llama, t5, gpt2 and bert. Use tokenizer.json.")


def _listed(path: str | Path, values: Mapping[str, Any], name: str, length: int, usual: Any) -> list[Any]:
    found = values.get(name, [usual] * length)
    if not isinstance(found, list) or len(found) != length:
        raise DataError(
            f"{path}: {_KEYS}{name} does not have one entry for each of the {length} tokens. Fetch it again."
        )
    return found


def _read_roles(path: str | Path, values: Mapping[str, Any], pieces: Sequence[str]) -> dict[str, int]:
    roles = {}
    for role, key in _ROLE_KEYS.items():
        index = values.get(key)
        if index is None or index == 0xFFFFFFFF:  # -1: none
            continue
        if not isinstance(index, int) or not 0 <= index < len(pieces):
            raise DataError(f"{path}: {_KEYS}{key} is {index!r}; the vocabulary has {len(pieces)} tokens.")
        roles[role] = index
    return roles


def _from_whole(path: str | Path, text: str, roles: Mapping[str, str], template: str | None) -> Tokenizer:
    try:
        return Tokenizer(tokenizers.Tokenizer.from_str(text), roles=roles, chat_template=template)
    except Exception as error:  # the library raises bare Exception for every fault
        raise DataError(f"{path}: tokenizer.huggingface.json cannot be used: {error}. Fetch it again.") from error


def _byte_level(
    path: str | Path,
    values: Mapping[str, Any],
    pieces: list[str],
    types: list[int],
    roles: dict[str, int],
    template: str | None,
) -> Tokenizer:
    name = values.get("pre", "default")
    if name not in PATTERNS:
        raise DataError(
            f"{path} cuts text into words by the rule {name!r}, which is not known here; known: {', '.join(PATTERNS)}. "
            "Give the model's tokenizer.json."
        )
    known = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(merge.split(" ", 1)) for merge in values.get("merges") or []]
    wrong = next((m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= known.keys()), None)
    if wrong is not None or len(known) < len(pieces):
        what = f"the merge {wrong!r} joins tokens that are not there" if wrong else "a token stands twice"
        raise DataError(f"{path}: in the vocabulary {what}. Fetch the file again.")
    backend = tokenizers.Tokenizer(models.BPE(vocab=known, merges=merges, ignore_merges=name in _WHOLE_WORDS))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in PATTERNS[name]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=bool(values.get("add_space_prefix")), use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, pieces, types, roles)
    texts = {role: pieces[index] for role, index in roles.items()}
    add_bos = values.get("add_bos_token", name in _WHOLE_WORDS)
    wanted = ("bos_token" if add_bos else "", "eos_token" if values.get("add_eos_token") else "")
    add_around(backend, texts, wanted, str(path))
    return Tokenizer(backend, roles=texts, chat_template=template)


def _add_tokens(
    backend: tokenizers.Tokenizer, pieces: Sequence[str], types: Sequence[int], roles: Mapping[str, int]
) -> None:
    for piece, kind in zip(pieces, types, strict=True):
        if kind in (CONTROL, UNKNOWN):
            backend.add_special_tokens([AddedToken(piece, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(piece, special=False, normalized=False)])
    backend.add_special_tokens([AddedToken(pieces[i], special=True, normalized=False) for i in roles.values()])


def _word_piece(path: str | Path, pieces: list[str], types: list[int], roles: dict[str, int]) -> Tokenizer:
    spelled = [_to_continuation(piece, kind) for piece, kind in zip(pieces, types, strict=True)]
    texts = {role: spelled[index] for role, index in roles.items()}
    texts = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"} | texts
    known = {piece: index for index, piece in enumerate(spelled)}
    missing = [text for text in texts.values() if text not in known]
    if missing or len(known) < len(spelled):
        what = f"has no {missing[0]}" if missing else "holds a token twice"
        raise DataError(f"{path} {what}; a WordPiece vocabulary needs it once. Fetch the file again.")
    is_cased = _is_cased(spelled)
    backend = tokenizers.Tokenizer(models.WordPiece(known, unk_token=texts["unk_token"], max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(lowercase=not is_cased)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    _add_tokens(backend, spelled, types, {role: known[text] for role, text in texts.items()})
    first, last = texts["cls_token"], texts["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(first, known[first]), (last, known[last])],
    )
    return Tokenizer(backend, roles=texts)


def _is_cased(pieces: Sequence[str]) -> bool:
    """Whether a vocabulary keeps capitals; the file does not say, and a lowered one has no piece with any."""
    return any("A" <= char <= "Z" for piece in pieces if not piece.startswith("[") for char in piece)


def _to_continuation(piece: str, kind: int) -> str:
    """Turn a piece that marks the beginning of a word into one that marks continuations.

    >>> _to_continuation("▁play", 1), _to_continuation("ing", 1), _to_continuation("[CLS]", 3)
    ('play', '##ing', '[CLS]')
    """
    if piece.startswith(SPACE):
        return piece[1:]
    is_named = piece.startswith("[") and piece.endswith("]") and len(piece) > 1
    return piece if kind == CONTROL or is_named else f"##{piece}"


# -- writing -----------------------------------------------------------------------------------------------------------


def gguf_vocab(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the metadata under which a GGUF file holds a tokenizer's vocabulary."""
    file = json.loads(tokenizer.to_json())
    kind = file["model"]["type"]
    if kind == "BPE" and (file.get("decoder") or {}).get("type") == "ByteLevel":
        values, is_said = _say_byte_level(tokenizer, file)
    elif kind == "WordPiece":
        values, is_said = _say_word_piece(tokenizer, file)
    else:
        values, is_said = _say_pieces(tokenizer, file)
    added = tokenizer.added_ids()
    usual = ("cls_token", "sep_token") if kind == "WordPiece" else ("bos_token", "eos_token")
    expected = [[tokenizer.special_ids.get(tokenizer.roles.get(role, ""))] for role in usual]
    is_said = is_said and all(not ids or ids == known for ids, known in zip(added, expected, strict=True))
    values |= {"add_bos_token": bool(added[0]), "add_eos_token": bool(added[1])} if kind != "WordPiece" else {}
    for role, key in _ROLE_KEYS.items():
        index = tokenizer.special_ids.get(tokenizer.roles.get(role, ""))
        values |= {} if index is None else {key: index}
    found = {_KEYS + key: value for key, value in values.items()}
    if tokenizer.chat_template:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    if not is_said:
        found["tokenizer.huggingface.json"] = tokenizer.to_json()
    return found


def _listed_pieces(tokenizer: Tokenizer, file: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Return every piece by id and its type; ids without a piece get a name of their own."""
    pieces = [f"[PAD{index}]" for index in range(tokenizer.vocab_size)]
    types = [UNUSED] * tokenizer.vocab_size
    for piece, index in file["model"]["vocab"].items():
        pieces[index], types[index] = piece, NORMAL
    for token in file["added_tokens"]:
        pieces[token["id"]], types[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    return pieces, types


def _say_byte_level(tokenizer: Tokenizer, file: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    pieces, types = _listed_pieces(tokenizer, file)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in file["model"]["merges"]]
    name = _name_of(file)
    if name is None:
        logger.warning(
            "GGUF has no name for how this tokenizer cuts words; other readers will cut by the default rule, "
            "this library reads the tokenizer.json that is written along"
        )
    values = {"model": "gpt2", "pre": name or "default", "tokens": pieces, "token_type": types, "merges": merges}
    return values, name is not None


def _name_of(file: Mapping[str, Any]) -> str | None:
    """Find the name of how a byte-level tokenizer cuts text into words."""
    part = file.get("pre_tokenizer") or {}
    steps = part.get("pretokenizers", [part]) or [{}]
    cuts = tuple(step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split")
    last = steps[-1]
    others = [step for step in steps if step.get("type") not in ("Split", "ByteLevel")]
    if file.get("normalizer") or others or last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    cuts += (GPT2,) if last.get("use_regex") else ()
    is_whole = bool(file["model"].get("ignore_merges"))
    return next((n for n, p in PATTERNS.items() if p == cuts and (n in _WHOLE_WORDS) == is_whole), None)


def _say_word_piece(tokenizer: Tokenizer, file: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    pieces, types = _listed_pieces(tokenizer, file)
    spelled = []
    for piece, kind in zip(pieces, types, strict=True):
        is_named = kind != NORMAL or (piece.startswith("[") and piece.endswith("]"))
        spelled.append(piece if is_named else piece[2:] if piece.startswith("##") else SPACE + piece)
    values = {"model": "bert", "pre": "default", "tokens": spelled, "token_type": types}
    steps = file.get("normalizer") or {}
    is_plain = steps.get("type") == "BertNormalizer" and steps.get("strip_accents") in (None, steps.get("lowercase"))
    is_cased = _is_cased(pieces)
    return values, is_plain and steps.get("lowercase") != is_cased and file["model"]["unk_token"] == "[UNK]"


def _say_pieces(tokenizer: Tokenizer, file: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    try:
        model = to_piece_model(tokenizer)
    except DataError:
        pieces, types = _listed_pieces(tokenizer, {**file, "model": {"vocab": _vocabulary(file)}})
        return {"model": "llama", "tokens": pieces, "scores": [0.0] * len(pieces), "token_type": types}, False
    values: dict[str, Any] = {
        "model": "llama" if model.kind == "bpe" else "t5",
        "pre": "default",
        "tokens": list(model.pieces),
        "scores": [float(score) for score in model.scores],
        "token_type": list(model.types),
        "add_space_prefix": model.add_dummy_prefix,
        "remove_extra_whitespaces": model.remove_extra_whitespaces,
    }
    if model.charsmap:
        values["precompiled_charsmap"] = model.charsmap
    return values, True


def _vocabulary(file: Mapping[str, Any]) -> dict[str, int]:
    vocab = file["model"]["vocab"]
    return vocab if isinstance(vocab, dict) else {piece: index for index, (piece, _) in enumerate(vocab)}
