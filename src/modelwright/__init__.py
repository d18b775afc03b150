"""The whole life of a language model in one readable codebase.

The names below are the public entry points. Each is imported when it is first used, so that ``import modelwright``
loads neither torch nor any optional dependency.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load_model": "modelwright.models.weights",
    "save_model": "modelwright.models.weights",
    "load_tokenizer": "modelwright.tokenizer.formats",
    "LLM": "modelwright.engine.llm",
    "SamplingParams": "modelwright.base.types",
    "Message": "modelwright.base.types",
    "Document": "modelwright.base.types",
    "NgramModel": "modelwright.models.ngram",
    "Index": "modelwright.rag.index",
    "ask": "modelwright.rag.answer",
    "FastModel": "modelwright.train.fast",
    "Trainer": "modelwright.train.fast",
    "Gateway": "modelwright.serve.gateway",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'modelwright' has no attribute {name!r}; it has: {', '.join(sorted(_PUBLIC))}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
