"""What the gateway spends, and what it need not ask again: one SQLite file each, shared by threads.

The ledger has a row a call: who asked, which endpoint answered, tokens, seconds, dollars. Prices are the user's own
table, dollars a million tokens; a model without a price costs an unknown amount, which is counted as such and refused
where there is a budget. The cache finds the same question again (exact), or one whose vector is near enough
(semantic), for the same tenant alone.

Source of the semantic cache: Bang 2023, "GPTCache".
"""

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from modelwright.base.errors import ConfigError
from modelwright.base.types import Completion, Message, SamplingParams, Usage

MILLION = 1_000_000
Embed = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Price:
    """Dollars a million tokens."""

    input: float
    output: float
    cached: float | None = None  # of prompt tokens found in the service's cache; None: as input

    def cost(self, usage: Usage) -> float:
        """Return the dollars of one answer.

        >>> Price(input=3, output=15, cached=0.3).cost(Usage(1_000_000, 100_000, 500_000))
        3.15
        """
        cached = self.input if self.cached is None else self.cached
        fresh = usage.prompt_tokens - usage.cached_tokens
        return (fresh * self.input + usage.cached_tokens * cached + usage.completion_tokens * self.output) / MILLION


@dataclass(frozen=True)
class Spent:
    """One row of the costs."""

    tenant: str
    endpoint: str
    num_calls: int
    num_failed: int
    num_cached: int  # answers from the gateway's own cache
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    dollars: float
    num_unpriced: int  # calls whose price is not known


