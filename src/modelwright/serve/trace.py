"""A trace of requests, and its replay: every prompt as token ids, its settings with the seed, and what came out.

The engine gives a request the same tokens alone and in any company, so a trace that is replayed with the same weights
and settings gives the same tokens, bit for bit; where one differs, the replay says at which token. A trace holds what
people wrote: it is readable by its owner alone, and it is off unless asked for.

A file is JSON lines: a ``start`` line with the model's fingerprint and the engine's settings at each start of a server,
then one line a completion, in the order in which they ended.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright import __version__
from modelwright.base.errors import DataError
from modelwright.base.files import read_jsonl
from modelwright.base.progress import bar
from modelwright.base.types import SamplingParams

if TYPE_CHECKING:
    from torch import nn

    from modelwright.engine.llm import LLM

START, COMPLETION = "start", "completion"
BATCH = 64  # requests replayed together


class Trace:
    """Writes completions as they end."""

    def __init__(self, path: Path, model: "nn.Module", engine: Any):
        """Open ``path`` for more lines and write the first.

        Raises:
            DataError: It cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise DataError(f"The trace {path} cannot be written: {error.strerror}. Give another file.") from error
        self._lock = threading.Lock()
        # Guessing changes no token, so a replay needs none; and who guesses may be a model, which no line can hold.
        settings = {
            name: value for name, value in asdict(replace(engine, speculation=None)).items() if value is not None
        }
        self._write({"kind": START, "version": __version__, "model": fingerprint(model), "engine": settings})

    def add(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        token_ids: Sequence[int],
        reason: str,
        adapter: str | None = None,
        images: Sequence[str] = (),
    ) -> None:
        """Write one completion.

        Args:
            reason: Its finish reason, ``abort`` where the client left before the end.
            adapter: The content hash of the adapter it was computed with; None: the model itself.
            images: The hashes of the pictures in the prompt. The pictures are not kept, so it cannot be replayed.
        """
        row = {"kind": COMPLETION, "prompt_ids": list(prompt_ids), "params": asdict(params)}
        row |= {"adapter": adapter} if adapter is not None else {}
        row |= {"images": list(images)} if images else {}
        self._write({**row, "token_ids": list(token_ids), "finish_reason": reason})

    def _write(self, row: dict[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3), **row}) + "\n"
        with self._lock:
            os.write(self._file, line.encode())  # one write, so that a kill leaves whole lines but perhaps the last

    def close(self) -> None:
        """End the file."""
        os.close(self._file)


def fingerprint(model: "nn.Module") -> str:
    """Return a hash over the names, shapes and first numbers of all tensors: another checkpoint gives another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        head = tensor.detach().flatten()[:64].float().tolist() if tensor.numel() else []
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {head}\n".encode())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Difference:
    """A completion that came out otherwise."""

    line: int  # of the trace, from 1
    at: int  # the first token that differs
    was: int | None  # None: it had ended
    is_now: int | None


@dataclass(frozen=True)
class Replayed:
    """What a replay found."""

    num_completions: int
    num_tokens: int
    num_skipped: int  # of another model's fingerprint, of an adapter that is not loaded, or with pictures
    differences: list[Difference]


def read_trace(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, row) of a trace; a last line that a kill cut off is left out.

    Raises:
        DataError: A line is no line of a trace.
    """
    lines = Path(path).read_bytes().count(b"\n") if Path(path).is_file() else 0
    for number, row in enumerate(_rows(path, lines), start=1):
        if row.get("kind") not in (START, COMPLETION):
            raise DataError(f"{path}, line {number}: kind is {row.get('kind')!r}; expected {START} or {COMPLETION}.")
        yield number, row


def _rows(path: Path, lines: int) -> Iterator[dict[str, Any]]:
    rows = read_jsonl(path)
    for _ in range(lines):
        row = next(rows, None)
        if row is None:
            return
        yield row
    if not lines:
        next(rows, None)  # a file that is missing or has half a line is told by the reader


def engine_settings(path: Path) -> dict[str, Any]:
    """Return the settings that the engine of a trace had at its last start.

    Raises:
        DataError: There is no start in the trace.
    """
    found = [row["engine"] for _, row in read_trace(path) if row["kind"] == START]
    if not found:
        raise DataError(f"{path} has no line of kind {START}; expected a file that mw serve --trace wrote.")
    return dict(found[-1])


def replay(path: Path, llm: "LLM") -> Replayed:
    """Compute every completion of a trace again and compare the tokens.

    Completions of a model with another fingerprint, of an adapter that ``llm`` has not loaded, and those whose prompt
    has pictures are counted and left out. Of one that was aborted, the tokens that had come are compared.
    """
    own, adapters = fingerprint(llm.engine.model), llm.engine.adapters.by_content()
    rows: list[tuple[int, dict[str, Any]]] = []
    num_skipped, is_own = 0, False
    for number, row in read_trace(path):
        if row["kind"] == START:
            is_own = row["model"] == own
        elif is_own and row.get("adapter") in (None, *adapters) and not row.get("images"):
            rows.append((number, row))
        else:
            num_skipped += 1
    differences: list[Difference] = []
    with bar("completions", len(rows)) as shown:
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            params = [_params(row) for _, row in part]
            names = [adapters.get(row.get("adapter", "")) for _, row in part]
            done = llm.generate([row["prompt_ids"] for _, row in part], params, adapter=names)
            for (number, row), completion in zip(part, done, strict=True):
                difference = _compare(number, row["token_ids"], list(completion.token_ids))
                differences += [difference] if difference is not None else []
            shown.advance(len(part))
    return Replayed(len(rows), sum(len(row["token_ids"]) for _, row in rows), num_skipped, differences)


def _params(row: dict[str, Any]) -> SamplingParams:
    params = SamplingParams(**row["params"])
    if row["finish_reason"] != "abort":
        return params
    return replace(params, max_tokens=max(1, len(row["token_ids"])), min_tokens=0)


def _compare(line: int, was: list[int], is_now: list[int]) -> Difference | None:
    if not was:
        return None  # aborted before its first token
    for at in range(max(len(was), len(is_now))):
        old, new = (ids[at] if at < len(ids) else None for ids in (was, is_now))
        if old != new:
            return Difference(line, at, old, new)
    return None
