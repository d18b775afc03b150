"""Train the tagger: made sentences with names, and lines of real text without.

The real text is whatever lines the caller has; of those only lines are used in which no word beyond the first begins
with a capital, so that a name left unlabelled cannot teach the tagger to overlook names. Some of them are written with
capitals throughout the headings' way, which teaches that capitals alone make no name.

A word's own features are hidden in one place out of six in training (only its form stays), which makes the network read
the words around it.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from modelwright.data.tagger import (
    LABELS,
    MAX_FEATURES,
    NUM_ROWS,
    Tagger,
    _hash,
    features,
    read_labels,
    split_words,
)
from modelwright.data.tagger_text import Maker, TaggedText


@dataclass(frozen=True)
class TaggerConfig:
    """How the tagger is trained."""

    num_texts: int = 40_000  # made texts
    num_plain: int = 12_000  # lines of real text without names
    num_common: int = 20_000  # words known as common
    hidden_size: int = 64
    num_layers: int = 3
    num_epochs: int = 3
    batch_words: int = 2048
    learning_rate: float = 4e-3
    hide_fraction: float = 0.15
    seed: int = 0
    lean: float = -2.0  # added to the score of "no name": below 0 finds more and errs more


class _Network(nn.Module):
    def __init__(self, config: TaggerConfig):
        super().__init__()
        D = config.hidden_size
        self.table = nn.EmbeddingBag(NUM_ROWS, D, mode="mean", padding_idx=0)
        self.mix = nn.ModuleList(nn.Linear(3 * D, 2 * D) for _ in range(config.num_layers))
        self.out = nn.Linear(D, len(LABELS))
        nn.init.normal_(self.table.weight, std=0.5)
        with torch.no_grad():
            self.table.weight[0] = 0  # the empty row counts for nothing here and is added in the run by NumPy

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.table(rows), 0.1, self.training)  # (T, D)
        for i, mix in enumerate(self.mix):
            step = 2**i
            around = F.pad(x, (0, 0, step, step))
            value, gate = mix(torch.cat([around[: -2 * step], x, around[2 * step :]], dim=1)).chunk(2, dim=1)
            x = x + torch.maximum(value, gate)
        return self.out(x)


def find_common(texts: Iterable[str], num: int) -> np.ndarray:
    """Return the hashes of the words that are mostly written small, the commonest first in count."""
    small: Counter[str] = Counter()
    large: Counter[str] = Counter()
    for text in texts:
        for word in re.findall(r"[^\W\d_]{1,20}", text):
            (small if word.islower() else large)[word.lower()] += 1
    words = [word for word, count in small.most_common(3 * num) if count >= 3 and count > large[word]][:num]
    return np.array(sorted({_hash(word) for word in words}), dtype=np.int64)


def plain_lines(texts: Iterable[str], num: int, seed: int) -> list[str]:
    """Return lines in which only the first word may begin with a capital; every sixth of them as a heading."""
    dice, found = random.Random(seed), []
    for text in texts:
        for line in re.split(r"\n\s*\n|(?<=[.!?]) (?=[A-Z\"])", text):
            line = " ".join(line.split())
            if 20 <= len(line) <= 400 and not re.search(r"(?<=.)\b(?!I\b)[A-Z]", line[1:]):
                found.append(line)
    dice.shuffle(found)
    found = found[:num]
    return [" ".join(line.split()[:8]).title() if i % 6 == 0 else line for i, line in enumerate(found)]


def train_tagger(config: TaggerConfig, real_texts: Sequence[str] = (), *, labels_seed: int | None = None) -> Tagger:
    """Train on `Maker`'s sentences and on lines of ``real_texts``; the same settings give the same tagger.

    Args:
        config: The settings.
        real_texts: Whole texts, for common words and for lines without names.
        labels_seed: Shuffle the labels among all words by this seed: a control that must learn nothing.
    """
    torch.manual_seed(config.seed)
    made = list(Maker(config.seed).texts(config.num_texts))
    made += [TaggedText(line) for line in plain_lines(real_texts, config.num_plain, config.seed)]
    random.Random(config.seed).shuffle(made)
    common = find_common([*real_texts, *(t.text for t in made)], config.num_common)
    rows, labels = _number(made, frozenset(common.tolist()))
    if labels_seed is not None:
        labels = labels[np.random.default_rng(labels_seed).permutation(len(labels))]
    network = _fit(config, torch.from_numpy(rows), torch.from_numpy(labels))
    weights = {name.replace("table.weight", "table"): w.detach().numpy() for name, w in network.state_dict().items()}
    return Tagger({**weights, "common": common, "lean": np.array([config.lean], dtype=np.float32)})


def _number(texts: Sequence[TaggedText], common: frozenset[int]) -> tuple[np.ndarray, np.ndarray]:
    """Lay all texts end to end, parted by an empty line; return the features (T, 16) and the labels (T)."""
    known: dict[str, np.ndarray] = {}
    rows, labels = [], []
    for text in texts:
        words = split_words(text.text)
        for start, end in [*words, (0, 0)]:
            word = text.text[start:end] or "\n\n"
            if word not in known:
                found = features(word, common)
                known[word] = np.array(found + [0] * (MAX_FEATURES - len(found)))
            rows.append(known[word])
        labels.append(read_labels(len(words) + 1, text.spans, [*words, (len(text.text) + 1, len(text.text) + 1)]))
    return np.stack(rows), np.concatenate(labels)


def _fit(config: TaggerConfig, rows: torch.Tensor, labels: torch.Tensor) -> _Network:
    network = _Network(config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=0.01)
    starts = torch.arange(0, len(labels), config.batch_words)
    num_steps, step = config.num_epochs * len(starts), 0
    for _ in range(config.num_epochs):
        for start in starts[torch.randperm(len(starts))].tolist():
            batch = rows[start : start + config.batch_words].clone()
            batch[torch.rand(len(batch)) < config.hide_fraction, 1:] = 0
            loss = F.cross_entropy(network(batch), labels[start : start + config.batch_words])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - step / num_steps)
    return network.eval()
