"""One endpoint of the gateway: a service, a model there, and how patiently it is asked.

A failure is one of three. *Passing* (no connection, a time limit, 408, 429, 5xx, an answer that is no answer): asked
again after a wait that doubles and is drawn at random, or as long as ``Retry-After`` says. *Of this endpoint* (the key,
the model's name, a prompt beyond its context): the next endpoint may do. *Of the request*: told to the caller at once.
An endpoint that fails again and again is left alone for a while (a circuit breaker), then tried with one request.

Source: Nygard, "Release It!" (circuit breaker); AWS, "Exponential backoff and jitter" (full jitter); RFC 9110, 10.2.3.
"""

import email.utils
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelwright.base import env
from modelwright.base.errors import CapacityError, ConfigError, MissingExtraError, ModelwrightError, RequestError
from modelwright.base.registry import lookup
from modelwright.base.types import Completion, Delta, Message, SamplingParams
from modelwright.serve import PROVIDERS
from modelwright.serve.providers import Call, Provider

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
OF_THE_ENDPOINT = frozenset({401, 402, 403, 404})
CONTEXT_WORDS = ("context_length_exceeded", "context length", "context window", "prompt is too long", "too many tokens")
MAX_ERROR_CHARS = 300


@dataclass(frozen=True)
class EndpointConfig:
    """A service and a model there."""

    provider: str  # openai (and every compatible server), anthropic, gemini, cohere, ollama
    model: str
    name: str | None = None  # in errors, costs and the chain; None: the model's
    url: str | None = None  # None: the provider's own
    key_env: str | None = None  # the environment variable that holds the key; None: no key is sent
    timeout_seconds: float = 60.0  # without a byte
    max_retries: int = 3
    first_wait_seconds: float = 0.5  # before the first retry, doubled for each further one
    max_wait_seconds: float = 30.0  # an endpoint that asks for a longer wait is passed over
    breaker_failures: int = 5  # in a row, after which the endpoint is left alone
    breaker_seconds: float = 30.0  # for so long

    def __post_init__(self) -> None:
        if self.provider not in PROVIDERS:
            raise ConfigError(f"provider is {self.provider!r}; known: {', '.join(PROVIDERS)}.")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url is {self.url!r}; expected one that begins with http:// or https://.")
        if self.max_retries < 0 or self.breaker_failures < 1:
            raise ConfigError("max_retries must be at least 0 and breaker_failures at least 1.")

    @property
    def shown(self) -> str:
        """The name in errors and costs."""
        return self.name or self.model


class EndpointError(ModelwrightError):
    """An endpoint gave no answer; another may. Holds no key and at most a few hundred characters of its words."""


