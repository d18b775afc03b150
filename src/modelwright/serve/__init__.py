"""HTTP: the server that speaks the APIs of OpenAI and Anthropic."""
