"""Imports go downward and in no circle: all there are, those in functions and under TYPE_CHECKING among them."""

from __future__ import annotations

import ast
import importlib
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Folder → the package that its files are modules of.
PACKAGES = {"fastcss": "fastcss", "kernels": "fastcss.kernels", "benchmarks": "benchmarks", "tests": "tests"}
#: The layers, from the bottom. A module belongs to the longest name here that is its own or that of a package around
#: it. It may import from layers below and from modules of the same name. Neighbours in a layer must not import each
#: other, as the implementations of an op.
LAYERS = (
    ("fastcss._dispatch.private_apis", "fastcss._import_files"),
    ("fastcss._cosine", "fastcss._files", "fastcss._tune_malloc", "fastcss._schema", "fastcss.packed_lora"),
    ("fastcss._dispatch.autograd", "fastcss._dispatch.nvrtc", "fastcss._dispatch.readable_values"),
    ("fastcss.reference", "fastcss.composed", "fastcss.kernels", "fastcss._launchers"),
    ("fastcss._dispatch",),
    ("fastcss._ops",),
    ("fastcss.ops",),
    ("fastcss._fuse",),
    ("fastcss._one_pass",),
    ("fastcss.nn", "fastcss.data"),
    ("fastcss.models",),
    ("fastcss",),
    ("fastcss.commands", "fastcss.selftest"),
    ("fastcss.__main__",),
    ("benchmarks.measure",),
    ("benchmarks.cases",),
    ("benchmarks._steps",),
    ("benchmarks",),
    ("benchmarks.registry",),
    (
        "benchmarks.__main__",
        "benchmarks.profile_kernels",
        "benchmarks.test_cases",
        "benchmarks.tune",
        "benchmarks.verify",
    ),
    ("tests",),
)
HEIGHTS = {name: height for height, layer in enumerate(LAYERS) for name in layer}
#: Files whose imports have names that are made at run time: the command that was asked for, and all files of a room.
IMPORT_BY_NAME = {"benchmarks/registry.py", "fastcss/__main__.py", "fastcss/_import_files.py"}


class Import(NamedTuple):
    """A module of ours that another one imports, and where."""

    importer: str
    imported: str
    place: str  # "benchmarks/registry.py:12"


# ---- reading


def modules(root: Path) -> dict[str, Path]:
    """Name → file."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            if (folder, parts[0]) != ("fastcss", "kernels"):  # where a checkout has a link to the folder itself
                found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imports(root: Path) -> list[Import]:
    """Every import of a module of ours, not counting that Python runs the packages around it first."""
    there = modules(root)
    # pytest puts a test's folder on the path: its helpers are imported by their stem.
    helpers = {name.rpartition(".")[2]: name for name in there if name.startswith("tests.")}
    found = []
    for importer, path in there.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in _named(node, importer, path):
                if importer.startswith("tests."):
                    name = helpers.get(name.split(".")[0], name)
                imported = name if name in there else name.rpartition(".")[0]
                if imported in there and imported != importer:
                    found.append(Import(importer, imported, f"{path.relative_to(root).as_posix()}:{node.lineno}"))
    return found


def _named(node: ast.AST, importer: str, path: Path) -> Iterator[str]:
    """Yield what is imported here: a module, or something in one."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = importer.split(".") if path.stem == "__init__" else importer.split(".")[:-1]
        package = above[: len(above) + 1 - node.level] if node.level else []
        start = [*package, *([node.module] if node.module else [])]
        yield from (".".join((*start, alias.name)) for alias in node.names)


# ---- judging


def circles(found: Sequence[Import]) -> list[str]:
    """The shortest way from a module back to itself, once for all modules on it."""
    below: dict[str, dict[str, str]] = defaultdict(dict)
    for importer, imported, place in found:
        below[importer].setdefault(imported, place)
    ways = {}
    for module in sorted(below):
        reached: dict[str, list[str]] = {module: []}
        queue = [module]
        for at in queue:
            for imported, place in below[at].items():
                if imported == module:
                    way = [*reached[at], f"{place} imports {imported}"]
                    ways.setdefault(frozenset(way), "\n  ".join(["in a circle:", *way]))
                elif imported not in reached:
                    reached[imported] = [*reached[at], f"{place} imports {imported}"]
                    queue.append(imported)
    return list(ways.values())


def upward(found: Sequence[Import]) -> list[str]:
    """Imports from a layer above, or from a neighbour."""
    wrong = {}
    for importer, imported, place in found:
        high, low = _layer(importer), _layer(imported)
        if high and low and high[0] == low[0] and high[1] != low[1]:
            wrong[f"{place} imports {imported}, a neighbour of {importer}"] = None
        elif not (high and low) or high[0] < low[0]:
            wrong[f"{place} imports {imported}, which is not below {importer}"] = None
    return list(wrong)


