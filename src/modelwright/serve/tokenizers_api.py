"""How several tokenizers cut the same text: what the web page of tokenizers asks for.

A token comes with its id and its text, or with its bytes where it is no whole character. Texts are short: a page shows
them, and a person types them.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modelwright.base.errors import RequestError
from modelwright.serve.body import read_json
from modelwright.serve.web import FastAPI, JSONResponse, Request

if TYPE_CHECKING:  # importing this room loads no heavy library
    from modelwright.tokenizer.bpe import Tokenizer

MAX_TEXT_CHARS = 20_000
MAX_BODY_BYTES = 1 << 18
BODY_SECONDS = 10.0


class TokenizerRoutes:
    """The handlers behind the page of tokenizers."""

    def __init__(self, tokenizers: "Mapping[str, Tokenizer]"):
        self.tokenizers = dict(tokenizers)

    def install(self, app: FastAPI) -> None:
        """Add the routes to ``app``."""
        app.add_api_route("/api/tokenizers", self.names, methods=["GET"])
        app.add_api_route("/api/tokenize", self.tokenize, methods=["POST"])

    async def names(self) -> JSONResponse:
        """Tell which tokenizers there are."""
        found = [{"name": name, "vocab_size": one.vocab_size} for name, one in self.tokenizers.items()]
        return JSONResponse({"tokenizers": found, "max_text_chars": MAX_TEXT_CHARS})

    async def tokenize(self, request: Request) -> JSONResponse:
        """Cut one text by every tokenizer, or by those that are named."""
        body = await read_json(request, MAX_BODY_BYTES, BODY_SECONDS)
        text = body.get("text")
        if not isinstance(text, str):
            message = f"text is {type(text).__name__}; it must be a string."
            raise RequestError(message, param="text", code="invalid_type")
        if len(text) > MAX_TEXT_CHARS:
            message = f"text has {len(text):,} characters; {MAX_TEXT_CHARS:,} are the most here. Shorten it."
            raise RequestError(message, param="text", code="text_too_long")
        names = body.get("tokenizers", list(self.tokenizers))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise RequestError("tokenizers must be a list of names.", param="tokenizers", code="invalid_type")
        unknown = [name for name in names if name not in self.tokenizers]
        if unknown:
            message = f"The tokenizer {unknown[0]!r} is not here. There are: {', '.join(self.tokenizers)}."
            raise RequestError(message, param="tokenizers", code="tokenizer_not_found", status=404)
        return JSONResponse(
            {"tokenizers": [{"name": n, **cut(self.tokenizers[n], text)} for n in dict.fromkeys(names)]}
        )


def cut(tokenizer: "Tokenizer", text: str) -> dict[str, Any]:
    """Return the tokens of a text and how much of it one carries."""
    special = set(tokenizer.special_ids.values())
    ids = tokenizer.encode(text, add_special_tokens=False)
    tokens = [_token(tokenizer, index, index in special) for index in ids]
    num_bytes, num_words = len(text.encode("utf-8")), len(text.split())
    return {
        "vocab_size": tokenizer.vocab_size,
        "tokens": tokens,
        "num_tokens": len(ids),
        "bytes_per_token": num_bytes / len(ids) if ids else None,
        "tokens_per_word": len(ids) / num_words if num_words else None,
    }


def _token(tokenizer: "Tokenizer", index: int, is_special: bool) -> dict[str, Any]:
    data = tokenizer.token_bytes(index)
    token: dict[str, Any] = {"id": index}
    try:
        token["text"] = data.decode("utf-8")
    except UnicodeDecodeError:
        token["bytes"] = data.hex(" ").upper()
    return token | ({"special": True} if is_special else {})
