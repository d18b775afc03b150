"""Spans as a collector receives them: numbers and settings, children of the caller's, and no word of what was said."""

import gzip
import http.server
import threading

import httpx2
import pytest

from modelwright.serve.app import ServeConfig, create_app

pytestmark = pytest.mark.service
proto = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector():
    received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            data = self.rfile.read(int(self.headers["content-length"]))
            received.append(gzip.decompress(data) if self.headers.get("content-encoding") == "gzip" else data)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()


def spans_of(received):
    found = []
    for data in received:
        message = proto.ExportTraceServiceRequest()
        message.ParseFromString(data)
        found += [s for r in message.resource_spans for scope in r.scope_spans for s in scope.spans]
    return {span.name: (span, {a.key: a.value for a in span.attributes}) for span in found}


def test_a_collector_gets_a_span_a_completion(build_engine, start, collector):
    url, received = collector
    config = ServeConfig(otlp_endpoint=url)
    with (
        build_engine() as engine,
        start(create_app(config, engine, engine.tokenizer, "tiny", None, None), engine) as server,
    ):
        body = {"model": "tiny", "max_tokens": 5, "temperature": 0, "seed": 7}
        turns = [{"role": "user", "content": "xylophone"}]
        post = {"timeout": 30, "headers": {"traceparent": PARENT}}
        chat = httpx2.post(f"{server.url}/v1/chat/completions", json={**body, "messages": turns}, **post).json()
        httpx2.post(f"{server.url}/v1/completions", json={**body, "prompt": "xylophone"}, timeout=30)
    spans = spans_of(received)
    assert set(spans) == {"chat tiny", "text_completion tiny"}
    span, told = spans["chat tiny"]
    assert span.trace_id.hex() == PARENT.split("-")[1] and span.parent_span_id.hex() == PARENT.split("-")[2]
    assert told["gen_ai.operation.name"].string_value == "chat"
    assert told["gen_ai.usage.input_tokens"].int_value == chat["usage"]["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"].int_value == chat["usage"]["completion_tokens"]
    assert told["gen_ai.response.finish_reasons"].array_value.values[0].string_value == "length"
    assert (
        told["gen_ai.request.seed"].string_value == "7" and told["gen_ai.server.time_to_first_token"].double_value > 0
    )
    assert not spans["text_completion tiny"][0].parent_span_id
    assert all(b"xylophone" not in data for data in received)
