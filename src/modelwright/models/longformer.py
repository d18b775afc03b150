"""Longformer: RoBERTa with a window of attention, and a few global tokens that see and are seen by all.

A token sees ``attention_window`` // 2 positions to each side, and the global tokens; a global token sees everything,
through projections of its own. Computed in pieces: each block of queries meets its own block of keys, its two
neighbours and the global tokens, so that time and memory grow with T * window. `LongformerAttention.attend_dense` is
the readable twin, which also serves whoever records attention maps. Padding sees nothing, as published.

Without a ``global_attention_mask`` a sequence classifier makes its first token global, an answerer its question (what
stands before the first separator), and everything else none.

Source: Beltagy et al. 2020, arXiv 2004.05150. T positions; W = ``attention_window`` // 2; G global tokens of the row
that has most. Not here: dilated windows, the autoregressive variant.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.base.errors import ConfigError, RequestError
from modelwright.models.bert import FIELDS, FIXED, Bert
from modelwright.models.encoder import EncoderOutput, check_length, check_sizes, read_fields, write_fields
from modelwright.models.heads import HeadShape, Labels, TaskModel, task_models
from modelwright.models.roberta import Roberta, roberta_head
from modelwright.nn.attention import attend, attention_weights, is_recording, record_weights
from modelwright.nn.mlp import activation


@dataclass(frozen=True)
class LongformerConfig:
    """How a Longformer is built; the defaults are those of Longformer base."""

    vocab_size: int = 50265
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_seq_len: int = 4096  # tokens; the published number of positions is pad_token_id + 1 more
    num_token_types: int = 1
    norm_eps: float = 1e-5
    act: str = "gelu"
    pad_token_id: int = 1
    tie_embeddings: bool = True  # of a masked language model: the output matrix is the embedding
    attention_window: tuple[int, ...] = (512,)  # width of the window, half to each side; one for all layers, or each
    sep_token_id: int = 2  # ends the question
    labels: Labels = Labels()

    def __post_init__(self) -> None:
        check_sizes(self)
        activation(self.act)
        windows = self.attention_window * self.num_layers if len(self.attention_window) == 1 else self.attention_window
        object.__setattr__(self, "attention_window", tuple(windows))
        if len(windows) != self.num_layers or any(w < 2 or w % 2 for w in windows):
            raise ConfigError(
                f"attention_window is {windows}; expected an even number of at least 2, one for all or one for each of "
                f"{self.num_layers} layers."
            )

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "LongformerConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute.
        """
        read = read_fields(values, FIELDS | {"sep_token_id": "sep_token_id"}, FIXED | {"attention_mode": "longformer"})
        if "max_seq_len" in read:
            read["max_seq_len"] -= read.get("pad_token_id", cls.pad_token_id) + 1
        windows = values.get("attention_window", 512)
        read["attention_window"] = (windows,) if isinstance(windows, int) else tuple(windows)
        return cls(**read, labels=Labels.from_hf(values))

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        values = write_fields(self, FIELDS | {"sep_token_id": "sep_token_id"}, FIXED) | self.labels.to_hf()
        values["max_position_embeddings"] += self.pad_token_id + 1
        values["attention_window"] = list(self.attention_window)
        return {"architectures": ["LongformerModel"], "model_type": "longformer"} | values


class Seen(NamedTuple):
    """Which positions are tokens, and which of them are global: (B, T) boolean each."""

    is_token: Tensor
    is_global: Tensor


