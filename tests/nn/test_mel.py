"""The ear of Whisper: bands and frames equal the published extractor's, and a clip is heard the same in any company."""

import math

import pytest
import torch

from modelwright.base.errors import RequestError
from modelwright.nn.mel import log_mel, mel_filters, to_input_features


def sound(seconds: float, seed: int = 0) -> torch.Tensor:
    """Three tones and noise, louder towards the end."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(int(16000 * seconds)) / 16000
    tones = sum(torch.sin(2 * math.pi * pitch * time) for pitch in (220.0, 1300.0 + 100 * seed, 5000.0))
    return 0.1 * (tones + 0.3 * torch.randn(len(time), generator=generator)) * (0.2 + time / time[-1])


@pytest.mark.peer
@pytest.mark.parametrize("num_bands", [80, 128, 20])
def test_bands_and_frames_equal_the_published_ones(num_bands):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.WhisperFeatureExtractor(feature_size=num_bands, chunk_length=5)
    assert (mel_filters(num_bands).T - torch.from_numpy(theirs.mel_filters)).abs().max() < 1e-6
    clips = [sound(2.5), sound(7.0, seed=1), torch.zeros(1600)]  # shorter, longer, silent
    wanted = theirs([c.numpy() for c in clips], sampling_rate=16000, return_tensors="pt").input_features
    mine = to_input_features(clips, sample_rate=16000, num_bands=num_bands, seconds=5.0)
    assert mine.shape == wanted.shape == (3, num_bands, 500)
    assert (mine - wanted).abs().max() < 1e-4


def test_a_clip_gives_the_same_alone_and_beside_a_louder_one():
    quiet, loud = 0.01 * sound(1.0), 5 * sound(1.0, seed=1)
    together = to_input_features([quiet, loud], sample_rate=16000, seconds=1.0)
    alone = to_input_features([quiet], sample_rate=16000, seconds=1.0)
    assert torch.allclose(together[:1], alone, atol=1e-6)


def test_a_tone_lights_the_band_around_its_pitch():
    time = torch.arange(16000) / 16000
    bands = [int(log_mel(torch.sin(2 * math.pi * f * time)[None])[0, :, 50].argmax()) for f in (300.0, 1000.0, 4000.0)]
    centres = [float(torch.linspace(0, 8000, 201)[mel_filters(80)[band].argmax()]) for band in bands]
    assert all(abs(c - f) < 0.05 * f + 40 for c, f in zip(centres, (300.0, 1000.0, 4000.0), strict=True))


def test_silence_is_finite_and_frames_are_a_hundred_a_second():
    assert log_mel(torch.zeros(2, 32000)).shape == (2, 80, 200)
    assert torch.isfinite(log_mel(torch.zeros(1, 3200))).all()


def test_another_sample_rate_and_several_channels_are_refused():
    with pytest.raises(RequestError, match="44100 samples a second; expected 16000"):
        to_input_features([sound(0.1)], sample_rate=44100)
    with pytest.raises(RequestError, match=r"\(2, 1600\)"):
        to_input_features([torch.zeros(2, 1600)], sample_rate=16000)
    with pytest.raises(RequestError, match="at least one"):
        to_input_features([], sample_rate=16000)
