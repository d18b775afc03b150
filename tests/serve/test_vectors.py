"""Vectors and scores over HTTP, as the official client and as a careless one see them."""

import base64
import json

import httpx2
import numpy as np
import openai
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from modelwright.models import bert
from modelwright.models.heads import Labels
from modelwright.models.sentence import SentenceEncoder, encoder_kind, save_sentence_encoder
from modelwright.models.weights import save_model
from modelwright.nn.init import init_weights
from modelwright.rag.embed import Embedder
from modelwright.rag.rerank import CrossEncoder
from modelwright.serve.app import ServeConfig, create_app
from modelwright.serve.vectors import Encoders

pytestmark = pytest.mark.service
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij"]
SHAPE = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}


def write_tokenizer(folder):
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    words.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    vectors, scores = tmp_path_factory.mktemp("vectors"), tmp_path_factory.mktemp("scores")
    encoder = init_weights(bert.Bert(bert.BertConfig(**SHAPE, max_seq_len=24)), 0, std=0.3)
    save_sentence_encoder(SentenceEncoder(encoder), vectors)
    prompts = {"prompts": {"query": "a ", "document": "b "}}
    (vectors / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    config = bert.BertConfig(**SHAPE, max_seq_len=24, labels=Labels.numbered(1))
    save_model(init_weights(bert.ARCHITECTURES["BertForSequenceClassification"](config), 1, std=0.3), scores)
    for folder in (vectors, scores):
        write_tokenizer(folder)
    assert (encoder_kind(vectors), encoder_kind(scores)) == ("encoder", "reranker")
    exact = {"dtype": torch.float32, "device": "cpu"}
    return Encoders({"vectors": Embedder(vectors, **exact)}, {"scores": CrossEncoder(scores, **exact)})


@pytest.fixture(scope="module")
def here(encoders, start):
    with start(create_app(ServeConfig(), None, None, "none", None, None, encoders), None) as server:
        yield server


def post(server, path, **body):
    return httpx2.post(server.url + path, json=body, timeout=30)


def refusal(server, path, **body):
    answer = post(server, path, **body)
    assert 400 <= answer.status_code < 500, answer.text
    return answer.json()["error"]


def test_the_official_client_gets_vectors_of_length_1(here, encoders):
    client = here.client()  # it asks for base64 and decodes
    answer = client.embeddings.create(model="vectors", input=["a b", "c d e", "a b"])
    found = np.array([row.embedding for row in answer.data], np.float32)
    assert [row.index for row in answer.data] == [0, 1, 2] and answer.usage.prompt_tokens == 4 + 5 + 4
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert np.array_equal(found, encoders.embedders["vectors"].embed(["a b", "c d e", "a b"], "plain"))
    assert [model.id for model in client.models.list()] == ["vectors", "scores"]


def test_forms_of_input_and_output_say_the_same(here):
    plain = post(here, "/v1/embeddings", model="vectors", input="a b").json()["data"][0]["embedding"]
    coded = post(here, "/v1/embeddings", model="vectors", input="a b", encoding_format="base64").json()
    assert np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4").tolist() == pytest.approx(plain)
    for ids in ([2, 4, 5, 3], [[2, 4, 5, 3]]):
        assert post(here, "/v1/embeddings", model="vectors", input=ids).json()["data"][0]["embedding"] == plain
    empty = post(here, "/v1/embeddings", model="vectors", input="").json()
    assert empty["usage"]["prompt_tokens"] == 2 and len(empty["data"][0]["embedding"]) == 32
    short = post(here, "/v1/embeddings", model="vectors", input="a b", dimensions=8).json()["data"][0]["embedding"]
    assert len(short) == 8 and np.linalg.norm(short) == pytest.approx(1, abs=1e-5)
    assert np.allclose(np.array(plain[:8]) / np.linalg.norm(plain[:8]), short, atol=1e-6)
    query = post(here, "/v1/embeddings", model="vectors", input="a b", input_type="query").json()
    asked = post(here, "/v1/embeddings", model="vectors", input="a a b").json()
    assert query["data"] == asked["data"] and query["data"][0]["embedding"] != plain


def test_a_long_text_is_refused_or_cut_when_asked(here):
    error = refusal(here, "/v1/embeddings", model="vectors", input=["a", "b " * 30])
    assert error["code"] == "context_length_exceeded" and error["message"].startswith("input[1] has 32 tokens")
    cut = post(here, "/v1/embeddings", model="vectors", input="b " * 30, truncate_prompt_tokens=-1).json()
    whole = post(here, "/v1/embeddings", model="vectors", input="b " * 22).json()
    assert cut == whole and cut["usage"]["total_tokens"] == 24


def test_documents_come_ordered_by_score(here, encoders):
    texts = ["a b", "c d e", "f", "a"]
    pairs = [("a", text) for text in texts]
    expected = encoders.rerankers["scores"].score(pairs).tolist()
    answer = post(here, "/v1/rerank", model="scores", query="a", documents=texts).json()
    order = sorted(range(4), key=lambda i: -expected[i])
    assert [r["index"] for r in answer["results"]] == order
    assert [r["relevance_score"] for r in answer["results"]] == pytest.approx([expected[i] for i in order])
    assert answer["results"][0]["document"] == {"text": texts[order[0]]}
    best = post(
        here, "/v2/rerank", model="scores", query="a", documents=[{"text": t} for t in texts], top_n=1,
        return_documents=False,
    )  # fmt: skip
    assert best.json()["results"] == [{"index": order[0], "relevance_score": pytest.approx(expected[order[0]])}]
    scored = post(here, "/v1/score", model="scores", text_1="a", text_2=texts).json()
    assert [row["score"] for row in scored["data"]] == pytest.approx(expected)


def test_an_embedder_scores_by_cosine(here, encoders):
    embedder = encoders.embedders["vectors"]
    expected = float(embedder.embed(["c"], "query")[0] @ embedder.embed(["d e"], "passage")[0])
    scored = post(here, "/score", model="vectors", text_1=["c"], text_2=["d e"]).json()
    assert scored["data"][0]["score"] == pytest.approx(expected, abs=1e-6)
    found = post(here, "/rerank", model="vectors", query="c", documents=["d e", "c"]).json()
    assert {r["index"]: r["relevance_score"] for r in found["results"]}[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"model": "vectors"}, "input"),
        ("/v1/embeddings", {"model": "vectors", "input": []}, "input"),
        ("/v1/embeddings", {"model": "vectors", "input": ["a", 1]}, "input"),
        ("/v1/embeddings", {"model": "vectors", "input": [99]}, "input"),
        ("/v1/embeddings", {"model": "vectors", "input": [-1]}, "input"),
        ("/v1/embeddings", {"model": "vectors", "input": ["a"] * 2049}, "input"),
        ("/v1/embeddings", {"model": "vectors", "input": "a", "dimensions": 33}, "dimensions"),
        ("/v1/embeddings", {"model": "vectors", "input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/v1/embeddings", {"model": "vectors", "input": "a", "input_type": ["x"]}, "input_type"),
        ("/v1/embeddings", {"model": "vectors", "input": "a", "truncate_prompt_tokens": 25}, "truncate_prompt_tokens"),
        ("/v1/embeddings", {"model": "vectors", "input": "a", "dimension": 8}, "dimension"),
        ("/v1/embeddings", {"model": "scores", "input": "a"}, "model"),
        ("/v1/embeddings", {"model": "other", "input": "a"}, "model"),
        ("/v1/rerank", {"model": "scores", "documents": ["a"]}, "query"),
        ("/v1/rerank", {"model": "scores", "query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"model": "scores", "query": "a", "documents": [{"title": "x"}]}, "documents"),
        ("/v1/rerank", {"model": "scores", "query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
        ("/v1/rerank", {"model": "scores", "query": "a", "documents": ["b " * 30]}, "documents"),
        ("/v1/score", {"model": "scores", "text_1": ["a", "b"], "text_2": ["a"]}, "text_2"),
        ("/v1/chat/completions", {"model": "vectors", "messages": [{"role": "user", "content": "a"}]}, "model"),
        ("/v1/completions", {"model": "scores", "prompt": "a"}, "model"),
        ("/tokenize", {"model": "scores", "prompt": "a"}, "model"),
    ],
)
def test_bad_requests_name_the_field(here, path, body, param):
    assert refusal(here, path, **body)["param"] == param


def test_a_server_without_encoders_says_so(server):
    with pytest.raises(openai.BadRequestError, match="This server has none; see --embedder"):
        server.client().embeddings.create(model="tiny", input="a")
