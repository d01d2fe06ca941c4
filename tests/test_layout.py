"""The shape of the source tree: which room may import which, and how long a file may grow.

Every rule is a function from parsed modules to a list of offences, and every rule has a made-up
offence that it must catch. An import counts wherever it stands, inside a function or under
TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80

# A room may import the rooms named here and itself; "tilert" is the package's own __init__.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "ir": {"errors"},
    "ops": {"errors", "ir"},
    "models": {"errors", "ir", "ops"},
    "compiler": {"errors", "ir", "ops", "models"},
    "backends": {"errors", "files", "ir", "ops", "models"},
    "weights": {"errors", "files", "ir"},
    "text": {"errors"},
    "engine": {"errors", "files", "ir", "ops", "models", "compiler", "backends", "weights"},
    "serve": {"errors", "ir", "ops", "models", "compiler", "backends", "weights", "text", "engine"},
}
ROOMS["serve"] |= {"files", "tilert"}  # tilert: for the version
PACKAGE = {"tilert": {"engine", "serve"}, "__main__": {"serve"}, "generate": {"serve"}}
# Import paths that scripts for the public TileRT package use. They lie below models, but are doors to
# serve: a room of their own, which nothing may enter.
FACADE = "tilert.models.deepseek_v3_2"
PACKAGE |= {"facade": {"serve"}}
# Outside packages that only these modules (or those below them) may import.
FENCED = {"torch": ("tilert.backends.cuda",), "transformers": ()}


@dataclass(frozen=True)
class Module:
    """A file of the package: its dotted name, its path below src and its text."""

    name: str
    path: str
    text: str

    @property
    def room(self) -> str:
        return room_of(self.name)

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)


def room_of(name: str) -> str:
    """The room of a dotted name."""
    if f"{name}.".startswith(f"{FACADE}."):
        return "facade"
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "tilert"


def load(root: Path) -> list[Module]:
    """Every Python file below root/tilert."""
    modules: list[Module] = []
    for path in sorted((root / "tilert").rglob("*.py")):
        relative = path.relative_to(root)
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        modules.append(Module(name, relative.as_posix(), path.read_text(encoding="utf-8")))
    return modules


def module(path: str, text: str) -> Module:
    """A made-up module at tilert/<path>."""
    name = f"tilert/{path}".removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    return Module(name, f"tilert/{path}", text)


def imports(source: Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import; relative ones are resolved.

    `from tilert.ir import program` gives tilert.ir.program: whether the last part is a module or a
    name in one does not matter to the rules below.
    """
    package = source.name if source.path.endswith("__init__.py") else source.name.rpartition(".")[0]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parts = parts[: len(parts) - node.level + 1] + ([base] if base else [])
                base = ".".join(parts)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def called(node: ast.Call) -> str:
    """The last part of the name of the function that is called."""
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def wrong_direction(modules: list[Module]) -> list[str]:
    """Imports of a room that ROOMS does not allow, and rooms that ROOMS does not have."""
    rooms = ROOMS | PACKAGE
    offences = [f"{m.path}: unknown room {m.room}" for m in modules if m.room not in rooms]
    for source in modules:
        for line, target in imports(source):
            if target.split(".")[0] != "tilert":
                continue
            part = room_of(target)
            room = part if part in rooms else "tilert"
            if room != source.room and room not in rooms.get(source.room, set()):
                offences.append(f"{source.path}:{line}: {source.room} may not import {target}")
    return offences


def eager_package(modules: list[Module]) -> list[str]:
    """Imports of the package's rooms when `import tilert` runs, instead of on first use."""
    offences: list[str] = []
    for source in modules:
        if source.name == "tilert":
            for node in source.tree.body:
                if isinstance(node, ast.Import | ast.ImportFrom) and "tilert" in ast.unparse(node):
                    offences.append(f"{source.path}:{node.lineno}: imports a room at once")
    return offences


def fenced(modules: list[Module]) -> list[str]:
    """Heavy packages imported outside the places that may use them."""
    offences: list[str] = []
    for source in modules:
        for line, target in imports(source):
            homes = FENCED.get(target.split(".")[0])
            if homes is not None and not any(
                source.name == home or source.name.startswith(home + ".") for home in homes
            ):
                offences.append(f"{source.path}:{line}: imports {target}")
    return offences


