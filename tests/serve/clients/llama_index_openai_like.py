"""LlamaIndex's OpenAILike against a running server: ``python llama_index_openai_like.py BASE_URL MODEL``."""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

base_url, model = sys.argv[1:3]
settings = {"api_base": f"{base_url}/v1", "api_key": "unused", "model": model, "temperature": 0, "max_tokens": 8}
chat = OpenAILike(is_chat_model=True, context_window=256, **settings)
messages = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Rain in Ulm?")]
whole = chat.chat(messages).message.content
assert "".join(p.delta or "" for p in chat.stream_chat(messages)) == whole
text = OpenAILike(is_chat_model=False, context_window=256, **settings)
completed = text.complete("Rain in").text
assert "".join(p.delta or "" for p in text.stream_complete("Rain in")) == completed
print("ok")
