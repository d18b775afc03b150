"""Answers from the documents over the chat API: quotes that are there, cited, streamed, and refused settings."""

import asyncio
import concurrent.futures
import threading
import time

import httpx2
import openai
import pytest

from modelwright.serve.app import ServeConfig, create_app
from modelwright.serve.documents import in_thread
from modelwright.serve.served import Served

pytestmark = pytest.mark.service

ASKED = [{"role": "user", "content": "What does the function textwrap.wrap do?"}]


def test_an_answer_quotes_its_documents_exactly(server, index):
    answer = server.client().chat.completions.create(model="tiny-documents", messages=ASKED, temperature=0)
    message = answer.choices[0].message
    assert message.mode == "extractive" and message.is_supported is True
    assert message.question == ASKED[0]["content"]
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens > 0
    assert [c["number"] for c in message.citations] == list(range(1, len(message.citations) + 1))
    assert any(c["doc"] == "textwrap.md" for c in message.citations)
    for citation in message.citations:
        assert set(citation) == {"number", "doc", "start", "end", "quote"}
        text = httpx2.get(server.url + "/api/document", params={"id": citation["doc"]}).json()["text"]
        assert text[citation["start"] : citation["end"]] == citation["quote"]
        assert f"[{citation['number']}]" in message.content


def test_a_streamed_answer_is_the_whole_one_and_cites_in_its_last_chunk(server):
    client = server.client()
    whole = client.chat.completions.create(model="tiny-documents", messages=ASKED).choices[0].message
    chunks = list(client.chat.completions.create(model="tiny-documents", messages=ASKED, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.content
    last = chunks[-1].choices[0]
    assert last.finish_reason == "stop" and last.delta.citations == whole.citations
    assert last.delta.mode == "extractive" and last.delta.is_supported is True


def test_what_the_documents_do_not_say_is_not_answered(server):
    turns = [{"role": "user", "content": "Who won the chess championship of Uruguay?"}]
    message = server.client().chat.completions.create(model="tiny-documents", messages=turns).choices[0].message
    assert message.is_supported is False and message.citations == []
    assert "not in the documents" in message.content.lower()


def test_settings_that_would_cut_a_quote_are_refused(server):
    for name, value in (("max_tokens", 5), ("max_completion_tokens", 5), ("stop", ["a"]), ("ignore_eos", True)):
        body = {"model": "tiny-documents", "messages": ASKED, name: value}
        error = httpx2.post(server.url + "/v1/chat/completions", json=body).json()["error"]
        assert error["param"] == name and "exact quotes" in error["message"]


@pytest.mark.parametrize("content", ["", "  ", "x" * 9000])
def test_a_question_that_is_none_is_a_400(server, content):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    with pytest.raises(openai.BadRequestError):
        server.client().chat.completions.create(model="tiny-documents", messages=turns)


def test_a_document_is_found_by_its_id_alone(server):
    found = httpx2.get(server.url + "/api/document", params={"id": "pages/evil.md"})
    assert found.status_code == 200 and found.headers["content-type"] == "application/json"
    assert "<script>" in found.json()["text"]
    for id in (
        "nothing.md",
        "../index/documents.jsonl",
        "/etc/passwd",
        "documents.jsonl",
        "\ud800".encode("utf-8", "surrogatepass"),
    ):
        missing = httpx2.get(server.url + "/api/document", params={"id": id})
        assert missing.status_code == 404 and missing.json()["error"]["type"] == "invalid_request_error"
    assert httpx2.get(server.url + "/api/document").status_code == 400


def test_the_info_says_who_answers_and_from_what(server):
    info = httpx2.get(server.url + "/api/info").json()
    assert info["model"] == "tiny-documents" and info["mode"] == "extractive" and info["num_documents"] == 3
    assert len(info["examples"]) == 3


def test_documents_alone_are_served_without_a_model(start, index, page):
    with start(create_app(ServeConfig(), None, None, "mine", index, page), None) as server:
        client = server.client()
        assert [m.id for m in client.models.list()] == ["mine-documents"]
        assert client.chat.completions.create(model="mine-documents", messages=ASKED).choices[0].message.citations
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="mine", messages=ASKED)
        assert httpx2.post(server.url + "/tokenize", json={"prompt": "x"}).status_code == 400
        assert httpx2.get(server.url + "/health/ready").json()["status"] == "ready"


def test_a_model_alone_is_served_without_documents(start, build_engine, page):
    with build_engine() as engine:
        app = create_app(ServeConfig(), engine, engine.tokenizer, "tiny", None, page)
        with start(app, engine) as server:
            info = httpx2.get(server.url + "/api/info").json()
            assert info["mode"] == "chat" and info["model"] == "tiny" and info["examples"] == []
            assert httpx2.get(server.url + "/api/document", params={"id": "a"}).status_code == 404


def test_many_questions_at_once_are_all_answered(server):
    client = server.client()
    questions = [f"What does {name} do?" for name in ("textwrap.wrap", "heapq.heappush", "the heap") for _ in range(8)]

    def ask(question):
        turns = [{"role": "user", "content": question}]
        return client.chat.completions.create(model="tiny-documents", messages=turns).choices[0].message

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, questions))
    assert all(a.question == q for a, q in zip(answers, questions, strict=True))
    assert len({(q, a.content) for a, q in zip(answers, questions, strict=True)}) == 3


def test_a_reader_that_leaves_stops_the_thread(index):
    served = Served(ServeConfig(num_threads=1), None, None, "x", index)
    closed = threading.Event()
    made = []

    def numbers():
        try:
            for number in range(10_000):
                made.append(number)
                time.sleep(0.001)
                yield number
        finally:
            closed.set()

    async def leave_early():
        items = in_thread(served, numbers)
        async for item in items:
            if item == 3:
                break
        await items.aclose()
        later = [item async for item in in_thread(served, lambda: (i for i in (1, 2)))]  # the one thread is free
        await served.close()
        return later

    assert asyncio.run(leave_early()) == [1, 2]
    assert closed.is_set() and len(made) < 1000
