"""Lets adapters come to a runner and go while it runs, at the cost of the layers that they are on."""

from __future__ import annotations

import difflib
import math
from pathlib import Path

from .adapter_sets import joined, rescaled, selected
from .cuda_graphs import Captures
from .engine import Engine
from .lineup import Lineup
from .named_model import NamedModel
from .read_adapters import Adapters, read_adapter
from .read_by_peft import ByPeft
from .read_folders import read_directories
from .runner_module import RunnerModule

NOTHING: tuple[tuple, tuple] = (), ()  # what has come to the model and gone


class ComingAdapters(RunnerModule):
    """Holds the part of a runner that changes which adapters it runs.

    Each of these methods waits for the calls that are under way in other threads, and leaves the runner as it was if it
    raises. Captured graphs are forgotten. The user's model is left as it is.
    """

    def add(self, adapter: str | Path, *, name: str | None = None) -> None:
        """Run one more adapter, the last of the task axis from now on.

        It costs what the adapter's layers cost, a small part of building a runner, if it is plain LoRA and covers no
        layer that was not adapted yet; otherwise the runner is built anew. Outputs are those of a runner that was
        built with the adapter.

        Args:
            adapter: the name of an adapter that the model has by now (``model.load_adapter``, ``model.add_adapter``),
                or the folder of one, as ``from_directories`` takes it. The model is left without an adapter that comes
                from a folder, and only plain LoRA can come so to a model with adapters of its own.
            name: the adapter's name if it comes from a folder, by default the folder's.

        Raises:
            FileNotFoundError, TypeError, ValueError: an unknown or known name, or a folder that ``from_directories``
                would refuse; the runner is as it was.
            RuntimeError: this thread is within a call of the runner.
        """
        with self._calls.change():
            if isinstance(adapter, str) and self._is_of_model(adapter):
                if name not in (None, adapter):
                    raise ValueError(f"one_pass.add: the model's adapter {adapter!r} keeps its name, got name={name!r}")
                self._check_new(adapter)
                found, one = self._read_of_model(adapter)
                self._run(self._lineup.with_own(adapter), found, one)
                return
            if not isinstance(adapter, str | Path):
                raise TypeError(
                    f"one_pass.add: adapter must be a name or a folder, a str or Path, got {type(adapter).__name__}"
                )
            folder = Path(adapter)
            name = folder.name if name is None else name
            self._check_new(name)
            self._check_is_free(name, folder)
            self._follow()
            one = read_directories(self._bare_model(), [folder], [name], self._why_by_peft())
            self._check_can_come(folder, name, one)
            self._run(self._lineup.with_read(one), NOTHING, one)

    def remove(self, name: str) -> None:
        """Run the adapter ``name`` no longer; those behind it move up on the task axis.

        An adapter of the model stays in the model, and may be deleted there, before or afterwards; ``add`` takes it
        back.

        Raises:
            KeyError: the runner has no such adapter.
            ValueError: it is the last one.
            RuntimeError: this thread is within a call of the runner.
        """
        with self._calls.change():
            self._check_known("remove", name)
            if len(self.adapters) == 1:
                raise ValueError(f"one_pass.remove: {name!r} is the runner's last adapter; it wants at least one")
            self._run(self._lineup.without(name), self._model_copy.came_and_went())

    def swap(self, name: str, folder: str | Path) -> None:
        """Put the adapter of ``folder`` in the place and under the name of one that was read from a folder.

        An adapter of the model is swapped there, by ``peft.utils.hotswap.hotswap_adapter``; the runner follows.

        Raises:
            KeyError: the runner has no such adapter.
            FileNotFoundError, TypeError, ValueError: an adapter of the model, or a folder that ``from_directories``
                would refuse; the runner is as it was.
            RuntimeError: this thread is within a call of the runner.
        """
        with self._calls.change():
            self._check_known("swap", name)
            if name not in self._lineup.of_folder:
                raise ValueError(
                    f"one_pass.swap: {name!r} is an adapter of the model; swap it there (peft.utils.hotswap."
                    "hotswap_adapter), and the runner follows"
                )
            self._follow()
            one = read_directories(self._bare_model(), [Path(folder)], [name], self._why_by_peft())
            self._check_can_come(Path(folder), name, one)
            self._run(self._lineup.with_read_in_place(one), NOTHING, one)

    def set_scale(self, name: str, factor: float) -> None:
        """Run the adapter ``name`` at ``factor`` times the scale that it has in the model or in its folder.

        This is what ``set_scale`` of PEFT's LoRA layers does, which the runner also follows: 1 is the adapter as it was
        trained, 0 the model without it (except for modules saved whole). The factor goes with the name, through
        ``swap`` and ``refresh``, until the adapter is removed; a change after which PEFT's own layer would run is
        refused.

        Raises:
            KeyError: the runner has no such adapter.
            TypeError, ValueError: ``factor`` is no finite number, or the adapter has no scale here.
            RuntimeError: this thread is within a call of the runner.
        """
        with self._calls.change():
            self._check_known("set_scale", name)
            if isinstance(factor, bool) or not isinstance(factor, (int, float)):
                raise TypeError(f"one_pass.set_scale: factor must be a number, got {type(factor).__name__}")
            if not math.isfinite(factor):
                raise ValueError(f"one_pass.set_scale: factor must be finite, got {factor}")
            if self._model_copy.by_peft:
                raise TypeError(
                    f"one_pass.set_scale: {self._model_copy.by_peft}, which PEFT's own layer runs; set the scale in "
                    "the model's layers"
                )
            if isinstance(self._lineup.folders, ByPeft):
                found, one = None, None  # PEFT reads its folders anew
            elif name in self._lineup.of_folder:
                found, one = NOTHING, selected(self._lineup.folders, [name])
            else:
                found, one = self._read_of_model(name)
            if all(own[self.adapters.index(name)] is None for own in self._adapters.layers.values()):
                raise ValueError(f"one_pass.set_scale: {name!r} has no LoRA, and what is saved whole has no scale")
            self._run(self._lineup.with_scale(name, float(factor)), found, one)

    # ----------------------------------------------------------------------------------------------- what is run then

    def _run(self, lineup: Lineup, found: tuple | None, one: Adapters | ByPeft | None = None) -> None:
        """Run ``lineup``, in which ``one`` is new, in the copy that there is if this can run it, otherwise in another.

        ``found`` says which adapters PEFT's layers have got and lost, None that more has changed there, or that ``one``
        could not be read.
        """
        known = {*lineup.left_out, *lineup.names}
        is_all = found is not None and known.issuperset((*found[0], *found[1])) and not isinstance(one, ByPeft)
        adapters = self._put_in(one, lineup) if is_all else None
        if adapters is None or not self._model_copy.can_take(adapters):
            self._take(*lineup.read(self.model))
        else:
            self._model_copy.saw(*found)
            self._model_copy.take(adapters)
            self._lineup, self._adapters, self.adapters = lineup, adapters, adapters.names
            self._engine = Engine(self._asked)
            self._passes.forget_adapters()
        self._captures, self._has_warned = Captures(), False
        self._renewed += 1

    def _put_in(self, one: Adapters | None, lineup: Lineup) -> Adapters:
        """Return the adapters of the present copy that are in ``lineup``, and ``one``."""
        new = () if one is None else one.names
        others = [name for name in self._adapters.names if name in lineup.names and name not in new]
        adapters = selected(self._adapters, others, keep=True)
        if one is not None:
            adapters = joined(adapters, rescaled(one, lineup.factors))
        return selected(adapters, lineup.names, keep=lineup.of_model)

    def _read_of_model(self, name: str) -> tuple[tuple | None, Adapters | None]:
        """Return what has come to the model and gone, and the new adapter ``name``; or None if that is not all."""
        bias = getattr(getattr(self.model, "peft_config", {}).get(name), "bias", "none")
        found = None if bias != "none" else self._model_copy.came_and_went()
        one = None if found is None else read_adapter(self._model_copy.lora_layers, name)
        return (None, None) if one is None else (found, one)

    def _bare_model(self) -> NamedModel:
        """Return the bare model, for which folders are read."""
        if self._named is None or self._named[0] is not self._model_copy:
            named = NamedModel.within(self._model_copy.original) if self._lineup.of_model else NamedModel(self.model)
            self._named = self._model_copy, named
        return self._named[1]

    def _why_by_peft(self) -> str | None:
        """Return why PEFT has to read the folder of one more adapter, if it has read those before."""
        held = self._lineup.folders
        return f"{held.folders[0]} is there, which PEFT has read" if isinstance(held, ByPeft) else None

    # ------------------------------------------------------------------------------------------------ what is refused

    def _is_of_model(self, name: str) -> bool:
        """Tell whether the model has an adapter ``name`` by now."""
        if not self._lineup.of_model:
            return False
        layers = self._model_copy.lora_layers.values()
        return name in getattr(self.model, "peft_config", ()) or any(name in layer.scaling for layer in layers)

    def _check_new(self, name: str) -> None:
        if name in self.adapters:
            raise ValueError(
                f"one_pass.add: the runner has an adapter {name!r}; swap puts another in its place, and name= gives "
                "that of a folder another name"
            )

    def _check_known(self, what: str, name: str) -> None:
        if name not in self.adapters:
            near = difflib.get_close_matches(str(name), self.adapters, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise KeyError(f"one_pass.{what}: no adapter {name!r}{hint}; there are {', '.join(self.adapters)}")

    def _check_is_free(self, name: str, folder: Path) -> None:
        """Refuse a folder's adapter with the name of one of the model, and what is no folder."""
        if self._is_of_model(name):
            raise ValueError(f"one_pass.add: the model has an adapter {name!r}; name= gives the folder's another name")
        if self._lineup.of_model and not folder.is_dir():
            others = [name for name in getattr(self.model, "peft_config", ()) if name not in self.adapters]
            raise FileNotFoundError(
                f"one_pass.add: {str(folder)!r} is no folder, and no adapter of the model; those of the model that the "
                f"runner does not run are: {', '.join(others) or 'none'}"
            )

    def _check_can_come(self, folder: Path, name: str, one: Adapters | ByPeft) -> None:
        by_peft = isinstance(one, ByPeft)
        wrapped = tuple(f"{name}." for name in self._bare_model().wrapped)
        other = by_peft or one.saved or any(f"{layer}.".startswith(wrapped) for layer in one.layers)
        if self._lineup.of_model and (other or self._model_copy.by_peft):
            raise TypeError(
                f"one_pass: {folder} cannot come beside the adapters that the model has: only plain LoRA can, and only "
                f"beside plain LoRA; model.load_adapter({str(folder)!r}, {name!r}) and runner.add({name!r}) run it"
            )
        if by_peft and isinstance(self._lineup.folders, Adapters) and len(self.adapters) > 1:
            raise TypeError(
                f"one_pass: {folder} is an adapter that only PEFT reads, and the others were read without it; "
                "one_pass.from_directories takes all of their folders at once"
            )
