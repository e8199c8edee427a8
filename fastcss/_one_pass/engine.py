"""Decides how a runner runs its model: the adapters side by side under vmap, or in turn."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from .force_eager import eager_parts
from .inputs_outputs import Inputs
from .leaked_values import KeepsError, where_kept
from .model_copy import ModelCopy
from .task_rules import Disagreement
from .undo import Undo, same_changes

ENGINES = ("auto", "vmap", "replay")
_OF_VMAP = ("vmap", "functorch", "atching rule", "BatchedTensor")


class Engine:
    """Runs one runner's model as ``asked``; "auto" means vmap until vmap has refused the model."""

    def __init__(self, asked: str) -> None:
        if asked not in ENGINES:
            raise ValueError(f"one_pass: engine must be one of {', '.join(ENGINES)}, got {asked!r}")
        self._asked = asked
        self._spoilt: str | None = None  # the reason why the runner's copy of the model is no longer usable
        # The following are kept apart for training and eval mode: their key is ``training``.
        self._refused: dict[bool, str] = {}  # the reason why vmap does not run the model
        self._failed: dict[bool, str] = {}  # the error of the last run under vmap, if replay then did not fail
        self._agreed: set[bool] = set()  # the modes in which several slots under vmap left the same state as in turn
        self._written: dict[bool, set[int]] = {}  # ids of the tensors that the model has written under vmap

    def name(self, training: bool) -> str:
        """Return the engine that runs the model in this mode, "vmap" or "replay"."""
        if self._asked != "auto":
            return self._asked
        return "replay" if training in self._refused else "vmap"

    @eager_parts()
    def run(
        self,
        copy: ModelCopy,
        inputs: Inputs,
        vmap: Callable[[], object] | None,
        replay: Callable[[], object],
        slots: int,
    ) -> object:
        """Return the result of ``vmap()``, or of ``replay()`` if vmap is refused.

        ``vmap`` is None if this call's inputs rule it out. ``slots`` says how many tasks or samples the two run.
        """
        if self._spoilt:
            raise RuntimeError(self._spoilt)
        copy.forget_changed_adapters()
        if torch.compiler.is_compiling():
            return replay()
        in_turn = self._runs_in_turn(copy, vmap)
        with copy.lock:
            try:
                result = replay() if in_turn else self._try(copy, inputs, vmap, replay, slots)
            except BaseException:
                copy.is_spoilt = copy.runs_pefts_layers
                raise
            copy.give_back()
        return result

    def _runs_in_turn(self, copy: ModelCopy, vmap: Callable[[], object] | None) -> bool:
        must_replay = copy.must_replay()
        if self._asked == "vmap" and (must_replay or vmap is None):
            reason = must_replay or "the inputs of the samples differ in more than values (in shape, say)"
            raise RuntimeError(f"one_pass: engine 'vmap' cannot run the model: {reason}")
        if must_replay and self.name(copy.training) == "vmap":
            self._refuse(copy, must_replay)
        return vmap is None or self.name(copy.training) == "replay"

    def _try(
        self,
        copy: ModelCopy,
        inputs: Inputs,
        vmap: Callable[[], object],
        replay: Callable[[], object],
        slots: int,
    ) -> object:
        training = copy.training
        known = self._written.get(training) if slots == 1 or training in self._agreed else None
        with copy.undoing(inputs, known) as undo:
            try:
                result = vmap()
            except BaseException as error:
                undo()
                copy.put_parameters_back()
                own = not isinstance(error, RuntimeError)  # vmap's errors are RuntimeErrors, also NotImplementedError
                if own or self._asked == "vmap" or isinstance(error, torch.OutOfMemoryError):
                    raise
                failure = error
                self._check_clean(copy, error)
            else:
                self._failed.pop(training, None)
                written, known = {id(t) for t in undo.written()}, self._written.get(training, set())
                if slots > 1 and (training not in self._agreed or not written <= known):
                    result = self._if_writes_agree(copy, undo, result, replay)
                    self._agreed.add(training)
                self._written[training] = known | written
                return result
        result = replay()  # if this fails too, vmap was not to blame: the error is the model's own
        reason = _reason(failure)
        # An error that is not vmap's own may not come again; the next call tells.
        if isinstance(failure, (Disagreement, KeepsError)) or any(word in str(failure) for word in _OF_VMAP):
            self._refuse(copy, reason)
        elif training in self._failed:
            self._refuse(copy, f"{reason} (twice under vmap, and not in turn)")
        else:
            self._failed[training] = reason
        return result

    def _if_writes_agree(self, copy: ModelCopy, undo: Undo, result: object, replay: Callable[[], object]) -> object:
        """Return ``result`` of a run under vmap, or that of runs in turn if these leave another state in the model.

        Under vmap the model's code runs once. That fills a cache correctly, but counts one call instead of many.
        """
        changes = undo.changes()
        if not changes:
            return result
        undo()
        in_turn = replay()
        if same_changes(changes, undo.changes()):
            return result
        reason = "what it writes (a buffer, an attribute) is another value after a run for each adapter"
        if self._asked == "vmap":
            undo()
            raise RuntimeError(f"one_pass: engine 'vmap' cannot run the model: {reason}")
        self._refuse(copy, reason)
        return in_turn

    def _check_clean(self, copy: ModelCopy, error: Exception) -> None:
        """Raise if values of the failed run are still in the model: no later run could tell them from its own."""
        if isinstance(error, KeepsError) and where_kept(copy.model, error.tensors):
            self._spoilt = (
                f"one_pass: {type(copy.model).__name__} cannot run under vmap: {error}, where nothing can take it "
                "back; build another runner with engine='replay'"
            )
            raise RuntimeError(self._spoilt) from None

    def _refuse(self, copy: ModelCopy, reason: str) -> None:
        self._refused[copy.training] = reason
        warnings.warn(
            f"one_pass: {type(copy.model).__name__} does not run under vmap, so its adapters run in turn "
            f"(engine 'replay'): {reason}",
            stacklevel=9,
        )


def _reason(error: BaseException) -> str:
    """Return the line of the message that says what vmap objects to."""
    lines = str(error).split("\n")
    return next((line for line in lines if any(word in line for word in _OF_VMAP)), lines[0])
