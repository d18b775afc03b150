"""Training data written by a model: asking within a budget, remembering every answer, and counting what was refused.

`Asker` stands between a method and any `ChatModel`. Each request has a seed that follows from the run's seed and its
number, and each answer goes to a journal on disk before it is used. A run that was killed is simply started again: the
same requests are answered from the journal at no cost, and it goes on where it stopped, to the same result. The budget
counts requests and tokens, those from the journal too, and a run that reaches it keeps what it has.

A model that fails is asked again with the next request; after several failures in a row the run stops and says why.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from modelwright.base.artifact import new_artifact
from modelwright.base.config import to_dict
from modelwright.base.errors import ConfigError, DataError, ModelwrightError
from modelwright.base.files import write_json, write_jsonl
from modelwright.base.types import ChatModel, Message, SamplingParams
from modelwright.data.conversation import Conversation
from modelwright.data.convert import write_conversation
from modelwright.data.novelty import MAX_ROUGE, MAX_SIMILARITY

MAX_FAILURES = 5  # in a row
MADE, REMOVED, REPORT, JOURNAL = "train.jsonl", "removed.jsonl", "report.json", "answers.jsonl"


@dataclass(frozen=True)
class GenerateConfig:
    """What is asked for, how it is drawn, and when it is good enough."""

    num: int = 100  # examples wanted
    max_requests: int = 1000  # of the whole run, judging included
    max_tokens: int | None = None  # of prompts and completions together; None: not bounded
    answer_tokens: int = 512  # longest single completion
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    max_rouge: float = MAX_ROUGE  # ROUGE-L from which a task counts as known
    max_similarity: float = MAX_SIMILARITY  # Jaccard similarity of word 5-grams from which an example is a near-copy
    min_score: float | None = None  # a model's own verdict from 1 to 5; None: rules alone decide
    num_turns: int = 3  # of the user in a conversation
    only_text: bool = True  # refuse tasks about pictures, files and the like, as Self-Instruct does

    def __post_init__(self) -> None:
        for name in ("num", "max_requests", "answer_tokens", "num_turns"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("max_rouge", "max_similarity"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0 and at most 1.")
        if self.min_score is not None and not 1 <= self.min_score <= 5:
            raise ConfigError(f"min_score is {self.min_score}; it must be from 1 to 5, or none for rules alone.")


@dataclass
class Spent:
    """What a run has used up."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    replayed: int = 0  # requests answered from the journal
    failed: int = 0  # requests that the model did not answer

    @property
    def tokens(self) -> int:
        """Tokens of prompts and completions."""
        return self.prompt_tokens + self.completion_tokens


class BudgetSpent(Exception):  # noqa: N818 - it is no error: the run ends well
    """The budget is used up; what was made is kept."""


