"""Mamba: a stack of selective state-space layers and nothing else; no attention, no feed-forward half, no positions.

Memory while decoding is of one size: per layer N numbers for each inner channel and the last inputs of a short
convolution. The residual stream stays float32 with 16-bit weights, as published.

Source: Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752.
Against transformers: padding is inert wherever it stands. There it is zeroed before the projection in, so with
``use_bias`` the bias leaks into the convolution, and padding on the right lets the state decay.
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
from modelwright.nn.ssm import MambaMixer


@dataclass(frozen=True)
class MambaConfig:
    """How a Mamba is built."""

    vocab_size: int
    hidden_size: int = 768
    num_layers: int = 24
    state_size: int = 16  # N
    expand: int = 2  # inner channels are so many times hidden_size
    num_taps: int = 4  # of the convolution
    step_rank: int | None = None  # None: hidden_size / 16, rounded up
    bias: bool = False  # of the projections in and out
    conv_bias: bool = True
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True  # the stream is float32 whatever the weights are
    tie_embeddings: bool = True  # the output matrix is the embedding
    max_seq_len: int = 2048  # trained at; the recurrence itself has no limit, and none is set
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "hidden_size", "num_layers", "state_size", "expand", "num_taps", "max_seq_len")
        if self.step_rank is None:
            object.__setattr__(self, "step_rank", -(-self.hidden_size // 16))
        check_sizes(self, "step_rank")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "MambaConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute.
        """
        check_published(values, "mamba", hidden_act="silu")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            if name not in values:
                raise ConfigError(
                    f"{name} is missing; use the transformers version of the model (its name ends in hf)."
                )
        rank = values.get("time_step_rank", "auto")
        config = cls(
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            num_layers=values["num_hidden_layers"],
            state_size=values.get("state_size", 16),
            expand=values.get("expand", 2),
            num_taps=values.get("conv_kernel", 4),
            step_rank=None if rank == "auto" else rank,
            bias=values.get("use_bias", False),
            conv_bias=values.get("use_conv_bias", True),
            norm_eps=values.get("layer_norm_epsilon", 1e-5),
            residual_in_fp32=values.get("residual_in_fp32", True),
            tie_embeddings=values.get("tie_word_embeddings", True),
            **token_ids_from_hf(values),
        )
        check_published(values, "mamba", intermediate_size=config.inner_size)
        return config

    @property
    def inner_size(self) -> int:
        """I = expand x D."""
        return self.expand * self.hidden_size

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        return {
            "architectures": ["MambaForCausalLM"],
            "model_type": "mamba",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.inner_size,
            "num_hidden_layers": self.num_layers,
            "state_size": self.state_size,
            "expand": self.expand,
            "conv_kernel": self.num_taps,
            "time_step_rank": self.step_rank,
            "use_bias": self.bias,
            "use_conv_bias": self.conv_bias,
            "hidden_act": "silu",
            "layer_norm_epsilon": self.norm_eps,
            "residual_in_fp32": self.residual_in_fp32,
            "tie_word_embeddings": self.tie_embeddings,
            "use_cache": True,
            **token_ids_to_hf(self),
        }


class MambaBlock(nn.Module):
    """One mixer behind a norm, added to the stream."""

    def __init__(self, config: MambaConfig, layer_index: int):
        super().__init__()
        c = config
        self.residual_in_fp32 = c.residual_in_fp32
        self.norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mixer = MambaMixer(
            c.hidden_size,
            c.inner_size,
            c.state_size,
            num_taps=c.num_taps,
            step_rank=c.step_rank,
            bias=c.bias,
            conv_bias=c.conv_bias,
            layer_index=layer_index,
        )
        mark_residual_output(self.mixer.out_proj, c.num_layers)

    def forward(self, x: Tensor, places: Segments, mask: Tensor | None, state: Any) -> Tensor:
        """Map the stream (B, T, D) to (B, T, D)."""
        y = self.mixer(self.norm(x.to(self.norm.weight.dtype)), state=state, segments=places)
        return (x.float() if self.residual_in_fp32 else x) + y


class Mamba(StateDecoder):
    """A Mamba language model. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[type[MambaConfig]] = MambaConfig
    published_names: ClassVar[dict[str, str]] = {
        "embed": "backbone.embeddings",
        "layers.*.norm": "backbone.layers.*.norm",
        "layers.*.mixer.in_proj": "backbone.layers.*.mixer.in_proj",
        "layers.*.mixer.conv": "backbone.layers.*.mixer.conv1d",
        "layers.*.mixer.select": "backbone.layers.*.mixer.x_proj",
        "layers.*.mixer.step": "backbone.layers.*.mixer.dt_proj",
        "layers.*.mixer.A_log": "backbone.layers.*.mixer.A_log",
        "layers.*.mixer.D": "backbone.layers.*.mixer.D",
        "layers.*.mixer.out_proj": "backbone.layers.*.mixer.out_proj",
        "norm": "backbone.norm_f",
        "lm_head": "lm_head",
    }

    def __init__(self, config: MambaConfig):
        blocks: list[nn.Module] = [MambaBlock(config, i) for i in range(config.num_layers)]
        super().__init__(config, blocks, RMSNorm(config.hidden_size, config.norm_eps))
        self.tie_weights()

    def cache_layout(self) -> list[LayerCache]:
        """Return what each layer remembers of a sequence: the state and the convolution's last inputs."""
        c = self.config
        return [LayerCache(fixed_size=c.inner_size * (c.state_size + c.num_taps - 1))] * c.num_layers


ARCHITECTURES = {"MambaForCausalLM": Mamba}
