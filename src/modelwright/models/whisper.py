"""Whisper: sound in, text out. Two convolutions halve the frames, an encoder reads them, a decoder writes.

The encoder's positions are fixed sinusoids, stored with the weights; the decoder's are learned. Keys have no bias. The
frames come from `modelwright.nn.mel.to_input_features`; writing is `modelwright.models.encoder_decoder`.

Source: Radford et al. 2022, arXiv 2212.04356, section 2.2 and figure 1. Not here: dropout, SpecAugment, timestamps,
suppressed tokens, and falling back to other temperatures, which belong to whoever transcribes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, RequestError
from modelwright.models.encoder_decoder import Encoded, EncoderDecoderBlock, EncoderDecoderOutput
from modelwright.models.towers import block_names
from modelwright.nn.attention import Attention, AttentionOptions, padding_mask
from modelwright.nn.block import PreNormBlock
from modelwright.nn.decode_state import KVState
from modelwright.nn.init import mark_residual_output
from modelwright.nn.mlp import Mlp, activation
from modelwright.nn.positions import sinusoids

FRAMES_A_POSITION = 2  # the second convolution goes two frames a step
NORM_EPS = 1e-5

# ours -> published
FIELDS = {
    "vocab_size": "vocab_size",
    "num_mel_bins": "num_mel_bins",
    "hidden_size": "d_model",
    "num_encoder_layers": "encoder_layers",
    "num_encoder_heads": "encoder_attention_heads",
    "encoder_intermediate_size": "encoder_ffn_dim",
    "num_decoder_layers": "decoder_layers",
    "num_decoder_heads": "decoder_attention_heads",
    "decoder_intermediate_size": "decoder_ffn_dim",
    "num_audio_positions": "max_source_positions",
    "max_seq_len": "max_target_positions",
    "act": "activation_function",
    "tie_embeddings": "tie_word_embeddings",
    "decoder_start_token_id": "decoder_start_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}


@dataclass(frozen=True)
class WhisperConfig:
    """How a Whisper is built; the defaults are those of tiny."""

    vocab_size: int = 51865
    num_mel_bins: int = 80
    hidden_size: int = 384
    num_encoder_layers: int = 4
    num_encoder_heads: int = 6
    encoder_intermediate_size: int = 1536
    num_decoder_layers: int = 4
    num_decoder_heads: int = 6
    decoder_intermediate_size: int = 1536
    num_audio_positions: int = 1500  # of the encoder: half as many as frames
    max_seq_len: int = 448  # tokens that the decoder writes at most
    act: str = "gelu"
    tie_embeddings: bool = True  # the output matrix is the embedding
    decoder_start_token_id: int = 50257
    bos_token_id: int | None = 50256
    eos_token_id: int = 50256
    pad_token_id: int | None = 50256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in list(FIELDS)[:11] and not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        for name in ("num_encoder_heads", "num_decoder_heads"):
            if self.hidden_size % getattr(self, name):
                raise ConfigError(
                    f"hidden_size is {self.hidden_size} and {name} is {getattr(self, name)}; the heads must divide it "
                    "evenly."
                )
        activation(self.act)

    @property
    def num_frames(self) -> int:
        """Frames of sound that the encoder reads, no more and no fewer."""
        return FRAMES_A_POSITION * self.num_audio_positions

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "WhisperConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute.
        """
        if values.get("scale_embedding", False):
            raise ConfigError("scale_embedding is True; Whisper here does not scale its embeddings.")
        return cls(**{ours: values[theirs] for ours, theirs in FIELDS.items() if theirs in values})

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        return {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            **{theirs: getattr(self, ours) for ours, theirs in FIELDS.items()},
            "num_hidden_layers": self.num_encoder_layers,
            "scale_embedding": False,
            "is_encoder_decoder": True,
            "begin_suppress_tokens": None,
        }


