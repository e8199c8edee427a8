"""Decides which cases of a test are made: none that could only be skipped. A table after the tests says what is out.

Implementations that this machine lacks are in no list of a test's parameters (``runnable``). Points that only some
implementation takes are marked: ``points`` says which a test has at all, ``light`` which of them go through Triton's
interpreter, some thousand times slower than a GPU.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch

INTERPRETED = "there are enough points without these for Triton's interpreter"
_device = "cpu"
_missing: dict[str, str] = {}  # implementation or peer → why this machine does not run it
_count: Counter[tuple[str, str]] = Counter()  # (what is left out, why) → cases


def configure(config: pytest.Config) -> None:
    global _device
    _device = config.getoption("--device")
    config.addinivalue_line("markers", "points(takes, why): the test has a case where takes(**parameters)")
    config.addinivalue_line("markers", "light(takes): Triton's interpreter runs the case where takes(**parameters)")


def runnable(*implementations: str) -> tuple[str, ...]:
    """Those of ``implementations`` that run on tensors of the tests' device."""
    from fastcss._dispatch import backends  # not before TRITON_INTERPRET is set

    reasons = {impl: backends.why_not(impl, torch.empty(0, device=_device)) for impl in implementations}
    _missing.update({impl: reason for impl, reason in reasons.items() if reason})
    return tuple(impl for impl, reason in reasons.items() if not reason)


def installed(peer: str, *packages: str) -> bool:
    """Tell whether a peer of the benchmarks can run: it and the ``packages`` that it needs are installed."""
    absent = [name for name in (peer, *packages) if importlib.util.find_spec(name) is None]
    if absent:
        _missing[peer] = f"not installed: {', '.join(absent)}"
    return not absent


def points(takes: Callable[..., bool], why: str) -> pytest.MarkDecorator:
    """The test has a case where ``takes`` of its parameters by name is true."""
    return pytest.mark.points(takes, why)


def light(takes: Callable[..., bool]) -> pytest.MarkDecorator:
    """The same for the cases of ``impl="triton"`` that its interpreter runs."""
    return pytest.mark.light(takes)


#: A test of what only a GPU has.
ON_A_GPU = points(lambda device: device == "cuda", "CUDA graphs need --device cuda")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left = {id(item): reason for item in items if (reason := why_left_out(item))}
    _count.update(left.values())
    config.hook.pytest_deselected(items=[item for item in items if id(item) in left])
    items[:] = [item for item in items if id(item) not in left]


def why_left_out(item: pytest.Item) -> tuple[str, str] | None:
    """(what its kind is called, the reason) of a case that is not made."""
    parameters = {"device": _device} | (item.callspec.params if hasattr(item, "callspec") else {})
    for mark in item.iter_markers("points"):
        if not _holds(mark.args[0], parameters):
            return "points", mark.args[1]
    if parameters.get("impl") == "triton" and _device == "cpu":
        for mark in item.iter_markers("light"):
            if not _holds(mark.args[0], parameters):
                return "triton", INTERPRETED
    return None


def _holds(takes: Callable[..., bool], parameters: dict) -> bool:
    return takes(**{name: parameters[name] for name in inspect.signature(takes).parameters})


def rows() -> Iterator[dict]:
    """The table after the tests."""
    for impl, reason in _missing.items():
        yield {"left out": impl, "cases": "all", "because": reason}
    for (what, why), count in _count.items():
        yield {"left out": what, "cases": count, "because": why}
