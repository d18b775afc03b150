"""What GGUF calls the tensors and settings of each family, against the names of the published checkpoints.

Keyed by GGUF architecture. A model class brings its own map from published names to ours, so adding a family that
differs in names alone is one entry here. Settings that GGUF lacks are derived, refused, or kept under keys of our own
(``modelwright.*``), which other readers pass over.

Source: llama.cpp, gguf-py/gguf/constants.py and tensor_mapping.py, convert_hf_to_gguf.py.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelwright.base.errors import CheckpointError, ConfigError
from modelwright.nn.rope import inverse_frequencies, scaling_from_hf

ROPE_FREQS = "rope_freqs.weight"
MAX_CONTEXT = 1 << 22
_OWN_ROPE = "modelwright.rope_scaling"

_BLOCK = "model.layers.*."
_DECODER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.*.attn_norm": _BLOCK + "input_layernorm",
    "blk.*.attn_q": _BLOCK + "self_attn.q_proj",
    "blk.*.attn_k": _BLOCK + "self_attn.k_proj",
    "blk.*.attn_v": _BLOCK + "self_attn.v_proj",
    "blk.*.attn_output": _BLOCK + "self_attn.o_proj",
    "blk.*.ffn_norm": _BLOCK + "post_attention_layernorm",
    "blk.*.ffn_gate": _BLOCK + "mlp.gate_proj",
    "blk.*.ffn_up": _BLOCK + "mlp.up_proj",
    "blk.*.ffn_down": _BLOCK + "mlp.down_proj",
}
_HEAD_NORMS = {
    "blk.*.attn_q_norm": _BLOCK + "self_attn.q_norm",
    "blk.*.attn_k_norm": _BLOCK + "self_attn.k_norm",
}
_FOUR_NORMS = {
    "blk.*.ffn_norm": _BLOCK + "pre_feedforward_layernorm",
    "blk.*.post_attention_norm": _BLOCK + "post_attention_layernorm",
    "blk.*.post_ffw_norm": _BLOCK + "post_feedforward_layernorm",
}
TENSOR_NAMES: dict[str, dict[str, str]] = {
    "llama": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER | _HEAD_NORMS,
    "gemma": _DECODER,
    "gemma2": _DECODER | _FOUR_NORMS,
    "gemma3": _DECODER | _FOUR_NORMS | _HEAD_NORMS,
    "gpt2": {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
        "blk.*.attn_norm": "transformer.h.*.ln_1",
        "blk.*.attn_qkv": "transformer.h.*.attn.c_attn",
        "blk.*.attn_output": "transformer.h.*.attn.c_proj",
        "blk.*.ffn_norm": "transformer.h.*.ln_2",
        "blk.*.ffn_up": "transformer.h.*.mlp.c_fc",
        "blk.*.ffn_down": "transformer.h.*.mlp.c_proj",
    },
    "bert": {
        "token_embd": "embeddings.word_embeddings",
        "position_embd": "embeddings.position_embeddings",
        "token_types": "embeddings.token_type_embeddings",
        "token_embd_norm": "embeddings.LayerNorm",
        "blk.*.attn_q": "encoder.layer.*.attention.self.query",
        "blk.*.attn_k": "encoder.layer.*.attention.self.key",
        "blk.*.attn_v": "encoder.layer.*.attention.self.value",
        "blk.*.attn_output": "encoder.layer.*.attention.output.dense",
        "blk.*.attn_output_norm": "encoder.layer.*.attention.output.LayerNorm",
        "blk.*.ffn_up": "encoder.layer.*.intermediate.dense",
        "blk.*.ffn_down": "encoder.layer.*.output.dense",
        "blk.*.layer_output_norm": "encoder.layer.*.output.LayerNorm",
    },
}
# Published tensors that GGUF has no place for; the model does the same without them, or says so when written.
LEFT_OUT = {"bert": ("pooler.dense.weight", "pooler.dense.bias")}
KEPT_WIDE = ("position_embd.weight", "token_types.weight")  # always float32, as in llama.cpp

# GGUF architecture -> the model_type and architecture of a published config.
PUBLISHED = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "gpt2": ("gpt2", "GPT2LMHeadModel"),
    "bert": ("bert", "BertModel"),
}
ARCHITECTURE_OF = {model_type: name for name, (model_type, _) in PUBLISHED.items()} | {"mistral": "llama"}

_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
}
_ROTARY = _SIZES | {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_GEMMA2 = _ROTARY | {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
SETTINGS: dict[str, dict[str, str]] = {
    "llama": _ROTARY | {"attention.sliding_window": "sliding_window"},
    "qwen2": _ROTARY,
    "qwen3": _ROTARY,
    "gemma": _ROTARY,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA2 | {"rope.freq_base_swa": "rope_local_base_freq"},
    "gpt2": {
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "feed_forward_length": "n_inner",
        "block_count": "n_layer",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    "bert": _SIZES | {"attention.layer_norm_epsilon": "layer_norm_eps"},
}
_OPTIONAL = {
    "attention.head_count_kv",
    "attention.key_length",
    "attention.sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.freq_base",
    "rope.freq_base_swa",
}
_FLOATS = ("epsilon", "freq_base", "freq_base_swa", "softcapping")
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def read_config(name: str, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the published ``config.json`` of a GGUF file (without what `read_rope_freqs` adds).

    Args:
        name: The architecture.
        metadata: Of the file.
        shapes: Of its tensors, by name.

    Raises:
        CheckpointError: A key is missing or has the wrong type; the message names it.
    """
    values: dict[str, Any] = {}
    for key, field in SETTINGS[name].items():
        value = _plain(f"{name}.{key}", metadata.get(f"{name}.{key}"), is_float=key.endswith(_FLOATS))
        if value is not None:
            values[field] = value
        elif key not in _OPTIONAL:
            raise CheckpointError(f"{name}.{key} is missing in the metadata; the {name} family needs it.")
    if "token_embd.weight" not in shapes:
        raise CheckpointError("The tensor token_embd.weight is missing; this file has a vocabulary at most, no model.")
    _check_counts(name, metadata, len(shapes))
    values["vocab_size"] = shapes["token_embd.weight"][0]
    model_type, architecture = PUBLISHED[name]
    if name == "llama" and values.get("sliding_window"):
        model_type, architecture = "mistral", "MistralForCausalLM"
    values |= {"model_type": model_type, "architectures": [architecture]}
    if name == "bert":
        return values | {"type_vocab_size": shapes.get("token_types.weight", (1,))[0]}
    values["tie_word_embeddings"] = "output.weight" not in shapes
    values |= _read_ids(metadata)
    if name == "gpt2":
        return values
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    if name == "llama":
        values |= {"attention_bias": "blk.0.attn_q.bias" in shapes, "mlp_bias": "blk.0.ffn_up.bias" in shapes}
    if name in ("gemma2", "gemma3"):
        values |= _read_gemma(name, metadata, values)
    scaling = _read_scaling(name, metadata)
    return values | ({"rope_scaling": scaling} if scaling else {})


