"""Give a trained model another tokenizer: new embedding and output rows, made of the old ones.

Tokens that both vocabularies have keep their rows. Every other one is made of two parts: of the old pieces that spell
it, each weighted by its length and by how alike the two look, and of its nearest neighbours among all old tokens. Alike
is measured outside the model, in a space of its own: here the hashed n-grams of a token's bytes, or any function from
texts to vectors that is handed in (the paper takes a sentence encoder). Both matrices get rows by the same weights, and
tied ones stay tied. Nothing else of the model changes; a brief training on text cut the new way does the rest.

Source: Sharthak et al. 2025, "Achieving Tokenizer Flexibility in Language Models through Heuristic Adaptation and
Supertoken Learning" (TokenAdapt), section 3: local and global estimate, the latter's share 0.3.
Others beside it: the plain mean of the pieces (Gee et al. 2022); as controls, the mean of all rows (Hewitt 2021) and
rows drawn anew.
Symbols: W old tokens, V new tokens, D hidden.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.base.registry import lookup
from modelwright.compress import TRANSPLANT_WAYS
from modelwright.compress.surgery import dense_state, rebuild
from modelwright.compress.vocabulary import NOISE
from modelwright.tokenizer.bpe import Tokenizer
from modelwright.tokenizer.overlap import Overlap, find_overlap

M = TypeVar("M", bound=nn.Module)
Describe = Callable[[Sequence[bytes]], np.ndarray]
GLOBAL_SHARE = 0.3
NUM_NEIGHBOURS = 5
SHARPNESS = 0.1  # temperature of the neighbours' weights
_DESCRIPTION_SIZE = 512
_CHUNK = 1024


@dataclass(frozen=True)
class Mixture:
    """New id -> old ids and their weights, which sum to one.

    Tokens that are not in it begin at the mean of all rows, ``noise`` times the spread of the rows away from it.
    """

    ids: Mapping[int, list[int]] = field(default_factory=dict)
    weights: Mapping[int, list[float]] = field(default_factory=dict)
    noise: float = NOISE


Way = Callable[[Tokenizer, Tokenizer, Overlap, Describe], Mixture]


def transplant(
    model: M,
    old: Tokenizer,
    new: Tokenizer,
    *,
    way: str | Way = "adapt",
    describe: Describe | None = None,
    multiple_of: int = 1,
    seed: int = 0,
) -> tuple[M, Overlap]:
    """Return the model with the rows of another tokenizer, and how the two vocabularies overlap.

    Args:
        model: A decoder with ``embed`` and ``lm_head``, tied or not.
        old: Its tokenizer.
        new: The other one.
        way: How tokens that ``old`` does not have begin: a name in `TRANSPLANT_WAYS`, or the function itself.
        describe: (n tokens' bytes) -> (n, size) vectors in which alike tokens are near; None: `ngram_vectors`.
        multiple_of: Round the number of rows up to this.
        seed: Of rows that are drawn.

    Raises:
        ConfigError: The weights are quantized, a tokenizer's tokens are no bytes, or ``old`` is not the model's.
    """
    state = dict(dense_state(model, "another tokenizer"))
    config: Any = model.config
    if old.vocab_size > config.vocab_size:
        raise ConfigError(
            f"The tokenizer has {old.vocab_size} tokens and the model {config.vocab_size} rows; they do not belong "
            "together. Give the tokenizer that the model was trained with."
        )
    make: Way = lookup(TRANSPLANT_WAYS, way, "way") if isinstance(way, str) else way
    overlap = find_overlap(old, new)
    mixture = make(old, new, overlap, describe or ngram_vectors)
    num_rows = -(-new.vocab_size // multiple_of) * multiple_of
    for name in ("embed.weight", "lm_head.weight", "lm_head.bias"):
        if name in state:
            state[name] = _rows(state[name], old.vocab_size, num_rows, overlap, mixture, seed)
    changed = rebuild(model, replace(config, vocab_size=num_rows, **_special_ids(config, new)), state)
    if isinstance(getattr(changed, "generation_config", None), dict):
        changed.generation_config = _renamed(changed.generation_config, new)  # type: ignore[assignment, arg-type]
    return changed, overlap


def _special_ids(config: Any, new: Tokenizer) -> dict[str, Any]:
    """Return the ids of special tokens that a config names, as the new tokenizer has them."""
    values = {"bos_token_id": new.bos_id, "eos_token_id": tuple(new.stop_ids), "pad_token_id": _pad_id(new)}
    known = {one.name for one in fields(config)}
    return {name: value for name, value in values.items() if name in known}


def _pad_id(tokenizer: Tokenizer) -> int | None:
    return tokenizer.pad_id if {"pad_token", "eos_token"} & set(tokenizer.roles) else None


def _renamed(settings: dict[str, Any], new: Tokenizer) -> dict[str, Any]:
    ids = {"bos_token_id": new.bos_id, "eos_token_id": list(new.stop_ids), "pad_token_id": _pad_id(new)}
    return {**settings, **{name: value for name, value in ids.items() if name in settings}}


def _rows(old: Tensor, num_known: int, num_rows: int, overlap: Overlap, mixture: Mixture, seed: int) -> Tensor:
    """Return a matrix (V, D) or a bias (V,) for the new tokens; shared rows are copied bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    known = old[:num_known].float().cpu()
    mean, spread = known.mean(0), known.std(0)
    made = mean.expand(num_rows, *old.shape[1:]).clone()
    for index in sorted({*overlap.strange, *overlap.spelled} - set(mixture.ids)):
        made[index] += mixture.noise * spread * torch.randn(mean.shape, generator=generator)
    for index, ids in mixture.ids.items():
        weights = torch.tensor(mixture.weights[index])
        made[index] = torch.tensordot(weights, known[ids], dims=1)
    made = made.to(old)
    new_ids, old_ids = list(overlap.shared), list(overlap.shared.values())
    made[new_ids] = old[old_ids]
    return made


# -- how a token that the old vocabulary does not have begins ----------------------------------------------------------


def by_adaptation(old: Tokenizer, new: Tokenizer, overlap: Overlap, describe: Describe) -> Mixture:
    """Mix the pieces that spell a token (0.7) with its nearest neighbours in the old vocabulary (0.3)."""
    if not overlap.spelled:
        return Mixture()
    told = describe([old.token_bytes(index) for index in range(old.vocab_size)])  # (W, size)
    wanted = describe([new.token_bytes(index) for index in overlap.spelled])  # (V, size)
    told[list(old.special_ids.values())] = 0  # nothing is like a special token
    ids: dict[int, list[int]] = {}
    weights: dict[int, list[float]] = {}
    for start in range(0, len(wanted), _CHUNK):
        likeness = wanted[start : start + _CHUNK] @ told.T  # (chunk, W)
        for row, (index, pieces) in zip(likeness, list(overlap.spelled.items())[start : start + _CHUNK], strict=True):
            lengths = np.array([len(old.token_bytes(piece)) for piece in pieces])
            local = lengths * (np.maximum(row[pieces], 0) + 1e-3)
            near = np.argpartition(-row, min(NUM_NEIGHBOURS, len(row) - 1))[:NUM_NEIGHBOURS]
            distant = np.exp((row[near] - row[near].max()) / SHARPNESS)
            mixed = [*(1 - GLOBAL_SHARE) * local / local.sum(), *GLOBAL_SHARE * distant / distant.sum()]
            ids[index], weights[index] = [*pieces, *map(int, near)], [float(weight) for weight in mixed]
    return Mixture(ids, weights)


def by_pieces(old: Tokenizer, new: Tokenizer, overlap: Overlap, describe: Describe) -> Mixture:
    """Take the plain mean of the pieces that spell a token."""
    ids = {index: list(pieces) for index, pieces in overlap.spelled.items()}
    return Mixture(ids, {index: [1 / len(pieces)] * len(pieces) for index, pieces in ids.items()})


def by_mean(old: Tokenizer, new: Tokenizer, overlap: Overlap, describe: Describe) -> Mixture:
    """Take the mean of all old rows, with a little noise: a control."""
    return Mixture()


def at_random(old: Tokenizer, new: Tokenizer, overlap: Overlap, describe: Describe) -> Mixture:
    """Draw rows with the mean and the spread of the old ones: a control."""
    return Mixture(noise=1.0)


def ngram_vectors(pieces: Sequence[bytes]) -> np.ndarray:
    """Return unit vectors (n, 512) of the byte n-grams (1 to 4, with marks at both ends) of each piece, hashed.

    >>> near, far = ngram_vectors([b" token", b" tokens", b" zebra"])[0] @ ngram_vectors([b" tokens", b" zebra"]).T
    >>> bool(near > 0.7 > 0.3 > far)
    True
    """
    vectors = np.zeros((len(pieces), _DESCRIPTION_SIZE), dtype=np.float32)
    for row, piece in zip(vectors, pieces, strict=True):
        marked = b"\x02" + piece + b"\x03"
        for size in range(1, 5):
            for start in range(len(marked) - size + 1):
                code = zlib.crc32(marked[start : start + size])
                row[code % _DESCRIPTION_SIZE] += 1 if code & 0x10000 else -1
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
