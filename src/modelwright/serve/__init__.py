"""HTTP: the server that speaks the APIs of OpenAI and Anthropic, and the gateway that asks others."""

# What an endpoint of the gateway can speak.
PROVIDERS = {
    "openai": "modelwright.serve.providers:OpenAI",
    "anthropic": "modelwright.serve.providers:Anthropic",
    "gemini": "modelwright.serve.providers:Gemini",
    "cohere": "modelwright.serve.providers:Cohere",
    "ollama": "modelwright.serve.providers:Ollama",
}
