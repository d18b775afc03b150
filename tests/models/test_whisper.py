"""Whisper: frames in, tokens out, step by step. Parity with the reference is in test_parity.py."""

import math

import pytest
import torch

from modelwright.base.errors import ConfigError, RequestError
from modelwright.models.encoder_decoder import write_by_beam, write_greedily
from modelwright.models.weights import load_model, save_model
from modelwright.models.whisper import Whisper, WhisperConfig
from modelwright.nn.attention import record_attention
from modelwright.nn.init import init_weights
from modelwright.nn.mel import to_input_features
from modelwright.nn.positions import sinusoids

SMALL = WhisperConfig(
    vocab_size=30,
    num_mel_bins=20,
    hidden_size=24,
    num_encoder_layers=2,
    num_encoder_heads=2,
    encoder_intermediate_size=32,
    num_decoder_layers=2,
    num_decoder_heads=2,
    decoder_intermediate_size=32,
    num_audio_positions=25,
    max_seq_len=80,
    decoder_start_token_id=3,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def random_model(config=SMALL):
    model = init_weights(Whisper(config), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def frames(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 20, 50, generator=torch.Generator().manual_seed(1))


def random_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(4, 30, (batch, length), generator=torch.Generator().manual_seed(2))


def test_step_by_step_equals_the_whole_and_the_sound_is_read_once():
    model = random_model()
    encoded, ids = model.encode(frames()), random_ids(2, 75)
    state = model.new_state(2)
    pieces = [model.decode(piece, encoded, state=state) for piece in ids.split([3, 1, 20, *[1] * 51], dim=1)]
    assert torch.allclose(torch.cat(pieces, dim=1), model.decode(ids, encoded), atol=1e-5)
    assert state.memory(1)["cross_k"].shape == (2, 25, 2, 12)


def test_fresh_positions_of_the_encoder_are_sinusoids_and_are_not_trained():
    model = init_weights(Whisper(SMALL), seed=0)
    assert torch.equal(model.encoder.positions.weight, sinusoids(25, 24, "whisper"))
    model(frames(), random_ids(2, 5)).logits.sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == ["encoder.positions.weight"]


def test_keys_have_no_bias_and_queries_and_values_have():
    names = set(Whisper(SMALL).state_dict())
    for layer in ("encoder.layers.0.attention", "decoder.layers.0.attention", "decoder.layers.0.cross"):
        assert f"{layer}.k.bias" not in names and {f"{layer}.q.bias", f"{layer}.v.bias", f"{layer}.o.bias"} <= names


def test_maps_are_recorded_encoder_first_then_self_before_cross():
    with record_attention() as maps:
        random_model()(frames(1), random_ids(1, 5))
    assert [tuple(m.shape) for m in maps] == [(1, 2, 25, 25)] * 2 + [(1, 2, 5, 5), (1, 2, 5, 25)] * 2


@pytest.mark.parametrize("is_tied", [True, False])
def test_saved_and_loaded_it_is_the_same(is_tied, tmp_path):
    model = random_model(WhisperConfig(**{**vars(SMALL), "tie_embeddings": is_tied}))
    model.generation_config = {"suppress_tokens": [5, 6]}
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config and again.generation_config["suppress_tokens"] == [5, 6]
    assert not again.encoder.positions.weight.requires_grad
    assert torch.equal(again(frames(), random_ids(2, 5)).logits, model(frames(), random_ids(2, 5)).logits)


def test_greedy_and_beam_search_write_and_stop():
    model = random_model()
    encoded, prefix = model.encode(frames()), torch.full((2, 1), 3)
    greedy = write_greedily(model, encoded, prefix, max_new_tokens=10, eos_token_id=2)
    beams = write_by_beam(model, encoded, prefix, max_new_tokens=10, eos_token_id=2, num_beams=3)
    assert all(len(row) <= 10 for row in greedy)
    assert [len(row) for row in beams] == [3, 3] and all(row[0].score >= row[1].score for row in beams)


def test_another_shape_of_frames_and_too_long_a_text_are_refused():
    model = random_model()
    with pytest.raises(RequestError, match=r"\(2, 20, 49\); expected \(B, 20, 50\)"):
        model.encode(frames()[..., :49])
    with pytest.raises(RequestError, match="reaches 81 tokens; this model writes at most 80"):
        model(frames(), random_ids(2, 81))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale_embedding": True}, "scale_embedding"),
        ({"activation_function": "odd"}, "odd"),
        ({"d_model": 100}, "num_encoder_heads is 6"),
        ({"encoder_layers": 0}, "num_encoder_layers"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        WhisperConfig.from_hf(values)


def learn_pitches(is_shuffled: bool) -> float:
    """Train to write which of three tones sounds, 60 steps; return the share of right answers on new sounds."""
    generator = torch.Generator().manual_seed(1)
    model = init_weights(Whisper(SMALL), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    time = torch.arange(8000) / 16000
    start = torch.full((16, 1), 3)

    def batch(is_shuffled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        which = torch.randint(0, 3, (16,), generator=generator)
        pitch = torch.tensor([300.0, 900.0, 2700.0])[which] * (0.9 + 0.2 * torch.rand(16, generator=generator))
        clips = torch.sin(2 * math.pi * pitch[:, None] * time) + 0.1 * torch.randn(16, 8000, generator=generator)
        features = to_input_features(list(clips), sample_rate=16000, num_bands=20, seconds=0.5)
        return features, which[torch.randperm(16, generator=generator)] + 10 if is_shuffled else which + 10

    for _ in range(60):
        features, answer = batch(is_shuffled)
        loss = torch.nn.functional.cross_entropy(model(features, start).logits[:, 0], answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        pairs = [batch(is_shuffled=False) for _ in range(4)]
        right = [model(features, start).logits[:, 0].argmax(-1) == answer for features, answer in pairs]
    return float(torch.cat(right).float().mean())


def test_it_learns_to_name_what_it_hears_and_not_from_shuffled_names():
    assert learn_pitches(is_shuffled=False) > 0.9
    assert learn_pitches(is_shuffled=True) < 0.6
