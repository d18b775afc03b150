"""Learn a Unigram or WordPiece vocabulary from texts, through the library ``tokenizers``.

Unigram cuts words where our BPE does and writes a space as ``▁``; bytes stand ready for characters that the texts never
had, so that every text comes back (but for ``▁`` itself, which becomes a space). WordPiece is BERT's: words between
spaces and punctuation, ``##`` inside them, unknown words lost, spaces not kept; for encoders.

Source: Kudo 2018 (Unigram); Schuster & Nakajima 2012, Devlin et al. 2019 (WordPiece).
"""

import json
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from modelwright.base.errors import ConfigError
from modelwright.base.logs import get_logger
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.byte_level import cut_text
from modelwright.tokenizer.special import END_OF_TEXT, SPECIAL_TOKENS
from modelwright.tokenizer.train import SPLIT_PATTERN, run_trainer

logger = get_logger(__name__)

UNIGRAM_UNK = "<unk>"
WORDPIECE_ROLES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
# The library takes a substring as a seed only if different characters follow it somewhere, so that it would never try
# " from", behind which a word always ends. Each word is therefore shown once more with something behind it: a mark that
# joins letters, or a private character that joins punctuation.
_AFTER_LETTERS, _AFTER_SIGNS = "\U0001e8d0", "\ue000"
_BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
_BYTE_SCORE = -1000.0  # so that text that spells out "<0x0A>" is cut into its characters
_SPELLING = sorted(set("".join(_BYTE_PIECES)))  # characters that must be pieces for that


def train_unigram(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """Learn a Unigram tokenizer: special tokens first, then ``<unk>``, the 256 bytes, and pieces by likelihood.

    Args:
        texts: Documents; read once.
        vocab_size: Pieces in all.
        special_tokens: With the end of text among them, it ends documents and pads.

    Raises:
        ConfigError: ``vocab_size`` has no room for the bytes and some characters, or special tokens are repeated.
        DataError: There is no text.
    """
    first = [*special_tokens, UNIGRAM_UNK]
    _check(vocab_size, len(first) + 256 + 2 * len(_SPELLING), first)
    backend = tokenizers.Tokenizer(models.Unigram())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.Metaspace(prepend_scheme="never", split=False)]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - 254, special_tokens=_added(first), unk_token=UNIGRAM_UNK, show_progress=False
    )
    run_trainer(backend, trainer, _with_followers(texts), first)
    learned = json.loads(backend.to_str())["model"]["vocab"][len(first) :]
    learned = [item for item in learned if not {_AFTER_LETTERS, _AFTER_SIGNS} & set(item[0])]
    pieces = [*((token, 0.0) for token in first), *((byte, _BYTE_SCORE) for byte in _BYTE_PIECES)]
    pieces += _with_characters(learned, _SPELLING, vocab_size - len(pieces))
    backend.model = models.Unigram(pieces, unk_id=len(special_tokens), byte_fallback=True)
    if len(pieces) < vocab_size:
        logger.warning("the texts gave %d pieces of the %d asked for", len(pieces), vocab_size)
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    ends = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT} if END_OF_TEXT in special_tokens else {}
    return Tokenizer(backend, roles={**ends, "unk_token": UNIGRAM_UNK}, chat_template=None)


def _with_followers(texts: Iterable[str]) -> Iterator[str]:
    """Give the texts, and each different word of letters or signs once more with a follower behind it."""
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    seen: set[str] = set()
    for text in texts:
        yield text
        found = {word for part in cut_text(text) for word, _ in split.pre_tokenize_str(part)}
        for word in sorted(found - seen):
            if not word[-1].isspace() and not word[-1].isnumeric():
                yield word + (_AFTER_LETTERS if word[-1].isalpha() else _AFTER_SIGNS)
        seen |= found


def _with_characters(learned: list[list[object]], chars: Sequence[str], size: int) -> list[tuple[str, float]]:
    """Add characters that were not learned, in the place of the least likely longer pieces where room is short."""
    # Six digits are read back from JSON as they were; the last bits of longer ones are not, and they decide equal cuts.
    pieces = [(str(piece), round(float(str(score)), 6)) for piece, score in learned]
    known = {piece for piece, _ in pieces}
    least = min(score for _, score in pieces)
    missing = [(char, least) for char in chars if char not in known]
    surplus = len(pieces) + len(missing) - size
    for index in range(len(pieces) - 1, -1, -1):
        if surplus > 0 and len(pieces[index][0]) > 1:
            del pieces[index]
            surplus -= 1
    return pieces + missing


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = tuple(WORDPIECE_ROLES.values())
) -> Tokenizer:
    """Learn a WordPiece tokenizer that puts ``[CLS]`` before a text and ``[SEP]`` behind it, as BERT's does.

    Args:
        texts: Documents; read once.
        vocab_size: Pieces in all; characters of the texts are kept even where that gives more.
        special_tokens: The first ids; ``[UNK]`` must be among them.

    Raises:
        ConfigError: ``vocab_size`` has no room, ``[UNK]`` is missing, or special tokens are repeated.
        DataError: There is no text.
    """
    _check(vocab_size, len(special_tokens) + 1, special_tokens)
    if "[UNK]" not in special_tokens:
        raise ConfigError(f"special_tokens is {list(special_tokens)}; WordPiece needs [UNK] for words without pieces.")
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=_added(special_tokens), show_progress=False
    )
    run_trainer(backend, trainer, texts, special_tokens)
    if {"[CLS]", "[SEP]"} <= set(special_tokens):
        marks = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks
        )
    return Tokenizer(backend, roles={role: token for role, token in WORDPIECE_ROLES.items() if token in special_tokens})


def _added(tokens: Sequence[str]) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in tokens]


def _check(vocab_size: int, least: int, special_tokens: Sequence[str]) -> None:
    if vocab_size < least:
        raise ConfigError(f"vocab_size is {vocab_size}; expected at least {least} for what every text needs.")
    if not all(special_tokens) or len(set(special_tokens)) < len(special_tokens):
        raise ConfigError(f"The special tokens are {list(special_tokens)}; expected different, non-empty texts.")
