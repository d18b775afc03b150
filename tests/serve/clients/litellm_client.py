"""LiteLLM against a running server: ``python litellm_client.py BASE_URL MODEL``."""

import sys

import litellm

base_url, model = sys.argv[1:3]
litellm.telemetry = False
settings = {"model": f"openai/{model}", "api_base": f"{base_url}/v1", "api_key": "unused"}
asked = {"messages": [{"role": "user", "content": "Rain in Ulm?"}], "temperature": 0, "max_tokens": 8, "seed": 1}
whole = litellm.completion(**settings, **asked)
assert whole.usage.completion_tokens <= 8
streamed = litellm.completion(**settings, **asked, stream=True, stream_options={"include_usage": True})
assert "".join(c.choices[0].delta.content or "" for c in streamed if c.choices) == whole.choices[0].message.content
tool = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Ulm", "Bonn"]}}, "required": ["city"],
    "additionalProperties": False}}}  # fmt: skip
called = litellm.completion(
    **settings,
    **{**asked, "max_tokens": 80},
    tools=[tool],
    tool_choice={"type": "function", "function": {"name": "weather"}},
)
assert called.choices[0].message.tool_calls[0].function.name == "weather"
text = litellm.text_completion(
    model=f"text-completion-openai/{model}", api_base=f"{base_url}/v1", api_key="unused", prompt="Rain in",
    max_tokens=4, temperature=0,
)  # fmt: skip
assert isinstance(text.choices[0].text, str)
try:
    litellm.completion(**settings, messages=[{"role": "user", "content": "word " * 5000}])
except litellm.ContextWindowExceededError:
    print("overflow: ContextWindowExceededError")
else:
    raise AssertionError("a prompt beyond the context was taken")
try:
    litellm.completion(**{**settings, "model": "openai/nobody"}, messages=asked["messages"])
except litellm.NotFoundError:
    pass
print("ok")