def cycles(modules: list[Module]) -> list[str]:
    """Modules that import each other, directly or around corners."""
    modules = [m for m in modules if m.name != "tilert"]  # its imports are lazy: see eager_package
    names = {m.name for m in modules}
    graph: dict[str, set[str]] = {}
    for source in modules:
        found: set[str] = set()
        for _, target in imports(source):
            known = target if target in names else target.rpartition(".")[0]
            if known in names and known != source.name:
                found.add(known)
        graph[source.name] = found
    offences: list[str] = []
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            offences.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for target in sorted(graph.get(name, set())):
                visit(target, [*trail, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return offences


def utils(modules: list[Module]) -> list[str]:
    """Folders and files without a subject."""
    vague = {"utils", "util", "helpers", "misc", "common"}
    return [m.path for m in modules if vague & set(m.name.split("."))]


def long_files(modules: list[Module]) -> list[str]:
    """Files of more than MAX_FILE_LINES lines."""
    counted = [(m.path, len(m.text.splitlines())) for m in modules]
    return [f"{path}: {lines} lines" for path, lines in counted if lines > MAX_FILE_LINES]


def long_functions(modules: list[Module]) -> list[str]:
    """Functions of more than MAX_FUNCTION_LINES lines, docstring included."""
    offences: list[str] = []
    for source in modules:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    offences.append(f"{source.path}:{node.lineno}: {node.name}, {lines} lines")
    return offences


RULES = (wrong_direction, eager_package, fenced, cycles, utils, long_files, long_functions)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_tree_obeys(rule: Callable[[list[Module]], list[str]]) -> None:
    modules = load(SOURCE)
    assert len(modules) > 10, f"only {len(modules)} modules below {SOURCE}"
    assert rule(modules) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("ir/a.py", "from tilert.ops import OPS"),
        ("ir/a.py", "import tilert.ops.linear"),
        ("ir/a.py", "from tilert import ops"),
        ("ir/a.py", "from ..ops import OPS"),
        ("ir/__init__.py", "from ..ops import OPS"),
        ("ir/a.py", "def f():\n    from tilert.compiler import build"),
        ("ir/a.py", "if TYPE_CHECKING:\n    from tilert.compiler import build"),
        ("ir/a.py", "importlib.import_module('tilert.ops')"),
        ("compiler/a.py", "from tilert.backends import interpreter"),
        ("backends/cpu/a.py", "from tilert.compiler.lower import lower"),
        ("backends/cpu/a.py", "from ...compiler.lower import lower"),
        ("text/a.py", "import tilert.ir"),
        ("engine/a.py", "from tilert.text import Tokenizer"),
        ("engine/a.py", "from tilert.serve import llm"),
        ("engine/a.py", "import tilert"),
        ("errors.py", "from tilert.ir import program"),
        ("cellar/a.py", ""),
        ("__init__.py", "from tilert.compiler import build"),
        ("generate.py", "from tilert.models import load_config"),
        ("models/deepseek_v3_2/a.py", "from tilert.engine import core"),
        ("models/deepseek_v32.py", "from tilert.serve import llm"),
        ("serve/a.py", "from tilert.models.deepseek_v3_2 import dsa_show_hands"),
        (
            "models/a.py",
            "from tilert.models.deepseek_v3_2.dsa_show_hands import ShowHandsGenerator",
        ),
        ("models/__init__.py", "from tilert.models import deepseek_v3_2"),
    ],
)
def test_wrong_direction_is_caught(path: str, text: str) -> None:
    assert len(wrong_direction([module(path, text)])) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("ops/a.py", "from tilert.ir import program\nimport numpy as np\nfrom . import linear"),
        ("compiler/a.py", "from tilert.models.llama import build\nfrom tilert.errors import E"),
        ("serve/a.py", "from tilert import __version__\nfrom tilert.engine.core import Request"),
        ("__init__.py", "def f():\n    from tilert.serve import llm"),
        ("models/deepseek_v3_2/a.py", "from tilert.serve.show_hands import ShowHandsGenerator"),
        ("generate.py", "from tilert.serve.cli import guarded"),
    ],
)
def test_right_direction_is_allowed(path: str, text: str) -> None:
    assert wrong_direction([module(path, text)]) == []


def test_eager_package_is_caught() -> None:
    assert eager_package([module("__init__.py", "from tilert.serve import llm")])
    assert not eager_package([module("__init__.py", "def f():\n    from tilert.serve import llm")])


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("weights/a.py", "import torch"),
        ("models/a.py", "def f():\n    from torch.nn import functional"),
        ("backends/cuda_like.py", "import torch"),
        ("backends/cuda/a.py", "import transformers"),
    ],
)
def test_fenced_is_caught(path: str, text: str) -> None:
    assert len(fenced([module(path, text)])) == 1


def test_fenced_allows_torch_at_home() -> None:
    assert fenced([module("backends/cuda/runtime.py", "import torch")]) == []


def test_cycles_are_caught() -> None:
    a = module("ir/a.py", "from tilert.ir import b")
    b = module("ir/b.py", "from tilert.ir.c import x")
    c = module("ir/c.py", "def f():\n    import tilert.ir.a")
    assert cycles([a, b, c]) == ["tilert.ir.a -> tilert.ir.b -> tilert.ir.c -> tilert.ir.a"]
    assert cycles([a, b, module("ir/c.py", "import tilert.errors")]) == []


def test_package_and_own_submodule_are_a_cycle() -> None:
    package = module("ops/__init__.py", "from tilert.ops.linear import Linear")
    assert cycles([package, module("ops/linear.py", "from tilert.ops import Linear")])
    assert not cycles([package, module("ops/linear.py", "import numpy")])


def test_utils_are_caught() -> None:
    assert utils([module("ir/utils/a.py", ""), module("ops/utils.py", "")]) == [
        "tilert/ir/utils/a.py",
        "tilert/ops/utils.py",
    ]
    assert utils([module("ir/utilisation.py", "")]) == []


def test_long_files_are_caught() -> None:
    assert not long_files([module("ir/a.py", "x = 1\n" * MAX_FILE_LINES)])
    assert long_files([module("ir/a.py", "x = 1\n" * (MAX_FILE_LINES + 1))])


@pytest.mark.parametrize("keyword", ["def", "async def"])
def test_long_functions_are_caught(keyword: str) -> None:
    head = f"class C:\n    {keyword} f():\n"
    assert not long_functions([module("ir/a.py", head + "        1\n" * (MAX_FUNCTION_LINES - 1))])
    assert long_functions([module("ir/a.py", head + "        1\n" * MAX_FUNCTION_LINES)])


def test_modules_are_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "tilert" / "ir").mkdir(parents=True)
    (tmp_path / "tilert" / "ir" / "__init__.py").write_text("")
    (tmp_path / "tilert" / "errors.py").write_text("")
    assert [m.name for m in load(tmp_path)] == ["tilert.errors", "tilert.ir"]
