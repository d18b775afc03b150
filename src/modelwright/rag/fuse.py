"""One ranking out of two: a weighted sum of scores that were each brought to the range 0 to 1.

Each half is min-max normalised between its median and its best passage, so that the common run of passages counts 0 in
it. Over 29 public corpora the normalised sum beats reciprocal rank fusion on 27 (Anserini,
``docs/experiments-beir-fusion.md``): ranks forget by how much a passage won.

A departure from the plain sum: the dense half has less to say the more literally the best lexical passage holds the
query. Somebody who types ``json.dumps`` means that name, and a sentence encoder blurs names.
"""

from dataclasses import dataclass

import numpy as np

from modelwright.base.errors import ConfigError


@dataclass(frozen=True)
class FusionConfig:
    """How the two halves are weighed; the rest of each share is BM25's."""

    dense_weight: float = 0.6  # share of the dense half where no passage holds the words of the query
    exact_dense_weight: float = 0.2  # its share where one passage holds them all

    def __post_init__(self) -> None:
        if not 0 <= self.exact_dense_weight <= self.dense_weight <= 1:
            raise ConfigError(
                f"fusion has dense_weight={self.dense_weight} and exact_dense_weight={self.exact_dense_weight}; "
                "expected 0 <= exact_dense_weight <= dense_weight <= 1."
            )

    def share(self, coverage: float) -> float:
        """Return the dense half's share for a query of which the best passage holds this fraction (0 to 1).

        The square is the better of 1, 2 and 4 over the reference questions, Cranfield, CACM, XQuAD and COVID-QA.
        """
        return self.dense_weight + (self.exact_dense_weight - self.dense_weight) * coverage**2


def fuse(bm25: np.ndarray, dense: np.ndarray, dense_share: float) -> np.ndarray:
    """Return the fused score of every passage, between 0 and 1, from its two scores.

    >>> fuse(np.array([4.0, 2.0, 0.0]), np.array([0.1, 0.9, 0.1]), 0.5).round(2).tolist()
    [0.5, 0.5, 0.0]
    """
    return (1 - dense_share) * normalise(bm25) + dense_share * normalise(dense)


def normalise(scores: np.ndarray) -> np.ndarray:
    """Bring scores to the range 0 (the median and below) to 1 (the best); equal scores all become 0."""
    scores = scores.astype(np.float64)
    if not len(scores):
        return scores
    highest, lowest = scores.max(), np.median(scores)
    # Where more than half of the passages share the best score, the lowest one still tells them from the rest.
    lowest = lowest if lowest < highest else scores.min()
    return np.clip((scores - lowest) / (highest - lowest), 0, 1) if lowest < highest else np.zeros(len(scores))


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the places of the ``k`` highest scores above 0, best first; ties keep the order of the documents."""
    order = np.argsort(-scores, kind="stable")[:k]
    return order[scores[order] > 0]
