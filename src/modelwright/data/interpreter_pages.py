"""A program that writes the documentation carried by this Python interpreter, one Markdown page a module.

`modelwright.data.reference` runs it in a process of its own, because importing a module runs the module's code. It
needs nothing but the standard library. A page holds the module's docstring and every public class, method and
function with signature and docstring: ``# json``, ``## json.dumps(obj, *, skipkeys=False)``,
``### json.JSONDecoder.decode(s)``. What a page says depends on the interpreter alone: a default value that carries an
address, a path or the environment is written by its kind, never by its content. A method stands with the class that
defines it; one inherited from a private base, which has no page, stands with the public class. The topics that
``help()`` carries (the language reference) become pages of their own, ``language.<topic>.md``.
"""

import enum
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Left out: a browser, a poem, windows and test suites start on import, or the module exists to be an example.
SKIPPED = {"antigravity", "this", "idlelib", "turtle", "turtledemo", "test", "xxlimited", "xxsubtype"}
# The platform's halves of os and os.path, whose pages hold the same functions under the names people use.
SKIPPED |= {"posix", "nt", "posixpath", "ntpath", "genericpath"}
SKIPPED_PARTS = {"__main__", "tests", "test", "idle_test", "xxlimited_35"}

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_FIRST_LINE_SIGNATURE = re.compile(r"^(?P<name>[\w.]+)(?P<signature>\(.*\))(\s*->\s*.+)?\s*$")
_PLAIN_SCALARS = (bool, int, float, complex, str, bytes, type(None), type(...))


def module_names() -> list[str]:
    """Return the names of the public standard-library modules and their submodules, sorted; nothing is imported
    but the packages themselves, whose search path lists what is in them.
    """
    names = ["os.path"]  # an attribute of os, not a file in a package
    for name in sorted(sys.stdlib_module_names):
        if not _is_wanted(name):
            continue
        names.append(name)
        spec = _find(name)
        if spec is not None and spec.submodule_search_locations is not None:
            names.extend(_submodules(list(spec.submodule_search_locations), f"{name}."))
    return sorted(names)


