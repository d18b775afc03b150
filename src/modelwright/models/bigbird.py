"""BigBird: BERT whose attention looks at blocks: the first and the last, its own and its neighbours, and random ones.

Rows longer than 5 + 2R blocks are computed block by block, so that time and memory grow with T; shorter ones, and
those of an ``original_full`` config, by full attention. A block that is drawn twice, or drawn though it is looked at
anyway, counts as often as it is met, as in the published code. `BigBirdAttention.attend_dense` is the readable twin,
which also serves whoever records attention maps.

Random blocks are drawn a head at a time from the layer's number, as in transformers, and in training only: in
evaluation the published code draws none but the first block, R times over, and so does this one.

Source: Zaheer et al. 2020, arXiv 2007.14062. M blocks of C positions; R random blocks; N heads. Not here: the decoder,
and global tokens beside the text (ETC).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.models.bert import FIELDS, FIXED, Bert
from modelwright.models.encoder import (
    EncoderOutput,
    check_length,
    check_sizes,
    read_fields,
    token_mask,
    write_fields,
)
from modelwright.models.heads import HeadShape, Labels, TaskModel, task_models
from modelwright.nn.attention import attend, attention_weights, is_recording, record_weights
from modelwright.nn.mlp import Mlp, activation

OWN_FIELDS = {
    "attention_type": "attention_type",
    "block_size": "block_size",
    "num_random_blocks": "num_random_blocks",
    "has_bias": "use_bias",
    "is_rescaled": "rescale_embeddings",
    "sep_token_id": "sep_token_id",
}
EARLY_LENGTHS, EARLY_LEN = (1024, 3072, 4096), 1024  # lengths for which blocks are drawn as in the paper's runs
QUESTION_PENALTY = 1e6  # taken from the scores of a question's tokens: they are no answer


@dataclass(frozen=True)
class BigBirdConfig:
    """How a BigBird is built; the defaults are those of BigBird base."""

    vocab_size: int = 50358
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_seq_len: int = 4096
    num_token_types: int = 2
    norm_eps: float = 1e-12
    act: str = "gelu_new"
    pad_token_id: int = 0
    tie_embeddings: bool = True  # of a masked language model: the output matrix is the embedding
    attention_type: str = "block_sparse"  # or original_full
    block_size: int = 64
    num_random_blocks: int = 3
    has_bias: bool = True  # on q, k and v
    is_rescaled: bool = False  # embeddings times sqrt(D)
    sep_token_id: int = 66  # ends the question
    labels: Labels = Labels()

    def __post_init__(self) -> None:
        check_sizes(self)
        activation(self.act)
        if self.attention_type not in ("block_sparse", "original_full"):
            raise ConfigError(f"attention_type is {self.attention_type!r}; known: block_sparse, original_full.")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "BigBirdConfig":
        """Read a published ``config.json``.

        Raises:
            ConfigError: A field has a value that this code does not compute.
        """
        fixed = FIXED | {"add_cross_attention": False}
        return cls(**read_fields(values, FIELDS | OWN_FIELDS, fixed), labels=Labels.from_hf(values))

    def to_hf(self) -> dict[str, Any]:
        """Return the published ``config.json`` (without the dtype, which the weights decide)."""
        values = write_fields(self, FIELDS | OWN_FIELDS, FIXED) | self.labels.to_hf()
        return {"architectures": ["BigBirdModel"], "model_type": "big_bird"} | values


@lru_cache(maxsize=256)
def random_blocks(
    num_blocks: int, block_size: int, num_random: int, num_heads: int, max_seq_len: int, seed: int
) -> Any:
    """Return the random blocks of each head and each query block but the first and last, (N, M - 2, R).

    The draws, their order included, are those of the published code, so that a seed gives the same blocks. They come
    from the first 2R + 5 blocks of a row, which has more, or from the first 1,024 positions at the paper's lengths.
    """
    rng = np.random.RandomState(seed)
    if num_blocks * block_size in EARLY_LENGTHS:
        all_blocks = max_seq_len // block_size
        heads = [_draw_early(all_blocks, block_size, num_random, rng) for _ in range(num_heads)]
        return np.stack(heads)[:, : num_blocks - 2]
    drawn = np.zeros((num_heads, num_blocks, num_random), dtype=np.int64)
    for row in range(1, num_blocks):  # the last row is drawn and not used
        for head in range(num_heads):
            drawn[head, row] = _draw_row(row, 2 * num_random + 5, num_random, rng)
    return drawn[:, 1:-1]


def _draw_row(row: int, stop: int, count: int, rng: Any) -> list[int]:
    """Draw blocks before ``stop`` that are no neighbours of the row and not at an end."""
    taken = {row - 1, row, row + 1, 0, stop - 1}
    if row == 1:
        taken.add(stop - 2)
    if row == stop - 2:
        taken.add(1)
    return [b for b in rng.permutation(np.arange(stop, dtype=np.int32)) if b not in taken][:count]


def _draw_early(num_blocks: int, block_size: int, num_random: int, rng: Any) -> Any:
    """Draw as in the paper's runs: from the first 1,024 positions, whatever the length."""
    middle = np.arange(1, num_blocks - 1, dtype=np.int32)
    last = EARLY_LEN // block_size - 1 if EARLY_LEN > 2 * block_size else num_blocks - 1
    rows = []
    for row in range(1, num_blocks - 1):
        if row <= 2:
            pool = middle[row + 1 : last]
        elif row >= num_blocks - 3 or row - 2 > last:
            pool = middle[:last]
        elif row + 1 == last:
            pool = middle[: row - 2]
        else:
            pool = np.concatenate((middle[: row - 2], middle[row + 1 : last]))
        rows.append(rng.permutation(pool)[:num_random])
    return np.array(rows, dtype=np.int64)


