"""Tests what docs/stability.md promises of public names: options go by name, types are whole, the import is light."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator

from documents import ROOT
from torch import nn

import fastcss
from docs.make_reference import BESIDES
from fastcss import data, models

BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
#: Only commands and extras need these; a user of the ops must not wait for them.
HEAVY = ("pytest", "peft", "transformers", "sklearn", "PIL", "matplotlib", "rich", "torchmetrics", "torch._dynamo")
COST = """
import json, sys, time
began = time.process_time()
import torch
there, loaded = time.process_time(), set(sys.modules)
import fastcss
print(json.dumps([there - began, time.process_time() - there, sorted(set(sys.modules) - loaded)]))
"""


def public() -> Iterator[tuple[str, object]]:
    """Every name of docs/reference."""
    for package in (fastcss, fastcss.ops, fastcss.nn, data):
        yield from ((f"{package.__name__}.{name}", getattr(package, name)) for name in package.__all__)
    for module, names in BESIDES["models"].items():
        there = importlib.import_module(f"{models.__name__}.{module}")
        yield from ((f"{there.__name__}.{name}", getattr(there, name)) for name in names)


def functions() -> dict[str, Callable]:
    """The public functions and methods, but those whose arguments torch has laid down."""
    found = {}
    for name, value in public():
        if inspect.isfunction(value):
            found[name] = value
        if not inspect.isclass(value):
            continue
        for attribute, member in vars(value).items():
            function = getattr(member, "__func__", member)  # of a classmethod
            inherited = hasattr(nn.Module, attribute) and attribute not in ("__init__", "forward")
            is_public = attribute == "__init__" or not attribute.startswith("_")
            if is_public and inspect.isfunction(function) and not inherited:
                found[f"{name}.{attribute}"] = function
    return found


FUNCTIONS = functions()


def test_these_are_the_public_functions():
    assert {"fastcss.ops.multi_lora", "fastcss.one_pass.from_directories", "fastcss.one_pass.forward"} <= set(FUNCTIONS)
    assert len(FUNCTIONS) > 80


def test_options_go_by_name():
    """Only the first argument, those without a default, and tensors may go by position, as in torch's own functions."""
    wrong = []
    for name, function in FUNCTIONS.items():
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
        optional = [p for p in parameters[1:] if p.kind in BY_POSITION and p.default is not p.empty]
        wrong += [f"{name}: {p.name}" for p in optional if "Tensor" not in str(p.annotation)]
    assert not wrong


def test_annotations_are_whole():
    """A parameter without an annotation is Any to a user's type checker, which then finds nothing wrong with it."""
    bare = []
    for name, function in FUNCTIONS.items():
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        bare += [f"{name}: {p.name}" for p in parameters if p.annotation is p.empty]
        if signature.return_annotation is signature.empty and not name.endswith("__init__"):
            bare.append(f"{name}: what it returns")
    assert not bare


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "fastcss" / "py.typed").exists()
    assert '"py.typed"' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_importing_it_costs_little_beside_torch():
    """The import may cost 0.3 s on a CPU on which torch's takes 0.8; the least of three counts, as other load adds."""
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", COST], cwd=ROOT, check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout))
    brought = {module for *_, modules in runs for module in modules}
    assert not [name for name in HEAVY if name in brought]
    of_torch, of_fastcss = (min(run[i] for run in runs) for i in (0, 1))
    assert of_fastcss <= 0.3 * max(1, of_torch / 0.8), f"{of_fastcss:.2f} s, beside {of_torch:.2f} s of torch"
