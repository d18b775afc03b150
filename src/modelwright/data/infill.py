"""Rows for a decoder that sees more than the past: a prefix read both ways, and holes to fill in.

Fill-in-the-middle cuts a document at two places and moves the middle to the end, so that a plain causal model learns to
write it from both sides:

    PSM    <prefix> prefix <suffix> suffix <middle> middle <end>
    SPM    <prefix> <suffix> suffix <middle> prefix middle <end>

(SPM in the joined form of the paper's appendix D, so that both can be mixed and a server can keep the suffix's cache.)
A prefix language model sees the beginning of each row from both sides and is trained on the rest.

Source: Bavarian et al. 2022, arXiv:2207.14255, section 3 and appendix D; Dong et al. 2019, arXiv:1905.03197, and
Raffel et al. 2019, section 3.2.1 (prefix). Cuts are made between tokens, not characters: section 4.4 of the paper finds
characters better where a middle may begin inside a token; use `cut_text` on texts before they are encoded for that.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from modelwright.base.errors import ConfigError
from modelwright.data.load import Batch
from modelwright.data.pack import IGNORED, Rows
from modelwright.tokenizer.bpe import Tokenizer

Ids = npt.NDArray[np.int64]
# Spellings of the three or four tokens, in the order prefix, suffix, middle, end; None: the end of the text ends it.
SPELLINGS: tuple[tuple[str, str, str, str | None], ...] = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", None),  # Qwen, and this house
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", None),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", None),  # SantaCoder
    ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),  # Code Llama
    ("<PRE>", "<SUF>", "<MID>", "<EOT>"),
    ("<|fim▁begin|>", "<|fim▁hole|>", "<|fim▁end|>", None),  # DeepSeek-Coder
)


@dataclass(frozen=True)
class FimConfig:
    """How often a document is cut, and into which order it is put."""

    rate: float = 0.5  # of the documents; the others stay as they are
    spm_rate: float = 0.5  # of the cut ones that are in the order suffix, prefix, middle

    def __post_init__(self) -> None:
        for name in ("rate", "spm_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"fim.{name} is {getattr(self, name)}; it must lie between 0 and 1.")


@dataclass(frozen=True)
class FimTokens:
    """Ids of the tokens around the parts."""

    prefix: int
    suffix: int
    middle: int
    end: int

    @classmethod
    def find(cls, tokenizer: Tokenizer) -> "FimTokens":
        """Return the tokens by any of the published spellings.

        Raises:
            ConfigError: The tokenizer has none of them.
        """
        for prefix, suffix, middle, end in SPELLINGS:
            ids = [tokenizer.token_id(text) for text in (prefix, suffix, middle)]
            end_id = tokenizer.eos_id if end is None else tokenizer.token_id(end)
            if None not in ids and end_id is not None:
                prefix_id, suffix_id, middle_id = (int(i) for i in ids if i is not None)
                return cls(prefix_id, suffix_id, middle_id, end_id)
        raise ConfigError(
            f"The tokenizer has no tokens to fill in the middle with; known: {', '.join(SPELLINGS[0][:3])}, and those "
            "of StarCoder, SantaCoder, Code Llama and DeepSeek-Coder. Train one with --special for these tokens."
        )


def fill_in_middle(ids: Ids, tokens: FimTokens, config: FimConfig, random: np.random.Generator) -> Ids:
    """Return a document with its middle at the end, or as it is, by chance.

    >>> tokens, random = FimTokens(100, 101, 102, 103), np.random.default_rng(3)
    >>> fill_in_middle(np.arange(6), tokens, FimConfig(rate=1.0, spm_rate=0.0), random).tolist()
    [100, 0, 1, 2, 3, 4, 101, 102, 5, 103]
    """
    if random.random() >= config.rate:
        return ids
    low, high = np.sort(random.integers(0, len(ids) + 1, 2))
    prefix, middle, suffix = ids[:low], ids[low:high], ids[high:]
    if random.random() < config.spm_rate:
        return _join([tokens.prefix, tokens.suffix], suffix, [tokens.middle], prefix, middle, [tokens.end])
    return _join([tokens.prefix], prefix, [tokens.suffix], suffix, [tokens.middle], middle, [tokens.end])


def _join(*parts: Ids | list[int]) -> Ids:
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def prefix_batch(rows: Rows, random: np.random.Generator) -> Batch:
    """Return rows of which a random beginning is seen from both sides and not trained on.

    The last token of the prefix predicts the first one behind it, so it has the first label. At least one token is the
    prefix, and at least one is predicted.
    """
    num, length = rows.input_ids.shape
    lengths = np.asarray(random.integers(1, length, size=(num,)))  # 1 .. T-1 tokens of prefix
    places = np.arange(length)
    labels = np.where(places[None] >= lengths[:, None] - 1, rows.labels, IGNORED)
    in_prefix: npt.NDArray[np.bool_] = places[None] < lengths[:, None]  # (R, T)
    causal = np.tril(np.ones((length, length), dtype=bool))
    mask: npt.NDArray[np.bool_] = causal[None] | (in_prefix[:, :, None] & in_prefix[:, None, :])  # (R, T, T)
    if rows.document_ids is not None:
        documents: Ids = rows.document_ids
        mask &= documents[:, :, None] == documents[:, None, :]
    return Batch(torch.from_numpy(rows.input_ids), torch.from_numpy(labels), None, torch.from_numpy(mask[:, None]))