def _check_counts(name: str, metadata: Mapping[str, Any], num_tensors: int) -> None:
    """Refuse counts from which layers and tables would be made without end."""
    for key, most in (("block_count", num_tensors), ("context_length", MAX_CONTEXT)):
        value = metadata.get(f"{name}.{key}", 1)
        if not 1 <= value <= most:
            raise CheckpointError(f"{name}.{key} is {value:,}; expected 1 to {most:,} in this file. Fetch it again.")


def _plain(key: str, value: Any, is_float: bool) -> Any:
    """Return one number: of a list with one entry a layer, the entry that all share."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    expected: tuple[type, ...] = (int, float) if is_float else (int,)
    if value is not None and (not isinstance(value, expected) or isinstance(value, bool)):
        raise CheckpointError(f"{key} is {value!r}; expected one number for all layers.")
    # Shortest decimal of the float32 that the file holds: 1e-06, not 9.999999974752427e-07.
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _read_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    found = {field: metadata.get(f"tokenizer.ggml.{key}") for field, key in names.items()}
    ends = [found["eos_token_id"], metadata.get("tokenizer.ggml.eot_token_id"), *metadata.get("modelwright.ends", [])]
    ends = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    return found | {"eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None}


def _read_gemma(name: str, metadata: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what GGUF leaves to the reader: the scale of the queries and which layers have a window."""
    scale = metadata.get("modelwright.query_size")
    if scale is None:
        is_27b = values["num_hidden_layers"] == _LAYERS_OF_27B[name]
        scale = values["hidden_size"] // values["num_attention_heads"] if is_27b else values["head_dim"]
    pattern = metadata.get(f"{name}.attention.sliding_window_pattern")
    windowed = pattern if isinstance(pattern, list) else _usual_windows(name, values["num_hidden_layers"], pattern)
    found: dict[str, Any] = {
        "query_pre_attn_scalar": scale,
        "layer_types": ["sliding_attention" if is_short else "full_attention" for is_short in windowed],
    }
    if name == "gemma3":
        found["rope_local_base_freq"] = values.get("rope_local_base_freq", 10000.0)
        found["rope_theta"] = values.get("rope_theta", 1_000_000.0)
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        found[field] = values.get(field)
    return found


def _usual_windows(name: str, num_layers: int, period: int | None = None) -> list[bool]:
    period = period or {"gemma2": 2, "gemma3": 6}[name]
    return [(i + 1) % period != 0 for i in range(num_layers)]


