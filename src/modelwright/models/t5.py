"""T5: an encoder and a decoder with relative position biases, RMSNorm, no biases and no scale on the scores.

One file for the families that are the same computation: T5 (ReLU, the embedding is the output matrix and the last
state is scaled by 1/sqrt(D) before it), T5 1.1, Flan-T5 and UL2 (gated GELU, an output matrix of its own, no scale),
and the encoder alone. The first layer of each stack holds the table of biases for all its layers; the decoder's
looks back only. Cross-attention has none.

Source: Raffel et al. 2019, arXiv 1910.10683; Shazeer 2020, arXiv 2002.05202 (gated); Tay et al. 2022,
arXiv 2205.05131 (UL2). Not here: dropout, umT5 (a table in every layer).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.models.encoder_decoder import Encoded, EncoderDecoderBlock, EncoderDecoderOutput
from modelwright.nn.attention import Attention, AttentionOptions, padding_mask
from modelwright.nn.decode_state import KVState
from modelwright.nn.init import mark_residual_output
from modelwright.nn.mlp import GatedMlp, Mlp
from modelwright.nn.norm import RMSNorm
from modelwright.nn.positions import RelativeBias

GATED_ACTS = {"gelu": "gelu_new"}  # "gated-gelu" has always meant the tanh approximation


@dataclass(frozen=True)
class T5Config:
    """How a T5 is built; the defaults are those of T5 small."""

    vocab_size: int = 32128
    hidden_size: int = 512
    head_dim: int = 64  # num_heads * head_dim need not be hidden_size
    intermediate_size: int = 2048
    num_layers: int = 6  # of the encoder
    num_decoder_layers: int | None = None  # None: as many as num_layers
    num_heads: int = 8
    num_buckets: int = 32  # distances that a bias tells apart
    max_distance: int = 128  # from here on all distances share a bucket
    act: str = "relu"
    is_gated: bool = False
    norm_eps: float = 1e-6
    tie_embeddings: bool = True  # the output matrix is the embedding
    is_output_scaled: bool | None = None  # by 1/sqrt(hidden_size); None: when tied
    architecture: str = "T5ForConditionalGeneration"  # T5EncoderModel: the encoder alone
    max_seq_len: int = 512  # what a decode state holds unless told; the model itself has no limit
    decoder_start_token_id: int = 0
    pad_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self) -> None:
        if self.num_decoder_layers is None:
            object.__setattr__(self, "num_decoder_layers", self.num_layers)
        if self.is_output_scaled is None:
            object.__setattr__(self, "is_output_scaled", self.tie_embeddings)
        sizes = ("vocab_size", "hidden_size", "head_dim", "intermediate_size", "num_layers", "num_decoder_layers")
        for name in (*sizes, "num_heads", "max_seq_len"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if self.num_buckets < 4 or self.num_buckets % 4 or self.max_distance <= self.num_buckets // 2:
            raise ConfigError(
                f"num_buckets is {self.num_buckets} and max_distance is {self.max_distance}; the buckets must be a "
                "multiple of 4, and the distance above half of them."
            )
        if self.architecture not in ("T5ForConditionalGeneration", "T5EncoderModel"):
            raise ConfigError(
                f"architecture is {self.architecture!r}; known: T5ForConditionalGeneration, T5EncoderModel."
            )

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "T5Config":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute.
        """
        if values.get("is_decoder", False):
            raise ConfigError("is_decoder is True; T5 here is an encoder-decoder or an encoder.")
        default = cls()
        gate, _, act = values.get("feed_forward_proj", "relu").rpartition("-")
        if gate not in ("", "gated"):
            raise ConfigError(f"feed_forward_proj is {values['feed_forward_proj']!r}; known: relu, gated-gelu, ....")
        is_tied = values.get("tie_word_embeddings", True)
        start = values.get("decoder_start_token_id")
        return cls(
            vocab_size=values.get("vocab_size", default.vocab_size),
            hidden_size=values.get("d_model", default.hidden_size),
            head_dim=values.get("d_kv", default.head_dim),
            intermediate_size=values.get("d_ff", default.intermediate_size),
            num_layers=values.get("num_layers", default.num_layers),
            num_decoder_layers=values.get("num_decoder_layers"),
            num_heads=values.get("num_heads", default.num_heads),
            num_buckets=values.get("relative_attention_num_buckets", default.num_buckets),
            max_distance=values.get("relative_attention_max_distance", default.max_distance),
            act=GATED_ACTS.get(act, act) if gate else act,
            is_gated=gate == "gated",
            norm_eps=values.get("layer_norm_epsilon", default.norm_eps),
            tie_embeddings=is_tied,
            is_output_scaled=values.get("scale_decoder_outputs", is_tied),
            architecture=(values.get("architectures") or [default.architecture])[0],
            max_seq_len=values.get("n_positions", default.max_seq_len),
            decoder_start_token_id=default.decoder_start_token_id if start is None else start,
            pad_token_id=values.get("pad_token_id", default.pad_token_id),
            eos_token_id=values.get("eos_token_id", default.eos_token_id),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        act = {theirs: name for name, theirs in GATED_ACTS.items()}.get(self.act, self.act)
        return {
            "architectures": [self.architecture],
            "model_type": "t5",
            "vocab_size": self.vocab_size,
            "d_model": self.hidden_size,
            "d_kv": self.head_dim,
            "d_ff": self.intermediate_size,
            "num_layers": self.num_layers,
            "num_decoder_layers": self.num_decoder_layers,
            "num_heads": self.num_heads,
            "relative_attention_num_buckets": self.num_buckets,
            "relative_attention_max_distance": self.max_distance,
            "feed_forward_proj": f"gated-{act}" if self.is_gated else self.act,
            "layer_norm_epsilon": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "scale_decoder_outputs": self.is_output_scaled,
            "is_encoder_decoder": self.architecture != "T5EncoderModel",
            "n_positions": self.max_seq_len,
            "decoder_start_token_id": self.decoder_start_token_id,
            "bos_token_id": None,
            "pad_token_id": self.pad_token_id,
            "eos_token_id": self.eos_token_id,
        }


def _attention(config: T5Config, layer_index: int, is_cross: bool = False) -> Attention:
    c = config
    options = AttentionOptions(scale=1.0, context_size=c.hidden_size if is_cross else None)
    attention = Attention(c.hidden_size, c.num_heads, c.num_heads, c.head_dim, layer_index=layer_index, options=options)
    attention.q.init_scale = c.head_dim**-0.5  # type: ignore[assignment]  # in place of the scale on the scores
    mark_residual_output(attention.o, c.num_layers)
    return attention


def _mlp(config: T5Config) -> nn.Module:
    mlp = (GatedMlp if config.is_gated else Mlp)(
        config.hidden_size, config.intermediate_size, act=config.act, bias=False
    )
    mark_residual_output(mlp.down, config.num_layers)
    return mlp


class T5EncoderBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, config: T5Config, layer_index: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = _attention(config, layer_index)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = _mlp(config)

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor) -> Tensor:
        """Map the stream (B, S, D) to (B, S, D)."""
        x = x + self.attention(self.attention_norm(x), mask=mask, is_causal=False, bias=bias)
        return x + self.mlp(self.mlp_norm(x))


