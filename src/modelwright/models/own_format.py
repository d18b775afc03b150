"""The folder of a model that nobody else publishes: our parameter names, and its config's fields as they are.

Recurrent, feed-forward and sequence-to-sequence models have no published format. Theirs is the ecosystem's container,
``config.json`` and safetensors, read and written by `modelwright.models.weights` like any other.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from modelwright.base import config as settings

T = TypeVar("T")


class OwnFormat(nn.Module):
    """A model whose published names are its own."""

    @property
    def published_names(self) -> dict[str, str]:
        """Every parameter's name for itself, ``*`` for a number."""
        names = (re.sub(r"\.\d+(?=\.)", ".*", name) for name, _ in self.named_parameters(remove_duplicate=False))
        return {name: name for name in names}


def fields_to_hf(config: Any, model_type: str, architecture: str) -> dict[str, Any]:
    """Return a config dataclass as the content of ``config.json``."""
    return {"architectures": [architecture], "model_type": model_type, **settings.to_dict(config)}


def fields_from_hf(cls: type[T], values: Mapping[str, Any]) -> T:
    """Read a config dataclass from ``config.json``; fields that it does not have are passed over.

    Raises:
        ConfigError: A field is missing or has the wrong type.
    """
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return settings.build(cls, {name: value for name, value in values.items() if name in known})
