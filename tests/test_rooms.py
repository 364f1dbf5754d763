"""The rooms: who may import whom, who may touch the disk, who may own threads, how large anything may be."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "async_ckpt"

_GROUND = {"errors", "metrics"}
_READERS = _GROUND | {"host", "threads", "format", "storage"}
_ENGINE_USES = _READERS | {"plan", "writer", "snapshot", "reading", "retention", "ranks", "observers", "mirror"}

ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "metrics": set(),
    "host": {"errors"},
    "threads": _GROUND,
    "format": {"errors", "host"},
    "plan": {"errors", "host", "format"},
    "storage": _GROUND | {"host", "threads", "format"},
    "writer": _GROUND | {"threads", "storage", "format"},
    "snapshot": {"errors", "host", "threads", "plan", "format"},
    "reading": _READERS,
    "retention": {"errors", "format", "storage", "reading"},
    "ranks": {"errors", "host", "threads", "format", "storage", "reading"},
    "observers": _GROUND | {"threads"},
    "mirror": _READERS | {"reading"},
    "engine": _ENGINE_USES,
    "integrations": _ENGINE_USES | {"engine"},
    "cli": _ENGINE_USES | {"engine"},
    "__init__": _ENGINE_USES | {"engine"},
    "__main__": {"cli"},
}
"""Which rooms each room may import, lazily or for its types alone too."""

MAY_IMPORT_TORCH = (
    "plan",
    "snapshot",
    "engine",
    "integrations",
    "ranks",
    "cli.demo",
    "cli.export",
    "reading.load",
    "reading.load_into",
    "reading.build",
    "reading.by_torch",
    "reading.scatter",
    "reading.shared_memory",
    "host.device",
)
NEVER_TORCH = ("ranks.protocol", "ranks.joining")
MAY_IMPORT_AIOFILES = ("storage",)
MAY_START_THREADS = ("threads", "writer", "integrations", "cli")
DISK_CALLS = {
    "open",
    "pwrite",
    "pread",
    "preadv",
    "fsync",
    "rename",
    "replace",
    "unlink",
    "rmdir",
    "mkdir",
    "ftruncate",
    "posix_fallocate",
}
DISK_SIDE = ("writer", "reading", "retention", "format", "engine", "snapshot", "mirror")

MAX_ROOMS, MAX_FLOORS = 20, 9
MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_COLUMNS = 350, 60, 120
MAX_PRIVATE_REACHES = 30


@cache
def trees() -> dict[str, ast.Module]:
    """Each module of the package by its dotted name; a package is named after its folder, the package itself
    `__init__`.
    """
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text())
    return found


def source(module: str) -> list[str]:
    path = PACKAGE / Path(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text().splitlines()


def imports(module: str) -> set[str]:
    """Modules of this package that `module` imports anywhere: at its top, in functions, for its types."""
    here = module.split(".") if (PACKAGE / Path(*module.split("."))).is_dir() else module.split(".")[:-1]
    here = [] if module == "__init__" else here
    found = set()
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - (node.level - 1)], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in trees() else ".".join(base) or "__init__")
    return found - {module}


def outside(module: str) -> set[str]:
    """Top-level names of what `module` imports from elsewhere at run time."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(trees()[module])
    return found


def is_in(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)


def room(module: str) -> str:
    return module.split(".")[0]


def room_arrows() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {room(module): set() for module in trees()}
    for module in trees():
        found[room(module)] |= {room(other) for other in imports(module)} - {room(module)}
    return found


@pytest.mark.wide
def test_imports_follow_the_arrows() -> None:
    wrong = {
        (module, other)
        for module in trees()
        for other in imports(module)
        if room(other) not in {room(module), *ARROWS[room(module)]}
    }
    assert wrong == set()