class LongformerAttention(nn.Module):
    """Attention within a window, and from and to global tokens."""

    def __init__(self, config: LongformerConfig, layer_index: int):
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.reach = config.num_heads, config.attention_window[layer_index] // 2
        self.scale = (size // config.num_heads) ** -0.5
        self.q, self.k, self.v, self.o = (nn.Linear(size, size) for _ in range(4))
        self.global_q, self.global_k, self.global_v = (nn.Linear(size, size) for _ in range(3))

    def forward(self, x: Tensor, mask: Seen, is_causal: bool = False) -> Tensor:
        """Map (B, T, D) to (B, T, D); ``mask`` says which positions are tokens and which are global."""
        assert not is_causal
        is_short = x.shape[1] <= 2 * self.reach
        out = self.attend_dense(x, mask) if is_short or is_recording() else self.attend_pieces(x, mask)
        return self.o((out * mask.is_token[..., None, None]).flatten(2))

    def attend_dense(self, x: Tensor, seen: Seen) -> Tensor:
        """Attend by (T, T) scores: (B, T, D) to (B, T, N, H)."""
        at = torch.arange(x.shape[1], device=x.device)
        near = (at[:, None] - at).abs() <= self.reach  # (T, T)
        is_self = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)  # so that padding gives numbers
        local = (near | seen.is_global[:, None]) & seen.is_token[:, None] | is_self  # (B, T, T)
        everything = seen.is_token[:, None] | is_self
        q, k, v = (self._heads(p(x)) for p in (self.q, self.k, self.v))  # (B, T, N, H)
        weights = attention_weights(q, k, scale=self.scale, mask=local[:, None])  # (B, N, T, T)
        if not seen.is_global.any():
            record_weights(weights)
            return torch.einsum("bnts,bsnh->btnh", weights, v.float()).to(x.dtype)
        q, k, wide = (self._heads(p(x)) for p in (self.global_q, self.global_k, self.global_v))
        is_global = seen.is_global[:, None, :, None]  # (B, 1, T, 1)
        widely = attention_weights(q, k, scale=self.scale, mask=everything[:, None])
        record_weights(torch.where(is_global, widely, weights))
        out = torch.einsum("bnts,bsnh->btnh", weights.masked_fill(is_global, 0.0), v.float())
        return (out + torch.einsum("bnts,bsnh->btnh", widely.masked_fill(~is_global, 0.0), wide.float())).to(x.dtype)

    def attend_pieces(self, x: Tensor, seen: Seen) -> Tensor:
        """Attend a block of queries at a time: (B, T, D) to (B, T, N, H)."""
        batch, length, reach = *x.shape[:2], self.reach
        q, k, v = (self._heads(p(x)) for p in (self.q, self.k, self.v))  # (B, T, N, H)
        num_blocks = -(-length // reach)  # C blocks of W
        tail = num_blocks * reach - length
        blocks = F.pad(q, (0, 0, 0, 0, 0, tail)).unflatten(1, (num_blocks, reach))  # (B, C, W, N, H)
        is_padding = F.pad(~seen.is_token, (0, tail), value=True).unflatten(1, (num_blocks, reach))  # (B, C, W)
        near_k, near_v, is_local = (
            _with_neighbours(t, reach, num_blocks) for t in (k, v, seen.is_token & ~seen.is_global)
        )  # (B, C, 3W, N, H) twice, (B, C, 3W)
        apart = torch.arange(3 * reach, device=x.device) - reach - torch.arange(reach, device=x.device)[:, None]
        mask = (apart.abs() <= reach) & is_local[:, :, None]  # (B, C, W, 3W)
        mask = mask | ((apart == 0) & is_padding[..., None])  # so that padding gives numbers
        order = seen.is_global.int().argsort(dim=1, descending=True, stable=True)  # global positions first
        order = order[:, : int(seen.is_global.sum(1).max())]  # (B, G)
        is_real = seen.is_global.gather(1, order)  # (B, G): a row may have fewer
        at_global = order[..., None, None].expand(-1, -1, *k.shape[2:])  # (B, G, N, H)
        if order.shape[1]:
            near_k, near_v = (
                torch.cat((near, t.gather(1, at_global)[:, None].expand(-1, num_blocks, -1, -1, -1)), dim=2)
                for near, t in ((near_k, k), (near_v, v))
            )
            mask = torch.cat((mask, is_real[:, None, None].expand(-1, num_blocks, reach, -1)), dim=-1)
        q, k, v = blocks.flatten(0, 1), near_k.flatten(0, 1), near_v.flatten(0, 1)  # (B*C, W, N, H), (B*C, 3W+G, N, H)
        out = attend(q, k, v, scale=self.scale, mask=mask.flatten(0, 1)[:, None])
        out = out.unflatten(0, (batch, num_blocks)).flatten(1, 2)[:, :length]  # (B, T, N, H)
        if not order.shape[1]:
            return out
        wide = self._attend_widely(x, seen, order)  # (B, G, N, H)
        return out.scatter(1, at_global, torch.where(is_real[..., None, None], wide, out.gather(1, at_global)))

    def _attend_widely(self, x: Tensor, seen: Seen, order: Tensor) -> Tensor:
        """Attend from the positions ``order`` (B, G) to all tokens: (B, G, N, H)."""
        chosen = x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))  # (B, G, D)
        q, k, v = self._heads(self.global_q(chosen)), self._heads(self.global_k(x)), self._heads(self.global_v(x))
        is_token = seen.is_token | ~seen.is_token.any(-1, keepdim=True)
        return attend(q, k, v, scale=self.scale, mask=is_token[:, None, None])

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


