"""Text to token ids and back: training, files of the ecosystem, chat templates, streaming decoding."""
