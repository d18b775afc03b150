"""Steps of pipelines in tests: worker processes import them from here."""

import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelwright.base.types import Document
from modelwright.data.step import Removal


@dataclass(frozen=True)
class Shout:
    """Change every text; as slowly as wanted."""

    seconds: float = 0.0

    def change(self, document: Document) -> Document:
        time.sleep(self.seconds)
        return replace(document, text=document.text.upper(), metadata={**document.metadata, "shouted": True})


@dataclass(frozen=True)
class AtLeast:
    """Remove short texts."""

    chars: int = 10

    def reason(self, document: Document) -> str:
        length = len(document.text)
        return f"too short: {length} characters, at least {self.chars}" if length < self.chars else ""


@dataclass(frozen=True)
class DropCopies:
    """Remove texts that stood before; decide as slowly as wanted."""

    seconds: float = 0.0

    def sign(self, document: Document) -> bytes:
        return hashlib.sha256(document.text.encode()).digest()

    def decide(self, signatures: Iterable[tuple[str, bytes]]) -> Mapping[str, str]:
        first: dict[bytes, str] = {}
        decisions = {}
        for name, digest in signatures:
            if first.setdefault(digest, name) != name:
                decisions[name] = first[digest]
        time.sleep(self.seconds)
        return decisions

    def apply(self, document: Document, decision: Any) -> Removal:
        return Removal(f"same as {decision}")


@dataclass(frozen=True)
class Trouble:
    """Raise, die, hang or empty the text, as a document asks for."""

    once_file: str = ""  # the worker dies only while this file does not exist

    def change(self, document: Document) -> Document:
        if "RAISE" in document.text:
            raise ValueError(f"cannot take {document.text}")
        if "EXHAUST" in document.text:
            raise MemoryError
        if "DIE" in document.text:
            os.kill(os.getpid(), 9)
        if "SEGFAULT" in document.text:
            os.kill(os.getpid(), 11)
        if "ONCE" in document.text and not Path(self.once_file).exists():
            Path(self.once_file).touch()
            os._exit(7)
        if "HANG" in document.text:
            time.sleep(60)
        return replace(document, text="") if "EMPTY" in document.text else document


TABLE = {
    "shout": "tests.data.trial_steps:Shout",
    "at_least": "tests.data.trial_steps:AtLeast",
    "drop_copies": "tests.data.trial_steps:DropCopies",
    "trouble": "tests.data.trial_steps:Trouble",
}
