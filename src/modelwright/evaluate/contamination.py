"""What of an evaluation stands in the training data already: the share of each item that was seen, word for word.

The index of n-grams is the one that the pipeline's step `decontaminate` removes documents by, in memory or as a saved
folder, so that what is removed before training and what is flagged after it are the same. An item counts as seen when
at least half of its words lie in shared runs of 13 words within one training document; figures are then also given for
the items that were not seen.

Source: Brown et al. 2020, appendix C (13-grams, figures on the clean part); Grattafiori et al. 2024, section 5.1.4
(share of an item that is covered). Not done: paraphrases.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelwright.base.errors import DataError
from modelwright.base.types import Document
from modelwright.data.decontaminate import EvaluationIndex, ItemCoverage, coverage, load_index

SEEN_FRACTION = 0.5


@dataclass(frozen=True)
class Contamination:
    """What was seen of the items.

    Attributes:
        num_items: Items in all.
        num_too_short: Items that are too short to be told from chance; they count as not seen.
        items: Of those with any shared run, how much is covered and where, most first.
    """

    num_items: int
    num_too_short: int
    items: list[ItemCoverage]

    @property
    def seen(self) -> set[str]:
        """Ids of the items of which at least half was seen."""
        return {row.item for row in self.items if row.covered_fraction >= SEEN_FRACTION}


def find_contamination(index: EvaluationIndex, training: Iterable[Document]) -> Contamination:
    """Look through training documents, one at a time, for what the index holds."""
    hits = (hit for document in training for hit in index.find(document))
    return Contamination(len(index.items), index.num_short, coverage(index, hits))


def open_index(items: Sequence[Document], folder: Path | None = None) -> EvaluationIndex:
    """Return the index of evaluation items; with a folder the one saved there, or else saved there now.

    Raises:
        DataError: The folder holds the index of other items.
    """
    if folder is None or not Path(folder).exists():
        index = EvaluationIndex(items)
        if folder is not None:
            index.save(folder)
        return index
    index = load_index(folder)
    texts = {item.id: item.text for item in index.items}
    missing = next((item.id for item in items if texts.get(item.id) != item.text), None)
    if missing is not None:
        raise DataError(
            f"{folder} is an index of {len(index.items)} items, and {missing} with its text is not among them. Give "
            "the index of this evaluation, or another folder to make it in."
        )
    return index
