"""`Gateway`: one `ChatModel` over many services, tried in order, with caches, costs and budgets.

Endpoints stand in a chain: the first is asked, and where it gives no answer the next. The local engine, or any other
`ChatModel`, can stand in the chain as well. An answer that has begun to stream is never begun again elsewhere.

Not done: routing by price or speed; several requests at once to different endpoints.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelwright.base.config import load
from modelwright.base.errors import CapacityError, ConfigError, RequestError
from modelwright.base.logs import get_logger
from modelwright.base.types import ChatModel, Completion, Delta, Message, SamplingParams, Usage
from modelwright.serve.endpoint import AllFailedError, Endpoint, EndpointConfig, EndpointError
from modelwright.serve.ledger import AnswerCache, CacheConfig, Embed, Ledger, Price, read_prices

log = get_logger(__name__)
CHARS_PER_TOKEN = 4  # of English, where nobody counts


class BudgetError(CapacityError):
    """A budget is spent; the message says whose, how much, and what was spent."""


@dataclass(frozen=True)
class GatewayConfig:
    """How a gateway is built."""

    endpoints: tuple[EndpointConfig, ...] = ()  # in the order in which they are tried
    prices: dict[str, dict[str, float]] = field(default_factory=dict)  # by model: input, output, cached
    cache: CacheConfig | None = None  # None: every question is asked
    ledger: Path | None = None  # file of the costs; None: in memory
    budget_dollars: float | None = None  # of all tenants together, in the ledger's life; None: no limit
    tenant_budget_dollars: float | None = None  # of each tenant; None: no limit


class Gateway:
    """Asks services for answers; a `ChatModel`.

    Args:
        config: The chain, or a YAML file of it.
        local: `ChatModel` objects by name, behind the configured endpoints in the chain, free of charge.
        tenant: Whose calls these are: caches and budgets are kept apart by it. `for_tenant` gives another's view.
        embed: Texts to vectors, for ``cache.similarity``.
    """

    def __init__(
        self,
        config: GatewayConfig | Path | str,
        *,
        local: Mapping[str, ChatModel] | None = None,
        tenant: str = "default",
        embed: Embed | None = None,
    ):
        if not isinstance(config, GatewayConfig):
            config = load(GatewayConfig, Path(config))
        self.config, self.tenant = config, tenant
        self._prices: dict[str, Price] = read_prices(config.prices)
        self._chain: list[tuple[str, Endpoint | ChatModel]] = []
        for one in config.endpoints:
            self._chain.append((one.shown, Endpoint(one)))
        self._chain += list((local or {}).items())
        if not self._chain:
            raise ConfigError("The gateway has no endpoint and no local model. Give at least one.")
        self._check_budget_is_possible()
        self.ledger = Ledger(config.ledger)
        self._cache = AnswerCache(config.cache, embed) if config.cache is not None else None
        self._lock = threading.Lock()

    def _check_budget_is_possible(self) -> None:
        if self.config.budget_dollars is None and self.config.tenant_budget_dollars is None:
            return
        unpriced = [c.model for c in self.config.endpoints if c.model not in self._prices]
        if unpriced:
            raise ConfigError(
                f"There is a budget, but no price for {unpriced[0]!r}. Add it to prices (0 if it is free)."
            )

    def for_tenant(self, tenant: str) -> "Gateway":
        """Return this gateway for another tenant: the same chain and ledger, other budgets and cached answers."""
        view = object.__new__(Gateway)
        view.__dict__ = {**self.__dict__, "tenant": tenant}
        return view

    def close(self) -> None:
        """Close the connections."""
        for _, asked in self._chain:
            if isinstance(asked, Endpoint):
                asked.close()

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """Answer a conversation.

        Raises:
            AllFailedError: No endpoint gave an answer.
            BudgetError: The budget is spent.
            RequestError: The request is wrong.
        """
        params = params or SamplingParams()
        found = self._find(messages, params)
        if found is not None:
            return found
        failures: list[str] = []
        for name, asked in self._chain:
            start = time.monotonic()
            try:
                answer = asked.chat(messages, params)
            except EndpointError as error:
                self._note_failure(name, start, failures, error)
                continue
            self._note_answer(name, asked, answer.usage, start)
            self._keep(messages, params, answer)
            return answer
        raise AllFailedError(_told(failures))

    def stream(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[Delta]:
        """Answer a conversation piece by piece; raises as `chat`, and `EndpointError` where an answer breaks off."""
        params = params or SamplingParams()
        found = self._find(messages, params)
        if found is not None:
            yield Delta(found.text, (), found.finish_reason, found.usage)
            return
        failures: list[str] = []
        for name, asked in self._chain:
            start, has_begun = time.monotonic(), False
            text, reason, usage = "", None, Usage(0, 0)
            try:
                for delta in asked.stream(messages, params):
                    has_begun = has_begun or bool(delta.text)
                    text, reason = text + delta.text, delta.finish_reason or reason
                    usage = _newer(usage, delta.usage)
                    yield delta
            except EndpointError as error:
                self._note_failure(name, start, failures, error)
                if has_begun:
                    raise
                continue
            self._note_answer(name, asked, usage, start)
            self._keep(messages, params, Completion(text, (), reason or "stop", usage))
            return
        raise AllFailedError(_told(failures))

    def count_tokens(self, messages: Sequence[Message]) -> tuple[int, bool]:
        """Return the tokens of a prompt, and whether the first endpoint counted them or they are an estimate."""
        first = self._chain[0][1]
        counted = first.count_tokens(messages) if isinstance(first, Endpoint) else None
        if counted is not None:
            return counted, True
        return sum(len(m.content) for m in messages) // CHARS_PER_TOKEN + 4 * len(messages), False

    def _find(self, messages: Sequence[Message], params: SamplingParams) -> Completion | None:
        if not messages:
            raise RequestError("There is no message to answer. Give at least one.", param="messages")
        if self._cache is not None:
            found = self._cache.find(self.tenant, self._models, messages, params)
            if found is not None:
                self.ledger.add(self.tenant, "cache", "cached", Usage(0, 0), 0.0, 0.0)
                return found
        self._check_budget()
        return None

    def _keep(self, messages: Sequence[Message], params: SamplingParams, answer: Completion) -> None:
        if self._cache is not None:
            self._cache.keep(self.tenant, self._models, messages, params, answer)

    @property
    def _models(self) -> list[str]:
        return [name for name, _ in self._chain]

    def _check_budget(self) -> None:
        for limit, tenant in ((self.config.budget_dollars, None), (self.config.tenant_budget_dollars, self.tenant)):
            if limit is not None and (spent := self.ledger.dollars(tenant)) >= limit:
                whose = "all tenants" if tenant is None else f"the tenant {tenant!r}"
                raise BudgetError(f"The budget of {whose} is {limit:.2f} dollars, and {spent:.2f} are spent. Raise it.")

    def _note_failure(self, name: str, start: float, failures: list[str], error: Exception) -> None:
        failures.append(str(error))
        log.warning("%s", error)
        self.ledger.add(self.tenant, name, "failed", Usage(0, 0), time.monotonic() - start, 0.0)

    def _note_answer(self, name: str, asked: Any, usage: Usage, start: float) -> None:
        dollars: float | None = 0.0
        if isinstance(asked, Endpoint):
            price = self._prices.get(asked.config.model)
            dollars = None if price is None else price.cost(usage)
        self.ledger.add(self.tenant, name, "answered", usage, time.monotonic() - start, dollars)


def _told(failures: list[str]) -> str:
    return f"No endpoint gave an answer. {' '.join(failures)}"


def _newer(usage: Usage, more: Usage | None) -> Usage:
    """Put together what a stream tells of its usage, the prompt perhaps at its start and the answer at its end."""
    if more is None:
        return usage
    prompt = max(usage.prompt_tokens, more.prompt_tokens)
    cached = max(usage.cached_tokens, more.cached_tokens)
    return Usage(prompt, max(usage.completion_tokens, more.completion_tokens), cached)
