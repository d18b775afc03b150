"""DeBERTa-v2 and v3: an encoder whose attention weighs content and distance apart.

The score of query t and key s is q_t . k_s + q_t . kr_d + k_s . qr_d, over sqrt(3 H): content to content, content to
position (``c2p``) and position to content (``p2c``), where d is the distance t - s in buckets that grow with its
logarithm, and kr, qr are projections of one table of distances that all layers share. The two terms of position are a
bias (B, N, T, T) on `attend`. DeBERTa-v3 is the same computation; its projections of the table are those of the
content (``share_att_key``).

Rows of nothing but padding aside, a query that is padding sees every token here; in the published code it sees all
positions alike. What tokens compute does not depend on it.

Source: He et al. 2021, arXiv 2006.03654; He et al. 2023, arXiv 2111.09543 (v3). T, S positions; N heads; R: half the
rows of the table of distances. Not here: the enhanced mask decoder and v3's discriminator head.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.models.encoder import (
    EncoderOutput,
    check_length,
    check_sizes,
    read_fields,
    token_mask,
    write_fields,
)
from modelwright.models.heads import HeadShape, Labels, task_models
from modelwright.nn.attention import attend
from modelwright.nn.mlp import Mlp, activation

FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_seq_len": "max_position_embeddings",
    "num_token_types": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
    "act": "hidden_act",
    "pad_token_id": "pad_token_id",
    "tie_embeddings": "tie_word_embeddings",
    "embedding_size": "embedding_size",
    "has_positions": "position_biased_input",
    "conv_size": "conv_kernel_size",
    "conv_act": "conv_act",
    "has_legacy_head": "legacy",
    "pooler_act": "pooler_hidden_act",
}
DISTANCE_FIELDS = {
    "max_distance": "max_relative_positions",
    "num_buckets": "position_buckets",
    "is_shared": "share_att_key",
}
FIXED = {"conv_groups": 1}


@dataclass(frozen=True)
class DistanceConfig:
    """How attention weighs distances."""

    terms: tuple[str, ...] = ("p2c", "c2p")  # which of the two terms of position there are
    max_distance: int = -1  # beyond it all distances are one; below 1: the longest input
    num_buckets: int = -1  # to each side; below 1: every distance is its own
    is_shared: bool = False  # the table goes through the projections of the content
    has_norm: bool = False  # the table is normed before it is projected

    def __post_init__(self) -> None:
        if set(self.terms) - {"c2p", "p2c"}:
            raise ConfigError(f"pos_att_type is {self.terms}; c2p and p2c are computed here. Use these.")


@dataclass(frozen=True)
class DebertaConfig:
    """How a DeBERTa-v2 is built; the defaults are those of the published config class, v3's are in every folder."""

    vocab_size: int = 128100
    hidden_size: int = 1536
    intermediate_size: int = 6144
    num_layers: int = 24
    num_heads: int = 24
    max_seq_len: int = 512
    num_token_types: int = 0
    norm_eps: float = 1e-7
    act: str = "gelu"
    pad_token_id: int = 0
    tie_embeddings: bool = True  # of a masked language model: the output matrix is the embedding
    embedding_size: int | None = None  # None: the hidden size
    has_positions: bool = True  # absolute positions are added to the input as well
    conv_size: int = 0  # width of the convolution beside the first layer; 0: there is none
    conv_act: str = "tanh"
    distance: DistanceConfig | None = None  # None: attention of content alone
    has_legacy_head: bool = True  # of a masked language model: BERT's head instead of DeBERTa's own
    pooler_act: str = "gelu"
    labels: Labels = Labels()

    def __post_init__(self) -> None:
        check_sizes(self)
        for act in (self.act, self.pooler_act, self.conv_act):
            activation(act)
        if not (self.has_legacy_head or self.tie_embeddings):
            raise ConfigError("tie_word_embeddings is False and legacy is False; DeBERTa's own head is the embedding.")

    @property
    def max_distance(self) -> int:
        """Distances beyond this are one."""
        given = -1 if self.distance is None else self.distance.max_distance
        return given if given >= 1 else self.max_seq_len

    @property
    def num_distances(self) -> int:
        """Rows of the table of distances to one side."""
        assert self.distance is not None
        return self.distance.num_buckets if self.distance.num_buckets > 0 else self.max_distance

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "DebertaConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute.
        """
        read = read_fields(values, FIELDS, FIXED)
        terms = values.get("pos_att_type") or ()
        terms = tuple(t.strip() for t in terms.lower().split("|")) if isinstance(terms, str) else tuple(terms)
        norms = {n.strip() for n in str(values.get("norm_rel_ebd", "none")).lower().split("|")}
        if norms - {"none", "layer_norm"}:
            raise ConfigError(f"norm_rel_ebd is {values['norm_rel_ebd']!r}; expected 'none' or 'layer_norm'.")
        if values.get("relative_attention", False):
            distances = read_fields(values, DISTANCE_FIELDS, {})
            read["distance"] = DistanceConfig(terms=terms, has_norm="layer_norm" in norms, **distances)
        elif terms:
            raise ConfigError(f"pos_att_type is {terms} and relative_attention is off; set it, or drop pos_att_type.")
        hidden_size = read.get("hidden_size", cls.hidden_size)
        head_dim = hidden_size // read.get("num_heads", cls.num_heads)
        if values.get("attention_head_size", head_dim) != head_dim:
            raise ConfigError(
                f"attention_head_size is {values['attention_head_size']}; only {head_dim} is computed here."
            )
        if values.get("pooler_hidden_size", hidden_size) != hidden_size:
            raise ConfigError(
                f"pooler_hidden_size is {values['pooler_hidden_size']}; the pooler here is as wide as the stream, "
                f"{hidden_size}."
            )
        return cls(**read, labels=Labels.from_hf(values))

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        values = write_fields(self, FIELDS, FIXED)
        if self.embedding_size is None:
            del values["embedding_size"]
        values |= {"relative_attention": self.distance is not None, "pooler_hidden_size": self.hidden_size}
        if self.distance is not None:
            norms = "layer_norm" if self.distance.has_norm else "none"
            values |= {**write_fields(self.distance, DISTANCE_FIELDS, {}), "norm_rel_ebd": norms}
            values["pos_att_type"] = list(self.distance.terms)
        return {"architectures": ["DebertaV2Model"], "model_type": "deberta-v2", **values, **self.labels.to_hf()}


def distance_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """Return the bucket of the distance t - s of every query t and key s, (T, T).

    Up to half the buckets a distance is its own, beyond that buckets widen until ``max_distance`` is the last.

    >>> distance_buckets(6, 4, 16)[5].tolist()
    [3, 3, 3, 2, 1, 0]
    """
    at = torch.arange(length)
    distance = at[:, None] - at
    if num_buckets < 1 or max_distance < 1:
        return distance
    half = num_buckets // 2
    # Rounded in float32 as published: another rounding puts a distance into the next bucket.
    far = distance.abs().clamp(min=half - 1)
    log = torch.log(far / half) / torch.log(torch.tensor((max_distance - 1) / half)) * (half - 1)
    return torch.where(distance.abs() <= half, distance, ((log.ceil() + half) * distance.sign()).long())


class DisentangledAttention(nn.Module):
    """Attention with a score of its own for distance."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        c, size = config, config.hidden_size
        self.num_heads, self.distance = c.num_heads, c.distance
        terms = () if c.distance is None else c.distance.terms
        self.scale = (size // c.num_heads * (1 + len(terms))) ** -0.5
        self.q, self.k, self.v, self.o = (nn.Linear(size, size) for _ in range(4))
        is_apart = c.distance is not None and not c.distance.is_shared
        self.distance_k = nn.Linear(size, size) if is_apart and "c2p" in terms else None
        self.distance_q = nn.Linear(size, size) if is_apart and "p2c" in terms else None

    def forward(self, x: Tensor, mask: Tensor | None, table: Tensor | None, places: Tensor | None) -> Tensor:
        """Map (B, T, D) to (B, T, D).

        Args:
            x: The stream.
            mask: Boolean, broadcast to (B, N, T, T), or None.
            table: (2R, D) the embedded distances, normed where the config says so; None: content alone.
            places: (T, T) the row of the table for each query and key.
        """
        q, k, v = self._heads(self.q(x)), self._heads(self.k(x)), self._heads(self.v(x))  # (B, T, N, H)
        bias = None if table is None or places is None else self._distance_bias(q, k, table, places)
        return self.o(attend(q, k, v, scale=self.scale, mask=mask, bias=bias).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def _distance_bias(self, q: Tensor, k: Tensor, table: Tensor, places: Tensor) -> Tensor | None:
        """Return the two terms of position, (B, N, T, T), scaled like the scores."""
        assert self.distance is not None
        batch, length = q.shape[:2]
        index = places.expand(batch, self.num_heads, length, length)
        terms = []
        if "c2p" in self.distance.terms:
            rows = self._heads((self.distance_k or self.k)(table))  # (2R, N, H)
            scores = torch.einsum("btnh,rnh->bntr", q, rows)
            terms.append(scores.gather(-1, index))
        if "p2c" in self.distance.terms:
            rows = self._heads((self.distance_q or self.q)(table))
            scores = torch.einsum("bsnh,rnh->bnsr", k, rows)
            terms.append(scores.gather(-1, index.mT).mT)  # the distance is the query's, whichever side scores it
        return sum(terms) * self.scale if terms else None


class SideConvolution(nn.Conv1d):
    """The convolution over positions beside the first layer of the large DeBERTa-v2: (B, T, D) to (B, T, D)."""

    def __init__(self, config: DebertaConfig):
        width = config.conv_size
        super().__init__(config.hidden_size, config.hidden_size, width, padding=(width - 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Mix neighbouring positions."""
        return super().forward(x.mT).mT

    def reset_own_parameters(self, generator: torch.Generator) -> None:
        """Draw the weights with deviation 1 / sqrt(inputs), zero the bias."""
        drawn = torch.empty(self.weight.shape).normal_(0.0, 1 / math.sqrt(self.weight[0].numel()), generator=generator)
        self.weight.copy_(drawn)
        if self.bias is not None:
            self.bias.zero_()


class DebertaBlock(nn.Module):
    """Attention and feed-forward, each added to the stream and normed after."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.attention = DisentangledAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, act=config.act)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None, table: Tensor | None, places: Tensor | None) -> Tensor:
        """Map the stream (B, T, D) to (B, T, D)."""
        x = self.attention_norm(x + self.attention(x, mask, table, places))
        return self.mlp_norm(x + self.mlp(x))


class Deberta(nn.Module):
    """A DeBERTa-v2 or v3 encoder. Fresh weights come from `modelwright.nn.init.init_weights`."""

    is_encoder: ClassVar[bool] = True
    config_class: ClassVar[Any] = DebertaConfig
    published_names: ClassVar[dict[str, str]] = {
        "embed": "embeddings.word_embeddings",
        "position_embed": "embeddings.position_embeddings",
        "type_embed": "embeddings.token_type_embeddings",
        "embed_up": "embeddings.embed_proj",
        "embed_norm": "embeddings.LayerNorm",
        "distance_embed": "encoder.rel_embeddings",
        "distance_norm": "encoder.LayerNorm",
        "conv": "encoder.conv.conv",
        "conv_norm": "encoder.conv.LayerNorm",
        "layers.*.attention.q": "encoder.layer.*.attention.self.query_proj",
        "layers.*.attention.k": "encoder.layer.*.attention.self.key_proj",
        "layers.*.attention.v": "encoder.layer.*.attention.self.value_proj",
        "layers.*.attention.distance_k": "encoder.layer.*.attention.self.pos_key_proj",
        "layers.*.attention.distance_q": "encoder.layer.*.attention.self.pos_query_proj",
        "layers.*.attention.o": "encoder.layer.*.attention.output.dense",
        "layers.*.attention_norm": "encoder.layer.*.attention.output.LayerNorm",
        "layers.*.mlp.up": "encoder.layer.*.intermediate.dense",
        "layers.*.mlp.down": "encoder.layer.*.output.dense",
        "layers.*.mlp_norm": "encoder.layer.*.output.LayerNorm",
    }
    optional_prefix: ClassVar[str] = "deberta."
    # Tables of numbers, absolute positions that v3 was exported with and does not add, and the pre-training heads.
    ignored_names: ClassVar[tuple[str, ...]] = (
        "embeddings.position_ids",
        "embeddings.position_embeddings.weight",
        "mask_predictions.*",
        "lm_predictions.*",
    )

    def __init__(self, config: DebertaConfig):
        super().__init__()
        c, size = config, config.embedding_size or config.hidden_size
        self.config = config
        self.embed = nn.Embedding(c.vocab_size, size)
        self.position_embed = nn.Embedding(c.max_seq_len, size) if c.has_positions else None
        self.type_embed = nn.Embedding(c.num_token_types, size) if c.num_token_types else None
        self.embed_up = nn.Linear(size, c.hidden_size, bias=False) if size != c.hidden_size else None
        self.embed_norm = nn.LayerNorm(c.hidden_size, c.norm_eps)
        self.layers = nn.ModuleList(DebertaBlock(c) for _ in range(c.num_layers))
        has_distances = c.distance is not None
        self.distance_embed = nn.Embedding(2 * c.num_distances, c.hidden_size) if has_distances else None
        has_norm = c.distance is not None and c.distance.has_norm
        self.distance_norm = nn.LayerNorm(c.hidden_size, c.norm_eps) if has_norm else None
        self.conv = SideConvolution(c) if c.conv_size else None
        self.conv_norm = nn.LayerNorm(c.hidden_size, c.norm_eps) if c.conv_size else None

    @staticmethod
    def head_shape(task: str, config: DebertaConfig) -> HeadShape:
        """Return how the head for a task is made and published."""
        if task == "masked_lm" and config.has_legacy_head:
            mlm = "cls.predictions"
            return HeadShape(
                f"{mlm}.decoder",
                out_bias=f"{mlm}.bias",
                dense=f"{mlm}.transform.dense",
                norm=f"{mlm}.transform.LayerNorm",
                act=config.act,
                width=config.embedding_size,
            )
        if task == "masked_lm":
            mlm = "lm_predictions.lm_head"
            dense, norm = f"{mlm}.dense", f"{mlm}.LayerNorm"
            return HeadShape(f"{mlm}.decoder", out_bias=f"{mlm}.bias", dense=dense, norm=norm, act=config.act)
        if task == "sequence_classification":
            return HeadShape("classifier", dense="pooler.dense", act=config.pooler_act, pool="first")
        return HeadShape("classifier" if task == "token_classification" else "qa_outputs")

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> EncoderOutput:
        """Encode ``input_ids`` (B, T); there is no pooler.

        Args:
            input_ids: Token ids.
            attention_mask: (B, T), 1 for tokens and 0 for padding; None when there is no padding (faster).
            token_type_ids: (B, T), 0 for the first text and 1 for the second; None means all 0. Only where the config
                has token types.
            mask: Boolean, True where attention is allowed, broadcast to (B, N, T, T).
        """
        check_length(input_ids, self.config.max_seq_len)
        is_token = None if attention_mask is None else attention_mask[..., None].bool()  # (B, T, 1)
        x = self._embed(input_ids, token_type_ids)
        embedded = x = x if is_token is None else x * is_token
        visible = token_mask(attention_mask, mask)
        table, places = self._distances(input_ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, visible, table, places)
            if index == 0 and self.conv is not None and self.conv_norm is not None:
                side = self.conv(embedded)
                side = side if is_token is None else side * is_token
                x = self.conv_norm(x + activation(self.config.conv_act)(side))
                x = x if is_token is None else x * is_token
        return EncoderOutput(x, None)

    def _embed(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        x = self.embed(input_ids)  # (B, T, E)
        if self.position_embed is not None:
            x = x + self.position_embed.weight[: input_ids.shape[1]]
        if self.type_embed is not None:
            x = x + (self.type_embed.weight[0] if token_type_ids is None else self.type_embed(token_type_ids))
        return self.embed_norm(x if self.embed_up is None else self.embed_up(x))  # (B, T, D)

    def _distances(self, input_ids: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the table (2R, D) of embedded distances, and its row for each query and key (T, T)."""
        c = self.config
        if self.distance_embed is None or c.distance is None:
            return None, None
        table = self.distance_embed.weight
        buckets = distance_buckets(input_ids.shape[1], c.distance.num_buckets, c.max_distance)
        places = (buckets + c.num_distances).clamp(0, 2 * c.num_distances - 1).to(input_ids.device)
        return table if self.distance_norm is None else self.distance_norm(table), places


ARCHITECTURES = task_models(Deberta, "DebertaV2", "deberta.")