class Breaker:
    """Closed while all is well; open, and nobody passes, after failures in a row; then one may try."""

    def __init__(self, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._most, self._seconds, self._clock = failures, seconds, clock
        self._lock = threading.Lock()
        self._num_failed = 0
        self._opened: float | None = None
        self._is_trying = False

    def may_pass(self) -> bool:
        """Tell whether a request may be sent; of those that come when the time is over, one may."""
        with self._lock:
            if self._opened is None:
                return True
            if self._is_trying or self._clock() - self._opened < self._seconds:
                return False
            self._is_trying = True
            return True

    def note(self, is_well: bool) -> None:
        """Note how a request ended."""
        with self._lock:
            self._is_trying = False
            self._num_failed = 0 if is_well else self._num_failed + 1
            if is_well:
                self._opened = None
            elif self._num_failed >= self._most or self._opened is not None:
                self._opened = self._clock()


class Endpoint:
    """Asks one service."""

    def __init__(self, config: EndpointConfig):
        try:
            import httpx2
        except ImportError:
            raise MissingExtraError("httpx2", "gateway", "Asking other services") from None
        self.config = config
        self.provider: Provider = lookup(PROVIDERS, config.provider, "provider")()
        self.breaker = Breaker(config.breaker_failures, config.breaker_seconds)
        key = env.secret(config.key_env) if config.key_env is not None else None
        if config.key_env is not None and key is None:
            raise ConfigError(f"The endpoint {config.shown!r} takes its key from {config.key_env}, which is not set.")
        self._base = (config.url or self.provider.url).rstrip("/")
        self._headers = self.provider.headers(key)
        self._http = httpx2
        # A redirect could carry the key to another host.
        self._client = httpx2.Client(timeout=config.timeout_seconds, follow_redirects=False)
        self._random = random.Random()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def chat(self, messages: Sequence[Message], params: SamplingParams) -> Completion:
        """Return a whole answer.

        Raises:
            EndpointError: There was none after all retries, or the endpoint cannot serve this request.
            RequestError: The request is wrong wherever it is sent.
        """
        call = self.provider.call(self.config.model, messages, params, False)

        def once() -> Completion:
            answer = self._client.post(self._base + call.path, json=call.body, headers=self._headers | call.headers)
            self._check(answer.status_code, answer.headers, answer.text)
            return self.provider.read(answer.json())

        return self._with_retries(once)

    def stream(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[Delta]:
        """Yield the pieces of an answer; retries end with the first piece.

        Raises:
            EndpointError: There was no first piece, or the stream broke off.
            RequestError: The request is wrong wherever it is sent.
        """
        call = self.provider.call(self.config.model, messages, params, True)

        def once() -> tuple[Delta, Iterator[Delta]]:
            rest = self._deltas(call)
            return next(rest, Delta("", (), None)), rest

        first, rest = self._with_retries(once)
        yield first
        try:
            yield from rest
        except (self._http.HTTPError, ValueError, KeyError, TypeError, IndexError) as error:
            raise EndpointError(f"{self.config.shown} broke off its answer ({_words(error)}). Ask again.") from error

    def count_tokens(self, messages: Sequence[Message]) -> int | None:
        """Return the prompt's tokens as the service counts them; None: it does not."""
        asked = self.provider.count_call(self.config.model, messages)
        if asked is None:
            return None
        call, name = asked

        def once() -> int:
            answer = self._client.post(self._base + call.path, json=call.body, headers=self._headers | call.headers)
            self._check(answer.status_code, answer.headers, answer.text)
            return int(answer.json()[name])

        return self._with_retries(once)

    def _deltas(self, call: Call) -> Iterator[Delta]:
        url, headers = self._base + call.path, self._headers | call.headers
        is_ended = False
        with self._client.stream("POST", url, json=call.body, headers=headers) as answer:
            if answer.status_code != 200:
                answer.read()
                self._check(answer.status_code, answer.headers, answer.text)
            for line in answer.iter_lines():
                event = self._event(line)
                if event is None:
                    continue
                if "error" in event or event.get("type") == "error":
                    raise ValueError(f"it told of an error: {json.dumps(event)[:MAX_ERROR_CHARS]}")
                delta = self.provider.read_event(event)
                if delta is not None:
                    is_ended = is_ended or delta.finish_reason is not None
                    yield delta
        if not is_ended:
            raise ValueError("it ended without a finish reason")

    def _event(self, line: str) -> Any:
        if self.provider.is_lines:
            return json.loads(line) if line.strip() else None
        if not line.startswith("data:") or line[5:].strip() == "[DONE]":
            return None
        return json.loads(line[5:])

    def _with_retries(self, once: Callable[[], Any]) -> Any:
        config, wait = self.config, 0.0
        if not self.breaker.may_pass():
            raise EndpointError(f"{config.shown} has failed again and again and is left alone for now. Ask later.")
        is_well, last = False, "?"
        try:
            for attempt in range(config.max_retries + 1):
                if attempt:
                    time.sleep(wait)
                try:
                    result = once()
                    is_well = True
                    return result
                except _PassingError as error:
                    last, asked = str(error), error.retry_after
                except (self._http.HTTPError, ValueError, KeyError, TypeError, IndexError) as error:
                    last, asked = _words(error), None
                most = config.first_wait_seconds * 2**attempt
                wait = asked if asked is not None else self._random.uniform(0, min(most, config.max_wait_seconds))
                if wait > config.max_wait_seconds:
                    raise EndpointError(f"{config.shown} asks to wait for {wait:.0f} seconds. Ask later: {last}")
            raise EndpointError(f"{config.shown} gave no answer in {config.max_retries + 1} tries. The last: {last}")
        except (RequestError, _OwnError):
            is_well = True  # it answers; it is the request that was wrong
            raise
        finally:
            self.breaker.note(is_well)

    def _check(self, status: int, headers: Mapping[str, str], text: str) -> None:
        """Sort an answer that is none by whose fault it is."""
        if status == 200:
            return
        said = f"{self.config.shown} answered {status}: {_error_text(text)}"
        if status in PASSING or status >= 500:
            raise _PassingError(said, retry_after(headers))
        if status in OF_THE_ENDPOINT or any(word in text.lower() for word in CONTEXT_WORDS):
            raise _OwnError(said)
        raise RequestError(said, code="upstream_refused", status=400)


class _PassingError(Exception):
    def __init__(self, message: str, wait: float | None):
        super().__init__(message)
        self.retry_after = wait


class _OwnError(EndpointError):
    """The endpoint cannot serve this request, another may."""


def retry_after(headers: Mapping[str, str], now: Callable[[], float] = time.time) -> float | None:
    """Return the seconds that ``Retry-After`` (a number or a date) or ``retry-after-ms`` asks for.

    >>> retry_after({"retry-after-ms": "1500"}), retry_after({"retry-after": "2"}), retry_after({"retry-after": "soon"})
    (1.5, 2.0, None)
    """
    try:
        if (value := headers.get("retry-after-ms")) is not None:
            return max(0.0, float(value) / 1000)
        value = headers.get("retry-after")
        if value is None:
            return None
        if value.strip().replace(".", "", 1).isdecimal():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now())
    except (ValueError, TypeError):
        return None


def _error_text(text: str) -> str:
    try:
        body = json.loads(text)
        found = body.get("error", body)
        text = found if isinstance(found, str) else str(found.get("message", text))
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:MAX_ERROR_CHARS]


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:MAX_ERROR_CHARS]}"


class AllFailedError(CapacityError):
    """No endpoint of the chain gave an answer; the message says what each one said."""