@pytest.mark.wide
def test_few_rooms_on_few_floors() -> None:
    arrows = room_arrows()

    @cache
    def floor(name: str) -> int:
        return 1 + max((floor(below) for below in arrows[name]), default=0)

    assert len(arrows) <= MAX_ROOMS, sorted(arrows)
    assert max(map(floor, arrows)) <= MAX_FLOORS, {name: floor(name) for name in arrows}


def test_no_module_imports_itself_through_others() -> None:
    reached: dict[str, set[str]] = {module: set(imports(module)) for module in trees()}
    for middle in trees():
        for module, others in reached.items():
            if middle in others:
                reached[module] = others | reached[middle]
    assert [module for module, others in reached.items() if module in others] == []


def test_torch_stays_on_the_memory_side() -> None:
    using = {module for module in trees() if "torch" in outside(module)}
    assert [module for module in using if not is_in(module, MAY_IMPORT_TORCH) or is_in(module, NEVER_TORCH)] == []


def test_only_the_seam_touches_files() -> None:
    assert [
        module for module in trees() if "aiofiles" in outside(module) and not is_in(module, MAY_IMPORT_AIOFILES)
    ] == []
    wrong = []
    for module in (module for module in trees() if is_in(module, DISK_SIDE)):
        for node in (node for node in ast.walk(trees()[module]) if isinstance(node, ast.Call)):
            called = ast.unparse(node.func)
            if called == "open" or (called.startswith("os.") and called[3:] in DISK_CALLS):
                wrong.append(f"{module}:{node.lineno}: {called}")
    assert wrong == []


def test_threads_and_locks_have_one_home() -> None:
    wrong = []
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            starts = node.attr in ("Thread", "ThreadPoolExecutor", "new_event_loop") and not is_in(
                module, MAY_START_THREADS
            )
            # An interrupt cannot leave those of threads/locks.py locked.
            locks = ast.unparse(node) in ("threading.Lock", "threading.RLock", "threading.Condition")
            # The signal flag is only tried, never entered.
            locks = locks and module not in ("threads.locks", "engine.preemption")
            if starts or locks:
                wrong.append(f"{module}:{node.lineno}: {ast.unparse(node)}")
    assert wrong == []


def test_only_one_helper_tells_what_no_caller_asked_for() -> None:
    wrong = []
    for module in (module for module in trees() if not is_in(module, ("errors", "observers", "cli"))):
        for node in (node for node in ast.walk(trees()[module]) if isinstance(node, ast.Call)):
            called = ast.unparse(node.func)
            # A log handler or a warning filter of the user's may raise: `errors.report` cannot.
            if called == "warnings.warn" or re.fullmatch(
                r"_?logg(er|ing)\.(debug|info|warning|error|exception|log)", called
            ):
                wrong.append(f"{module}:{node.lineno}: {called}")
    assert wrong == []


def test_everything_stays_small() -> None:
    large = []
    for module, tree in trees().items():
        lines = source(module)
        if len(lines) > MAX_MODULE_LINES:
            large.append(f"{module}: {len(lines)} lines")
        large += [f"{module}:{k}: {len(line)} columns" for k, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    large.append(f"{module}.{node.name}: {length} lines")
    assert large == []


def privates(nodes: list[ast.AST]) -> set[str]:
    """The names with one leading underscore that these nodes define: functions, classes, attributes, variables."""
    found = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    found |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    found |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def test_tests_reach_into_few_privates() -> None:
    """Each private name of the package that a test file takes from an object or module, or names in a string."""
    theirs = privates([node for tree in trees().values() for node in ast.walk(tree)])
    reached = []
    for path in sorted((PACKAGE.parent / "tests").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        foreign = theirs - privates(nodes)
        for node in nodes:
            name = getattr(node, "attr", "") if isinstance(node, ast.Attribute) else getattr(node, "name", "")
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                name = node.value.rpartition(".")[2]
            if name in foreign:
                reached.append(f"{path.name}:{getattr(node, 'lineno', 0)}: {name}")
    assert len(reached) <= MAX_PRIVATE_REACHES, reached