class AudioConv(nn.Conv1d):
    """Three frames into one, each ``stride`` frames."""

    vector_names: ClassVar[tuple[str, ...]] = ("weight",)  # three axes: not a hidden matrix

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__(in_channels, out_channels, kernel_size=3, stride=stride, padding=1)

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Draw the weight so that the variance of what goes in is kept; the bias is zero."""
        std = (self.in_channels * 3) ** -0.5
        self.weight.copy_(torch.empty(self.weight.shape).normal_(0.0, std, generator=generator))
        assert self.bias is not None
        self.bias.zero_()


class FixedPositions(nn.Module):
    """Sinusoids that are stored with the weights and not trained."""

    def __init__(self, num_positions: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_positions, hidden_size), requires_grad=False)

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Compute the table."""
        self.weight.copy_(sinusoids(self.weight.shape[0], self.weight.shape[1], "whisper"))


def _encoder_block(config: WhisperConfig, layer_index: int) -> PreNormBlock:
    c = config
    block = PreNormBlock(
        c.hidden_size,
        c.num_encoder_heads,
        c.encoder_intermediate_size,
        act=c.act,
        norm_eps=NORM_EPS,
        place=(layer_index, c.num_encoder_layers),
    )
    block.attention.k = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
    return block


class WhisperEncoder(nn.Module):
    """Convolutions, fixed positions, pre-norm blocks, a last norm."""

    def __init__(self, config: WhisperConfig):
        super().__init__()
        c = config
        self.conv1 = AudioConv(c.num_mel_bins, c.hidden_size, stride=1)
        self.conv2 = AudioConv(c.hidden_size, c.hidden_size, stride=FRAMES_A_POSITION)
        self.positions = FixedPositions(c.num_audio_positions, c.hidden_size)
        self.layers = nn.ModuleList(_encoder_block(c, i) for i in range(c.num_encoder_layers))
        self.norm = nn.LayerNorm(c.hidden_size, NORM_EPS)

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames (B, bands, F) to states (B, F / 2, D)."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(frames)))).mT + self.positions.weight  # (B, F / 2, D)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class WhisperDecoder(nn.Module):
    """Learned positions, blocks that look back and at the sound, a last norm."""

    def __init__(self, config: WhisperConfig):
        super().__init__()
        c = config
        self.positions = nn.Embedding(c.max_seq_len, c.hidden_size)
        blocks = []
        for i in range(c.num_decoder_layers):
            mlp = Mlp(c.hidden_size, c.decoder_intermediate_size, act=c.act)
            mark_residual_output(mlp.down, c.num_decoder_layers)
            norms = tuple(nn.LayerNorm(c.hidden_size, NORM_EPS) for _ in range(3))
            parts = (_decoder_attention(c, i, is_cross=False), _decoder_attention(c, i, is_cross=True))
            blocks.append(EncoderDecoderBlock(*parts, mlp, norms))
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(c.hidden_size, NORM_EPS)


