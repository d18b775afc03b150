"""Who may ask, for what, and how much: API keys, their scopes and their limits.

A key file is a YAML list; each entry has a ``name``, the SHA-256 of the key (``sha256``; the key itself is told once,
by ``mw keys``, and stands nowhere), and what the key may do. A request carries the key as ``Authorization: Bearer ...``
or, as Anthropic's clients do, in ``x-api-key``.

Rates are token buckets: a minute's worth may be spent at once and refills steadily. Tokens are counted when an answer
ends, since nobody knows before how long it will be, so the last answer may overdraw; the next one waits for it.
A request that is refused for a fault of its own (HTTP 4xx) is given back and counted among the refused ones, of which
a minute lets as many pass: a faulty program does not use up what the others of its key may ask, and does not flood.
Budgets are for the life of the file and are kept beside it in ``FILE.usage.json``.
"""

import hashlib
import math
import secrets
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from modelwright.base.errors import ConfigError, RequestError
from modelwright.base.files import atomic_file, read_json, write_json

PREFIX = "mw-"
SCOPES = ("inference", "metrics", "admin")
MINUTE = 60.0


@dataclass(frozen=True)
class KeyConfig:
    """What one key may do."""

    name: str
    sha256: str
    scopes: tuple[str, ...] = ("inference",)
    requests_per_minute: int | None = None  # None: as many as the server can
    tokens_per_minute: int | None = None  # of prompts and answers together; None: no limit
    max_concurrent: int | None = None  # requests at the same time; None: no limit
    token_budget: int | None = None  # in all; None: no limit

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name and self.name.isprintable() and len(self.name) <= 64):
            raise ConfigError(f"A key is named {self.name!r}; a name has 1 to 64 printable characters.")
        digest = str(self.sha256).lower()
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise ConfigError(f"The key {self.name!r} has no SHA-256 of 64 hexadecimal digits. Make one with mw keys.")
        object.__setattr__(self, "sha256", digest)
        object.__setattr__(self, "scopes", tuple(self.scopes))
        unknown = [scope for scope in self.scopes if scope not in SCOPES]
        if unknown:
            raise ConfigError(f"The key {self.name!r} has the scope {unknown[0]!r}; known: {', '.join(SCOPES)}.")
        for limit in ("requests_per_minute", "tokens_per_minute", "max_concurrent", "token_budget"):
            value = getattr(self, limit)
            if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
                raise ConfigError(f"The key {self.name!r} has {limit} {value!r}; it must be at least 1, or left out.")


class LimitError(RequestError):
    """A key has used up what it may use for now; the same request passes after ``retry_after`` seconds."""

    def __init__(self, message: str, *, code: str, retry_after: float):
        super().__init__(message, code=code, status=429)
        self.retry_after = max(1, math.ceil(retry_after))


class Bucket:
    """An amount that refills steadily up to a minute's worth."""

    def __init__(self, per_minute: int, clock: Callable[[], float]):
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._seen = clock()

    def wait_seconds(self, amount: float) -> float:
        """Return the seconds until ``amount`` is there; 0 when it is."""
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._seen) * self.per_minute / MINUTE)
        self._seen = now
        return max(0.0, (amount - self._level) * MINUTE / self.per_minute)

    def take(self, amount: float) -> None:
        """Use up some, below zero if need be."""
        self._level -= amount


class KeyMeter:
    """What one key uses."""

    def __init__(self, config: KeyConfig, spent: int = 0, clock: Callable[[], float] = time.monotonic):
        self.config = config
        self.spent = spent  # tokens, ever
        self.num_running = 0
        self._requests = Bucket(config.requests_per_minute, clock) if config.requests_per_minute else None
        self._refused = Bucket(config.requests_per_minute, clock) if config.requests_per_minute else None
        self._tokens = Bucket(config.tokens_per_minute, clock) if config.tokens_per_minute else None

    def enter(self) -> None:
        """Begin one request.

        Raises:
            LimitError: The key is at one of its limits.
        """
        self.take_place()
        try:
            self.take_turn()
        except LimitError:
            self.leave()
            raise

    def take_place(self) -> None:
        """Begin what lasts: a request, or a connection over which requests come one after the other.

        Raises:
            LimitError: As many are open as the key may have.
        """
        c = self.config
        if c.max_concurrent is not None and self.num_running >= c.max_concurrent:
            message = f"The key {c.name!r} has {self.num_running} requests running, the most it may. Wait for one."
            raise LimitError(message, code="rate_limit_exceeded", retry_after=1)
        self.num_running += 1

    def take_turn(self) -> None:
        """Count one request: over HTTP, in a message of a WebSocket, or on a line of a batch.

        Raises:
            LimitError: The budget is spent, or the rates are used up for now.
        """
        c = self.config
        if c.token_budget is not None and self.spent >= c.token_budget:
            message = f"The key {c.name!r} has spent its budget of {c.token_budget} tokens. Ask for a larger one."
            raise LimitError(message, code="insufficient_quota", retry_after=3600)
        buckets = ((self._requests, "requests"), (self._tokens, "tokens"), (self._refused, "refused requests"))
        for bucket, what in buckets:
            seconds = bucket.wait_seconds(1) if bucket is not None else 0.0
            if bucket is not None and seconds > 0:
                message = (
                    f"The key {c.name!r} is at its {bucket.per_minute} {what} a minute. Wait {seconds:.1f} seconds."
                )
                raise LimitError(message, code="rate_limit_exceeded", retry_after=seconds)
        if self._requests is not None:
            self._requests.take(1)

    def give_back(self) -> None:
        """Count a request that had its turn among the refused ones instead."""
        if self._requests is not None and self._refused is not None:
            self._requests.take(-1)
            self._refused.take(1)

    def leave(self) -> None:
        """End what `take_place` began."""
        self.num_running -= 1

    def spend(self, num_tokens: int) -> None:
        """Count the tokens of an answer."""
        self.spent += num_tokens
        if self._tokens is not None:
            self._tokens.take(num_tokens)


