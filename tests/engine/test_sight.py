"""Pictures in prompts: the engine writes what the model itself writes, and no picture meets another's blocks."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from modelwright.base.errors import ConfigError, RequestError
from modelwright.base.types import Message, SamplingParams
from modelwright.engine.engine import Engine, EngineConfig
from modelwright.engine.llm import LLM
from modelwright.engine.sight import Picture, Sight, place_pictures, read_chat
from modelwright.engine.speculative import SpeculationConfig
from modelwright.engine.stream import AsyncEngine
from modelwright.models.llama import LlamaConfig
from modelwright.models.llava import Llava, LlavaConfig
from modelwright.models.pixels import to_pixel_values
from modelwright.models.towers import VisionConfig
from modelwright.models.weights import save_model
from modelwright.nn.init import init_weights
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.train import SPECIAL_TOKENS, train_bpe

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
VISION = VisionConfig(
    "clip_vision_model", 24, 32, num_layers=3, num_heads=2, image_size=32, patch_size=8, act="quick_gelu", norm_eps=1e-5
)  # fmt: skip
NUM = 16  # image tokens of one picture


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(
        ["what is in the picture, and what is not? a cat, a dog and the sea. "] * 3, 300, (*SPECIAL_TOKENS, "<image>")
    )


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Llava:
    text = LlamaConfig(tokenizer.vocab_size, 32, 64, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=256)
    made = init_weights(Llava(LlavaConfig(text, VISION, tokenizer.special_ids["<image>"])), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    return made.eval()


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)


def asked(text: str, *seeds: int, at: int = 0) -> list[Message]:
    return [Message("user", text, images=tuple((at, picture(seed)) for seed in seeds))]


def by_hand(llm: LLM, model: Llava, messages: list[Message]) -> list[int]:
    """Draw greedily with whole forward passes of the model, pictures and all."""
    sight = llm.engine.sight
    assert sight is not None
    images = [image for message in messages for _, image in message.images]
    ids = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, image_token="<image>")
    ids = sight.expand(ids, len(images))
    from_pixels = torch.stack([torch.as_tensor(p) for p in _pixels(sight, images)]) if images else None
    drawn: list[int] = []
    with torch.inference_mode():
        for _ in range(GREEDY.max_tokens):
            drawn.append(int(model(torch.tensor([ids + drawn]), from_pixels).logits[0, -1].argmax()))
    return drawn


def _pixels(sight: Sight, images: list[np.ndarray]) -> list[torch.Tensor]:
    return list(to_pixel_values(images, sight.pixels))


@pytest.fixture(scope="module")
def llm(model: Llava, tokenizer: Tokenizer) -> LLM:
    return LLM(model, tokenizer=tokenizer)


@pytest.mark.parametrize("chunk", [512, 7], ids=["whole", "chunks of 7"])
def test_the_engine_writes_what_the_model_writes(model: Llava, tokenizer: Tokenizer, chunk: int):
    """One picture, two, one in the middle of the text, none: alone and together, prompts cut inside the picture."""
    talks = [asked("what is it?", 1), asked("a cat and a dog", 1, 2, at=5), asked("the sea", 3, at=3), asked("what?")]
    llm = LLM(model, tokenizer=tokenizer, config=EngineConfig(max_tokens_per_step=chunk))
    wanted = [by_hand(llm, model, talk) for talk in talks]
    assert [list(llm.chat(talk, GREEDY).token_ids) for talk in talks] == wanted
    streams = [llm.stream(talk, GREEDY) for talk in talks]  # together in one batch
    together = [[t for delta in stream for t in delta.token_ids] for stream in streams]
    assert together == wanted


def test_two_pictures_give_two_answers(llm: LLM):
    """The negative control of everything here: the picture decides."""
    first, second = (llm.chat(asked("what is it?", seed), GREEDY) for seed in (1, 2))
    assert first.token_ids != second.token_ids
    assert first.usage.prompt_tokens == second.usage.prompt_tokens > NUM


def test_a_cached_picture_is_shared_and_another_never_is(model: Llava, tokenizer: Tokenizer):
    llm = LLM(model, tokenizer=tokenizer, config=EngineConfig(block_size=4))
    cold = llm.chat(asked("what is it?", 1), GREEDY)
    assert cold.usage.cached_tokens == 0
    other = llm.chat(asked("what is it?", 2), GREEDY)
    before = _before(llm, asked("what is it?", 2))
    assert other.usage.cached_tokens == before // 4 * 4  # the words before the picture, and no more
    warm = llm.chat(asked("what is it?", 1), GREEDY)
    assert warm.usage.cached_tokens >= NUM
    assert (warm.token_ids, warm.logprobs) == (cold.token_ids, cold.logprobs)
    moved = llm.chat(asked("what is it?", 1, at=7), GREEDY)  # the same picture at another place
    fresh = LLM(model, tokenizer=tokenizer).chat(asked("what is it?", 1, at=7), GREEDY)
    assert (moved.token_ids, moved.logprobs) == (fresh.token_ids, fresh.logprobs)
    assert llm.chat(asked("what is it?", 2), GREEDY).token_ids == other.token_ids


def _before(llm: LLM, messages: list[Message]) -> int:
    ids = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, image_token="<image>")
    return ids.index(llm.tokenizer.special_ids["<image>"])


def test_the_same_picture_prepared_otherwise_is_another(llm: LLM):
    sight = llm.engine.sight
    assert sight is not None
    pixels = _pixels(sight, [picture(1)])[0]
    same, other = sight.see_pixels(pixels), sight.see_pixels(pixels * 1.01)
    assert sight.see([picture(1)])[0].hash == same.hash != other.hash
    assert not set(same.marks()) & set(other.marks())
    assert len(set(same.marks())) == NUM and max(same.marks()) < 0


def test_a_picture_in_words_is_only_words(llm: LLM, model: Llava):
    """``<image>`` that somebody writes is text: no place of a picture, and the model is not misled."""
    talk = asked("the <image> token", 1)
    assert list(llm.chat(talk, GREEDY).token_ids) == by_hand(llm, model, talk)
    words = llm.chat([Message("user", "the <image> token")], GREEDY)
    assert words.usage.prompt_tokens < 60


def test_preempted_and_guessed_requests_still_see(model: Llava, tokenizer: Tokenizer):
    talks = [asked("what is in the picture?", seed) for seed in (1, 2, 3, 4)]
    alone = [list(LLM(model, tokenizer=tokenizer).chat(talk, GREEDY).token_ids) for talk in talks]
    for config in (
        EngineConfig(num_blocks=8, block_size=16, has_prefix_cache=False),
        EngineConfig(speculation=SpeculationConfig("ngram", is_timed=False)),
        EngineConfig(speculation=SpeculationConfig("early_exit", num_layers=1, is_timed=False)),
    ):
        llm = LLM(model, tokenizer=tokenizer, config=config)
        streams = [llm.stream(talk, GREEDY) for talk in talks]
        pieces: list[list[int]] = [[] for _ in talks]
        for _ in range(3):  # all are under way before one goes on to its end
            for at, stream in enumerate(streams):
                delta = next(stream, None)
                pieces[at] += delta.token_ids if delta is not None else ()
        for at, stream in enumerate(streams):
            pieces[at] += [t for delta in stream for t in delta.token_ids]
        assert pieces == alone
        if config.num_blocks is not None:
            assert llm.stats().num_preemptions > 0


def test_in_bfloat16_the_bits_do_not_depend_on_neighbours(model: Llava, tokenizer: Tokenizer):
    half = copy.deepcopy(model).to(torch.bfloat16)
    talks = [asked("what is it?", 1), asked("a dog", 2), asked("a cat")]
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=8, ignore_eos=True)
    alone = [LLM(half, tokenizer=tokenizer).chat(talk, params) for talk in talks]
    llm = LLM(half, tokenizer=tokenizer)
    checked = []
    for talk in talks:
        ids, pictures = read_chat(tokenizer, llm.engine.sight, talk)
        checked.append(llm.engine.check(ids, params, None, pictures))
    together = llm._finish(checked)
    assert [(c.token_ids, c.logprobs) for c in together] == [(c.token_ids, c.logprobs) for c in alone]


def test_several_completions_of_one_picture(llm: LLM):
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=6, n=3, ignore_eos=True)
    done = llm.chat(asked("what is it?", 1), params)
    assert len(done.others) == 2 and len({done.token_ids, *(o.token_ids for o in done.others)}) > 1


def test_a_folder_is_opened_with_its_own_preprocessing(tmp_path: Path, model: Llava, tokenizer: Tokenizer):
    save_model(model, tmp_path)
    tokenizer.save(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text('{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 32}')
    engine = AsyncEngine(tmp_path, config=EngineConfig(dtype="float32"))
    assert engine.engine.sight is not None and engine.engine.sight.pixels.crop == (32, 32)
    with engine:
        done = engine.chat(asked("what is it?", 1), GREEDY)
    assert done.usage.prompt_tokens > NUM
    file.write_text('{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 64}, "crop_size": 64}')
    with pytest.raises(ConfigError, match=r"makes pictures of \(64, 64\); the tower reads \(32, 32\)"):
        Engine(tmp_path)


def test_what_does_not_go_together_is_refused_by_name(llm: LLM, model: Llava, tokenizer: Tokenizer):
    sight = llm.engine.sight
    assert sight is not None
    seen = sight.see([picture(1)])
    token = sight.token_id
    with pytest.raises(RequestError, match="15 image tokens .*, and 1 pictures take 16 each"):
        llm.engine.check([1, *[token] * 15], GREEDY, None, seen)
    with pytest.raises(RequestError, match="16 image tokens .*, and 0 pictures"):
        llm.engine.check([1, *[token] * 16], GREEDY)
    with pytest.raises(RequestError, match="in a row"):
        place_pictures([*[token] * 8, 1, *[token] * 8], seen, sight)
    with pytest.raises(RequestError, match="beam_width is given and the prompt has pictures"):
        llm.engine.check([1, *[token] * 16], SamplingParams(beam_width=2), None, seen)
    with pytest.raises(ConfigError, match="the model sees"):
        Engine(model, tokenizer=tokenizer, config=EngineConfig(kernels="native"))
    blind = Engine(model.language, tokenizer=tokenizer)
    with pytest.raises(RequestError, match="this model does not see"):
        blind.check([1, 2], GREEDY, None, seen)
    with pytest.raises(RequestError, match="this model does not see"):
        LLM(model.language, tokenizer=tokenizer).chat(asked("what?", 1), GREEDY)
    stranger = train_bpe(["no pictures here"], 280)
    with pytest.raises(ConfigError, match="no special token of the tokenizer"):
        Engine(model, tokenizer=stranger)
    with pytest.raises(RequestError, match="expected a Pillow image"):
        llm.chat([Message("user", "x", images=((0, b"nonsense"),))], GREEDY)


def test_pictures_are_kept_up_to_a_number(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    sight = llm.engine.sight
    assert sight is not None
    monkeypatch.setattr("modelwright.engine.sight.MAX_KEPT", 2)
    first = sight.see([picture(7)])[0]
    assert sight.see([picture(7)])[0] is first
    sight.see([picture(8), picture(9)])
    again = sight.see([picture(7)])[0]
    assert again is not first and isinstance(again, Picture) and torch.equal(again.vectors, first.vectors)
