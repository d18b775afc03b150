"""langchain-openai against a running server: ``python langchain_openai.py BASE_URL MODEL``."""

import importlib
import sys

# This file has the package's name; its folder must not be searched for it.
sys.path = [place for place in sys.path if not place.endswith("clients")]
lc = importlib.import_module("langchain_openai")
base_url, model = sys.argv[1:3]
chat = lc.ChatOpenAI(base_url=f"{base_url}/v1", api_key="unused", model=model, temperature=0, max_tokens=8, seed=1)
whole = chat.invoke("Rain in Ulm?")
assert whole.response_metadata["finish_reason"] in ("stop", "length"), whole
assert whole.usage_metadata["output_tokens"] <= 8
pieces = list(chat.stream("Rain in Ulm?", stream_usage=True))
assert "".join(p.content for p in pieces) == whole.content
assert pieces[-1].usage_metadata or any(p.usage_metadata for p in pieces)
assert [m.content for m in chat.batch(["Rain in Ulm?"] * 3)] == [whole.content] * 3

tool = {
    "name": "weather",
    "description": "Tell the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Ulm", "Bonn"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
caller = lc.ChatOpenAI(base_url=f"{base_url}/v1", api_key="unused", model=model, temperature=0, max_tokens=80)
called = caller.bind_tools([tool], tool_choice="weather").invoke("Rain in Ulm?")
assert called.tool_calls and called.tool_calls[0]["args"]["city"] in ("Ulm", "Bonn"), called

schema = {"title": "city", "type": "object", "properties": {"city": {"enum": ["Ulm", "Bonn"]}}, "required": ["city"],
          "additionalProperties": False}  # fmt: skip
found = caller.with_structured_output(schema, method="json_schema").invoke("Rain in Ulm?")
assert found["city"] in ("Ulm", "Bonn")

try:
    chat.invoke("word " * 5000)
except Exception as error:
    assert type(error).__name__ == "ContextOverflowError" or "context_length_exceeded" in str(error), error
    print("overflow:", type(error).__name__)
else:
    raise AssertionError("a prompt beyond the context was taken")
if len(sys.argv) > 3:  # an embedding model; the client sends token ids unless told otherwise
    vectors = lc.OpenAIEmbeddings(
        base_url=f"{base_url}/v1", api_key="unused", model=sys.argv[3], check_embedding_ctx_length=False
    ).embed_documents(["one", "two"])
    assert len(vectors) == 2 and len(vectors[0]) > 1
print("ok")
