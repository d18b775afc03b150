"""Decode ids as they come, without ever showing half a character.

Byte-level vocabularies go through an incremental UTF-8 decoder, which is exact by construction. Others (SentencePiece,
WordPiece), whose pieces depend on their place, are decoded again from a short window, and text is held back while it
ends in U+FFFD.
"""

import codecs

from modelwright.tokenizer.bpe import Tokenizer


class StreamDecoder:
    """Turns a stream of ids into pieces of text whose concatenation equals ``tokenizer.decode`` of them all."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._special = frozenset(tokenizer.special_ids.values())
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []
        self._sent = 0  # characters of the window's text that are out already

    def push(self, token_id: int) -> str:
        """Take one id and return the text that is certain by now; may be empty."""
        if self._skip and token_id in self._special:
            return ""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self._ids.append(token_id)
        text = self._text()
        if text.endswith("\ufffd"):
            return ""
        fresh, self._sent = text[self._sent :], len(text)
        return fresh

    def finish(self) -> str:
        """Return what is left; an unfinished character becomes U+FFFD."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(b"", final=True)
        text = self._text()
        fresh, self._sent = text[self._sent :], len(text)
        return fresh

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
