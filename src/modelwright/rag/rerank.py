"""A cross-encoder: it reads a query and a passage together and says how well the passage answers.

Slower than comparing vectors, since every pair is a forward pass, and better, since the words of both meet in every
layer. It orders the few passages that a search has found.
Source: Nogueira and Cho 2019, arXiv 1901.04085. Not done: rerankers that are language models asked for "yes" or "no".
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelwright.base.device import has_fast_bf16, pick_device
from modelwright.base.errors import CheckpointError
from modelwright.base.progress import bar
from modelwright.models.hub import fetch
from modelwright.models.weights import load_model
from modelwright.rag.embed import even_batches, read_tokenizer

Pair = tuple[str, str]


class CrossEncoder:
    """Pairs of a query and a passage to scores between 0 and 1."""

    def __init__(self, source: str | Path, *, dtype: torch.dtype | None = None, device: str | None = None):
        """Load a reranker: an encoder with a head for sequence classification and one label.

        Args:
            source: A folder or a hub id.
            dtype: Of the weights; None: bfloat16 where the machine computes it fast, else float32.
            device: Where to run; None: a GPU where there is one.

        Raises:
            CheckpointError: The folder holds another kind of model.
        """
        self.folder = fetch(source)
        self.device = pick_device(device)
        dtype = dtype or (torch.bfloat16 if has_fast_bf16(self.device) else torch.float32)
        self._model = load_model(self.folder, dtype=dtype, device=self.device)
        config: Any = self._model.config
        labels = getattr(getattr(config, "labels", None), "names", ())
        if getattr(self._model, "task", None) != "sequence_classification" or len(labels) != 1:
            kind = type(self._model).__name__
            raise CheckpointError(
                f"{self.folder} holds a {kind} with {len(labels)} labels; expected a sequence classifier with one. "
                "Give the folder of a reranker."
            )
        self._has_types = getattr(config, "num_token_types", 1) > 1
        self.max_tokens: int = config.max_seq_len
        self._whole_tokenizer = read_tokenizer(self.folder)
        self._tokenizer = read_tokenizer(self.folder)
        self._tokenizer.enable_truncation(self.max_tokens, strategy="longest_first")

    def pair_lengths(self, pairs: Sequence[Pair]) -> list[int]:
        """Return the tokens of each pair, before any cut."""
        return [len(encoding.ids) for encoding in self._whole_tokenizer.encode_batch(list(pairs))]

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Return the score of each pair, shape (pairs,), float32: the sigmoid of the model's logit.

        Of a pair beyond ``max_tokens`` the longer text is cut first.
        """
        encodings = self._tokenizer.encode_batch(list(pairs))
        types = {tuple(encoding.ids): tuple(encoding.type_ids) for encoding in encodings}
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, encoding in enumerate(encodings):
            rows.setdefault(tuple(encoding.ids), []).append(row)
        scores = np.zeros(len(pairs), np.float32)
        distinct = sorted(rows, key=len)
        with bar("pairs", len(distinct)) as shown, torch.inference_mode():
            for batch in even_batches(distinct):
                logits = self._logits(batch, [types[ids] for ids in batch])  # (B,)
                for ids, score in zip(batch, torch.sigmoid(logits).tolist(), strict=True):
                    scores[rows[ids]] = score
                shown.advance(len(batch))
        return scores

    def _logits(self, batch: Sequence[tuple[int, ...]], types: Sequence[tuple[int, ...]]) -> torch.Tensor:
        longest = max(map(len, batch))

        def padded(rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
            return torch.tensor([row + (0,) * (longest - len(row)) for row in rows], device=self.device)  # (B, T)

        lengths = torch.tensor([len(row) for row in batch], device=self.device)
        mask = (torch.arange(longest, device=self.device) < lengths[:, None]).long()  # (B, T)
        more = {"token_type_ids": padded(types)} if self._has_types else {}
        return self._model(padded(batch), attention_mask=mask, **more).logits[:, 0].float()
