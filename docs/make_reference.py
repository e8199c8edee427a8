"""Writes docs/reference from the signatures and docstrings of the public names: ``python docs/make_reference.py``.

The sources are read and not imported, so that a page is the same whatever is installed.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"

#: Page → the file that exports its names, and what its examples begin with.
PAGES = {
    "fastcss": ("fastcss/__init__.py", "import torch\n\nimport fastcss\nfrom fastcss import PackedLora, multi_lora"),
    "ops": ("fastcss/ops.py", "import torch\n\nfrom fastcss import PackedLora\nfrom fastcss.ops import *"),
    "nn": ("fastcss/nn/__init__.py", "import torch\n\nfrom fastcss.nn import *"),
    "models": (
        "fastcss/models/__init__.py",
        "import torch\n\nfrom fastcss.models.phrases import describe\n"
        "from fastcss.models.preprocessing import preprocess",
    ),
    "data": ("fastcss/data/__init__.py", "from fastcss.data import *"),
}
#: These names are public beside ``__all__``: those of a package whose modules are imported one by one, and results that
#: have no public name.
BESIDES = {
    "fastcss": {"_fuse/fusion": ("Fusion",)},
    "models": {
        "class_detector": ("ClassDetector", "DetectedClasses"),
        "continual": ("begin", "train", "load_run"),
        "continual_evaluation": ("Evaluation", "evaluate", "compare"),
        "continual_plan": ("Plan", "DEFAULTS"),
        "continual_watch": ("Watch",),
        "convert_sam": ("convert_sam",),
        "decouplecss": ("Segmentation", "DecoupleCSS"),
        "decouplecss_folder": ("save_base", "save_task", "load"),
        "decouplecss_training": ("Losses", "Recipe"),
        "grounding_dino": ("GroundingDinoEncoder",),
        "phrases": ("load_tokenizer", "describe", "read_phrases", "encode"),
        "preprocessing": ("Picture", "preprocess"),
        "prompt_generator": ("PromptGenerator",),
        "sam": ("Masks", "SamSegmenter"),
        "task": ("Phrases",),
    },
}
#: Ops that the first page imports from this file are described on the page of ops.
OPS = ROOT / "fastcss" / "ops.py"
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Source|Example):\s+")
Definition = ast.FunctionDef | ast.ClassDef | ast.Assign


class Entry(NamedTuple):
    """A public name and where it is defined."""

    name: str
    path: Path
    node: Definition
    lines: list[str]  # of the module


def pages() -> dict[Path, str]:
    """Every page and what it must say."""
    return {FOLDER / f"{page}.md": _page(page, *about) for page, about in PAGES.items()}


def _page(page: str, file: str, preamble: str) -> str:
    names, folder = _exported(ROOT / file), (ROOT / file).parent
    names |= {name: folder / f"{module}.py" for module, of in BESIDES.get(page, {}).items() for name in of}
    entries = [_entry(name, path) for name, path in names.items() if path != OPS]
    entries.sort(key=lambda entry: (entry.path, entry.node.lineno))
    elsewhere = sorted(name for name, path in names.items() if path == OPS)
    title = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    parts = [f"# {title}", _prose(_docstring(_parsed(ROOT / file)))]
    parts.append("Made by `python docs/make_reference.py` from the docstrings; changes belong there.")
    parts.append("\n".join(f"- [`{e.name}`](#{_anchor(e.name)}): {_first_line(e)}" for e in entries))
    if elsewhere:
        parts.append(f"From [fastcss.ops](ops.md): {', '.join(f'[`{n}`](ops.md#{_anchor(n)})' for n in elsewhere)}.")
    if any("Example:" in _docstring(entry.node) for entry in entries):
        parts += ["What the examples begin with:", _fence("python", preamble)]
    return "\n\n".join([*parts, *(part for entry in entries for part in _describe(entry))]) + "\n"


# --- finding the names -----------------------------------------------------------------------------------------------


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _exported(file: Path) -> dict[str, Path]:
    """The names of ``__all__``, each with the module that the file has it from."""
    tree, found, public = _parsed(file), {}, set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            path = file.parent / f"{node.module.replace('.', '/')}.py"
            found |= {name.name: path for name in node.names}
        elif isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            public = set(ast.literal_eval(node.value))
    return {name: path for name, path in found.items() if name in public}


def _entry(name: str, path: Path) -> Entry:
    text = re.sub(r"  # type: ignore\b.*", "", path.read_text(encoding="utf-8"))  # said to the type checker
    defined = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            alias = isinstance(node.value, ast.Name) and node.value.id in defined
            defined[node.targets[0].id] = defined[node.value.id] if alias else node
    return Entry(name, path, defined[name], text.splitlines())


# --- what is said of a name ------------------------------------------------------------------------------------------


def _describe(entry: Entry) -> Iterable[str]:
    where = entry.path.relative_to(ROOT).as_posix()
    yield f"## `{entry.name}`"
    if isinstance(entry.node, ast.Assign):
        yield _fence("python", "\n".join(entry.lines[entry.node.lineno - 1 : entry.node.end_lineno]))
        yield _prose(_comment_above(entry))
    else:
        yield _fence("python", _signature(entry))
        yield from _sections(_docstring(entry.node))
    yield f"[{where}](../../{where})"
    for method, lines in _methods(entry):
        if _is_public(method.name) and _docstring(method):
            yield f"### `{entry.name}.{method.name}`"
            yield _fence("python", _header(method, lines))
            yield from _sections(_docstring(method))


def _methods(entry: Entry) -> Iterable[tuple[ast.FunctionDef, list[str]]]:
    """Yield a class's methods, and those that it has from classes of files beside its own, with the files' lines."""
    if not isinstance(entry.node, ast.ClassDef):
        return
    yield from ((node, entry.lines) for node in entry.node.body if isinstance(node, ast.FunctionDef))
    own = {node.name for node in entry.node.body if isinstance(node, ast.FunctionDef)}
    files = {
        name.name: entry.path.with_name(f"{node.module}.py")
        for node in _parsed(entry.path).body
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        for name in node.names
    }
    for base in entry.node.bases:
        if isinstance(base, ast.Name) and files.get(base.id, entry.path) != entry.path:
            of_base = _methods(_entry(base.id, files[base.id]))
            yield from ((method, lines) for method, lines in of_base if method.name not in own)


def _signature(entry: Entry) -> str:
    """Return the signature as it is written; for a class with its fields, or with what makes an instance."""
    header = _header(entry.node, entry.lines)
    if isinstance(entry.node, ast.FunctionDef):
        return header
    inside = []
    for node in entry.node.body:
        if isinstance(node, ast.AnnAssign):
            inside.append("\n".join(entry.lines[node.lineno - 1 : node.end_lineno]))
        elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
            inside.append(textwrap.indent(_header(node, entry.lines), "    "))
    alias = [f"\n{entry.name} = {entry.node.name}"] if entry.name != entry.node.name else []
    return "\n".join([f"{header}:" if inside else header, *inside, *alias])


def _header(node: ast.FunctionDef | ast.ClassDef, lines: list[str]) -> str:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    header = textwrap.dedent("\n".join(lines[first - 1 : node.body[0].lineno - 1]))
    return re.sub(r":(\s*#.*)?\s*$", "", header)


def _is_public(method: str) -> bool:
    return method == "__call__" or not method.startswith("_")


def _comment_above(entry: Entry) -> str:
    comment, line = [], entry.node.lineno - 2
    while entry.lines[line].startswith("#:"):
        comment.insert(0, entry.lines[line][2:].strip())
        line -= 1
    return "\n".join(comment)


# --- docstrings as Markdown ------------------------------------------------------------------------------------------


def _docstring(node: ast.AST) -> str:
    return "" if isinstance(node, ast.Assign) else ast.get_docstring(node) or ""


def _first_line(entry: Entry) -> str:
    text = _comment_above(entry) if isinstance(entry.node, ast.Assign) else _docstring(entry.node)
    return _prose(" ".join(text.split("\n\n")[0].split()))


def _sections(docstring: str) -> Iterable[str]:
    for block in docstring.split("\n\n"):
        head = SECTION.match(block)
        if head is None:
            yield _prose(block)
        elif head[1] == "Example":
            yield from ("**Example**", _fence("pycon", textwrap.dedent(block.split("\n", 1)[1])))
        elif head[1] in ("Source", "Returns"):
            yield f"**{head[1]}**: {_prose(' '.join(block[head.end() :].split()))}"
        else:
            yield f"**{head[1]}**"
            yield _items(textwrap.dedent(block.split("\n", 1)[1]))


def _items(body: str) -> str:
    """``name: what it is``, with further lines indented."""
    items = (" ".join(item.split()).split(": ", 1) for item in re.split(r"\n(?=\S)", body))
    return "\n".join(f"- {', '.join(f'`{n}`' for n in names.split(', '))}: {_prose(what)}" for names, what in items)


def _prose(text: str) -> str:
    return text.replace("``", "`")


def _fence(language: str, code: str) -> str:
    return f"```{language}\n{code.rstrip()}\n```"


def _anchor(name: str) -> str:
    """Return the anchor that GitHub makes of a heading."""
    return name.lower().replace(".", "")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
