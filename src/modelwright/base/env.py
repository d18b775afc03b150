"""Every environment variable that the house reads, and nothing else reads one."""

import os
from pathlib import Path

VARIABLES = {
    "MODELWRIGHT_DATA": "folder with the public data sets that benchmarks and some tests use; unset: they are skipped",
    "MODELWRIGHT_DATASETS": "folder with local copies of Hugging Face data sets by name; unset: they are fetched",
    "MODELWRIGHT_EMBEDDER": "folder of the default sentence encoder; unset: the installed package, then the hub",
    "MODELWRIGHT_SECRET": "under which personal data get their pseudonyms; never written; unset: none are made",
    "MODELWRIGHT_DEBUG": "any value: the command line shows the traceback of errors that it explains; unset: one line",
    "MODELWRIGHT_COMPILE": "0 turns torch.compile off everywhere; unset: used where it pays and a compiler is found",
    "MODELWRIGHT_CLIENTS": "folder of a virtual environment with the clients of make clients; unset: .venv-clients",
    "MODELWRIGHT_KERNELS": "folder where compiled CPU kernels are kept; unset: ~/.cache/modelwright/kernels",
}


def read(name: str) -> str | None:
    """Return the value of a variable listed in `VARIABLES`, or None when unset or empty."""
    assert name in VARIABLES, f"{name} is not declared in base/env.py"
    return os.environ.get(name) or None


def secret(name: str) -> str | None:
    """Return the value of a variable that the user named in a setting, for a key that no file should hold."""
    return os.environ.get(name) or None


def data_folder() -> Path | None:
    """Return the folder named by ``MODELWRIGHT_DATA`` when it exists."""
    value = read("MODELWRIGHT_DATA")
    return Path(value) if value and Path(value).is_dir() else None
