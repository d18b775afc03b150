"""A hybrid: Mamba-2 layers with attention at chosen places, each followed by a SwiGLU half; published as Bamba.

Any pattern is built, from all recurrence to all attention. Attention rotates a part of each head (half in Bamba). The
recurrent layers' memory is of one size, so only the attention layers' cache grows with the length.

Source: the Bamba release (IBM, Princeton, CMU and UIUC, 2024) and its code in transformers; Lieber et al. 2024,
"Jamba", arXiv 2403.19887 (mixing the two); Dao and Gu 2024, arXiv 2405.21060, section 9.2.3. Against transformers: as
for Mamba-2, and positions go on while decoding (there they begin at 0 with each step unless they are given).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.models.decoder import LayerCache
from modelwright.models.mamba2 import inner_expand, step_limit_from_hf, step_limit_to_hf
from modelwright.models.published import check_published, check_sizes, token_ids_from_hf, token_ids_to_hf
from modelwright.models.state_decoder import StateDecoder
from modelwright.nn.attention import Attention
from modelwright.nn.init import mark_residual_output
from modelwright.nn.mlp import GatedMlp
from modelwright.nn.norm import RMSNorm
from modelwright.nn.past import Segments
from modelwright.nn.rope import Rope, RotaryTable
from modelwright.nn.ssd import Mamba2Mixer, SsdShape


@dataclass(frozen=True)
class HybridConfig:
    """How a hybrid is built."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 8
    attention_layers: tuple[int, ...] = ()  # indices of the layers that are attention; the others are Mamba-2
    num_heads: int = 4
    num_kv_heads: int | None = None  # None: as many as num_heads
    mixer: SsdShape = SsdShape(num_heads=8)  # num_heads x head_dim is a multiple of hidden_size, usually twice
    max_seq_len: int = 2048
    rope_theta: float = 10000.0
    rotary_fraction: float = 0.5  # of each head that is rotated
    norm_eps: float = 1e-5
    tie_embeddings: bool = False  # the output matrix is the embedding
    attention_bias: bool = False
    mlp_bias: bool = False
    mixer_bias: bool = False  # of the Mamba layers' projections in and out
    conv_bias: bool = True
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        check_sizes(self, *sizes, "max_seq_len")
        inner_expand(self.mixer, self.hidden_size)
        assert self.num_kv_heads is not None
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"hidden_size is {self.hidden_size}, num_heads {self.num_heads}, num_kv_heads {self.num_kv_heads}; "
                "each must be a multiple of the next."
            )
        if not 0 < self.rotary_fraction <= 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ConfigError(
                f"rotary_fraction is {self.rotary_fraction} of heads of {self.head_dim}; it must give an even number "
                "of at least 2."
            )
        wrong = [i for i in self.attention_layers if not 0 <= i < self.num_layers]
        if wrong:
            raise ConfigError(f"attention_layers names {wrong}; the layers are 0 .. {self.num_layers - 1}.")

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """Numbers of an attention head that are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "HybridConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute.
        """
        check_published(values, "bamba", hidden_act="silu", attention_dropout=0.0)
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        kind = rope.get("rope_type", "default")
        if kind != "default":
            raise ConfigError(f"rope scaling is {kind!r}; the bamba model here computes 'default' only.")
        hidden_size, heads = values.get("hidden_size", 4096), values.get("mamba_n_heads", 128)
        inner_size = values.get("mamba_expand", 2) * hidden_size
        head_dim = values.get("mamba_d_head", "auto")
        mixer = SsdShape(
            num_heads=heads,
            head_dim=inner_size // heads if head_dim == "auto" else head_dim,
            state_size=values.get("mamba_d_state", 256),
            num_groups=values.get("mamba_n_groups", 1),
            num_taps=values.get("mamba_d_conv", 4),
            chunk_size=values.get("mamba_chunk_size", 256),
            step_limit=step_limit_from_hf(values),
        )
        check_published(values, "bamba", mamba_expand=inner_expand(mixer, hidden_size))
        return cls(
            vocab_size=values.get("vocab_size", 128000),
            hidden_size=hidden_size,
            intermediate_size=values.get("intermediate_size", 14336),
            num_layers=values.get("num_hidden_layers", 32),
            attention_layers=tuple(values.get("attn_layer_indices") or ()),
            num_heads=values.get("num_attention_heads", 32),
            num_kv_heads=values.get("num_key_value_heads", 8),
            mixer=mixer,
            max_seq_len=values.get("max_position_embeddings", 262144),
            rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
            rotary_fraction=rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 0.5)),
            norm_eps=values.get("rms_norm_eps", 1e-5),
            tie_embeddings=values.get("tie_word_embeddings", False),
            attention_bias=values.get("attention_bias", False),
            mlp_bias=values.get("mlp_bias", False),
            mixer_bias=values.get("mamba_proj_bias", False),
            conv_bias=values.get("mamba_conv_bias", True),
            **token_ids_from_hf(values),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        m = self.mixer
        return {
            "architectures": ["BambaForCausalLM"],
            "model_type": "bamba",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "attn_layer_indices": list(self.attention_layers),
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "mamba_n_heads": m.num_heads,
            "mamba_d_head": m.head_dim,
            "mamba_d_state": m.state_size,
            "mamba_n_groups": m.num_groups,
            "mamba_d_conv": m.num_taps,
            "mamba_chunk_size": m.chunk_size,
            "mamba_expand": inner_expand(m, self.hidden_size),
            **step_limit_to_hf(m),
            "mamba_proj_bias": self.mixer_bias,
            "mamba_conv_bias": self.conv_bias,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": self.max_seq_len,
            "rope_theta": self.rope_theta,
            "partial_rotary_factor": self.rotary_fraction,
            "tie_word_embeddings": self.tie_embeddings,
            "use_cache": True,
            **token_ids_to_hf(self),
        }


