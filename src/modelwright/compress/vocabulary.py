"""More tokens: rows for new ones in the embedding and the output matrix, where they can be learned quickly.

A new token starts as the mean of the pieces that spelled it before, in both matrices; one that had no spelling (a
control token) starts near the mean of all, so that it neither shouts nor is silent. A matrix often has more rows than
the tokenizer has tokens (151,936 for 151,665, say): new ids then take rows that are there, and the matrix grows when
these are used up.

Source: Hewitt 2021, "Initializing new word embeddings for pretrained language models" (the mean of all);
Gee et al. 2022, "Fast vocabulary transfer", section 3 (the mean of the pieces).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from modelwright.base.errors import ConfigError
from modelwright.compress.surgery import dense_state, rebuild
from modelwright.tokenizer.bpe import Tokenizer

M = TypeVar("M", bound=nn.Module)
NOISE = 0.1  # of the spread of the rows, so that two tokens without a spelling are not one


def add_tokens(model: M, tokenizer: Tokenizer, tokens: Sequence[str], *, multiple_of: int = 1) -> tuple[M, Tokenizer]:
    """Return the model and the tokenizer with more tokens.

    Args:
        model: A decoder.
        tokenizer: Its tokenizer.
        tokens: Texts that become one token each.
        multiple_of: Round the number of rows up to this, where it grows at all.

    Raises:
        ConfigError: A token is empty, given twice or known already; or the tokenizer has more tokens than the model.
    """
    wanted = list(tokens)
    odd = [t for t in wanted if not t or wanted.count(t) > 1 or tokenizer.token_id(t) is not None]
    if odd or not wanted:
        raise ConfigError(f"The token {(odd or [''])[0]!r} is empty, given twice or known already. Leave it out.")
    spellings = tokenizer.encode_batch(wanted, add_special_tokens=False)
    larger = tokenizer.with_tokens(wanted)
    ids = [larger.token_id(token) for token in wanted]
    pieces = {index: spelling for index, spelling in zip(ids, spellings, strict=True) if index is not None}
    return extend_vocabulary(model, tokenizer.vocab_size, pieces, multiple_of=multiple_of), larger


def extend_vocabulary(
    model: M, num_known: int, pieces: Mapping[int, Sequence[int]], *, multiple_of: int = 1, seed: int = 0
) -> M:
    """Return the model with rows for new tokens.

    Args:
        model: A decoder with ``embed`` and ``lm_head``, tied or not.
        num_known: Tokens of the tokenizer so far; rows from there on are free.
        pieces: New id -> ids of the tokens that spelled it, or none.
        multiple_of: Round the number of rows up to this, where it grows at all.
        seed: Of the noise on rows without a spelling.

    Raises:
        ConfigError: An id is in use, or a piece is not a known token.
    """
    state = dict(dense_state(model, "adding tokens"))
    num_rows = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    if num_known > num_rows:
        raise ConfigError(f"The tokenizer has {num_known} tokens and the model {num_rows} rows; they do not belong.")
    for index, spelling in pieces.items():
        if index < num_known or not all(0 <= piece < num_known for piece in spelling):
            raise ConfigError(
                f"The new token {index} is spelled {list(spelling)}; new ids start at {num_known}, "
                "and the ids of pieces end there."
            )
    needed = max([num_rows, *(index + 1 for index in pieces)])
    if needed > num_rows:
        needed = -(-needed // multiple_of) * multiple_of
    for name in ("embed.weight", "lm_head.weight", "lm_head.bias"):
        if name in state:
            state[name] = _extend(state[name], num_known, needed, pieces, seed)
    return rebuild(model, replace(model.config, vocab_size=needed), state)  # type: ignore[type-var]


def _extend(old: Tensor, num_known: int, num_rows: int, pieces: Mapping[int, Sequence[int]], seed: int) -> Tensor:
    """Return a matrix (V, D) or a bias (V,) with rows for the new tokens; known rows are copied bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    known = old[:num_known].float()
    mean, spread = known.mean(0), known.std(0)
    new = torch.cat((old, old.new_empty(num_rows - len(old), *old.shape[1:])))
    new[len(old) :] = mean.to(old.dtype)  # rows that no token has yet
    for index, spelling in pieces.items():
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        row = known[list(spelling)].mean(0) if len(spelling) else mean + NOISE * spread * noise
        new[index] = row.to(old.dtype)
    return new