def _layer(module: str) -> tuple[int, str] | None:
    """Find a module's layer and the name that puts it there; None if the table has no name for it."""
    around = module
    while around not in HEIGHTS:
        around = around.rpartition(".")[0]
        if not around:
            return None
    # ``fastcss`` is the package itself: what stands in none of its rooms has no layer.
    return None if around == "fastcss" != module else (HEIGHTS[around], around)


# ---- the house


@pytest.fixture(scope="module")
def house() -> list[Import]:
    return imports(ROOT)


def test_no_circle(house):
    assert len(house) > 1000
    assert not circles(house), "\n".join(circles(house))


def test_no_arrow_goes_upward(house):
    assert not upward(house), "\n".join(upward(house))


def test_every_module_has_a_layer_and_every_name_there_a_module():
    layers = {name: _layer(name) for name in modules(ROOT)}
    without = [name for name, layer in layers.items() if layer is None]
    assert not without, f"in no layer of LAYERS: {', '.join(without)}"
    assert HEIGHTS.keys() == {name for _, name in layers.values()}


def test_nothing_else_imports_by_a_name_made_at_run_time():
    found = set()
    for name, path in modules(ROOT).items():
        if not name.startswith("tests."):
            names = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(ast.parse(path.read_text()))}
            if names & {"import_module", "__import__"}:
                found.add(path.relative_to(ROOT).as_posix())
    assert found == IMPORT_BY_NAME


def test_no_public_name_shadows_a_module():
    """``import fastcss.fuse`` would put the module in the place of a function of that name, or the other way round."""
    there, public = modules(ROOT), 0
    for name, path in there.items():
        if name.startswith("fastcss") and "__all__" in path.read_text(encoding="utf-8"):
            package = importlib.import_module(name)
            public += len(package.__all__)
            for own in package.__all__:
                is_module = isinstance(getattr(package, own), ModuleType)
                assert is_module or f"{name}.{own}" not in there, f"{name}.{own} is a module and something else"
    assert public > 50


# ---- what they would see


def written(root: Path, files: dict[str, str]) -> list[Import]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return imports(root)


@pytest.mark.parametrize(
    "back",
    [
        "import fastcss.models.b",
        "from . import b",
        "from .b import x",
        "from ..models.b import x",
        "def f():\n    from .b import x",
        "if TYPE_CHECKING:\n    from .b import X",
    ],
)
def test_a_circle_is_seen(tmp_path, back):
    found = written(tmp_path, {"fastcss/models/a.py": back, "fastcss/models/b.py": "\nfrom .c import y",
                               "fastcss/models/c.py": "from .a import z"})  # fmt: skip
    (circle,) = circles(found)
    assert "fastcss/models/b.py:2 imports fastcss.models.c\n  fastcss/models/c.py:1 imports fastcss.models.a" in circle
    assert not upward(found)


def test_a_circle_of_a_package_and_of_tests_is_seen(tmp_path):
    files = {"fastcss/nn/__init__.py": "from .a import A", "fastcss/nn/a.py": "from . import A"}
    files |= {"tests/ops/one.py": "import two", "tests/two.py": "from one import x"}
    assert len(circles(written(tmp_path, files))) == 2


@pytest.mark.parametrize(
    ("path", "line", "wrong"),
    [
        ("fastcss/_ops/a.py", "from ..composed.a import a", None),
        ("fastcss/composed/a.py", "from .._ops.a import a", "fastcss/composed/a.py:1 imports fastcss._ops.a"),
        ("fastcss/composed/a.py", "from ..reference.a import a", "fastcss.reference.a, a neighbour of"),
        ("fastcss/reference/a.py", "def f():\n    from ..kernels import a", "fastcss.kernels.a, a neighbour of"),
        ("kernels/a.py", "from ..composed.a import a", "kernels/a.py:1 imports fastcss.composed.a, a neighbour of"),
        ("fastcss/models/a.py", "from ..commands.a import a", "fastcss.commands.a, which is not below"),
        ("fastcss/models/a.py", "from .. import a", "fastcss, which is not below fastcss.models.a"),
        ("fastcss/_new.py", "from ._ops.a import a", "fastcss._ops.a, which is not below fastcss._new"),
        ("fastcss/nn/a.py", "import benchmarks.a", "benchmarks.a, which is not below fastcss.nn.a"),
        ("benchmarks/a.py", "from tests.a import a", "tests.a, which is not below benchmarks.a"),
        ("benchmarks/a.py", "from fastcss._ops.a import a", None),
    ],
)
def test_an_arrow_upward_is_seen(tmp_path, path, line, wrong):
    rooms = ("reference", "composed", "_ops", "commands")
    files = {f"fastcss/{room}/a.py": "a = 0" for room in rooms} | {"fastcss/__init__.py": "a = 0"}
    files |= {"kernels/a.py": "a = 0", "benchmarks/a.py": "a = 0", "tests/a.py": "a = 0"}
    found = upward(written(tmp_path, files | {path: line}))
    assert (len(found) == 1 and wrong in found[0]) if wrong else not found
