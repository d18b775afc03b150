"""Change a model folder's shape: fewer key/value heads, more layers, more tokens; and say what it cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from modelwright.base.artifact import new_artifact
from modelwright.base.errors import ConfigError
from modelwright.base.registry import lookup
from modelwright.compress import DEPTH_WAYS
from modelwright.compress.gqa import share_heads
from modelwright.compress.surgery import measure_cost
from modelwright.compress.vocabulary import add_tokens
from modelwright.models.scoring import context_len
from modelwright.models.weights import load_model, save_model
from modelwright.ops.make import held_out_rows
from modelwright.tokenizer.formats import load_tokenizer


def reshape_model(
    source: Path,
    out: Path,
    *,
    num_kv_heads: int | None = None,
    num_layers: int | None = None,
    way: str = "silent",
    tokens: Sequence[str] = (),
    data: Path | None = None,
) -> dict[str, Any]:
    """Make a model of another shape at ``out`` and return what it cost, as it stands in the manifest.

    Args:
        source: Model folder with its tokenizer.
        out: Folder to make.
        num_kv_heads: Key/value heads to share; None: as they are.
        num_layers: Layers to grow to; None: as they are.
        way: Of growing: a name in `DEPTH_WAYS`.
        tokens: New tokens, one text each.
        data: Data set on whose held-out part the change is measured; None: sizes alone.

    Raises:
        ConfigError: Nothing is to be changed, ``out`` is the source, or the model cannot be changed so.
    """
    if num_kv_heads is None and num_layers is None and not tokens:
        raise ConfigError("Nothing is to be changed. Give --kv-heads, --depth or --add-tokens.")
    if out.resolve() == source.resolve():
        raise ConfigError(f"OUT is {out}, the model itself, which would be lost. Give another folder.")
    model, tokenizer = load_model(source), load_tokenizer(source)
    rows: Tensor | None = None if data is None else held_out_rows(data, tokenizer, context_len(model))
    changed = model
    if num_kv_heads is not None:
        changed = share_heads(changed, num_kv_heads)
    if num_layers is not None:
        changed = lookup(DEPTH_WAYS, way, "way")(changed, num_layers)
    if tokens:
        changed, tokenizer = add_tokens(changed, tokenizer, tokens)
    settings = {"num_kv_heads": num_kv_heads, "num_layers": num_layers, "way": way, "tokens": list(tokens)}
    parents = [parent for parent in (source, data) if parent is not None and (parent / "manifest.json").is_file()]
    with new_artifact(out, "model", settings=settings, parents=parents) as (folder, measured):
        save_model(changed, folder)
        tokenizer.save(folder)
        measured.update(measure_cost(model, changed, rows).to_dict())
        return dict(measured)