def _decoder_attention(config: WhisperConfig, layer_index: int, is_cross: bool) -> Attention:
    size, heads = config.hidden_size, config.num_decoder_heads
    options = AttentionOptions(context_size=size if is_cross else None)
    attention = Attention(size, heads, heads, size // heads, layer_index=layer_index, bias=True, options=options)
    attention.k = nn.Linear(size, size, bias=False)
    mark_residual_output(attention.o, config.num_decoder_layers)
    return attention


def _attention_names(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{x}": f"{theirs}.{x if x != 'o' else 'out'}_proj" for x in "qkvo"}


ENCODER_BLOCK = {
    **_attention_names("attention", "self_attn"),
    "attention_norm": "self_attn_layer_norm",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
    "mlp_norm": "final_layer_norm",
}
DECODER_BLOCK = {
    **ENCODER_BLOCK,
    **_attention_names("cross", "encoder_attn"),
    "cross_norm": "encoder_attn_layer_norm",
}


class Whisper(nn.Module):
    """The encoder and the decoder. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[type[WhisperConfig]] = WhisperConfig
    published_names: ClassVar[dict[str, str]] = {
        "encoder.conv1": "model.encoder.conv1",
        "encoder.conv2": "model.encoder.conv2",
        "encoder.positions": "model.encoder.embed_positions",
        **block_names("encoder.layers.*", "model.encoder.layers.*", ENCODER_BLOCK),
        "encoder.norm": "model.encoder.layer_norm",
        "embed": "model.decoder.embed_tokens",
        "decoder.positions": "model.decoder.embed_positions",
        **block_names("decoder.layers.*", "model.decoder.layers.*", DECODER_BLOCK),
        "decoder.norm": "model.decoder.layer_norm",
        "lm_head": "proj_out",
    }

    def __init__(self, config: WhisperConfig):
        super().__init__()
        self.config = config
        self.encoder = WhisperEncoder(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.decoder = WhisperDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the output matrix the embedding itself, where the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def tied_names(self) -> dict[str, str]:
        """Return which parameter is another one under a second name: {second: first}."""
        return {"lm_head.weight": "embed.weight"} if self.config.tie_embeddings else {}

    def _apply(self, fn: Any, recurse: bool = True) -> "Whisper":
        super()._apply(fn, recurse)
        self.tie_weights()  # moving off the meta device makes a new parameter per module
        return self

    def new_state(self, batch_size: int, max_seq_len: int | None = None, dtype: torch.dtype | None = None) -> KVState:
        """Return an empty state for `decode`."""
        return KVState(batch_size=batch_size, max_seq_len=max_seq_len or self.config.max_seq_len, dtype=dtype)

    def encode(self, input_features: Tensor) -> Encoded:
        """Encode frames (B, bands, F) of sound.

        Raises:
            RequestError: Another number of bands or frames than the model was made for.
        """
        wanted = (self.config.num_mel_bins, self.config.num_frames)
        if tuple(input_features.shape[1:]) != wanted:
            raise RequestError(
                f"input_features has shape {tuple(input_features.shape)}; expected (B, {wanted[0]}, {wanted[1]}). "
                "Fill clips up with silence (modelwright.nn.mel.to_input_features)."
            )
        return Encoded(self.encoder(input_features.to(self.encoder.conv1.weight.dtype)))

    def decode(
        self,
        decoder_input_ids: Tensor,
        encoded: Encoded,
        *,
        decoder_attention_mask: Tensor | None = None,
        state: Any = None,
    ) -> Tensor:
        """Return the logits (B, T, V) of the tokens after ``decoder_input_ids`` (B, T).

        Args:
            decoder_input_ids: What is written so far, the prompt of language and task first; with a state, what is
                new of it.
            encoded: From `encode`.
            decoder_attention_mask: (B, T), 1 for tokens and 0 for padding; not with a state.
            state: From `new_state`; it keeps the keys of the decoder and, from the first step on, of ``encoded``.

        Raises:
            RequestError: The text is longer than the model writes.
        """
        past = 0 if state is None else state.length
        stop = past + decoder_input_ids.shape[1]
        if stop > self.config.max_seq_len:
            raise RequestError(
                f"The text reaches {stop} tokens; this model writes at most {self.config.max_seq_len}. Shorten it.",
                code="context_length_exceeded",
            )
        x = self.embed(decoder_input_ids) + self.decoder.positions.weight[past:stop]  # (B, T, D)
        mask = None if decoder_attention_mask is None else padding_mask(decoder_attention_mask)
        for layer in self.decoder.layers:
            x = layer(x, encoded, mask, None, state)
        if state is not None:
            state.advance(stop - past)
        return self.lm_head(self.decoder.norm(x))

    def forward(
        self, input_features: Tensor, decoder_input_ids: Tensor, *, decoder_attention_mask: Tensor | None = None
    ) -> EncoderDecoderOutput:
        """Read frames (B, bands, F) and return the logits after each of ``decoder_input_ids`` (B, T)."""
        encoded = self.encode(input_features)
        logits = self.decode(decoder_input_ids, encoded, decoder_attention_mask=decoder_attention_mask)
        return EncoderDecoderOutput(logits, encoded.hidden)


ARCHITECTURES = {"WhisperForConditionalGeneration": Whisper}
