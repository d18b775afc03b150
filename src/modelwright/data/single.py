"""Single steps on a file of JSON lines with ``id`` and ``text``: the work of a pipeline without a data set around it.

The rows keep their order and all their own fields; only the text changes, and fields that a step adds. A line that
cannot be used is set aside by its number, and listed in ``OUT.aside.jsonl``.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from modelwright.base.errors import ConfigError, DataError
from modelwright.base.files import atomic_file, write_jsonl
from modelwright.data.inputs import find_units
from modelwright.data.plan import NamedStep, PipelineConfig, SourceConfig, make_key, plan_passes
from modelwright.data.run import Run, RunParams, RunResult, alone, make_engine
from modelwright.data.shards import Slice, encode_row


def run_on_lines(
    source: Path, out: Path, steps: Sequence[NamedStep], params: RunParams, removed: Path | None = None
) -> RunResult:
    """Run steps over the rows of ``source`` and write those that are left to ``out``.

    Args:
        source: JSON lines.
        out: A file, replaced when all is done.
        steps: Made by `plan.build_steps`.
        params: How it is run.
        removed: Where to write what was removed, with the reason and its text redacted; None: nowhere.

    Raises:
        ConfigError: The output is the input, or a folder.
        DataError: There is no such file; (strict) something in it cannot be used.
    """
    if not Path(source).is_file():
        raise DataError(f"{source} is not a file. Expected JSON lines with id and text; give the path of such a file.")
    if out.is_dir() or out.resolve() == source.resolve():
        raise ConfigError(f"The output {out} is {'a folder' if out.is_dir() else 'the input'}; name another file.")
    config = PipelineConfig((SourceConfig(str(source), kind="jsonl"),), tuple(steps), out)
    with contextlib.closing(make_engine(params, config)) as engine:
        run = Run(config, params, engine, is_plain=True)
        with alone(run.work):
            units, found, _ = find_units(config.source, config.shard)
            run.do_all(plan_passes(config.steps), units, make_key("plain", *(one.hash for one in found)))
            with atomic_file(out, "wb") as handle:
                handle.writelines(_plain_rows(run.pieces))
            if removed is not None:
                with atomic_file(removed, "wb") as handle:
                    for path in run.removed:
                        handle.write(path.read_bytes())
            shutil.rmtree(run.work, ignore_errors=True)
    asides = aside_file(out)
    if run.asides:
        write_jsonl(asides, run.asides)
    else:
        asides.unlink(missing_ok=True)  # of an earlier run
    return RunResult(out, run.funnel, run.asides)


def aside_file(out: Path) -> Path:
    """Return where the command for a single step lists what it set aside."""
    return out.with_name(out.name + ".aside.jsonl")


def _plain_rows(pieces: Sequence[Slice]) -> Iterator[bytes]:
    for piece in pieces:
        with open(piece.path, "rb") as handle:
            for line in handle:
                row = json.loads(line)
                yield encode_row({"id": row["id"], **row["metadata"], "text": row["text"]})
