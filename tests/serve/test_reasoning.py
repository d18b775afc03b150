"""Thoughts apart from answers, and the best of many: the same whole and streamed, whatever the pieces."""

import asyncio
from collections.abc import AsyncGenerator, Iterator

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.serve.conftest import Running, make_engine, running

from modelwright.base.types import Completion, SamplingParams, Usage
from modelwright.serve.app import ServeConfig, create_app
from modelwright.serve.choose import Chosen, spoken
from modelwright.serve.reasoning import ThoughtParser, with_thoughts
from modelwright.serve.served import Piece

THINKING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: <think>"
    "{% endif %}{# </think> #}"
)


def split(text: str, is_open: bool, cuts: list[int]) -> tuple[str, str]:
    parser, places = ThoughtParser(is_open), sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    pieces = [parser.push(text[a:b]) for a, b in zip(places, places[1:], strict=False)] + [parser.finish()]
    return "".join(p[0] for p in pieces), "".join(p[1] for p in pieces)


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("<think>a</think>b", False, ("a", "b")),
        ("\n<think>\na\n</think>\n\nb", False, ("a\n", "b")),
        ("a</think>b", True, ("a", "b")),
        ("no thought <think>x</think>", False, ("", "no thought <think>x</think>")),
        ("<think>cut off", False, ("cut off", "")),
        ("<think>a</thi", False, ("a</thi", "")),
        ("<thin", False, ("", "<thin")),
        ("  plain", False, ("", "  plain")),
        ("<think></think>b", False, ("", "b")),
        ("<think>a</think>b</think>c", False, ("a", "b</think>c")),
        ("", True, ("", "")),
    ],
)
@given(cuts=st.lists(st.integers(0, 40), max_size=8))
def test_thoughts_are_split_alike_however_the_text_is_cut(text, is_open, expected, cuts):
    assert split(text, is_open, cuts) == expected


@given(st.text(alphabet="<>/think a\n", max_size=30), st.lists(st.integers(0, 30), max_size=6), st.booleans())
def test_any_text_is_split_alike_however_it_is_cut(text: str, cuts: list[int], is_open: bool):
    assert split(text, is_open, cuts) == split(text, is_open, [])


def test_ordinary_text_is_not_held_back():
    parser = ThoughtParser(is_open=False)
    assert [parser.push(p) for p in ("Hello", " <", "b>")] == [("", "Hello"), ("", " <"), ("", "b>")]


def test_pieces_carry_thoughts_beside_their_tokens():
    async def pieces() -> AsyncGenerator[Piece, None]:
        for number, text in enumerate(("<think>hm", "</think>yes")):
            yield Piece(text, token_ids=(number,))
        yield Piece("", "stop", Usage(1, 2))

    async def collect() -> list[Piece]:
        return [piece async for piece in with_thoughts(pieces(), is_open=False)]

    found = asyncio.run(collect())
    assert [(p.reasoning, p.text, p.token_ids) for p in found] == [("hm", "", (0,)), ("", "yes", (1,)), ("", "", ())]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    engine = make_engine()
    assert engine.engine.tokenizer is not None
    thinking = engine.engine.tokenizer.with_chat_template(THINKING)
    app = create_app(ServeConfig(), engine, thinking, "tiny", None, None)
    with engine, running(app, engine) as served:
        yield served


def chat(server: Running, **fields) -> httpx2.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "seed": 1} | fields
    return httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def test_an_answer_that_begins_inside_a_thought_is_all_thought(server: Running):
    whole = chat(server).json()["choices"][0]["message"]
    assert whole["reasoning_content"] == whole["reasoning"] != "" and whole["content"] == ""
    with server.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=8, seed=1, stream=True
    ) as stream:
        deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == whole["reasoning"]
    assert "".join(d.content or "" for d in deltas) == ""


