"""The answers behind the page of tokenizers: every token with its id and text, and bad requests in words."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from modelwright.base.errors import ConfigError
from modelwright.serve.tokenizers_api import MAX_TEXT_CHARS, cut
from modelwright.serve.tokenizers_app import create_tokenizers_app
from modelwright.studio import PAGE
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.subwords import train_unigram, train_wordpiece
from modelwright.tokenizer.train import train_bpe

TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 6


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {
        "bpe": train_bpe([TEXT], 300),
        "unigram": train_unigram([TEXT], 340),
        "words": train_wordpiece([TEXT], 90),
    }


@pytest.fixture(scope="module")
def client(tokenizers: dict[str, Tokenizer]) -> Iterator[TestClient]:
    with TestClient(create_tokenizers_app(tokenizers, PAGE), base_url="http://localhost") as made:
        yield made


def pieces(one: dict[str, Any]) -> bytes:
    parts = (bytes.fromhex(t["bytes"]) if "bytes" in t else t["text"].encode() for t in one["tokens"])
    return b"".join(parts)


@pytest.mark.parametrize("text", ["The quick fox", "猫 é 👩‍👩‍👧 \n\tx  y", "<|endoftext|> is text", "", "\x00\x7f"])
def test_the_pieces_of_every_tokenizer_give_the_text_back(client: TestClient, tokenizers, text: str):
    answer = client.post("/api/tokenize", json={"text": text, "tokenizers": ["bpe", "unigram"]}).json()["tokenizers"]
    assert [one["name"] for one in answer] == ["bpe", "unigram"]
    for one in answer:
        assert pieces(one) == text.encode() and one["num_tokens"] == len(one["tokens"])
        assert [t["id"] for t in one["tokens"]] == tokenizers[one["name"]].encode(text, add_special_tokens=False)
        assert (one["bytes_per_token"] is None) == (text == "")


def test_parts_of_characters_come_as_bytes_and_unknown_words_are_marked(client: TestClient):
    bpe, words = client.post("/api/tokenize", json={"text": "猫", "tokenizers": ["bpe", "words"]}).json()["tokenizers"]
    assert [t["bytes"] for t in bpe["tokens"]] == ["E7", "8C", "AB"]
    assert words["tokens"][0]["text"] == "[UNK]" and words["tokens"][0]["special"]


def test_the_names_are_told_and_the_page_is_sent(client: TestClient):
    found = client.get("/api/tokenizers").json()
    assert [one["name"] for one in found["tokenizers"]] == ["bpe", "unigram", "words"]
    assert found["tokenizers"][0]["vocab_size"] == 300 and found["max_text_chars"] == MAX_TEXT_CHARS
    page = client.get("/")
    assert "Tokenizers side by side" in page.text and "default-src 'self'" in page.headers["content-security-policy"]
    assert client.get("/page/tokenizers.js").headers["content-type"].startswith("text/javascript")
    for path in ("/page/none.js", "/page/..%2fapp.py", "/etc"):
        assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "text is NoneType"),
        ({"text": 3}, 400, "text is int"),
        ({"text": "a" * (MAX_TEXT_CHARS + 1)}, 400, "Shorten it"),
        ({"text": "a", "tokenizers": "bpe"}, 400, "list of names"),
        ({"text": "a", "tokenizers": ["gpt"]}, 404, "'gpt' is not here. There are: bpe"),
    ],
)
def test_bad_requests_are_told_in_words(client: TestClient, body: dict[str, Any], status: int, message: str):
    answer = client.post("/api/tokenize", json=body)
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_broken_bodies_and_other_sites_are_refused(client: TestClient):
    for body in (b"{", b"[1]", b'{"text": "\\ud800"}', b"\xff"):
        assert client.post("/api/tokenize", content=body).status_code == 400
    assert client.post("/api/tokenize", content=b'{"text": "' + b"a" * 300_000 + b'"}').status_code == 413
    foreign = client.post("/api/tokenize", json={"text": "a"}, headers={"origin": "http://evil.example"})
    assert foreign.status_code == 403


def test_nothing_to_show_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no tokenizer to show"):
        create_tokenizers_app({}, PAGE)
    with pytest.raises(ConfigError, match=r"has no index\.html"):
        create_tokenizers_app({"a": train_bpe([TEXT], 280)}, tmp_path)


def test_the_figures_are_those_of_the_text(tokenizers):
    found = cut(tokenizers["bpe"], "the lazy dog")
    assert found["bytes_per_token"] == pytest.approx(12 / found["num_tokens"])
    assert found["tokens_per_word"] == pytest.approx(found["num_tokens"] / 3)