class Seen(NamedTuple):
    """Which positions are tokens, and whether the row is long enough for blocks."""

    is_token: Tensor | None  # (B, T) boolean; None: all
    is_sparse: bool


class BigBirdAttention(nn.Module):
    """Attention over blocks, or over everything."""

    def __init__(self, config: BigBirdConfig, layer_index: int):
        super().__init__()
        self.config, self.layer_index, size = config, layer_index, config.hidden_size
        self.scale = (size // config.num_heads) ** -0.5
        self.q, self.k, self.v = (nn.Linear(size, size, bias=config.has_bias) for _ in range(3))
        self.o = nn.Linear(size, size)

    def forward(self, x: Tensor, mask: Seen, is_causal: bool = False) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        assert not is_causal
        q, k, v = (p(x).unflatten(-1, (self.config.num_heads, -1)) for p in (self.q, self.k, self.v))  # (B, T, N, H)
        if not mask.is_sparse:
            return self.o(attend(q, k, v, scale=self.scale, mask=token_mask(mask.is_token)).flatten(2))
        length, size = x.shape[1], self.config.block_size
        tail = -length % size
        is_token = (
            torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask.is_token is None else mask.is_token
        )
        is_token = F.pad(is_token, (0, tail))
        q, k, v = (F.pad(t, (0, 0, 0, 0, 0, tail)) for t in (q, k, v))
        drawn = self.draw((length + tail) // size).to(x.device)
        compute = self.attend_dense if is_recording() else self.attend_blocks
        out = compute(q, k, v, is_token, drawn) * is_token[..., None, None]  # padding gets nothing, as published
        return self.o(out[:, :length].flatten(2))

    def draw(self, num_blocks: int) -> Tensor:
        """Return the random blocks, (N, M - 2, R): in evaluation the first block each time."""
        c = self.config
        if not self.training:
            return torch.zeros(c.num_heads, num_blocks - 2, c.num_random_blocks, dtype=torch.long)
        sizes = (num_blocks, c.block_size, c.num_random_blocks, c.num_heads, c.max_seq_len)
        return torch.from_numpy(random_blocks(*sizes, self.layer_index).copy())

    def attend_dense(self, q: Tensor, k: Tensor, v: Tensor, is_token: Tensor, drawn: Tensor) -> Tensor:
        """Attend by (T, T) scores, q, k, v and the result (B, T, N, H): the twin of `attend_blocks`."""
        size, num_blocks = self.config.block_size, q.shape[1] // self.config.block_size
        at = torch.arange(num_blocks, device=q.device)
        is_end = (at == 0) | (at == num_blocks - 1)
        is_met = ((at[:, None] - at).abs() <= 1) | is_end | is_end[:, None]  # (M, M)
        times = is_met.float().repeat(q.shape[2], 1, 1)  # (N, M, M) how often a block of keys is met
        times[:, 1:-1].scatter_add_(2, drawn, torch.ones_like(drawn, dtype=times.dtype))
        times = times.repeat_interleave(size, 1).repeat_interleave(size, 2)  # (N, T, T)
        mask = token_mask(is_token)
        assert mask is not None
        bias = times.clamp(min=1).log()  # a key met twice weighs twice
        weights = attention_weights(q, k, scale=self.scale, mask=mask & _or_everything((times > 0) & mask), bias=bias)
        record_weights(weights)
        return torch.einsum("bnts,bsnh->btnh", weights, v.float()).to(q.dtype)

    def attend_blocks(self, q: Tensor, k: Tensor, v: Tensor, is_token: Tensor, drawn: Tensor) -> Tensor:
        """Attend a block of queries at a time, q, k, v and the result (B, T, N, H)."""
        size, num_blocks, num_heads = self.config.block_size, q.shape[1] // self.config.block_size, q.shape[2]
        row = torch.arange(1, num_blocks - 1, device=q.device)
        fixed = torch.stack((0 * row, row - 1, row, row + 1, 0 * row + num_blocks - 1), dim=1)  # (M-2, 5)
        met = torch.cat((fixed.expand(num_heads, -1, -1), drawn), dim=-1)  # (N, M-2, 5+R)
        is_counted = torch.ones_like(met, dtype=torch.bool)  # a neighbour that is an end was met already
        is_counted[:, 0, 1] = is_counted[:, -1, 3] = False
        heads = torch.arange(num_heads, device=q.device)[:, None, None]
        blocks = [t.unflatten(1, (num_blocks, size)).permute(0, 3, 1, 2, 4) for t in (q, k, v)]  # (B, N, M, C, H)
        near_k, near_v = (t[:, heads, met].flatten(3, 4) for t in blocks[1:])  # (B, N, M-2, (5+R)C, H)
        mask = is_token.unflatten(1, (num_blocks, size))[:, met] & is_counted[..., None]  # (B, N, M-2, 5+R, C)
        mask = _or_everything(mask.flatten(3))[..., None, None, :]  # (B, N, M-2, 1, 1, (5+R)C)
        rows = blocks[0][:, :, 1:-1]  # (B, N, M-2, C, H)
        out = attend(
            rows.flatten(0, 2)[:, :, None],  # a head of a block of a row is a row of its own
            near_k.flatten(0, 2)[:, :, None],
            near_v.flatten(0, 2)[:, :, None],
            scale=self.scale,
            mask=mask.flatten(0, 2),
        )
        middle = out[:, :, 0].view(rows.shape).permute(0, 2, 3, 1, 4).flatten(1, 2)  # (B, T-2C, N, H)
        ends = torch.cat((q[:, :size], q[:, -size:]), dim=1)
        ends = attend(ends, k, v, scale=self.scale, mask=token_mask(is_token))  # (B, 2C, N, H)
        return torch.cat((ends[:, :size], middle, ends[:, size:]), dim=1)


def _or_everything(mask: Tensor) -> Tensor:
    """Let a query that sees nothing see all, so that it gives numbers and not NaN."""
    return mask | ~mask.any(-1, keepdim=True)


class BigBird(Bert):
    """A BigBird encoder. Fresh weights come from `modelwright.nn.init.init_weights`."""

    config_class: ClassVar[Any] = BigBirdConfig
    published_names: ClassVar[dict[str, str]] = Bert.published_names | {"pooler": "pooler"}

    @staticmethod
    def head_shape(task: str, config: Any) -> HeadShape:
        """Return how the head for a task is made and published."""
        mlm = "cls.predictions"
        shapes = {
            "masked_lm": HeadShape(
                f"{mlm}.decoder",
                out_bias=f"{mlm}.bias",
                dense=f"{mlm}.transform.dense",
                norm=f"{mlm}.transform.LayerNorm",
                act=config.act,
                has_pooler=True,
            ),
            "sequence_classification": HeadShape(
                "classifier.out_proj", dense="classifier.dense", act=config.act, pool="first", has_pooler=True
            ),
            "token_classification": HeadShape("classifier", has_pooler=True),
            "question_answering": HeadShape("qa_classifier.qa_outputs"),
        }
        return shapes[task]

    @staticmethod
    def make_attention(config: Any, layer_index: int) -> nn.Module:
        """Return the attention of one block."""
        return BigBirdAttention(config, layer_index)

    def embed_tokens(self, input_ids: Tensor, token_type_ids: Tensor | None, positions: Tensor | None) -> Tensor:
        """Return the stream before the first block, (B, T, D)."""
        scale = self.config.hidden_size**0.5 if self.config.is_rescaled else 1.0
        types = self.type_embed.weight[0] if token_type_ids is None else self.type_embed(token_type_ids)
        places = self.place(input_ids) if positions is None else positions
        return self.embed_norm(self.embed(input_ids) * scale + types + self.position_embed(places))

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, *, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> EncoderOutput:
        """Encode ``input_ids`` (B, T).

        Args:
            input_ids: Token ids.
            attention_mask: (B, T), 1 for tokens and 0 for padding; None when there is no padding.
            token_type_ids: (B, T), 0 for the first text and 1 for the second; None means all 0.
        """
        c = self.config
        check_length(input_ids, c.max_seq_len)
        is_long = input_ids.shape[1] > (5 + 2 * c.num_random_blocks) * c.block_size
        is_token = None if attention_mask is None else attention_mask.bool()
        x = self.embed_tokens(input_ids, token_type_ids, None)
        return self.encode(x, Seen(is_token, is_long and c.attention_type == "block_sparse"))


class SpanHead(nn.Module):
    """Scores of answers: a feed-forward layer added to the states, a norm, the output matrix."""

    def __init__(self, config: BigBirdConfig):
        super().__init__()
        self.mlp = Mlp(config.hidden_size, config.intermediate_size, act=config.act)
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.out = nn.Linear(config.hidden_size, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, 2)."""
        return self.out(self.norm(x + self.mlp(x)))


class BigBirdAnswers(TaskModel):
    """Extractive answers: the question's tokens, up to the first separator, are none."""

    def make_head(self) -> nn.Module:
        """Return the head."""
        return SpanHead(self.config)

    def head_names(self) -> dict[str, str]:
        """Our paths in the head -> published ones."""
        return {
            "head.mlp.up": "qa_classifier.intermediate.dense",
            "head.mlp.down": "qa_classifier.output.dense",
            "head.norm": "qa_classifier.output.LayerNorm",
            "head.out": "qa_classifier.qa_outputs",
        }

    def complete(self, input_ids: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        """Add the token types: 0 for the question, 1 for the text."""
        if inputs.get("token_type_ids") is not None:
            return inputs
        return inputs | {"token_type_ids": (~self._is_question(input_ids)).long()}

    def finish_spans(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Take the question out of the running; its first token stays, for questions without an answer."""
        is_question = self._is_question(input_ids)
        is_question[:, 0] = False
        return logits - is_question[..., None] * QUESTION_PENALTY

    def _is_question(self, input_ids: Tensor) -> Tensor:
        end = (input_ids == self.config.sep_token_id).int().argmax(1, keepdim=True)  # (B, 1)
        return torch.arange(input_ids.shape[1], device=input_ids.device) <= end


ARCHITECTURES = task_models(BigBird, "BigBird", "bert.", {"question_answering": BigBirdAnswers})