class Ledger:
    """Every call and its cost."""

    def __init__(self, path: Path | None = None):
        """Open the ledger; None keeps it in memory."""
        self._lock = threading.Lock()
        self._db = sqlite3.connect(":memory:" if path is None else path, check_same_thread=False)
        with self._lock, self._db:
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS calls (time REAL, tenant TEXT, endpoint TEXT, outcome TEXT, "
                "prompt_tokens INT, cached_tokens INT, completion_tokens INT, seconds REAL, dollars REAL)"
            )

    def add(
        self, tenant: str, endpoint: str, outcome: str, usage: Usage, seconds: float, dollars: float | None
    ) -> None:
        """Write a call; ``outcome`` is answered, cached or failed."""
        tokens = (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
        row = (time.time(), tenant, endpoint, outcome, *tokens, seconds, dollars)
        with self._lock, self._db:
            self._db.execute("INSERT INTO calls VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def dollars(self, tenant: str | None = None) -> float:
        """Return what has been spent, by one tenant or all."""
        with self._lock:
            query, values = "SELECT COALESCE(SUM(dollars), 0) FROM calls", ()
            if tenant is not None:
                query, values = f"{query} WHERE tenant = ?", (tenant,)  # type: ignore[assignment]
            return float(self._db.execute(query, values).fetchone()[0])

    def table(self) -> list[Spent]:
        """Return the costs by tenant and endpoint, the dearest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT tenant, endpoint, COUNT(*), SUM(outcome = 'failed'), SUM(outcome = 'cached'), "
                "SUM(prompt_tokens), SUM(completion_tokens), SUM(seconds), COALESCE(SUM(dollars), 0), "
                "SUM(dollars IS NULL AND outcome = 'answered') FROM calls GROUP BY tenant, endpoint "
                "ORDER BY 9 DESC, 1, 2"
            ).fetchall()
        return [Spent(*row) for row in rows]

    def by_day(self) -> list[tuple[str, float, int]]:
        """Return (day, dollars, calls) in order of days, by UTC."""
        with self._lock:
            return self._db.execute(
                "SELECT date(time, 'unixepoch'), COALESCE(SUM(dollars), 0), COUNT(*) FROM calls GROUP BY 1 ORDER BY 1"
            ).fetchall()


@dataclass(frozen=True)
class CacheConfig:
    """What is found again."""

    path: Path | None = None  # None: in memory, until the program ends
    seconds: float = 24 * 3600.0  # for so long an answer is good
    similarity: float | None = None  # of vectors, from which a question counts as the same; None: only equal ones
    has_random: bool = False  # also answers that were drawn at random (temperature above 0 and no seed)
    max_compared: int = 5_000  # newest questions whose vectors are compared

    def __post_init__(self) -> None:
        if self.similarity is not None and not 0 < self.similarity <= 1:
            raise ConfigError(f"cache.similarity is {self.similarity}; it must be above 0 and at most 1, or none.")


class AnswerCache:
    """Answers by question."""

    def __init__(self, config: CacheConfig, embed: Embed | None = None):
        if config.similarity is not None and embed is None:
            raise ConfigError("cache.similarity is given, but nothing that makes vectors. Pass embed, or leave it out.")
        self.config, self._embed = config, embed
        self._lock = threading.Lock()
        self._db = sqlite3.connect(":memory:" if config.path is None else config.path, check_same_thread=False)
        with self._lock, self._db:
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, around TEXT, time REAL, vector BLOB, "
                "text TEXT, reason TEXT, prompt_tokens INT, completion_tokens INT)"
            )
            self._db.execute("CREATE INDEX IF NOT EXISTS by_around ON answers (around, time)")

    def find(
        self, tenant: str, models: Sequence[str], messages: Sequence[Message], params: SamplingParams
    ) -> Completion | None:
        """Return the answer that the same question got; None: there is none that is good still."""
        if not self._is_kept(params):
            return None
        key, around = self._keys(tenant, models, messages, params)
        since = time.time() - self.config.seconds
        fields = "text, reason, prompt_tokens, completion_tokens"
        with self._lock:
            query = f"SELECT {fields} FROM answers WHERE key = ? AND time > ?"
            row = self._db.execute(query, (key, since)).fetchone()
        if row is None and self.config.similarity is not None:
            row = self._nearest(around, since, messages[-1].content, fields)
        return None if row is None else Completion(row[0], (), row[1], Usage(row[2], row[3]))

    def _nearest(self, around: str, since: float, question: str, fields: str) -> tuple[str, str, int, int] | None:
        with self._lock:
            rows = self._db.execute(
                f"SELECT vector, {fields} FROM answers WHERE around = ? AND time > ? AND vector IS NOT NULL "
                "ORDER BY time DESC LIMIT ?",
                (around, since, self.config.max_compared),
            ).fetchall()
        if not rows:
            return None
        likeness = np.stack([np.frombuffer(row[0], np.float32) for row in rows]) @ self._vector(question)
        best = int(likeness.argmax())
        assert self.config.similarity is not None
        return rows[best][1:] if likeness[best] >= self.config.similarity else None

    def keep(
        self,
        tenant: str,
        models: Sequence[str],
        messages: Sequence[Message],
        params: SamplingParams,
        answer: Completion,
    ) -> None:
        """Keep an answer."""
        if not self._is_kept(params):
            return
        key, around = self._keys(tenant, models, messages, params)
        vector = self._vector(messages[-1].content).tobytes() if self.config.similarity is not None else None
        usage = answer.usage
        row = (key, around, time.time(), vector, answer.text, answer.finish_reason)
        with self._lock, self._db:
            self._db.execute("DELETE FROM answers WHERE time < ?", (time.time() - self.config.seconds,))
            self._db.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, usage.prompt_tokens, usage.completion_tokens),
            )

    def _is_kept(self, params: SamplingParams) -> bool:
        return self.config.has_random or params.temperature == 0 or params.seed is not None

    def _vector(self, text: str) -> np.ndarray:
        assert self._embed is not None
        vector = np.asarray(self._embed([text])[0], np.float32)
        return vector / max(float(np.linalg.norm(vector)), 1e-12)

    @staticmethod
    def _keys(
        tenant: str, models: Sequence[str], messages: Sequence[Message], params: SamplingParams
    ) -> tuple[str, str]:
        """Return the hash of the whole question, and of all but its last message, which may differ in words."""
        turns = [[m.role, m.content] for m in messages]
        settings = asdict(params)
        settings["logit_bias"] = sorted(settings["logit_bias"].items())
        around = [tenant, list(models), turns[:-1], turns[-1][:1], settings]
        return _hash([around, turns[-1]]), _hash(around)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def read_prices(values: Mapping[str, Mapping[str, float]]) -> dict[str, Price]:
    """Return a price table from plain values.

    Raises:
        ConfigError: A price lacks input or output, has another field, or is negative.
    """
    table = {}
    for model, one in values.items():
        unknown = sorted(set(one) - {"input", "output", "cached"})
        if unknown or not {"input", "output"} <= set(one):
            raise ConfigError(f"The price of {model!r} is {dict(one)}; expected input, output and perhaps cached.")
        if any(not isinstance(p, (int, float)) or p < 0 for p in one.values()):
            raise ConfigError(f"The price of {model!r} is {dict(one)}; expected dollars a million tokens, from 0 on.")
        table[model] = Price(**one)
    return table
