"""OpenTelemetry spans of what the language model does, by the conventions for generative AI.

One span a completion, from the moment it is handed to the engine to its end, child of the caller's span when the
request carries a ``traceparent``. Numbers and settings only: no word of a prompt or an answer is in a span. Off unless
an endpoint is given.

Source: OpenTelemetry semantic conventions for generative AI (gen_ai.*, still incubating, so their names stand here).
"""

import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Self

from modelwright.base.errors import MissingExtraError
from modelwright.base.types import SamplingParams, Usage

SERVICE = "modelwright"
# The headers of the request that is being served, for the span of its caller.
current_headers: ContextVar[Mapping[str, str]] = ContextVar("current_headers", default={})  # noqa: B039 - never changed


class Telemetry:
    """Makes spans and sends them to an OTLP collector over HTTP.

    Args:
        endpoint: Of the collector, without ``/v1/traces``: ``http://localhost:4318``.

    Raises:
        MissingExtraError: The extra ``telemetry`` is not installed.
    """

    def __init__(self, endpoint: str):
        try:
            from opentelemetry import propagate
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise MissingExtraError("opentelemetry-sdk", "telemetry", "Sending spans") from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": SERVICE}))
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer(SERVICE)
        self._extract = propagate.extract

    def begin(self, operation: str, model: str, params: SamplingParams) -> "CompletionSpan":
        """Open the span of one completion; ``operation`` is ``chat`` or ``text_completion``."""
        settings: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": SERVICE,
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k,
            "gen_ai.request.frequency_penalty": params.frequency_penalty,
            "gen_ai.request.presence_penalty": params.presence_penalty,
            **({} if params.seed is None else {"gen_ai.request.seed": str(params.seed)}),
        }
        from opentelemetry.trace import SpanKind

        context = self._extract(current_headers.get())
        span = self._tracer.start_span(f"{operation} {model}", context, SpanKind.SERVER, settings)
        return CompletionSpan(span)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class CompletionSpan:
    """The span of one completion, a context that ends it."""

    def __init__(self, span: Any):
        self._span = span
        self._start = time.monotonic()
        self._has_first = False
        self._is_finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, GeneratorExit):
            self._span.set_attribute("error.type", type(error).__name__)
            self._fail()
        elif not self._is_finished:
            self._span.set_attribute("gen_ai.response.finish_reasons", ["abort"])
        self._span.end()

    def _fail(self) -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_status(StatusCode.ERROR)

    def see(self, num_tokens: int, reason: str | None, usage: Usage | None) -> None:
        """Note a piece of the answer."""
        if num_tokens and not self._has_first:
            self._has_first = True
            self._span.set_attribute("gen_ai.server.time_to_first_token", time.monotonic() - self._start)
        if reason is not None:
            self._is_finished = True
            self._span.set_attribute("gen_ai.response.finish_reasons", [reason])
        if usage is not None:
            self._span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)
            self._span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
            self._span.set_attribute("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens)
