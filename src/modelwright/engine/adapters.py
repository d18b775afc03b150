"""Many LoRA adapters beside one model, loaded and unloaded while it serves.

Each request names an adapter or none, and a step computes all of them together. An adapter is known by a name and by
a hash of its content: the hash, not the name, tags prefix blocks, so two adapters never share a prefix and one that
was loaded again with other weights never meets the blocks of the old.

Weights are kept up to a limit of memory. Beyond it, those that were used least recently and that no request holds are
dropped, and read from their folder again when asked for; a folder that has changed meanwhile is refused until it is
loaded anew. `unload` takes the name away at once; requests that already run end with the weights they began with.
Not done: adapters of embeddings, of the output matrix and of experts, DoRA; each is refused by name.
"""

import hashlib
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.base.errors import CapacityError, CheckpointError, ConfigError, RequestError
from modelwright.base.logs import get_logger
from modelwright.engine.scheduler import Chunk
from modelwright.models.adapter_file import (
    CONFIG,
    WEIGHTS,
    adapter_size,
    check_parts,
    published_layer,
    read_adapter_config,
    read_adapter_parts,
)
from modelwright.nn.linear import linears
from modelwright.nn.lora_rows import LoraRows, LowRank, RowGroup

log = get_logger(__name__)
DEFAULT_ADAPTER_BYTES = 512 * 2**20
MAX_NAME = 128


@dataclass(eq=False)
class Adapter:
    """One adapter in memory."""

    name: str
    content_hash: str  # of its two files
    layers: Mapping[str, LowRank]  # by our layer names
    num_running: int = 0  # requests that are not finished
    packed: Any = None  # the compiled step's own layout, made by it on first use
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_bytes = sum(change.num_bytes for change in self.layers.values())