def test_a_form_leaves_no_room_for_thoughts(server: Running):
    pytest.importorskip("llguidance")
    message = chat(server, structured_outputs={"choice": ["yes", "no"]}).json()["choices"][0]["message"]
    assert message["content"] in ("yes", "no") and "reasoning" not in message


def test_thoughts_are_left_in_the_text_where_they_are_not_to_be_told_apart():
    engine = make_engine()
    assert engine.engine.tokenizer is not None
    thinking = engine.engine.tokenizer.with_chat_template(THINKING)
    app = create_app(ServeConfig(reasoning="off"), engine, thinking, "tiny", None, None)
    with engine, running(app, engine) as served:
        message = chat(served).json()["choices"][0]["message"]
    assert message["content"] and "reasoning" not in message


def test_best_of_and_beams_through_the_server(server: Running):
    fields = {"model": "tiny", "prompt": "The", "max_tokens": 6, "seed": 1}
    url = f"{server.url}/v1/completions"
    every = httpx2.post(url, json={**fields, "n": 5, "logprobs": 0}, timeout=60).json()
    best = httpx2.post(url, json={**fields, "best_of": 5, "n": 2, "logprobs": 0}, timeout=60).json()
    means = [sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["tokens"]) for c in every["choices"]]
    order = sorted(range(5), key=lambda i: -means[i])
    assert [c["text"] for c in best["choices"]] == [every["choices"][i]["text"] for i in order[:2]]
    assert best["usage"] == every["usage"] | {"prompt_tokens_details": best["usage"]["prompt_tokens_details"]}
    beams = httpx2.post(url, json={**fields, "n": 3, "use_beam_search": True}, timeout=60).json()
    ids = server.engine.tokenizer.encode("The")
    found = asyncio.run(server.engine.complete_tokens(ids, SamplingParams(beam_width=3, n=3, max_tokens=6)))
    assert [c["text"] for c in beams["choices"]] == [found.text, *(c.text for c in found.others)]
    streamed = httpx2.post(url, json={**fields, "n": 2, "beam_width": 3, "stream": True}, timeout=60).text
    assert streamed.count('"finish_reason":"') == 2 or streamed.count('"finish_reason": "') == 2
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"best_of": 1, "n": 2}, "best_of is 1"),
        ({"beam_width": 2, "top_p": 0.5}, "top_p is 0.5 and has no effect on a beam search"),
        ({"length_penalty": 2.0}, "length_penalty is 2.0 and has no effect without beam_width"),
        ({"priority": "high"}, "priority is"),
        ({"beam_width": True}, "beam_width is true"),
    ],
)
def test_wrong_choices_are_the_clients_mistake(server: Running, wrong: dict, message: str):
    reply = chat(server, **wrong)
    assert reply.status_code == 400 and message in reply.json()["error"]["message"]


def test_a_client_that_goes_ends_all_of_its_draws(server: Running):
    with pytest.raises(httpx2.TimeoutException):
        body = {"model": "tiny", "prompt": "The", "max_tokens": 200, "best_of": 8, "ignore_eos": True}
        httpx2.post(f"{server.url}/v1/completions", json=body, timeout=0.3)
    server.wait_until_idle()


def test_closing_one_choice_ends_the_work():
    async def main() -> bool:
        ended = asyncio.Event()

        async def compute() -> list[Completion]:
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()
            return []

        chosen = Chosen(compute)
        task = asyncio.ensure_future(anext(chosen.pieces(0, None, None, False)))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return ended.is_set()

    assert asyncio.run(main())


def test_special_tokens_are_shown_where_they_stand():
    engine = make_engine()
    tokenizer = engine.engine.tokenizer
    assert tokenizer is not None
    first, second = tokenizer.encode("The"), tokenizer.encode("list")
    ids = (*first, 299, *second)
    text = spoken(tokenizer, Completion("plain", ids, "stop", Usage(1, 3)), {299: "<think>"})
    assert text == "The<think>list"
    assert spoken(tokenizer, Completion("plain", ids, "stop", Usage(1, 3)), {}) == "plain"