def _with_neighbours(t: Tensor, reach: int, num_blocks: int) -> Tensor:
    """Lay each block of ``reach`` positions between its two neighbours: (B, T, ...) to (B, C, 3W, ...)."""
    rest = t.dim() - 2
    padded = F.pad(t, (0, 0) * rest + (reach, (num_blocks + 1) * reach - t.shape[1]))
    return padded.unfold(1, 3 * reach, reach).movedim(-1, 2)


class Longformer(Roberta):
    """A Longformer encoder. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[Any] = LongformerConfig
    published_names: ClassVar[dict[str, str]] = Bert.published_names | {
        "layers.*.attention.global_q": "encoder.layer.*.attention.self.query_global",
        "layers.*.attention.global_k": "encoder.layer.*.attention.self.key_global",
        "layers.*.attention.global_v": "encoder.layer.*.attention.self.value_global",
    }
    optional_prefix: ClassVar[str] = "longformer."

    @staticmethod
    def head_shape(task: str, config: Any) -> HeadShape:
        """Return how the head for a task is made and published."""
        return roberta_head(task)

    @staticmethod
    def make_attention(config: Any, layer_index: int) -> nn.Module:
        """Return the attention of one block."""
        return LongformerAttention(config, layer_index)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
    ) -> EncoderOutput:
        """Encode ``input_ids`` (B, T).

        Args:
            input_ids: Token ids.
            attention_mask: (B, T), 1 for tokens and 0 for padding.
            token_type_ids: (B, T); None means all 0.
            global_attention_mask: (B, T), 1 for tokens that see and are seen by all; None: there are none.
        """
        check_length(input_ids, self.config.max_seq_len)
        is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_global = torch.zeros_like(input_ids) if global_attention_mask is None else global_attention_mask
        seen = Seen(is_token.bool(), is_global.bool() & is_token.bool())
        return self.encode(self.embed_tokens(input_ids, token_type_ids, None), seen)


class LongformerTask(TaskModel):
    """Make global what the task asks for, where the caller does not say."""

    def complete(self, input_ids: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        """Add the global attention mask."""
        if inputs.get("global_attention_mask") is not None:
            return inputs
        at = torch.arange(input_ids.shape[1], device=input_ids.device)
        if self.task == "sequence_classification":
            return inputs | {"global_attention_mask": (at == 0).expand_as(input_ids)}
        is_separator = input_ids == self.config.sep_token_id
        if not bool(is_separator.any(1).all()):
            raise RequestError(
                f"A row has no separator (id {self.config.sep_token_id}) after its question; expected question, "
                "separator, text. Add it, or pass global_attention_mask."
            )
        return inputs | {"global_attention_mask": at < is_separator.int().argmax(1, keepdim=True)}


BASES: dict[str, type[TaskModel]] = dict.fromkeys(("sequence_classification", "question_answering"), LongformerTask)
ARCHITECTURES = task_models(Longformer, "Longformer", "longformer.", BASES)