class Places(NamedTuple):
    """What the two kinds of layers are told of the positions."""

    rope: Rope
    segments: Segments


class HybridBlock(nn.Module):
    """Attention or a Mamba-2 mixer, then the feed-forward half, each behind a norm and added to the stream."""

    def __init__(self, config: HybridConfig, layer_index: int):
        super().__init__()
        c = config
        assert c.num_kv_heads is not None
        self.mixer_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.attention: Attention | None = None
        self.mixer: Mamba2Mixer | None = None
        if layer_index in c.attention_layers:
            self.attention = Attention(
                c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, layer_index=layer_index, bias=c.attention_bias
            )
            mark_residual_output(self.attention.o, c.num_layers)
        else:
            self.mixer = Mamba2Mixer(
                c.hidden_size,
                c.mixer,
                norm_eps=c.norm_eps,
                bias=c.mixer_bias,
                conv_bias=c.conv_bias,
                layer_index=layer_index,
            )
            mark_residual_output(self.mixer.out_proj, c.num_layers)
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = GatedMlp(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        mark_residual_output(self.mlp.down, c.num_layers)

    def forward(self, x: Tensor, places: Places, mask: Tensor | None, state: Any) -> Tensor:
        """Map the stream (B, T, D) to (B, T, D)."""
        y = self.mixer_norm(x)
        if self.attention is not None:
            y = self.attention(y, places.rope, mask=mask, state=state)
        else:
            assert self.mixer is not None
            y = self.mixer(y, state=state, segments=places.segments)
        x = x + y
        return x + self.mlp(self.mlp_norm(x))


class Hybrid(StateDecoder):
    """A language model of Mamba-2 and attention layers. Fresh weights come from `modelwright.nn.init.init_weights`."""

    has_attention: ClassVar[bool] = True
    config_class: ClassVar[type[HybridConfig]] = HybridConfig
    published_names: ClassVar[dict[str, str]] = {
        "embed": "model.embed_tokens",
        "layers.*.mixer_norm": "model.layers.*.input_layernorm",
        "layers.*.attention.q": "model.layers.*.self_attn.q_proj",
        "layers.*.attention.k": "model.layers.*.self_attn.k_proj",
        "layers.*.attention.v": "model.layers.*.self_attn.v_proj",
        "layers.*.attention.o": "model.layers.*.self_attn.o_proj",
        "layers.*.mixer.in_proj": "model.layers.*.mamba.in_proj",
        "layers.*.mixer.conv": "model.layers.*.mamba.conv1d",
        "layers.*.mixer.dt_bias": "model.layers.*.mamba.dt_bias",
        "layers.*.mixer.A_log": "model.layers.*.mamba.A_log",
        "layers.*.mixer.D": "model.layers.*.mamba.D",
        "layers.*.mixer.norm": "model.layers.*.mamba.norm",
        "layers.*.mixer.out_proj": "model.layers.*.mamba.out_proj",
        "layers.*.mlp_norm": "model.layers.*.pre_ff_layernorm",
        "layers.*.mlp.gate": "model.layers.*.feed_forward.gate_proj",
        "layers.*.mlp.up": "model.layers.*.feed_forward.up_proj",
        "layers.*.mlp.down": "model.layers.*.feed_forward.down_proj",
        "norm": "model.final_layernorm",
        "lm_head": "lm_head",
    }

    def __init__(self, config: HybridConfig):
        blocks: list[nn.Module] = [HybridBlock(config, i) for i in range(config.num_layers)]
        super().__init__(config, blocks, RMSNorm(config.hidden_size, config.norm_eps))
        self.rope = RotaryTable(config.rotary_dim, config.max_seq_len, config.rope_theta)
        self.tie_weights()

    def places(self, x: Tensor, positions: Tensor | None, segments: Segments) -> Places:
        """Return the rotation for the attention layers and the segments for the others."""
        return Places(self.rope(x.shape[1], positions), segments)

    def cache_layout(self) -> list[LayerCache]:
        """Return what each layer remembers of a sequence."""
        c = self.config
        attention = LayerCache(c.num_kv_heads, c.head_dim, c.head_dim)
        mixer = LayerCache(fixed_size=c.mixer.memory_size)
        return [attention if i in c.attention_layers else mixer for i in range(c.num_layers)]


ARCHITECTURES = {"BambaForCausalLM": Hybrid}