class T5Stack(nn.Module):
    """The encoder's or the decoder's layers, their table of biases and their last norm."""

    def __init__(self, config: T5Config, blocks: list[nn.Module], is_causal: bool):
        super().__init__()
        self.bias = RelativeBias(
            config.num_heads,
            is_bidirectional=not is_causal,
            num_buckets=config.num_buckets,
            max_distance=config.max_distance,
        )
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


def _stack_names(ours: str, mlp_index: int, config: T5Config) -> dict[str, str]:
    """Return the published names of a stack; the feed-forward is the last of a block's sub-layers."""
    layer, theirs = f"{ours}.layers.*", f"{ours}.block.*.layer"
    names = {
        f"{ours}.bias.embed": f"{ours}.block.0.layer.0.SelfAttention.relative_attention_bias",
        f"{ours}.norm": f"{ours}.final_layer_norm",
        f"{layer}.attention_norm": f"{theirs}.0.layer_norm",
        f"{layer}.mlp_norm": f"{theirs}.{mlp_index}.layer_norm",
        f"{layer}.mlp.down": f"{theirs}.{mlp_index}.DenseReluDense.wo",
    }
    ups = {"gate": "wi_0", "up": "wi_1"} if config.is_gated else {"up": "wi"}
    names |= {f"{layer}.mlp.{up}": f"{theirs}.{mlp_index}.DenseReluDense.{wi}" for up, wi in ups.items()}
    names |= {f"{layer}.attention.{x}": f"{theirs}.0.SelfAttention.{x}" for x in "qkvo"}
    if mlp_index == 2:
        names |= {f"{layer}.cross.{x}": f"{theirs}.1.EncDecAttention.{x}" for x in "qkvo"}
        names[f"{layer}.cross_norm"] = f"{theirs}.1.layer_norm"
    return names


