"""The first batches of a run, decoded in colour: what the model is trained to say is green, the rest dim.

Each kind of batch is shown as what it is: rows of tokens whose labels are the next ones or those in their own place, a
source and its target, a text and its class or numbers, groups of texts that belong together.
"""

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from modelwright.base.progress import console
from modelwright.data.examples import GroupBatch, PairBatch, TextBatch
from modelwright.data.load import Batch

MAX_ROWS, MAX_SHOWN = 2, 160  # rows of a batch, and tokens of a row, that are printed
TRAINED, READ = "green underline", "dim"


class FirstBatches:
    """A hook that prints the first batches of a run."""

    def __init__(self, tokenizer: Any, num_batches: int):
        self._tokenizer, self._num_batches = tokenizer, num_batches

    def __call__(self, run: Any, report: Any) -> None:
        """Look at the data again from its beginning, and put the loader back where it was.

        A mixture cannot be told to begin again; of one the batches that come next are shown.
        """
        if report.step != 1:
            return
        place = run.loader.state()
        is_plain = set(place) == {"epoch", "row"}
        if not is_plain and run.layout.is_parallel:  # its sources are read by all ranks together
            return
        if is_plain:
            run.loader.load_state({"epoch": 0, "row": 0})
        for index in range(self._num_batches):
            batch = run.loader.next_batch()
            rows = show_batch(self._tokenizer, batch)
            if not rows:
                break
            shape = "x".join(map(str, batch.input_ids.shape))
            which = f"batch {index + 1}" if is_plain else f"batch {index + 1} of those that come next"
            console.print(f"  {which}: {shape} tokens, {run.objective.count_trained(batch)} trained")
            for row in rows:
                console.print(row)
        run.loader.load_state(place)


def show_batch(tokenizer: Any, batch: Any) -> list[Text]:
    """Return the first rows of a batch as coloured text; none for data that is no text."""
    if isinstance(batch, Batch):
        pairs = zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True)
        return [show_row(tokenizer, ids, labels) for ids, labels in list(pairs)[:MAX_ROWS]]
    if not isinstance(batch, (TextBatch, PairBatch, GroupBatch)):
        return []
    shown = []
    for i in range(min(MAX_ROWS, len(batch.input_ids))):
        ids, mask = batch.input_ids[i], batch.attention_mask[i].bool()
        labels = getattr(batch, "labels", None)
        if isinstance(batch, GroupBatch):
            text = Text("    ")
            for k in range(len(ids)):
                text.append(" | " if k else "")
                _append(text, tokenizer, ids[k][mask[k]].tolist(), READ)
        elif labels is not None and labels.shape == batch.input_ids.shape and not isinstance(batch, PairBatch):
            text = show_row(tokenizer, ids[mask].tolist(), labels[i][mask].tolist(), is_next=False)
        else:
            assert labels is not None
            text = _append(Text("    "), tokenizer, ids[mask].tolist(), READ).append(" -> ")
            if isinstance(batch, PairBatch):
                _append(text, tokenizer, labels[i][labels[i] >= 0].tolist(), TRAINED)
            else:
                text.append(str(labels[i].tolist()), TRAINED)
        shown.append(text)
    return shown


def show_row(tokenizer: Any, ids: Sequence[int], labels: Sequence[int], *, is_next: bool = True) -> Text:
    """Return a row's text, in which what is trained stands out.

    Args:
        is_next: A label is that of the next token, so a token is trained when the label before it is not ignored;
            otherwise that of the token in its own place, which the model sees hidden.
    """
    trained = [label >= 0 for label in labels]
    trained = [False, *trained][: len(ids)] if is_next else trained
    text = Text("    ")
    start = 0
    shown = min(len(ids), MAX_SHOWN)
    while start < shown:
        end = start
        while end < shown and trained[end] == trained[start]:
            end += 1
        _append(text, tokenizer, ids[start:end], TRAINED if trained[start] else READ)
        start = end
    return text.append(" …", READ) if len(ids) > MAX_SHOWN else text


def _append(text: Text, tokenizer: Any, ids: Sequence[int], style: str) -> Text:
    return text.append(tokenizer.decode(list(ids[:MAX_SHOWN])).replace("\n", "⏎"), style)
