"""Makes a runner's call where torch traces it: for ``torch.export``, and for ``torch.compile`` with fullgraph=True.

Within a trace there are stand-ins in the places of the model's parameters. So the trace builds a runner of its own, of
the model as it then is, and runs its adapters in turn: the graph reads the parameters themselves, which keep their
names, take other values, and get gradients. All else of the model is in the graph as it was then. A compiled graph
therefore begins with an op that compares the model with what it was, and raises where it differs.

``torch.compile`` without fullgraph=True leaves the runner's call out of its graphs: it then follows the model.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .._dispatch.private_apis import is_one_graph, modules_themselves, traced_as_one
from .model_copy import ModelCopy
from .read_adapters import Adapters

LIBRARY = torch.library.Library("fastcss_one_pass", "DEF")
LIBRARY.define("compare(Tensor(a!) compared, int place) -> ()")
_places = itertools.count()
#: The runners that can be compiled, by their places; a graph can hold a number, but no runner.
RUNNERS: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
#: What the compiled graphs of living runners were made of, by its place.
_compiled: weakref.WeakValueDictionary[int, Compiled] = weakref.WeakValueDictionary()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Holds what of a runner's model is in a compiled graph as it was."""

    runner: weakref.ref[nn.Module]
    copy: weakref.ref[ModelCopy]
    stamp: tuple

    def is_current(self) -> bool:
        runner, copy = self.runner(), self.copy()
        if runner is None or copy is None or runner._model_copy is not copy:
            return False
        return copy.is_current() and copy.stamp() == self.stamp


def place_of(runner: nn.Module) -> int:
    """Return a number for ``runner``, by which a trace finds it."""
    place = next(_places)
    RUNNERS[place] = runner
    return place


def call_traced(runner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Make the call ``runner(*args, **kwargs)`` within a trace. Dynamo, if it is the one that traces, reads this."""
    if not torch.compiler.is_dynamo_compiling():
        return _by_a_runner_of_the_trace(runner, args, kwargs, [])
    if not torch.compiler.is_exporting() and not is_one_graph():
        return torch.compiler.disable(runner.forward)(*args, **kwargs)
    # The last arguments are there to be compared: another value of them is compiled anew.
    place = _enter(runner._place, kwargs["route"] is not None, runner._renewed, runner.model.training)
    torch.ops.fastcss_one_pass.compare(runner._compared, place)
    given = {name: value for name, value in kwargs.items() if value is not None}
    return _entry(runner, args, given, [name for name, value in kwargs.items() if value is None])


def _by_a_runner_of_the_trace(runner: nn.Module, args: tuple, kwargs: dict[str, Any], nones: list[str]) -> Any:
    """Make the call; ``nones`` are keyword arguments that are None, which torch does not pass by themselves."""
    kwargs = kwargs | dict.fromkeys(nones)
    if not torch.compiler.is_compiling():  # torch.compile(backend="eager") keeps the call as it is
        return runner(*args, **kwargs)
    _check_traceable(runner, kwargs.get("route") is not None)
    with modules_themselves():
        runner = RUNNERS[runner._place]
        if isinstance(runner._lineup.folders, Adapters | None):  # PEFT cannot read folders into stand-ins
            runner = runner._made_of(runner.model, runner._lineup, *runner._options)
        return runner.called_in_trace(args, kwargs)


def _check_traceable(runner: nn.Module, is_routed: bool) -> None:
    if is_routed:
        raise RuntimeError(
            "one_pass: a call with route reads which adapters it is for, so torch.export and torch.compile with "
            "fullgraph=True cannot trace it; trace a call with adapters=[…], or compile without fullgraph=True"
        )
    if runner._asked == "vmap":  # in a trace it would hold the batch to the size of the example
        raise RuntimeError(
            "one_pass: engine 'vmap' cannot be exported, nor compiled with fullgraph=True; engine='replay' or 'auto' "
            "can"
        )


_entry = _by_a_runner_of_the_trace


def _enter(place: int, is_routed: bool, *_: object) -> int:
    """Prepare torch to take the call as one op of its graph; return the place of what it is compared with."""
    global _entry
    if _entry is _by_a_runner_of_the_trace:
        _entry = traced_as_one(_by_a_runner_of_the_trace)
    runner = RUNNERS[place]
    _check_traceable(runner, is_routed)
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "one_pass: torch.export cannot trace a runner with strict=True; strict=False can, its default"
        )
    if not isinstance(runner._lineup.folders, Adapters | None):
        raise RuntimeError(
            "one_pass: adapters that PEFT has read from folders cannot be compiled with fullgraph=True; load them by "
            "PEFT, and give one_pass that model, or compile without fullgraph=True"
        )
    runner._follow(in_trace=False)
    place, copy = next(_places), runner._model_copy
    _compiled[place] = compiled = Compiled(weakref.ref(runner), weakref.ref(copy), copy.stamp())
    runner._compiled.append(compiled)
    return place


# This does what torch.compiler.assume_constant_result does, without its import of the whole compiler.
_enter._dynamo_marked_constant = True


def _compare(compared: Tensor, place: int) -> None:
    compiled = _compiled.get(place)
    if compiled is not None and not compiled.is_current():
        raise RuntimeError(
            "one_pass: the model has changed since the runner was compiled (an attribute, a hook, a module, a scale, a "
            "parameter in another's place, the mode of a module); runner.refresh() lets the next call compile it anew, "
            "and torch.compile without fullgraph=True follows such changes"
        )


LIBRARY.impl("compare", _compare, "CompositeExplicitAutograd")
torch.library.register_fake("fastcss_one_pass::compare", lambda compared, place: None, lib=LIBRARY)
