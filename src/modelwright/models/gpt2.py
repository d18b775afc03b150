"""GPT-2: the pre-norm decoder with learned positions, LayerNorm, biases everywhere and the output tied to the input.

The published checkpoints store their matrices as (in, out) and q, k, v in one.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3. Not here: dropout, and
the variants that scale attention by the layer's index or add cross-attention.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modelwright.models.decoder import Decoder
from modelwright.models.published import (
    check_published,
    check_sizes,
    required,
    split_hidden,
    token_ids_from_hf,
    token_ids_to_hf,
)
from modelwright.nn.attention import Attention
from modelwright.nn.init import mark_residual_output
from modelwright.nn.mlp import Mlp, activation


@dataclass(frozen=True)
class GPT2Config:
    """How a GPT-2 is built; the defaults are those of the smallest one."""

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int | None = None  # None: four times hidden_size
    num_layers: int = 12
    num_heads: int = 12
    max_seq_len: int = 1024
    act: str = "gelu_new"
    norm_eps: float = 1e-5
    tie_embeddings: bool = True  # the output matrix is the embedding
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "max_seq_len")
        check_sizes(self, *sizes)
        split_hidden(self.hidden_size, self.num_heads)
        activation(self.act)

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        """As many as there are query heads."""
        return self.num_heads

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "GPT2Config":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute.
        """
        fixed = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
        check_published(values, "gpt2", **fixed)
        return cls(
            vocab_size=required(values, "vocab_size"),
            hidden_size=required(values, "n_embd"),
            intermediate_size=values.get("n_inner"),
            num_layers=required(values, "n_layer"),
            num_heads=required(values, "n_head"),
            max_seq_len=values.get("n_positions", 1024),
            act=values.get("activation_function", "gelu_new"),
            norm_eps=values.get("layer_norm_epsilon", 1e-5),
            tie_embeddings=values.get("tie_word_embeddings", True),
            **token_ids_from_hf(values),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.vocab_size,
            "n_embd": self.hidden_size,
            "n_inner": self.intermediate_size,
            "n_layer": self.num_layers,
            "n_head": self.num_heads,
            "n_positions": self.max_seq_len,
            "n_ctx": self.max_seq_len,
            "activation_function": self.act,
            "layer_norm_epsilon": self.norm_eps,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "initializer_range": 0.02,
            "scale_attn_weights": True,
            "tie_word_embeddings": self.tie_embeddings,
            "use_cache": True,
            **token_ids_to_hf(self),
        }


class GPT2Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, config: GPT2Config, layer_index: int):
        super().__init__()
        c = config
        assert c.intermediate_size is not None
        self.attention_norm = nn.LayerNorm(c.hidden_size, c.norm_eps)
        self.attention = Attention(
            c.hidden_size, c.num_heads, c.num_heads, c.head_dim, layer_index=layer_index, bias=True
        )
        self.mlp_norm = nn.LayerNorm(c.hidden_size, c.norm_eps)
        self.mlp = Mlp(c.hidden_size, c.intermediate_size, act=c.act)
        mark_residual_output(self.attention.o, c.num_layers)
        mark_residual_output(self.mlp.down, c.num_layers)

    def forward(self, x: Tensor, places: None, mask: Tensor | None, state: Any) -> Tensor:
        """Map the stream (B, T, D) to (B, T, D)."""
        x = x + self.attention(self.attention_norm(x), mask=mask, state=state)
        return x + self.mlp(self.mlp_norm(x))


class GPT2(Decoder):
    """A GPT-2 language model. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[type[GPT2Config]] = GPT2Config
    published_names: ClassVar[dict[str, str]] = {
        "embed": "transformer.wte",
        "position_embed": "transformer.wpe",
        "layers.*.attention_norm": "transformer.h.*.ln_1",
        "layers.*.attention.o": "transformer.h.*.attn.c_proj",
        "layers.*.mlp_norm": "transformer.h.*.ln_2",
        "layers.*.mlp.up": "transformer.h.*.mlp.c_fc",
        "layers.*.mlp.down": "transformer.h.*.mlp.c_proj",
        "norm": "transformer.ln_f",
        "lm_head": "lm_head",
    }
    published_fused: ClassVar[dict[str, tuple[str, ...]]] = {
        "transformer.h.*.attn.c_attn": tuple(f"layers.*.attention.{name}" for name in "qkv"),
    }
    transposed_names: ClassVar[tuple[str, ...]] = tuple(
        f"transformer.h.*.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    )
    # The first release has no prefix; most exports since have it.
    other_prefixes: ClassVar[dict[str, str]] = {name: f"transformer.{name}" for name in ("wte", "wpe", "h.", "ln_f")}
    ignored_names: ClassVar[tuple[str, ...]] = (  # the causal mask, once saved by mistake
        "transformer.h.*.attn.bias",
        "transformer.h.*.attn.masked_bias",
    )

    def __init__(self, config: GPT2Config):
        blocks: list[nn.Module] = [GPT2Block(config, i) for i in range(config.num_layers)]
        super().__init__(config, blocks, nn.LayerNorm(config.hidden_size, config.norm_eps))
        self.position_embed = nn.Embedding(config.max_seq_len, config.hidden_size)
        self.tie_weights()

    def embed_tokens(self, input_ids: Tensor, positions: Tensor | None) -> Tensor:
        """Return the sum of a token's and its position's embedding, (B, T, D)."""
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return self.embed(input_ids) + self.position_embed(positions)


ARCHITECTURES = {"GPT2LMHeadModel": GPT2}