@dataclass
class KeyRing:
    """All keys of a server."""

    path: Path
    meters: dict[str, KeyMeter] = field(default_factory=dict)  # by the key's SHA-256

    @classmethod
    def load(cls, path: Path, clock: Callable[[], float] = time.monotonic) -> "KeyRing":
        """Read a key file.

        Raises:
            ConfigError: The file is not there, malformed, empty, or names two keys alike.
        """
        ring = cls(path)
        spent = ring._read_usage()
        names = set()
        for entry in read_entries(path):
            config = _config(entry, path)
            if config.name in names or config.sha256 in ring.meters:
                raise ConfigError(f"{path} has the key {config.name!r} twice. Names and keys must differ.")
            names.add(config.name)
            ring.meters[config.sha256] = KeyMeter(config, spent.get(config.name, 0), clock)
        if not ring.meters:
            raise ConfigError(f"{path} holds no keys, so nobody could ask. Make one with mw keys.")
        return ring

    def find(self, secret: str) -> KeyMeter | None:
        """Return the meter of a key; looked up by its hash, so timing tells nothing about the keys there are."""
        return self.meters.get(digest_of(secret))

    def save_usage(self) -> None:
        """Keep what has been spent."""
        write_json(self._usage_path, {m.config.name: m.spent for m in self.meters.values() if m.spent})

    @property
    def has_budgets(self) -> bool:
        """Whether a key's spending outlives the process."""
        return any(m.config.token_budget is not None for m in self.meters.values())

    @property
    def _usage_path(self) -> Path:
        return self.path.with_name(self.path.name + ".usage.json")

    def _read_usage(self) -> dict[str, int]:
        return read_json(self._usage_path) if self._usage_path.is_file() else {}


# The key of the request that is being served, for whoever counts its tokens or keeps its cache apart.
current_key: ContextVar[KeyMeter | None] = ContextVar("current_key", default=None)


def digest_of(secret: str) -> str:
    """Return the SHA-256 of a key in hexadecimal. Keys are long and random, so a slow hash would add nothing."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def read_entries(path: Path) -> list[Mapping[str, Any]]:
    """Return the entries of a key file, unchecked."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The key file {path} cannot be read: {error.strerror}. Make one with mw keys.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # The message of the parser would quote the file, keys of a careless author included.
        where = getattr(getattr(error, "problem_mark", None), "line", None)
        raise ConfigError(f"{path} is not YAML{'' if where is None else f' (line {where + 1})'}.") from None
    if entries is None:
        return []
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise ConfigError(f"{path} holds a {type(entries).__name__}; expected a list of keys with name and sha256.")
    return entries


def add_key(path: Path, name: str, **limits: Any) -> str:
    """Add a new key to a file, which is made if it does not exist, and return the key; it is kept nowhere.

    Raises:
        ConfigError: The name is taken or a limit is wrong; the file is as it was.
    """
    entries = read_entries(path) if path.exists() else []
    if any(entry.get("name") == name for entry in entries):
        raise ConfigError(f"{path} has a key named {name!r} already. Choose another name, or remove its entry.")
    secret = PREFIX + secrets.token_urlsafe(32)
    entry = {"name": name, "sha256": digest_of(secret), **{k: v for k, v in limits.items() if v is not None}}
    _config(entry, path)
    with atomic_file(path, "w") as handle:
        yaml.safe_dump([*entries, entry], handle, sort_keys=False)
    path.chmod(0o600)
    return secret


def _config(entry: Mapping[str, Any], path: Path) -> KeyConfig:
    known = {f.name for f in fields(KeyConfig)}
    if "key" in entry:
        raise ConfigError(f"{path}: the key {entry.get('name')!r} stands there in the open. Keep its sha256 instead.")
    unknown = sorted(set(entry) - known)
    if unknown:
        raise ConfigError(f"{path}: a key has the field {unknown[0]!r}; known: {', '.join(sorted(known))}.")
    missing = [name for name in ("name", "sha256") if name not in entry]
    if missing:
        raise ConfigError(f"{path}: a key has no {missing[0]}. Make one with mw keys.")
    return KeyConfig(**entry)
