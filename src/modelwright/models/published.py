"""What every family does with a published ``config.json``: check its fields, refuse by name, read and write the ids."""

from collections.abc import Mapping
from typing import Any

from modelwright.base.errors import ConfigError
from modelwright.nn.rope import RopeSettings, rope_from_hf


def check_sizes(config: Any, *names: str) -> None:
    """See that these fields of a config are whole numbers of at least 1.

    Raises:
        ConfigError: One is not.
    """
    for name in names:
        value = getattr(config, name)
        if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1.")


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """See that the query heads can be shared out among the key/value heads.

    Raises:
        ConfigError: They cannot.
    """
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"num_heads is {num_heads} and num_kv_heads is {num_kv_heads}; the key/value heads must divide the query "
            "heads evenly."
        )


def split_hidden(hidden_size: int, num_heads: int) -> int:
    """Return the head size that follows from the width.

    Raises:
        ConfigError: The heads do not divide it evenly.
    """
    if hidden_size % num_heads:
        raise ConfigError(
            f"hidden_size is {hidden_size} and num_heads is {num_heads}; the heads must divide it evenly, or the head "
            "size be given."
        )
    return hidden_size // num_heads


def check_published(values: Mapping[str, Any], model_type: str, **fixed: Any) -> None:
    """See that a published config is of this family and has nothing that is not computed here.

    Raises:
        ConfigError: It is another family, or a field in ``fixed`` has another value; a missing one is fine.
    """
    for name, expected in {"model_type": model_type, **fixed}.items():
        if values.get(name, expected) != expected:
            raise ConfigError(f"{name} is {values[name]!r}; the {model_type} model here computes {expected!r} only.")


def required(values: Mapping[str, Any], name: str) -> int:
    """Return a whole number that a published config must have.

    Raises:
        ConfigError: It is missing or something else.
    """
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; the config must give it as a whole number.")
    return value


def whole_rope_from_hf(values: Mapping[str, Any], layer_type: str | None = None) -> RopeSettings:
    """Read the rotation of a model that rotates whole heads.

    Raises:
        ConfigError: The config rotates a part of each head, or has a scaling that is not known.
    """
    rope = rope_from_hf(values, layer_type)
    if rope.rotary_fraction != 1:
        raise ConfigError(
            f"partial_rotary_factor is {rope.rotary_fraction}; the {values.get('model_type')} model here rotates "
            "whole heads (1.0)."
        )
    return rope


def token_ids_from_hf(values: Mapping[str, Any]) -> dict[str, Any]:
    """Read the special ids of a published config."""
    eos = values.get("eos_token_id")
    return {
        "bos_token_id": values.get("bos_token_id"),
        "eos_token_id": () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,),
        "pad_token_id": values.get("pad_token_id"),
    }


def token_ids_to_hf(config: Any) -> dict[str, Any]:
    """Write the special ids of a config as published."""
    eos: Any = list(config.eos_token_id)
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else eos,
        "pad_token_id": config.pad_token_id,
    }
