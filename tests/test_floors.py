"""The house stands on floors: a room imports only from floors below it, and keeps to its ceilings.

Reads the source text alone. The plan is the table below; a new room is one entry in it.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = "modelwright"
ROOT = Path(__file__).parents[1] / "src" / PACKAGE

# Ground floor first. Rooms that share a floor do not import each other.
FLOORS = [
    ["base"],
    ["tokenizer", "nn", "optim"],
    ["data", "models"],
    ["train", "engine"],
    ["compress", "image"],
    ["align", "evaluate"],
    ["rag", "guardrails"],
    ["agents"],
    ["serve", "ops"],
    ["studio"],
    ["cli"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
DRAWERS = {"utils", "common", "misc", "helpers", "extras", "core", "components", "manager", "v1", "new", "experiments"}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
MAX_FIELDS = 20

# Exceptions, each with its reason: "file:function" -> why.
LONG_FUNCTIONS: dict[str, str] = {}
WIDE_DATACLASSES = {"SamplingParams": "the settings of the OpenAI and vLLM interfaces, by their names"}
# Typer declares a verb's options as the parameters of its function.
WIDE_ROOMS = {"cli"}
WIDE_FILES = {
    name: "a Triton kernel takes pointers, sizes and compile-time constants one by one"
    for name in ("nn/kernels/flash_triton.py", "nn/kernels/paged_triton.py")
}

FILES = sorted(ROOT.rglob("*.py"))
IDS = [str(f.relative_to(ROOT)) for f in FILES]


def imported_rooms(tree: ast.AST) -> list[tuple[int, str]]:
    """Every (line number, room) that a parsed file imports from the package."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{PACKAGE}.<relative import>"]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == PACKAGE and len(parts) > 1:
                found.append((node.lineno, parts[1]))
    return found


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_imports_point_down(file: Path):
    inside = file.relative_to(ROOT).with_suffix("")
    assert not DRAWERS & set(inside.parts), f"{file}: name the subject, not a drawer"
    room = inside.parts[0]
    if len(inside.parts) == 1:
        return
    assert room in FLOOR_OF, f"{file}: the room {room!r} is on no floor; add it to FLOORS"
    for line, target in imported_rooms(ast.parse(file.read_text(encoding="utf-8"))):
        if target == "__version__":
            continue
        allowed = target == room or FLOOR_OF.get(target, 99) < FLOOR_OF[room]
        assert allowed, (
            f"{file}:{line}: {room} (floor {FLOOR_OF[room]}) imports {target} (floor {FLOOR_OF.get(target)}). "
            "Move the shared part down, or pass it in as an argument."
        )


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_ceilings(file: Path):
    text = file.read_text(encoding="utf-8")
    room = file.relative_to(ROOT).parts[0]
    assert text.count("\n") <= MAX_FILE_LINES, f"{file}: more than {MAX_FILE_LINES} lines"
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            name = f"{file.relative_to(ROOT)}:{node.name}"
            assert length <= MAX_FUNCTION_LINES or name in LONG_FUNCTIONS, f"{name} has {length} lines"
            names = [a.arg for a in [*node.args.args, *node.args.kwonlyargs] if a.arg not in ("self", "cls")]
            count = len(names)
            is_wide = room in WIDE_ROOMS or str(file.relative_to(ROOT)) in WIDE_FILES
            assert count <= MAX_PARAMETERS or is_wide, f"{name} has {count} parameters"
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            fields = sum(isinstance(item, ast.AnnAssign) for item in node.body)
            assert fields <= MAX_FIELDS or node.name in WIDE_DATACLASSES, (
                f"{file}: {node.name} has {fields} fields; nest a dataclass"
            )


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_import_cycles():
    modules = {module_name(f): f for f in FILES}
    edges: dict[str, set[str]] = {}
    for name, file in modules.items():
        edges[name] = set()
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                targets = [f"{node.module}.{a.name}" for a in node.names] + [node.module]
                edges[name] |= {t for t in targets if t in modules and t != name}
            elif isinstance(node, ast.Import):
                edges[name] |= {a.name for a in node.names if a.name in modules}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, f"import cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        for target in sorted(edges[name]):
            visit(target, [*path, name])
        done.add(name)

    for name in sorted(modules):
        visit(name, [])


def test_every_room_has_a_page_of_its_own_words():
    for room in {f.relative_to(ROOT).parts[0] for f in FILES if len(f.relative_to(ROOT).parts) > 1}:
        init = ROOT / room / "__init__.py"
        assert init.is_file() and ast.get_docstring(ast.parse(init.read_text())), (
            f"{room}/__init__.py says what it holds"
        )
