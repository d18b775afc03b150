"""Hugging Face data sets by name: the same name finds a local copy first, so that everything runs without a network.

A copy lies in the folder that the setting ``datasets`` or the variable MODELWRIGHT_DATASETS names, as ``owner/name``,
``owner--name`` or just ``name``, or as the hub's own cache keeps it (``datasets--owner--name/snapshots/...``). Files
are found as the hub finds them: the ``configs`` of the README's front matter, else the names of the splits in the
paths. Only data is read: Parquet, Arrow, JSON lines, CSV, text, also compressed. Not done: data sets that are a script.
Source: https://huggingface.co/docs/hub/datasets-data-files-configuration
"""

import fnmatch
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from modelwright.base import env
from modelwright.base.errors import DataError
from modelwright.data.archive import suffix_of

_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # about the data, not data
SUFFIXES = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
_PACKED = (".gz", ".bz2", ".xz", ".zst")
# The hub's words for a split; a word counts between any two marks, as in data/train-00000-of-00002.parquet.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def find_dataset(
    name: str, split: str = "train", subset: str | None = None, revision: str | None = None, folder: Path | None = None
) -> list[tuple[Path, str]]:
    """Return (path, name in the data set) of the files of one split, in order; fetched if there is no local copy.

    Args:
        name: ``owner/name``, or the path of a folder.
        split: One split.
        subset: One configuration of several; None: the default one.
        revision: Of a data set that is fetched.
        folder: Where local copies lie; None: MODELWRIGHT_DATASETS.

    Raises:
        DataError: There is no such data set, split or subset; the message says what there is.
    """
    root = find_copy(name, folder) or _fetch(name, revision, folder)
    files = _data_files(root)
    if not files:
        raise DataError(f"The data set {name} in {root} holds no data; expected files of {' '.join(SUFFIXES)}.")
    configs = _configs(root)
    if configs:
        files, splits = _choose_config(configs, files, name, subset)
    else:
        files = _choose_folder(files, name, subset)
        splits = _splits_by_name(files)
    if split not in splits:
        raise DataError(f"The data set {name} has no split {split!r}; it has: {', '.join(splits)}. Choose one of them.")
    return [(root / file, file) for file in splits[split]]


def find_copy(name: str, folder: Path | None = None) -> Path | None:
    """Return the folder of the local copy of a data set, or None.

    Raises:
        DataError: The name points outside the folder of copies.
    """
    if Path(name).is_dir():
        return Path(name)
    given = folder or env.read("MODELWRIGHT_DATASETS")
    if not given:
        return None
    root = Path(given)
    if not root.is_dir():
        raise DataError(f"The folder of data sets {root} does not exist. Mend MODELWRIGHT_DATASETS or the setting.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ".." in name:
        raise DataError(f"{name!r} is not the name of a data set; expected owner/name.")
    flat = name.replace("/", "--")
    for candidate in (root / name, root / flat, root / PurePosixPath(name).name):
        if candidate.is_dir():
            return candidate
    snapshots = root / f"datasets--{flat}" / "snapshots"
    if snapshots.is_dir():
        main = snapshots.parent / "refs" / "main"
        wanted = main.read_text().strip() if main.is_file() else ""
        found = sorted(p for p in snapshots.iterdir() if p.is_dir())
        return next((p for p in found if p.name == wanted), found[-1] if found else None)
    return None


def _fetch(name: str, revision: str | None, folder: Path | None) -> Path:
    from huggingface_hub import snapshot_download  # a second to import; comes with tokenizers

    patterns = [f"*{suffix}{packed}" for suffix in SUFFIXES for packed in ("", *_PACKED)]
    try:
        return Path(
            snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=[*patterns, "README.md"])
        )
    except Exception as error:  # the hub's client raises errors of several libraries
        place = folder or env.read("MODELWRIGHT_DATASETS") or "the folder that MODELWRIGHT_DATASETS names"
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise DataError(
            f"The data set {name!r} has no local copy in {place} and could not be fetched ({reason}). "
            f"Put a copy there as {name}, or name a folder."
        ) from None


def _data_files(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        bare = name.lower()
        if suffix_of(bare) in _PACKED:
            bare = bare[: -len(suffix_of(bare))]
        is_hidden = any(part.startswith((".", "_")) for part in PurePosixPath(name).parts)
        # The hub's cache keeps links to its own blobs, so a link counts here; a folder of copies is the user's own.
        is_about = bare.rpartition("/")[2] in _ABOUT
        if suffix_of(bare) in SUFFIXES and not is_hidden and not is_about and path.is_file():
            found.append(name)
    return found


def _configs(root: Path) -> list[Mapping[str, Any]]:
    """Read ``configs`` from the front matter of the README."""
    readme = root / "README.md"
    if not readme.is_file():
        return []
    head = re.match(r"---\r?\n(.{0,200000}?)\n---", readme.read_text("utf-8", "replace"), re.DOTALL)
    try:
        values = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return []
    configs = values.get("configs") if isinstance(values, Mapping) else None
    usable = [c for c in configs or [] if isinstance(c, Mapping) and c.get("data_files")]
    return usable if isinstance(configs, list) else []


def _choose_config(
    configs: list[Mapping[str, Any]], files: list[str], name: str, subset: str | None
) -> tuple[list[str], dict[str, list[str]]]:
    names = [str(config.get("config_name", "default")) for config in configs]
    default = next((i for i, c in enumerate(configs) if c.get("default") is True), None)
    if default is None:
        default = names.index("default") if "default" in names else 0 if len(names) == 1 else None
    if subset is not None and subset not in names or (subset is None and default is None):
        raise DataError(
            f"The data set {name} has no subset {subset!r}; it has: {', '.join(names)}. Choose one: subset."
        )
    config = configs[names.index(subset) if subset is not None else default or 0]
    given = config["data_files"]
    rows = given if isinstance(given, list) else [{"split": "train", "path": given}]
    splits: dict[str, list[str]] = {}
    for row in rows:
        row = row if isinstance(row, Mapping) else {"split": "train", "path": row}
        paths = row.get("path")
        patterns = [str(p) for p in (paths if isinstance(paths, list) else [paths])]
        matched = [f for f in files if any(_matches(f, pattern) for pattern in patterns)]
        if matched:
            splits.setdefault(str(row.get("split", "train")), []).extend(matched)
    return files, splits


def _matches(file: str, pattern: str) -> bool:
    pattern = pattern.removeprefix("./").replace("**/", "*")
    return fnmatch.fnmatchcase(file, pattern)


def _choose_folder(files: list[str], name: str, subset: str | None) -> list[str]:
    if subset is None:
        return files
    chosen = [file for file in files if subset in PurePosixPath(file).parts[:-1]]
    if not chosen:
        there = sorted({part for file in files for part in PurePosixPath(file).parts[:-1]})
        raise DataError(f"The data set {name} has no subset {subset!r}; its folders: {', '.join(there) or 'none'}.")
    return chosen


def _splits_by_name(files: list[str]) -> dict[str, list[str]]:
    """Sort files into splits by the words in their paths; what names no split is all "train"."""
    splits: dict[str, list[str]] = {}
    for file in files:
        words = re.split(r"[^a-zA-Z]+", file.lower())
        found = next((split for split, known in _SPLIT_WORDS.items() if any(w in known for w in reversed(words))), None)
        if found is not None:
            splits.setdefault(found, []).append(file)
    return splits or {"train": files}
