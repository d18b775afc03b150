"""Tokenizers of llama2.c (``tokenizer.bin``): SentencePiece BPE pieces with scores, and nothing else.

A file is one int32 (the longest piece) and then, for each piece, a float32 score, an int32 length and its bytes.
Ids 0, 1, 2 are unknown, begin and end; 3 to 258 are the bytes where the vocabulary is larger than that. Texts get the
begin token in front, as the program does.

Source: karpathy/llama2.c, tokenizer.py (``export``) and run.c (``encode``).
"""

import struct
from pathlib import Path

from modelwright.base.errors import DataError
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, PieceModel, build_tokenizer

_FIRST = (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL))
_MAX_PIECE_BYTES = 1 << 16


def read_llama2c_tokenizer(path: str | Path) -> Tokenizer:
    """Read a llama2.c tokenizer.

    Raises:
        DataError: The file is none, or is cut short.
    """
    data = Path(path).read_bytes()
    longest = struct.unpack_from("<i", data)[0] if len(data) >= 4 else -1
    if not 0 < longest <= _MAX_PIECE_BYTES:
        raise DataError(f"{path} is no llama2.c tokenizer: its longest piece has {longest} bytes. Check the path.")
    pieces: list[str] = []
    scores: list[float] = []
    at = 4
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at) if at + 8 <= len(data) else (0.0, -1)
        at += 8
        if not 0 <= length <= longest or at + length > len(data):
            raise DataError(
                f"{path} is cut short or no llama2.c tokenizer: piece {len(pieces)} has {length} bytes, the longest "
                f"should have {longest}. Fetch it again."
            )
        try:
            pieces.append(data[at : at + length].decode("utf-8"))
        except UnicodeDecodeError:
            raise DataError(f"{path}: piece {len(pieces)} is no UTF-8. Fetch it again.") from None
        scores.append(score)
        at += length
    if len(pieces) < len(_FIRST):
        raise DataError(f"{path} holds {len(pieces)} pieces; a llama2.c tokenizer has at least {len(_FIRST)}.")
    has_bytes = pieces[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]
    num_bytes = 256 if has_bytes else 0
    model = PieceModel(
        kind="bpe",
        pieces=[text for text, _ in _FIRST] + [piece.replace(" ", SPACE) for piece in pieces[3:]],
        scores=scores,
        types=[kind for _, kind in _FIRST] + [BYTE] * num_bytes + [NORMAL] * (len(pieces) - 3 - num_bytes),
        byte_fallback=has_bytes,
        roles={"unk_token": 0, "bos_token": 1, "eos_token": 2},
    )
    return build_tokenizer(model, str(path), add_bos=True)
