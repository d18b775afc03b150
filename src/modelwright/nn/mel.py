"""From sound to log-mel frames: what Whisper hears.

A window of 25 ms every 10 ms, its power spectrum gathered into bands that are as wide as the ear's, the logarithm of
that, cut off 8 decades below the loudest of the clip. The bands are Slaney's: even up to 1 kHz, logarithmic above, each
of the same area.

Source: Radford et al. 2022, arXiv 2212.04356, section 2.2; Slaney 1998, "Auditory Toolbox" (the bands).
Not here: reading sound files, resampling.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modelwright.base.errors import RequestError

SAMPLE_RATE = 16000  # samples a second
WINDOW_LEN, HOP_LEN = 400, 160  # samples: 25 ms and 10 ms
FLOOR = 1e-10  # of the power
DECADES = 8.0  # kept below the loudest


def mel_filters(num_bands: int) -> Tensor:
    """Return how much each frequency of the spectrum counts in each band, (bands, 201), float32."""
    frequency = torch.linspace(0, SAMPLE_RATE / 2, WINDOW_LEN // 2 + 1, dtype=torch.float64)
    step = math.log(6.4) / 27  # of the logarithmic part: 27 bands from 1 to 6.4 kHz
    last = 15 + math.log(SAMPLE_RATE / 2 / 1000) / step  # in mels; 1 kHz is 15
    mels = torch.linspace(0, last, num_bands + 2, dtype=torch.float64)
    edges = torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp(step * (mels - 15)))  # Hz, (bands + 2,)
    widths = edges.diff()[:, None]
    distance = edges[:, None] - frequency  # (bands + 2, 201)
    rising, falling = -distance[:-2] / widths[:-1], distance[2:] / widths[1:]
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (edges[2:] - edges[:-2])[:, None]).float()


def log_mel(samples: Tensor, num_bands: int = 80) -> Tensor:
    """Return the frames (B, bands, S // 160) of sound (B, S) at 16 kHz in -1 .. 1; mostly between -1 and 1.

    Each row is scaled by its own loudest frame, so a row gives the same alone and in a batch.
    """
    window = torch.hann_window(WINDOW_LEN, device=samples.device)
    spectrum = torch.stft(samples.float(), WINDOW_LEN, HOP_LEN, window=window, return_complex=True)
    power = spectrum[..., :-1].abs().square()  # (B, 201, frames); the last window, half beyond the end, is left out
    bands = (mel_filters(num_bands).to(samples.device) @ power).clamp(min=FLOOR).log10()
    loudest = bands.amax(dim=(-2, -1), keepdim=True)
    return (torch.maximum(bands, loudest - DECADES) + 4) / 4


def to_input_features(
    clips: Sequence[Tensor], *, sample_rate: int, num_bands: int = 80, seconds: float = 30.0
) -> Tensor:
    """Return the frames (B, bands, 100 * seconds) of clips, each filled up with silence or cut to ``seconds``.

    Args:
        clips: Sound, each (S,), one channel.
        sample_rate: Of the clips.
        num_bands: 80, or 128 for large-v3.
        seconds: 30 for the published models.

    Raises:
        RequestError: Another sample rate than 16 kHz, more than one channel, or no clip.
    """
    if sample_rate != SAMPLE_RATE:
        raise RequestError(f"The sound has {sample_rate} samples a second; expected {SAMPLE_RATE}. Resample it.")
    if not clips or any(clip.dim() != 1 for clip in clips):
        raise RequestError(
            f"The clips have shapes {[tuple(clip.shape) for clip in clips]}; expected at least one, each (samples,). "
            "Mix channels into one."
        )
    length = int(seconds * SAMPLE_RATE)
    padded = torch.zeros(len(clips), length)
    for row, clip in zip(padded, clips, strict=True):
        row[: len(clip)] = clip[:length]
    return log_mel(padded, num_bands)