class Adapters:
    """The adapters of one engine, by name. Safe to use while another thread steps.

    Args:
        model: What they were made for.
        max_bytes: Memory for their weights.
        why_not: Why there can be none; None: there can.
    """

    def __init__(self, model: nn.Module, max_bytes: int | None = None, why_not: str | None = None):
        self._why_not = why_not
        self.max_bytes = DEFAULT_ADAPTER_BYTES if max_bytes is None else max_bytes
        self._model = model
        parameter = next(p for p in model.parameters() if p.is_floating_point())
        self._options: dict[str, Any] = {"dtype": parameter.dtype, "device": parameter.device}
        self._rows = LoraRows(model)
        self._lock = threading.RLock()
        self._known: dict[str, tuple[Path, str]] = {}  # name: folder, content hash
        self._loaded: dict[str, Adapter] = {}  # by name, least recently used first
        self._leaving: list[Adapter] = []  # unloaded while requests still run with them

    @property
    def names(self) -> list[str]:
        """The names that a request can give, in the order in which they were loaded."""
        return list(self._known)

    def by_content(self) -> dict[str, str]:
        """Return a name for each content hash that is served."""
        return {known_hash: name for name, (_, known_hash) in list(self._known.items())}

    def hash_of(self, name: str | None) -> str | None:
        """Return the content hash that a name stands for; None: it stands for no adapter."""
        known = self._known.get(name or "")
        return known[1] if known is not None else None

    @property
    def num_bytes(self) -> int:
        """Memory of the adapters whose weights are here."""
        self._leaving = [adapter for adapter in self._leaving if adapter.num_running]
        return sum(adapter.num_bytes for adapter in (*self._loaded.values(), *self._leaving))

    def load(self, name: str, folder: str | Path) -> Adapter:
        """Read an adapter and serve it under a name; a name that is there gets the new content.

        Raises:
            ConfigError: The name is empty, too long, or holds something else than letters, digits and ``-_.:/``; or
                this engine computes none.
            CheckpointError: The folder holds no adapter for this model; the message names the tensor.
            CapacityError: There is no room beside the adapters in use.
        """
        check_name(name)
        if self._why_not is not None:
            raise ConfigError(f"The adapter {name!r} cannot be loaded: {self._why_not}. Merge it into the model.")
        folder = Path(folder)
        made = Adapter(name, content_hash(folder), self._read(folder))
        with self._lock:
            self._make_room(made, besides=name)
            self._retire(name)
            self._known[name] = (folder, made.content_hash)
            self._loaded[name] = made
        log.info("adapter %s: %d layers, %.1f MB, from %s", name, len(made.layers), made.num_bytes / 1e6, folder)
        return made

    def unload(self, name: str) -> None:
        """Take an adapter's name away; requests that run with it end with it.

        Raises:
            RequestError: There is no such adapter.
        """
        with self._lock:
            if name not in self._known:
                raise self._unknown(name)
            del self._known[name]
            self._retire(name)

    def get(self, name: str) -> Adapter:
        """Return an adapter, read again from its folder if its memory was given to others.

        Raises:
            RequestError: There is no such adapter.
            CheckpointError: Its folder has changed or gone.
            CapacityError: There is no room for it now.
        """
        with self._lock:
            if name not in self._known:
                raise self._unknown(name)
            adapter = self._loaded.pop(name, None)
            if adapter is None:
                folder, known_hash = self._known[name]
                if content_hash(folder) != known_hash:
                    raise CheckpointError(
                        f"The adapter {name!r} in {folder} has changed since it was loaded. Load it again."
                    )
                adapter = Adapter(name, known_hash, self._read(folder))
                self._make_room(adapter)
            self._loaded[name] = adapter
            return adapter

    def resolve(self, tags: dict[str, str] | None) -> tuple[Adapter | None, dict[str, str] | None]:
        """Return the adapter that a request's tags name, and the tags with its content in the name's place."""
        if not tags or "adapter" not in tags:
            return None, tags
        adapter = self.get(tags["adapter"])
        return adapter, {**tags, "adapter": adapter.content_hash}

    def run(self, runner: Any, chunks: Sequence[Chunk]) -> Tensor:
        """Compute a step by a runner, with the adapters of its requests."""
        if getattr(runner, "takes_adapters", False) or all(chunk.request.adapter is None for chunk in chunks):
            return runner.run(chunks)  # type: ignore[no-any-return]
        rows: dict[Adapter, list[int]] = {}
        at = 0
        for chunk in chunks:
            end = at + chunk.computed_end - chunk.start
            if chunk.request.adapter is not None:
                rows.setdefault(chunk.request.adapter, []).extend(range(at, end))
            at = end
        device = self._options["device"]
        with (
            torch.inference_mode(),
            self._rows.over(
                [RowGroup(adapter.layers, torch.tensor(at, device=device)) for adapter, at in rows.items()]
            ),
        ):
            return runner.run(chunks)  # type: ignore[no-any-return]

    def _retire(self, name: str) -> None:
        adapter = self._loaded.pop(name, None)
        if adapter is not None and adapter.num_running:
            self._leaving.append(adapter)

    def _make_room(self, wanted: Adapter, besides: str | None = None) -> None:
        """Drop unused adapters, least recently used first, until another fits."""
        if wanted.num_bytes > self.max_bytes:
            raise ConfigError(
                f"The adapter {wanted.name!r} takes {wanted.num_bytes} bytes and all of them may take "
                f"{self.max_bytes}. Give adapters more memory (adapter_bytes)."
            )
        for name, adapter in list(self._loaded.items()):
            if self.num_bytes + wanted.num_bytes <= self.max_bytes:
                return
            if not adapter.num_running or name == besides:
                self._retire(name)
        if self.num_bytes + wanted.num_bytes > self.max_bytes:
            raise CapacityError(
                f"The adapters in use take {self.num_bytes} bytes; with {wanted.name!r} it would be more than "
                f"{self.max_bytes}. Try again when requests have ended, or give adapters more memory (adapter_bytes)."
            )

    def _read(self, folder: Path) -> dict[str, LowRank]:
        config = read_adapter_config(folder)
        found = dict(linears(self._model))
        made = {}
        for name, tensors in read_adapter_parts(self._model, folder).items():
            published = published_layer(self._model, name)
            if name == "lm_head" or ".experts." in f".{name}":
                raise CheckpointError(
                    f"{folder / WEIGHTS}: {published} is an output matrix or an expert, whose adapters are not "
                    "computed row by row. Merge the adapter into the model and serve that."
                )
            rank, alpha = adapter_size(config, published, folder)
            layer: Any = found[name]
            check_parts(tensors, (rank, layer.in_features, layer.out_features), published, folder)
            scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            parts = {part: tensor.to(**self._options).contiguous() for part, tensor in tensors.items()}
            for part, tensor in parts.items():
                if not torch.isfinite(tensor).all():
                    raise CheckpointError(f"{folder / WEIGHTS}: {part} of {published} holds NaN or infinity.")
            made[name] = LowRank(parts["lora_a"], parts["lora_b"], scaling)
        return made

    def _unknown(self, name: str) -> RequestError:
        known = ", ".join(self._known) or "none"
        return RequestError(
            f"The adapter {name!r} is not loaded. Loaded: {known}.", param="model", code="model_not_found", status=404
        )


def check_name(name: str) -> None:
    """Hold an adapter's name to what can stand in a model's name.

    Raises:
        ConfigError: It cannot.
    """
    is_plain = isinstance(name, str) and all(c.isalnum() or c in "-_.:/" for c in name) and name.isascii()
    if not is_plain or not 0 < len(name) <= MAX_NAME or not name[0].isalnum() or ".." in name:
        raise ConfigError(
            f"The adapter's name is {name!r:.200}; it has 1 to {MAX_NAME} letters, digits and - _ . : / and begins "
            "with a letter or digit. Choose another."
        )


def content_hash(folder: Path) -> str:
    """Return the hash of an adapter's two files.

    Raises:
        CheckpointError: One of them cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in (CONFIG, WEIGHTS):
        try:
            with (folder / name).open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        except OSError as error:
            pickled = (folder / "adapter_model.bin").exists()
            more = " Pickled weights (adapter_model.bin) are not opened: they can run code." if pickled else ""
            raise CheckpointError(
                f"{folder / name} cannot be read: {error.strerror}. "
                f"An adapter folder holds {CONFIG} and {WEIGHTS}.{more}"
            ) from None
    return digest.hexdigest()
