"""Decode ids as they come, without ever showing half a character.

Vocabularies whose pieces are bytes go through an incremental UTF-8 decoder, which is exact by construction. Others
(WordPiece) are decoded again from the start at each token, which is right but slow; encoders, whose vocabularies they
are, do not stream.
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
        self._spaces_to_strip = tokenizer.num_stripped_spaces
        self._ids: list[int] = []
        self._sent = 0  # characters that are out already

    def push(self, token_id: int) -> str:
        """Take one id and return the text that is certain by now; may be empty."""
        if self._skip and token_id in self._special:
            return ""
        if not self._tokenizer.has_byte_pieces:
            self._ids.append(token_id)
            return self._fresh(is_last=False)
        data = self._tokenizer.token_bytes(token_id)
        while self._spaces_to_strip and data:
            self._spaces_to_strip = self._spaces_to_strip - 1 if data.startswith(b" ") else 0
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """Return what is left; an unfinished character becomes U+FFFD."""
        if self._tokenizer.has_byte_pieces:
            return self._utf8.decode(b"", final=True)
        return self._fresh(is_last=True)

    def _fresh(self, is_last: bool) -> str:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
        if text.endswith("\ufffd") and not is_last:
            return ""
        fresh, self._sent = text[self._sent :], len(text)
        return fresh