def _find(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def _is_wanted(name: str) -> bool:
    parts = name.split(".")
    return not (parts[0] in SKIPPED or set(parts) & SKIPPED_PARTS or any(part.startswith("_") for part in parts))


def _submodules(paths: list[str], prefix: str) -> Iterator[str]:
    for found in pkgutil.iter_modules(paths, prefix):
        if not _is_wanted(found.name):
            continue
        yield found.name
        if found.ispkg:
            last = found.name.rpartition(".")[2]
            yield from _submodules([os.path.join(path, last) for path in paths], f"{found.name}.")


def render_module(module: types.ModuleType, name: str) -> str:
    """Return the page of one imported module."""
    parts = [f"# {name}", _own_doc(module)]
    for member_name, member in _public_members(module, name):
        qualified = f"{name}.{member_name}"
        if inspect.isclass(member):
            parts.extend(_render_class(member, qualified))
        else:
            parts.extend(_render_callable(member, qualified, "##"))
    return "\n\n".join(part for part in parts if part) + "\n"


def _public_members(module: types.ModuleType, name: str) -> list[tuple[str, Any]]:
    """Classes and routines that the module offers as its own: those in ``__all__``, or else those it defines."""
    listed = getattr(module, "__all__", None)
    names = sorted({n for n in listed if isinstance(n, str)}) if listed else sorted(vars(module))
    members = []
    for member_name in names:
        member = getattr(module, member_name, None)
        if member_name.startswith("_") or not (inspect.isclass(member) or inspect.isroutine(member)):
            continue
        if not listed and getattr(member, "__module__", None) not in (name, f"_{name}", module.__name__, None):
            continue  # imported from elsewhere for the module's own use
        if isinstance(member, types.GenericAlias):
            continue
        members.append((member_name, member))
    return members


def _render_class(cls: type, qualified: str) -> list[str]:
    parts = [f"## class {qualified}{_signature(cls, skip_first=False)}", _own_doc(cls)]
    for name, raw in sorted(_class_members(cls).items()):
        doc = _own_doc(raw)
        if name.startswith("__") and not (isinstance(raw, types.FunctionType) and doc):
            continue  # special methods only where their author wrote something about them
        if name.startswith("_") and not name.startswith("__"):
            continue
        if inspect.isroutine(raw) or isinstance(raw, (staticmethod, classmethod)):
            member = getattr(cls, name, raw)
            is_bound = isinstance(
                raw, (staticmethod, classmethod, types.BuiltinMethodType, types.ClassMethodDescriptorType)
            )
            parts.extend(_render_callable(member, f"{qualified}.{name}", "###", skip_first=not is_bound))
        elif inspect.isdatadescriptor(raw) and doc and not doc.startswith("Alias for field number"):
            parts.extend([f"### {qualified}.{name}", doc])
    return parts


def _class_members(cls: type) -> dict[str, Any]:
    """What the class defines, and what it inherits from private bases that have no page of their own."""
    members: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        is_private = base.__name__.startswith("_") or base.__module__.startswith("_")
        if base is cls or is_private:
            members.update(vars(base))
        else:
            for name in vars(base):
                members.pop(name, None)  # defined again by a public base: it stands there
    return members


def _render_callable(member: Any, qualified: str, marks: str, skip_first: bool = False) -> list[str]:
    doc = _own_doc(member)
    signature = _signature(member, skip_first)
    if signature == "(...)":
        # Many C functions state their signature as the first line of the docstring.
        first, _, rest = doc.partition("\n")
        found = _FIRST_LINE_SIGNATURE.match(first)
        if found and found["name"].rpartition(".")[2] == qualified.rpartition(".")[2] and rest.strip():
            signature, doc = first[found.start("signature") :].strip(), rest.strip("\n")
    return [f"{marks} {qualified}{signature}", doc]


def _own_doc(thing: Any) -> str:
    """The docstring that stands on the thing itself, never one inherited; addresses and trailing blanks removed."""
    doc = vars(thing).get("__doc__") if inspect.isclass(thing) else getattr(thing, "__doc__", None)
    return _tidy(inspect.cleandoc(doc)) if isinstance(doc, str) else ""


def _tidy(text: str) -> str:
    lines = (line.rstrip() for line in _ADDRESS.sub("", text).splitlines())
    # A comment at the start of a line would read as a Markdown heading; indented, it is code.
    return "\n".join(f"    {line}" if line.startswith("#") else line for line in lines).strip("\n")


class _Shown:
    """A default value that prints as the given text."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _signature(member: Any, skip_first: bool) -> str:
    try:
        signature = inspect.signature(member)
    except (ValueError, TypeError, NameError, AttributeError, RecursionError):
        return "" if inspect.isclass(member) else "(...)"
    parameters = [
        p if p.default is p.empty else p.replace(default=_Shown(_show_default(p.default)))
        for p in signature.parameters.values()
    ]
    if (
        skip_first
        and parameters
        and parameters[0].kind in (parameters[0].POSITIONAL_ONLY, parameters[0].POSITIONAL_OR_KEYWORD)
    ):
        parameters = parameters[1:]
    return _ADDRESS.sub("", " ".join(str(signature.replace(parameters=parameters)).split()))


def _show_default(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if inspect.isclass(value) or inspect.isroutine(value):
        return str(getattr(value, "__qualname__", None) or type(value).__name__)
    if isinstance(value, str) and os.path.isabs(value) and len(value) > 1:
        return "'...'"  # a path of this machine
    if type(value) in _PLAIN_SCALARS:
        return repr(value)
    if type(value) in (tuple, list) and all(type(item) in _PLAIN_SCALARS for item in value):
        inner = ", ".join(_show_default(item) for item in value)
        if type(value) is list:
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if type(value) in (dict, set, frozenset) and not value:
        return repr(value)
    return f"<{type(value).__name__}>"


def render_topic(text: str) -> str:
    """Return the page of one ``help()`` topic, its underlined titles turned into Markdown headings."""
    lines = _tidy(text).split("\n")
    page = []
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        mark = below[:1]
        if line and mark and mark in "*=-~" and set(below) == {mark} and len(below) >= len(line):
            page.append(f"{'#' * ('*=-~'.index(mark) + 1)} {line}")
        elif not (line and set(line) <= {line[0]} and line[0] in "*=-~" and len(line) > 3):
            page.append(line)
    return "\n".join(page).strip("\n") + "\n"


def write_topics(folder: Path) -> None:
    """Write the pages of the language reference, where this Python ships them."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        return
    for name, text in sorted(topics.items()):
        (folder / f"language.{name.lower()}.md").write_text(render_topic(text), encoding="utf-8", newline="\n")


def main(folder: str) -> None:
    """Write the page of each module named on standard input, telling each name on standard output before its import
    and again once done (``> name``, ``< name``), so that the parent knows where a crash or a hang happened.
    """
    names = sys.stdin.read().split()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as told, open(os.devnull, "r+b") as null:
        for descriptor in (0, 1, 2):  # what a module prints or asks on import must not reach the user
            os.dup2(null.fileno(), descriptor)
        sys.argv = [""]
        warnings.simplefilter("ignore")
        for name in names:
            told.write(f"> {name}\n")
            told.flush()
            try:
                page = render_module(importlib.import_module(name), name)
                Path(folder, f"{name}.md").write_text(page, encoding="utf-8", errors="replace", newline="\n")
            except (Exception, SystemExit):
                continue  # not made for this machine (winreg, msilib ...): no page
            told.write(f"< {name}\n")
        told.flush()
        os._exit(0)  # modules may have left threads and exit handlers behind


if __name__ == "__main__":
    if sys.argv[1] == "--list":
        print("\n".join(module_names()))
    elif sys.argv[1] == "--topics":
        write_topics(Path(sys.argv[2]))
    else:
        main(sys.argv[1])