class T5EncoderOutput(NamedTuple):
    """What the encoder alone returns."""

    last_hidden_state: Tensor  # (B, S, D)


class T5Encoder(nn.Module):
    """The encoder alone. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[type[T5Config]] = T5Config
    ignored_names: ClassVar[tuple[str, ...]] = ("encoder.embed_tokens.weight",)  # the embedding a second time
    architecture: ClassVar[str] = "T5EncoderModel"

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = replace(config, architecture=self.architecture)
        self.published_names = {"embed": "shared", **_stack_names("encoder", 1, config)}
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks: list[nn.Module] = [T5EncoderBlock(config, i) for i in range(config.num_layers)]
        self.encoder = T5Stack(config, blocks, is_causal=False)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Encoded:
        """Encode ``input_ids`` (B, S); ``attention_mask`` (B, S) marks tokens with 1 and padding with 0."""
        x = self.embed(input_ids)  # (B, S, D)
        mask = None if attention_mask is None else attention_mask.to(torch.bool)[:, None, None, :]  # (B, 1, 1, S)
        bias = self.encoder.bias(x.shape[1], x.shape[1])
        for layer in self.encoder.layers:
            x = layer(x, mask, bias)
        return Encoded(self.encoder.norm(x), mask)

    def forward(self, input_ids: Tensor, *, attention_mask: Tensor | None = None) -> T5EncoderOutput:
        """Encode ``input_ids`` (B, S); the arguments are those of `encode`."""
        return T5EncoderOutput(self.encode(input_ids, attention_mask).hidden)


class T5(T5Encoder):
    """The encoder and the decoder."""

    architecture: ClassVar[str] = "T5ForConditionalGeneration"
    ignored_names: ClassVar[tuple[str, ...]] = (
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",  # never used, once saved
    )

    def __init__(self, config: T5Config):
        super().__init__(config)
        c = config
        assert c.num_decoder_layers is not None
        self.published_names |= {"lm_head": "lm_head", **_stack_names("decoder", 2, config)}
        blocks: list[nn.Module] = []
        for i in range(c.num_decoder_layers):
            norms = tuple(RMSNorm(c.hidden_size, c.norm_eps) for _ in range(3))
            blocks.append(EncoderDecoderBlock(_attention(c, i), _attention(c, i, is_cross=True), _mlp(c), norms))
        self.decoder = T5Stack(c, blocks, is_causal=True)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the output matrix the embedding itself, where the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def tied_names(self) -> dict[str, str]:
        """Return which parameter is another one under a second name: {second: first}."""
        return {"lm_head.weight": "embed.weight"} if self.config.tie_embeddings else {}

    def _apply(self, fn: Any, recurse: bool = True) -> "T5":
        super()._apply(fn, recurse)
        self.tie_weights()  # moving off the meta device makes a new parameter per module
        return self

    def new_state(self, batch_size: int, max_seq_len: int | None = None, dtype: torch.dtype | None = None) -> KVState:
        """Return an empty state for `decode`."""
        return KVState(batch_size=batch_size, max_seq_len=max_seq_len or self.config.max_seq_len, dtype=dtype)

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
            decoder_input_ids: What is written so far, from ``config.decoder_start_token_id`` on; with a state, what
                is new of it.
            encoded: From `encode`.
            decoder_attention_mask: (B, T), 1 for tokens and 0 for padding; not with a state.
            state: From `new_state`; it keeps the keys of the decoder and, from the first step on, of ``encoded``.
        """
        x = self.embed(decoder_input_ids)  # (B, T, D)
        length = x.shape[1]
        past = 0 if state is None else state.length
        bias = self.decoder.bias(length, past + length, offset=past)
        mask = None if decoder_attention_mask is None else padding_mask(decoder_attention_mask)
        for layer in self.decoder.layers:
            x = layer(x, encoded, mask, bias, state)
        if state is not None:
            state.advance(length)
        x = self.decoder.norm(x)
        if self.config.is_output_scaled:
            x = x * self.config.hidden_size**-0.5
        return self.lm_head(x)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> EncoderDecoderOutput:
        """Read ``input_ids`` (B, S) and return the logits after each of ``decoder_input_ids`` (B, T).

        The masks mark tokens with 1 and padding with 0.
        """
        encoded = self.encode(input_ids, attention_mask)
        logits = self.decode(decoder_input_ids, encoded, decoder_attention_mask=decoder_attention_mask)
        return EncoderDecoderOutput(logits, encoded.hidden)


ARCHITECTURES = {"T5ForConditionalGeneration": T5, "T5EncoderModel": T5Encoder}
