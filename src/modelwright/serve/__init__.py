"""HTTP: the OpenAI-compatible server."""
