"""Where the rows of pre-training come from, as its recipe says: one data set held in memory, or a blend on disk.

A data set alone is joined anew each epoch, its documents in another order. A blend (`data.blend`), and token shards
given alone, stay on disk; of several processes the first encodes and scores what is missing, the others wait.
"""

import math
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from modelwright.base import distributed
from modelwright.base.device import pick_device
from modelwright.base.errors import DataError, ModelwrightError
from modelwright.base.progress import track
from modelwright.data.blend import Blend, BlendConfig, BlendSource
from modelwright.data.load import RowLoader
from modelwright.data.pack import Rows, stream_rows
from modelwright.data.shards import read_texts
from modelwright.data.token_shards import INDEX, TokenShards
from modelwright.models.scoring import context_len, token_log_probs
from modelwright.models.weights import load_model
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.formats import load_tokenizer
from modelwright.train.loop import Loader, LoopConfig

_BATCH_TOKENS = 8192  # of documents that are scored side by side


class Supply(Protocol):
    """What a run learns from."""

    num_tokens: int

    def loader(self, loop: LoopConfig) -> Loader:
        """Return the batches, from the first one."""
        ...


class HeldSupply:
    """Documents in memory, joined to a stream in another order each epoch.

    Args:
        documents: Token ids of each, (length,).
        row_len: T.
        separator_id: Stands before each document, and after the last.
    """

    def __init__(self, documents: list[np.ndarray], row_len: int, separator_id: int):
        self._documents, self._row_len, self._separator_id = documents, row_len, separator_id
        self.num_tokens = sum(map(len, documents))

    def loader(self, loop: LoopConfig) -> Loader:
        """Return the batches, from the first one."""

        def make(epoch: int) -> Rows:
            return stream_rows(self._documents, self._row_len, self._separator_id, loop.seed * 100_003 + epoch)

        return RowLoader(make, loop.micro_batch_size)


class BlendSupply:
    """Rows of one or several sources on disk."""

    def __init__(self, blend: Blend):
        self.blend, self.num_tokens = blend, blend.num_tokens

    def loader(self, loop: LoopConfig) -> Loader:
        """Return the batches, from the first one."""
        return self.blend.feed(loop.micro_batch_size, loop.seed)


def open_supply(data: Path | BlendConfig, tokenizer: Tokenizer, row_len: int, work: Path) -> Supply:
    """Return what a run learns from.

    Args:
        data: A data set, token shards, or the settings of several.
        tokenizer: Of the model.
        row_len: T.
        work: Folder of the run, where encoded texts and scores are kept.

    Raises:
        DataError: A source is missing, empty, or of another tokenizer; of several processes, on all of them.
    """
    if isinstance(data, Path):
        if not (data / INDEX).is_file():
            return HeldSupply(encode_documents(data, "train", tokenizer), row_len, tokenizer.eos_id)
        data = BlendConfig((BlendSource(data),))
    said, found = None, None
    if distributed.rank() == 0:
        try:
            found = _open_blend(data, tokenizer, row_len, work)
        except ModelwrightError as error:
            if not distributed.is_distributed():
                raise
            said = str(error)
    said = distributed.share(said)
    if said is not None:
        raise DataError(said)
    return BlendSupply(found or _open_blend(data, tokenizer, row_len, work))


def _open_blend(data: BlendConfig, tokenizer: Tokenizer, row_len: int, work: Path) -> Blend:
    def score(shards: TokenShards) -> np.ndarray:
        assert data.difficulty is not None and data.difficulty.model is not None
        return document_perplexities(data.difficulty.model, shards, tokenizer)

    return Blend(data, tokenizer, row_len, work, score)


def encode_documents(folder: Path, part: str, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Return the token ids of every document of one part of a data set, in files of lines, Parquet, or many of them.

    Raises:
        DataError: The part is missing or holds no text.
    """
    texts = list(read_texts(folder, part))
    if not texts:
        raise DataError(f"{folder} holds no document in its part {part}. Make it again from documents with text.")
    return [np.array(ids, dtype=np.int64) for ids in tokenizer.encode_batch(texts)]


def count_tokens(path: Path, tokenizer: Tokenizer) -> int:
    """Return how many tokens a data set has to train on, or a folder of token shards."""
    if (path / INDEX).is_file():
        return TokenShards(path, tokenizer).num_tokens
    return sum(map(len, encode_documents(path, "train", tokenizer)))


@torch.inference_mode()
def document_perplexities(folder: Path, shards: TokenShards, tokenizer: Tokenizer) -> np.ndarray:
    """Return the perplexity of each document under a model, (documents,), of as much as its context holds.

    A document without a token of its own has the perplexity of the vocabulary, as if nothing were known.

    Raises:
        DataError: The model's tokenizer is not the one of the shards.
    """
    if load_tokenizer(folder).to_json() != tokenizer.to_json():
        raise DataError(
            f"{folder} has another tokenizer than the run, so it cannot score the run's tokens. Give a model of the "
            "same tokenizer, or order by length."
        )
    device = pick_device()
    model = load_model(folder, dtype=torch.float32, device=device)
    starts, lengths = shards.starts(), np.minimum(shards.lengths(), context_len(model))
    found = np.full(len(starts), float(tokenizer.vocab_size))
    ranked = [int(i) for i in np.argsort(lengths, kind="stable") if lengths[i] > 1]
    batches: list[list[int]] = [[]]
    for i in ranked:  # shortest first: rows of one batch are of about one length
        if batches[-1] and (len(batches[-1]) + 1) * int(lengths[i]) > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(i)
    for batch in track(batches if ranked else [], "perplexity of the documents"):
        width = int(lengths[batch[-1]])
        ids = np.full((len(batch), width), shards.separator_id, dtype=np.int64)  # (B, T)
        for row, i in enumerate(batch):
            ids[row, : lengths[i]] = shards.read(int(starts[i]), int(lengths[i]))
        losses = -token_log_probs(model, torch.from_numpy(ids).to(device)).double().cpu()  # (B, T - 1)
        counts = torch.tensor([int(lengths[i]) - 1 for i in batch])
        inside = torch.arange(width - 1)[None, :] < counts[:, None]  # padding stands behind, so nothing sees it
        means = (losses * inside).sum(1) / counts
        found[batch] = [math.exp(min(float(mean), 700.0)) for mean in means]
    return found
