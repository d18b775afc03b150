"""Mamba-2: a stack of state-space-duality layers; one decay per head instead of one per channel and state.

Memory while decoding is of one size: per layer a state of P x N numbers for each head and the last inputs of a short
convolution. The residual stream stays float32 with 16-bit weights, as published.

Source: Dao and Gu 2024, "Transformers are SSMs", arXiv 2405.21060. Against transformers: ``time_step_limit`` holds
while decoding too (there only over sequences), padding is inert wherever it stands (there the state decays over
padding on the right, and with ``use_bias`` the bias leaks into the convolution).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.models.decoder import LayerCache
from modelwright.models.published import check_published, check_sizes, token_ids_from_hf, token_ids_to_hf
from modelwright.models.state_decoder import StateDecoder
from modelwright.nn.init import mark_residual_output
from modelwright.nn.norm import RMSNorm
from modelwright.nn.past import Segments
from modelwright.nn.ssd import Mamba2Mixer, SsdShape


@dataclass(frozen=True)
class Mamba2Config:
    """How a Mamba-2 is built."""

    vocab_size: int
    hidden_size: int = 768
    num_layers: int = 24
    mixer: SsdShape = SsdShape(num_heads=24)  # num_heads x head_dim is a multiple of hidden_size, usually twice
    bias: bool = False  # of the projections in and out
    conv_bias: bool = True
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True  # the stream is float32 whatever the weights are
    tie_embeddings: bool = False  # the output matrix is the embedding
    max_seq_len: int = 2048  # trained at; the recurrence itself has no limit, and none is set
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "hidden_size", "num_layers", "max_seq_len")
        inner_expand(self.mixer, self.hidden_size)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "Mamba2Config":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute.
        """
        check_published(values, "mamba2", hidden_act="silu")
        mixer = SsdShape(
            num_heads=values.get("num_heads", 128),
            head_dim=values.get("head_dim", 64),
            state_size=values.get("state_size", 128),
            num_groups=values.get("n_groups", 8),
            num_taps=values.get("conv_kernel", 4),
            chunk_size=values.get("chunk_size", 256),
            step_limit=step_limit_from_hf(values),
        )
        config = cls(
            vocab_size=values.get("vocab_size", 32768),
            hidden_size=values.get("hidden_size", 4096),
            num_layers=values.get("num_hidden_layers", 64),
            mixer=mixer,
            bias=values.get("use_bias", False),
            conv_bias=values.get("use_conv_bias", True),
            norm_eps=values.get("layer_norm_epsilon", 1e-5),
            residual_in_fp32=values.get("residual_in_fp32", True),
            tie_embeddings=values.get("tie_word_embeddings", False),
            **token_ids_from_hf(values),
        )
        check_published(values, "mamba2", expand=inner_expand(mixer, config.hidden_size))
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        m = self.mixer
        return {
            "architectures": ["Mamba2ForCausalLM"],
            "model_type": "mamba2",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_heads": m.num_heads,
            "head_dim": m.head_dim,
            "state_size": m.state_size,
            "n_groups": m.num_groups,
            "conv_kernel": m.num_taps,
            "chunk_size": m.chunk_size,
            "expand": inner_expand(m, self.hidden_size),
            **step_limit_to_hf(m),
            "use_bias": self.bias,
            "use_conv_bias": self.conv_bias,
            "hidden_act": "silu",
            "layer_norm_epsilon": self.norm_eps,
            "residual_in_fp32": self.residual_in_fp32,
            "tie_word_embeddings": self.tie_embeddings,
            "use_cache": True,
            **token_ids_to_hf(self),
        }


def inner_expand(mixer: SsdShape, hidden_size: int) -> int:
    """Return how many times ``hidden_size`` the inner size is, the published way to say it.

    Raises:
        ConfigError: It is no multiple.
    """
    if mixer.inner_size % hidden_size:
        raise ConfigError(
            f"A Mamba-2 layer has {mixer.num_heads} heads of {mixer.head_dim}, together {mixer.inner_size}; this must "
            f"be a multiple of hidden_size, which is {hidden_size}."
        )
    return mixer.inner_size // hidden_size


def step_limit_from_hf(values: Mapping[str, Any]) -> tuple[float, float]:
    """Read ``time_step_limit``; transformers writes an infinite end as a dictionary, older exports as Infinity."""
    low, high = values.get("time_step_limit") or (0.0, float("inf"))
    return float(low), float(high["__float__"] if isinstance(high, dict) else high)


def step_limit_to_hf(mixer: SsdShape) -> dict[str, Any]:
    """Write ``time_step_limit`` unless it is the published default, whose infinity is no JSON number."""
    return {} if mixer.step_limit == (0.0, float("inf")) else {"time_step_limit": list(mixer.step_limit)}


class Mamba2Block(nn.Module):
    """One mixer behind a norm, added to the stream."""

    def __init__(self, config: Mamba2Config, layer_index: int):
        super().__init__()
        c = config
        self.residual_in_fp32 = c.residual_in_fp32
        self.norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mixer = Mamba2Mixer(
            c.hidden_size, c.mixer, norm_eps=c.norm_eps, bias=c.bias, conv_bias=c.conv_bias, layer_index=layer_index
        )
        mark_residual_output(self.mixer.out_proj, c.num_layers)

    def forward(self, x: Tensor, places: Segments, mask: Tensor | None, state: Any) -> Tensor:
        """Map the stream (B, T, D) to (B, T, D)."""
        y = self.mixer(self.norm(x.to(self.norm.weight.dtype)), state=state, segments=places)
        return (x.float() if self.residual_in_fp32 else x) + y


class Mamba2(StateDecoder):
    """A Mamba-2 language model. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[type[Mamba2Config]] = Mamba2Config
    published_names: ClassVar[dict[str, str]] = {
        "embed": "backbone.embeddings",
        "layers.*.norm": "backbone.layers.*.norm",
        "layers.*.mixer.in_proj": "backbone.layers.*.mixer.in_proj",
        "layers.*.mixer.conv": "backbone.layers.*.mixer.conv1d",
        "layers.*.mixer.dt_bias": "backbone.layers.*.mixer.dt_bias",
        "layers.*.mixer.A_log": "backbone.layers.*.mixer.A_log",
        "layers.*.mixer.D": "backbone.layers.*.mixer.D",
        "layers.*.mixer.norm": "backbone.layers.*.mixer.norm",
        "layers.*.mixer.out_proj": "backbone.layers.*.mixer.out_proj",
        "norm": "backbone.norm_f",
        "lm_head": "lm_head",
    }

    def __init__(self, config: Mamba2Config):
        blocks: list[nn.Module] = [Mamba2Block(config, i) for i in range(config.num_layers)]
        super().__init__(config, blocks, RMSNorm(config.hidden_size, config.norm_eps))
        self.tie_weights()

    def cache_layout(self) -> list[LayerCache]:
        """Return what each layer remembers of a sequence: the state and the convolution's last inputs."""
        return [LayerCache(fixed_size=self.config.mixer.memory_size)] * self.config.num_layers


ARCHITECTURES = {"Mamba2ForCausalLM": Mamba2}
