"""The tree's shape: who may import whom, what stays free of torch, how long things are, that no module has state."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "ziphius"
FILES = sorted(SRC.rglob("*.py"))
MODULES = {".".join(path.relative_to(SRC).with_suffix("").parts): path for path in FILES if path.stem != "__init__"}

# Each folder, and each module beside the folders, imports itself and what stands before it: no two import each other.
ORDER = (
    *("errors", "log", "formats", "config", "installation", "ipc", "distributed", "tokenizer", "checkpoint", "planner"),
    *("kv_cache", "kernels", "layers", "attention", "scheduler", "models"),
    *("ranks", "engine", "frontend", "launchers", "manager", "cli", "__main__"),
)
# What needs torch; everything else does without it.
TORCH = (
    *("distributed", "kernels", "layers", "attention", "models", "engine"),
    *("kv_cache.kv_pool", "checkpoint.read_ahead", "checkpoint.safetensors_source"),
)
MAX_FILE, MAX_FUNCTION = 400, 50
MUTATORS = {"append", "add", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}


def room(module: str) -> str:
    return module.partition(".")[0]


def needs_torch(module: str) -> bool:
    return module in TORCH or room(module) in TORCH


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module of ziphius) for each import, also those inside functions and those that only mypy follows."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("ziphius."):
                inside = name.removeprefix("ziphius.")
                yield node.lineno, inside if inside in MODULES else inside.rpartition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_leftwards(module: str) -> None:
    wrong = [
        f"line {line}: {imported}"
        for line, imported in imports(MODULES[module])
        if imported in MODULES and ORDER.index(room(imported)) > ORDER.index(room(module))
    ]
    assert wrong == []


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: {name for _, name in imports(path) if name in MODULES} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_command_and_the_frontend_are_free_of_torch() -> None:
    names = [f"ziphius.{module}" for module in MODULES if not needs_torch(module)]
    code = (
        "import importlib, sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        assert name.split('.')[0] not in ('torch', 'transformers'), f'{module} imports {name}'\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"for module in {names}:\n"
        "    importlib.import_module(module)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_packages_are_folders_and_nothing_else() -> None:
    packages = [path for path in FILES if path.name == "__init__.py" and path != SRC / "__init__.py"]
    assert [str(path) for path in packages if path.read_text().strip()] == []


def test_the_package_gives_its_names_and_loads_nothing_for_them_before() -> None:
    code = (
        "import sys\n"
        "import ziphius\n"
        "loaded = [name for name in sys.modules if name.startswith('ziphius.')]\n"
        "assert not loaded and 'torch' not in sys.modules, loaded\n"
        "assert sorted(ziphius.__all__) == ['Completion', 'LLM', 'SamplingParams', 'ZiphiusError']\n"
        "assert set(ziphius.__all__) <= set(dir(ziphius))\n"
        "from ziphius import SamplingParams, ZiphiusError\n"
        "assert 'torch' not in sys.modules\n"
        "from ziphius import LLM, Completion\n"
        "found = [(value.__module__, value.__name__) for value in (LLM, Completion, SamplingParams, ZiphiusError)]\n"
        "assert found == [('ziphius.engine.llm', 'LLM'), ('ziphius.engine.llm', 'Completion'),\n"
        "                 ('ziphius.ipc.messages', 'SamplingParams'), ('ziphius.errors', 'ZiphiusError')], found\n"
        "assert not hasattr(ziphius, 'nothing')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_no_two_public_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("module", MODULES)
def test_length(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    if module.startswith("kernels."):
        return
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION} == {}


@pytest.mark.parametrize("module", MODULES)
def test_the_first_line_says_what_the_module_is(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert (ast.get_docstring(tree) or "").split("\n")[0].endswith((".", ";", ",", ":"))


@pytest.mark.parametrize("module", MODULES)
def test_no_module_has_state(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert [f"line {n.lineno}: global" for n in ast.walk(tree) if isinstance(n, ast.Global)] == []
    values = dict(assigned(tree))
    containers = {name for name, value in values.items() if is_container(value) and name != name.upper()}
    assert containers - {"__all__"} == set(), "named like variables"
    assert [f"line {line}: {name} is changed" for line, name in mutations(tree, set(values))] == []


def assigned(tree: ast.Module) -> Iterator[tuple[str, ast.expr | None]]:
    """The names that a module's top level assigns, with what."""
    for node in tree.body:
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
            targets = [node.target]
        for target in targets:
            for leaf in ast.walk(target):
                if isinstance(leaf, ast.Name):
                    yield leaf.id, getattr(node, "value", None)


def is_container(value: ast.expr | None) -> bool:
    """Whether it makes something that can be filled."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        return value.func.id in ("list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict")
    return isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp))


def mutations(tree: ast.Module, names: set[str]) -> Iterator[tuple[int, str]]:
    """`NAME[...] = x`, `del NAME[...]`, `NAME.attribute = x` and `NAME.append(x)` of a module's own names."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, (ast.Store, ast.Del)):
            owner: ast.expr = node.value
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS
        ):  # fmt: skip
            owner = node.func.value
        else:
            continue
        if isinstance(owner, ast.Name) and owner.id in names:
            yield node.lineno, owner.id