def _read_scaling(name: str, metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    own = metadata.get(_OWN_ROPE)
    if isinstance(own, str):
        try:
            found: dict[str, Any] = json.loads(own)
            return found
        except ValueError as error:
            raise CheckpointError(f"{_OWN_ROPE} is no JSON: {error}.") from error
    kind = metadata.get(f"{name}.rope.scaling.type", "none")
    factor = metadata.get(f"{name}.rope.scaling.factor", metadata.get(f"{name}.rope.scale_linear"))
    if factor is None or kind == "none" and f"{name}.rope.scaling.type" in metadata:
        return None
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(f"{name}.rope.scaling.type is {kind!r}; read are none, linear and yarn.")
    if kind != "yarn":
        return {"rope_type": "linear", "factor": float(factor)}
    length = metadata.get(f"{name}.rope.scaling.original_context_length")
    return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": length}


def read_rope_freqs(values: dict[str, Any], divisors: Tensor) -> None:
    """Put the scaling of Llama 3 into a config: GGUF holds by how much each frequency is divided.

    Raises:
        CheckpointError: The divisors are not those of any such scaling.
    """
    theta, size = float(values.get("rope_theta", 10000.0)), int(values["head_dim"])
    factor = float(divisors.max())
    plain = inverse_frequencies(size, theta)
    candidates = [values["rope_scaling"]] if values.get("rope_scaling") else []
    known: dict[str, Any] = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    lengths = {8192, int(values["max_position_embeddings"]), int(values["max_position_embeddings"] / factor)}
    candidates += [known | {"original_max_position_embeddings": length} for length in sorted(lengths)]
    for candidate in candidates:
        again = plain / inverse_frequencies(size, theta, scaling_from_hf(candidate))
        if again.shape == divisors.shape and torch.allclose(again, divisors, rtol=1e-4):
            values["rope_scaling"] = candidate
            return
    raise CheckpointError(
        f"{ROPE_FREQS} (largest divisor {factor:g}) is not the Llama-3 scaling with its usual factors 1 and 4 and an "
        "original length of 8192; other factors cannot be told from the file. Use the model's own folder."
    )


# -- writing -----------------------------------------------------------------------------------------------------------


def write_config(values: Mapping[str, Any]) -> tuple[str, dict[str, Any], Tensor | None]:
    """Return a published config as GGUF metadata: the architecture, the pairs, and the divisors of rope_freqs.

    Raises:
        ConfigError: The family, or a setting of it, cannot be said in GGUF.
    """
    model_type = values.get("model_type")
    if model_type not in ARCHITECTURE_OF:
        raise ConfigError(
            f"A model of the family {model_type!r} cannot be written as GGUF here; these can: "
            f"{', '.join(sorted(ARCHITECTURE_OF))}. Save it as a folder."
        )
    name = ARCHITECTURE_OF[model_type]
    architectures = values.get("architectures") or [PUBLISHED[name][1]]
    if name == "bert" and architectures != ["BertModel"]:
        raise ConfigError(
            f"The architecture is {architectures[0]}; GGUF holds encoders (BertModel) without task heads."
        )
    if values.get("use_sliding_window"):
        raise ConfigError(
            "use_sliding_window is true; GGUF has no place for which layers of this family have a window."
        )
    found: dict[str, Any] = {"general.architecture": name}
    for key, field in SETTINGS[name].items():
        if values.get(field) is not None:
            found[f"{name}.{key}"] = float(values[field]) if key.endswith(_FLOATS) else int(values[field])
    found[f"{name}.vocab_size"] = values["vocab_size"]
    if name == "bert":
        types = {"tokenizer.ggml.token_type_count": int(values["type_vocab_size"])}
        return name, found | {"bert.attention.causal": False} | types, None
    found |= _write_ids(values)
    if name == "gpt2":
        return name, found, None
    found[f"{name}.attention.value_length"] = found[f"{name}.rope.dimension_count"] = int(values["head_dim"])
    if name in ("gemma2", "gemma3"):
        windowed = [kind == "sliding_attention" for kind in values["layer_types"]]
        found["modelwright.query_size"] = float(values["query_pre_attn_scalar"])
        if windowed != _usual_windows(name, len(windowed)):
            found[f"{name}.attention.sliding_window_pattern"] = windowed
    return name, *_write_scaling(name, found, values)


def _write_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    ends = values.get("eos_token_id")
    ends = list(ends) if isinstance(ends, Sequence) else [] if ends is None else [ends]
    ids = {"bos_token_id": values.get("bos_token_id"), "padding_token_id": values.get("pad_token_id")}
    ids["eos_token_id"] = ends[0] if ends else None
    found: dict[str, Any] = {f"tokenizer.ggml.{key}": index for key, index in ids.items() if index is not None}
    return found | ({"modelwright.ends": ends} if len(ends) > 1 else {})


def _write_scaling(name: str, found: dict[str, Any], values: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    rope = values.get("rope_scaling") or values.get("rope_parameters")
    scaling = scaling_from_hf(rope, values.get("max_position_embeddings"))
    if scaling is None:
        return found, None
    found[_OWN_ROPE] = json.dumps(rope)
    if scaling.kind == "llama3":
        size, theta = int(values["head_dim"]), float(values.get("rope_theta", 10000.0))
        return found, inverse_frequencies(size, theta) / inverse_frequencies(size, theta, scaling)
    if scaling.kind not in ("linear", "yarn"):
        raise ConfigError(
            f"rope scaling is {scaling.kind!r}; GGUF can say linear, yarn and llama3. Save it as a folder."
        )
    found |= {f"{name}.rope.scaling.type": scaling.kind, f"{name}.rope.scaling.factor": float(scaling.factor)}
    if scaling.kind == "yarn":
        found[f"{name}.rope.scaling.original_context_length"] = scaling.original_max_seq_len
    return found, None
