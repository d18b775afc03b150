"""The byte-level alphabet: each of the 256 bytes written as one visible character.

Published byte-level vocabularies spell their pieces in this alphabet, so that a space is ``Ġ`` and every piece is
printable text. The table is frozen: 188 bytes stand for themselves, the other 68 follow from U+0100 on.

Source: Radford et al. 2019, GPT-2, ``encoder.py`` (``bytes_to_unicode``).
"""


def _table() -> dict[int, str]:
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


BYTE_TO_CHAR = _table()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def spell(data: bytes) -> str:
    """Return bytes as the visible characters of a byte-level vocabulary.

    >>> spell(b" hi")
    'Ġhi'
    """
    return "".join(BYTE_TO_CHAR[byte] for byte in data)


def unspell(piece: str) -> bytes:
    """Return the bytes of a byte-level piece; a piece outside the alphabet (an added token) is its own UTF-8.

    >>> unspell("Ġhi")
    b' hi'
    """
    if all(char in CHAR_TO_BYTE for char in piece):
        return bytes(CHAR_TO_BYTE[char] for char in piece)
    return piece.encode("utf-8")
