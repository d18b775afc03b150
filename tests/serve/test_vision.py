"""Pictures over HTTP: the three APIs show the model the same picture, and a model that does not see refuses by name."""

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from modelwright.base.types import Message, SamplingParams
from modelwright.engine.engine import EngineConfig
from modelwright.engine.llm import LLM
from modelwright.engine.stream import AsyncEngine
from modelwright.models.llama import LlamaConfig
from modelwright.models.llava import Llava, LlavaConfig
from modelwright.models.towers import VisionConfig
from modelwright.nn.init import init_weights
from modelwright.serve.app import ServeConfig, create_app
from modelwright.serve.trace import replay
from modelwright.tokenizer.train import SPECIAL_TOKENS, train_bpe

VISION = VisionConfig(
    "clip_vision_model", 24, 32, num_layers=3, num_heads=2, image_size=32, patch_size=8, act="quick_gelu", norm_eps=1e-5
)  # fmt: skip
GREEDY = {"temperature": 0, "max_tokens": 10}


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8))


def encoded(seed: int) -> str:
    out = io.BytesIO()
    picture(seed).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def part(seed: int, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(seed)}", **more}}


def turn(text: str, *seeds: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*(part(seed) for seed in seeds), {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def seeing(start: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    tokenizer = train_bpe(["what is in the picture? a cat, a dog, the sea. "] * 3, 300, (*SPECIAL_TOKENS, "<image>"))
    text = LlamaConfig(tokenizer.vocab_size, 32, 64, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=256)
    model = init_weights(Llava(LlavaConfig(text, VISION, tokenizer.special_ids["<image>"])), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    trace = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    with AsyncEngine(model, tokenizer=tokenizer, config=EngineConfig(dtype="float32", device="cpu")) as engine:
        app = create_app(ServeConfig(trace_file=trace), engine, tokenizer, "eyes", None, None)
        with start(app, engine) as running:
            yield running


@pytest.fixture(scope="module")
def alone(seeing: Any) -> Any:
    """The answer of the library to a text and pictures."""
    llm = LLM(model_of(seeing), tokenizer=seeing.engine.tokenizer)

    def answer(text: str, *seeds: int) -> Any:
        message = Message("user", text, images=tuple((0, picture(seed)) for seed in seeds))
        return llm.chat([message], SamplingParams(temperature=0, max_tokens=10))

    return answer


def model_of(seeing: Any) -> Any:
    return seeing.engine.engine.sight._model


def test_a_chat_about_a_picture_is_the_librarys(seeing: Any, alone: Any):
    client = seeing.client()
    answers = []
    for seeds in [(1,), (2,), (1, 2), (2, 1), ()]:
        done = client.chat.completions.create(model="eyes", messages=turn("what is it?", *seeds), **GREEDY)
        wanted = alone("what is it?", *seeds)
        assert done.choices[0].message.content == wanted.text
        assert done.usage.prompt_tokens == wanted.usage.prompt_tokens
        answers.append(wanted.token_ids)
    assert len(set(answers)) == 5  # the control: the pictures and their order decide
    streamed = client.chat.completions.create(model="eyes", messages=turn("what is it?", 1), stream=True, **GREEDY)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert text == alone("what is it?", 1).text


def test_the_other_apis_show_the_same(seeing: Any, alone: Any):
    wanted = alone("what is it?", 1).text
    source = {"type": "base64", "media_type": "image/png", "data": encoded(1)}
    blocks = [{"type": "image", "source": source}, {"type": "text", "text": "what is it?"}]
    client = anthropic.Anthropic(base_url=seeing.url, api_key="unused", max_retries=0)
    asked = {"model": "eyes", "messages": [{"role": "user", "content": blocks}]}
    message = client.messages.create(max_tokens=10, extra_body={"temperature": 0}, **asked)
    assert message.content[0].text == wanted
    counted = client.messages.count_tokens(**asked).input_tokens
    assert counted == alone("what is it?", 1).usage.prompt_tokens
    parts = [{"type": "input_image", "image_url": part(1)["image_url"]["url"], "detail": "auto"}]
    parts.append({"type": "input_text", "text": "what is it?"})
    done = seeing.client().responses.create(
        model="eyes", input=[{"role": "user", "content": parts}], temperature=0, max_output_tokens=10
    )
    assert done.output_text == wanted and done.usage.input_tokens == counted
    ids = httpx2.post(f"{seeing.url}/tokenize", json={"messages": turn("what is it?", 1)}).json()
    assert ids["count"] == counted


def test_a_later_turn_finds_the_picture_in_the_cache(seeing: Any):
    client = seeing.client()
    talk = turn("what is in the picture?", 5)
    first = client.chat.completions.create(model="eyes", messages=talk, **GREEDY)
    talk = [*talk, {"role": "assistant", "content": first.choices[0].message.content}, *turn("and here?", 6)]
    later = client.chat.completions.create(model="eyes", messages=talk, **GREEDY)
    assert later.usage.prompt_tokens_details.cached_tokens >= 16
    other = [*turn("what is in the picture?", 7), *talk[1:]]
    cold = client.chat.completions.create(model="eyes", messages=other, **GREEDY)
    assert cold.usage.prompt_tokens_details.cached_tokens < 16


@pytest.mark.parametrize(("content", "words"), [
    ([part(1, detail="huge")], "detail"),
    ([part(1, file="x")], "Unrecognized field"),
    ([{"type": "image_url", "image_url": "data:"}], "image_url"),
    ([{"type": "image_url", "image_url": {"url": 5}}], "image_url"),
    ([{"type": "image_url", "image_url": {"url": "https://pictures.example/a.png"}}], "fetches nothing"),
    ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "fetches nothing"),
    ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}], "cannot be read"),
    ([{"type": "input_audio", "input_audio": {}}], "text or, in a message of the user, image_url"),
    ([part(i) for i in range(17)], "17 pictures; 16 are allowed"),
    ([part(i) for i in range(16)], "context_length_exceeded"),
])  # fmt: skip
def test_bad_pictures_are_400_and_named(seeing: Any, content: Any, words: str):
    body = {"model": "eyes", "messages": [{"role": "user", "content": content}], "max_tokens": 5}
    answer = httpx2.post(f"{seeing.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400 and words in answer.text


def test_pictures_stand_in_messages_of_the_user_alone(seeing: Any):
    for role in ("system", "assistant"):
        body = {"model": "eyes", "messages": [{"role": role, "content": [part(1)]}, *turn("x")], "max_tokens": 5}
        answer = httpx2.post(f"{seeing.url}/v1/chat/completions", json=body)
        assert answer.status_code == 400 and "a part of type text" in answer.text


@pytest.mark.parametrize("source", [
    {"type": "base64", "media_type": "image/png"}, {"type": "file", "file_id": "x"}, {"type": "base64", "data": 5},
    {"type": "base64", "media_type": "image/png", "data": "aGk=", "more": 1}, "base64",
])  # fmt: skip
def test_bad_sources_of_anthropics_blocks_are_400(seeing: Any, source: Any):
    blocks = [{"type": "image", "source": source}]
    body = {"model": "eyes", "messages": [{"role": "user", "content": blocks}], "max_tokens": 5}
    answer = httpx2.post(f"{seeing.url}/v1/messages", json=body)
    assert answer.status_code == 400 and "source" in answer.text


def test_a_model_that_does_not_see_refuses_by_name(server: Any):
    with pytest.raises(openai.BadRequestError, match="this model reads text only"):
        server.client().chat.completions.create(model="tiny", messages=turn("what?", 1))
    blocks = [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": encoded(1)}}]
    client = anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0)
    with pytest.raises(anthropic.BadRequestError, match="this model reads text only"):
        client.messages.create(model="tiny", max_tokens=5, messages=[{"role": "user", "content": blocks}])
    parts = [{"type": "input_image", "image_url": part(1)["image_url"]["url"]}]
    with pytest.raises(openai.BadRequestError, match="this model reads text only"):
        server.client().responses.create(model="tiny", input=[{"role": "user", "content": parts}])


def test_a_raw_prompt_cannot_fake_a_picture(seeing: Any):
    token = seeing.engine.tokenizer.special_ids["<image>"]
    body = {"model": "eyes", "prompt": [1, token, token], "max_tokens": 5}
    answer = httpx2.post(f"{seeing.url}/v1/completions", json=body)
    assert answer.status_code == 400 and "image tokens" in answer.text


def test_beams_over_pictures_are_refused_and_the_best_of_many_is_not(seeing: Any):
    body = {"model": "eyes", "messages": turn("what?", 1), "max_tokens": 5}
    answer = httpx2.post(f"{seeing.url}/v1/chat/completions", json={**body, "beam_width": 2})
    assert answer.status_code == 400 and "beam_width" in answer.text
    answer = httpx2.post(f"{seeing.url}/v1/chat/completions", json={**body, "best_of": 3, "n": 2, "seed": 1})
    assert answer.status_code == 200 and len(answer.json()["choices"]) == 2


def test_a_trace_tells_of_pictures_and_a_replay_leaves_them_out(seeing: Any):
    client = seeing.client()
    client.chat.completions.create(model="eyes", messages=turn("what is it?", 1), **GREEDY)
    client.chat.completions.create(model="eyes", messages=turn("no picture"), **GREEDY)
    path = seeing.app.state.served.config.trace_file
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    seen = [row for row in rows if row.get("images")]
    assert seen and all(len(name) == 32 for row in seen for name in row["images"])
    found = replay(path, LLM(model_of(seeing), tokenizer=seeing.engine.tokenizer))
    assert found.num_skipped >= len(seen) and found.num_completions >= 1 and not found.differences
