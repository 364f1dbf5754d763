"""The rooms: who may import whom, who may touch the disk, who may own threads. A rule that matters is a test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "async_ckpt"
MODULES = sorted(str(p.relative_to(PACKAGE).with_suffix("")).replace("/", ".") for p in PACKAGE.rglob("*.py"))

# Only the memory side, the engine and what stands above it import torch.
MAY_IMPORT_TORCH = (
    "host.device",
    "staging",
    "snapshot",
    "guard",
    "engine",
    "layout.",
    "restore.loading",
    "restore.into",
    "restore.scatter",
    "restore.shared_memory",
    "restore.building",
    "restore.torch_file",
    "restore.safetensors_file",
    "coordination.",
    "integrations",
    "demo",
    "cli.exporting",
)
# Inside layout/, the container's arithmetic is plain Python.
NEVER_TORCH = ("coordination.__init__", "coordination.rank_protocol", "layout.zipformat", "layout.sealer")
MAY_IMPORT_AIOFILES = ("filesystem",)
MAY_START_THREADS = ("writer.__init__", "threads.executor", "writer.loopthread", "restore.reading", "restore.undo")


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text())


def runtime_imports(module: str) -> set[str]:
    """Absolute names of modules imported at run time; TYPE_CHECKING blocks do not count."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree(module))
    return names


def is_in(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == a or module.startswith(a.rstrip(".") + ".") for a in allowed)


@pytest.mark.parametrize("module", MODULES)
def test_torch_stays_on_the_memory_side(module: str) -> None:
    uses = any(name.split(".")[0] == "torch" for name in runtime_imports(module))
    if uses:
        assert is_in(module, MAY_IMPORT_TORCH) and module not in NEVER_TORCH


@pytest.mark.parametrize("module", MODULES)
def test_only_the_seam_imports_aiofiles(module: str) -> None:
    if any(name.split(".")[0] == "aiofiles" for name in runtime_imports(module)):
        assert is_in(module, MAY_IMPORT_AIOFILES)


DISK_CALLS = {"open", "pwrite", "pread", "preadv", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "ftruncate", "posix_fallocate"}
DISK_SIDE = ("writer", "transaction", "catalog", "verify", "retention", "manifest", "engine", "inflight", "restore", "snapshot")


@pytest.mark.parametrize("module", [m for m in MODULES if is_in(m, DISK_SIDE)])
def test_only_the_seam_makes_file_calls(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            assert not (node.func.value.id == "os" and node.func.attr in DISK_CALLS), f"os.{node.func.attr} at line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "open", f"open() at line {node.lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_only_the_writer_owns_threads_and_loops(module: str) -> None:
    if is_in(module, MAY_START_THREADS) or is_in(module, ("demo", "cli", "integrations")):
        return
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("Thread", "ThreadPoolExecutor", "new_event_loop"), f"{node.attr} at line {node.lineno}"


@pytest.mark.parametrize("module", [m for m in MODULES if m != "threads.locks"])
def test_locks_are_those_that_an_interrupt_cannot_leave_locked(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.With):
            entered = {ast.unparse(item.context_expr) for item in node.items}
            assert not any(name.startswith("threading.") for name in entered), f"{entered} at line {node.lineno}"
        # Only tried, never entered: a commit in progress is told apart from none.
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("threading.Lock", "threading.RLock", "threading.Condition"):
            assert module == "preemption.__init__", f"{ast.unparse(node)} at line {node.lineno}: see threads/locks.py"


@pytest.mark.parametrize("module", [m for m in MODULES if m != "errors" and not is_in(m, ("cli", "demo", "observers"))])
def test_people_are_told_through_the_one_helper_that_cannot_raise(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("warnings.warn", "logging.getLogger", "logging.warning"), f"line {node.lineno}: errors.report"


@pytest.mark.parametrize("module", MODULES)
def test_modules_stay_small(module: str) -> None:
    lines = (PACKAGE / (module.replace(".", "/") + ".py")).read_text().count("\n")
    assert lines <= 460, f"{module} has {lines} lines: one idea each"