class Asker:
    """Asks a model within a budget.

    Args:
        model: Anything that chats.
        config: The budget and how answers are drawn.
        journal: File that every answer goes to, and is found in again; None: nothing is remembered.
    """

    def __init__(self, model: ChatModel, config: GenerateConfig, journal: Path | None = None):
        self._model, self._config = model, config
        self.spent = Spent()
        self._num_failures = 0
        self._known: dict[str, dict[str, Any]] = {}
        self._file: IO[str] | None = None
        if journal is not None:
            self._known = dict(_read_journal(journal))
            journal.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(journal, "a", encoding="utf-8")

    def ask(self, messages: Sequence[Message] | str, *, temperature: float | None = None) -> str | None:
        """Return the model's answer, stripped; None where it failed, was cut off or said nothing.

        Raises:
            BudgetSpent: The budget is used up.
            DataError: The model failed several times in a row.
        """
        config, spent = self._config, self.spent
        if spent.requests >= config.max_requests or (config.max_tokens and spent.tokens >= config.max_tokens):
            raise BudgetSpent
        turns = [Message("user", messages)] if isinstance(messages, str) else list(messages)
        params = SamplingParams(
            temperature=config.temperature if temperature is None else temperature,
            top_p=config.top_p,
            max_tokens=config.answer_tokens,
            seed=(config.seed * 1_000_003 + spent.requests) & (2**62 - 1),
        )
        key = _key_of(turns, params)
        spent.requests += 1
        entry = self._known.get(key)
        if entry is None:
            entry = self._fresh(turns, params, key)
            if entry is None:
                return None
        else:
            spent.replayed += 1
        self._num_failures = 0
        spent.prompt_tokens += entry["prompt_tokens"]
        spent.completion_tokens += entry["completion_tokens"]
        text = entry["text"].strip()
        return text if text and entry["finish_reason"] != "length" else None

    def _fresh(self, turns: list[Message], params: SamplingParams, key: str) -> dict[str, Any] | None:
        try:
            found = self._model.chat(turns, params)
        except (ModelwrightError, OSError) as error:
            self.spent.failed += 1
            self._num_failures += 1
            if self._num_failures >= MAX_FAILURES:
                raise DataError(
                    f"The model failed {MAX_FAILURES} times in a row, the last with {type(error).__name__}: {error}. "
                    "What was made is in the journal; mend the model or its server and run the same command again."
                ) from error
            return None
        entry = {
            "key": key,
            "text": str(found.text),
            "finish_reason": found.finish_reason,
            "prompt_tokens": found.usage.prompt_tokens,
            "completion_tokens": found.usage.completion_tokens,
        }
        if self._file is not None:
            self._file.write(json.dumps(entry, ensure_ascii=True) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        return entry

    def close(self) -> None:
        """Close the journal."""
        if self._file is not None:
            self._file.close()


def _key_of(turns: Sequence[Message], params: SamplingParams) -> str:
    text = json.dumps([[(t.role, t.content) for t in turns], params.seed, params.temperature, params.max_tokens])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _read_journal(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the answers of a journal; a last line that a killed run left half written is passed over."""
    if not file.is_file():
        return
    text = file.read_text(encoding="utf-8")
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line) if line else None
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise DataError(f"{file}, line {number}: not valid JSON ({error}). Remove the line.") from None
            # Cut the half line off, or the next answer would be written behind it.
            file.write_text(text[: len(text) - len(line)], encoding="utf-8")
            return
        if entry:
            yield entry["key"], entry


@dataclass(frozen=True)
class Candidate:
    """One example that a method proposes."""

    conversation: Conversation
    task: str  # what is compared with the tasks that are known
    origin: str  # what it was made from: a seed's number, a document's id, an earlier task
    is_grounded: bool = False  # whether a document answers it, so that it may well speak of files and pictures


@dataclass(frozen=True)
class Refused:
    """A candidate, or an answer that gave none, and why it was not kept."""

    reason: str
    text: str


@dataclass
class Generated:
    """What a run made."""

    kept: list[Candidate] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    spent: Spent = field(default_factory=Spent)
    ended: str = ""  # why the run ended: "enough", "budget" or "exhausted" (the method has nothing more to propose)

    def reasons(self) -> dict[str, int]:
        """Return how many were refused for each kind of reason, the most frequent first."""
        return dict(Counter(refused.reason.split(":")[0] for refused in self.refused).most_common())

    def report(self) -> dict[str, Any]:
        """Return the figures of the run."""
        return {
            "kept": len(self.kept),
            "refused": len(self.refused),
            "reasons": self.reasons(),
            "ended": self.ended,
            "spent": asdict(self.spent),
        }


def save_generated(
    generated: Generated, folder: Path, config: GenerateConfig, *, made_by: str, parents: Sequence[Path] = ()
) -> None:
    """Write the examples as a data set: rows in the OpenAI messages or preference form, each with its origin.

    Args:
        generated: What a run made.
        folder: The artifact to make.
        config: Written into the manifest.
        made_by: Which model wrote it, as people should read it: a rule-based one is called so.
        parents: Artifacts that seeds, documents or the model come from.
    """
    settings = {**to_dict(config), "made_by": made_by}
    with new_artifact(folder, "dataset", settings=settings, parents=parents, seed=config.seed) as (work, measured):
        rows = []
        for candidate, score in zip(generated.kept, generated.scores, strict=True):
            form = "preference" if candidate.conversation.kind == "preference" else "messages"
            row = write_conversation(replace(candidate.conversation, extra={}), form)
            rows.append({**row, "origin": candidate.origin, "made_by": made_by} | ({"score": score} if score else {}))
        write_jsonl(work / MADE, rows)
        write_jsonl(work / REMOVED, (asdict(refused) for refused in generated.refused))
        write_json(work / REPORT, generated.report())
        measured.update(num_train=len(rows), num_requests=generated.spent.requests, num_tokens=generated.spent.tokens)


Method = Callable[[Asker], Iterator[Candidate | Refused]]
