"""Runs a model with thousands of saved adapters, of which a byte budget's worth is in memory at a time."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .call_arguments import places
from .lineup import Lineup
from .pool_arena import Arena
from .pool_files import POOL, AdapterFile, Reader
from .pooled_layers import Paged
from .read_adapters import Adapters, kind_of
from .runner import OnePass


class AdapterPool(nn.Module):
    """Runs each sample of a batch through its own adapter, out of any number of adapter folders on disk.

    A call reads the adapters that its ``route`` names and that are not in memory; for room it evicts those that were
    used longest ago. The adapters in memory lie in one allocation (the arena), from which linear layers read them where
    they lie; convolutions and embeddings copy those of the call. Each answer equals that of PEFT with this adapter
    alone, and its bits do not depend on what was in memory, on the other samples' adapters, or on the dtype the pool
    was read in: adapters run in float32, as PEFT loads them. Several threads may call a pool; a call whose adapters do
    not fit beside those of the calls under way waits for these.

    Folders are read at the beginning but for their weights, which are mapped and copied once each time that they are
    paged in. Every call compares time, size and inode of its adapters' files with those at that reading: a folder that
    has vanished or changed is refused by name, even if its weights are still in memory, and the other adapters go on.
    ``refresh`` reads a changed folder.

    The adapters are plain LoRA on Linear, Conv1D, Conv2d and Embedding; ranks, scales, dtypes and layers may differ.
    A pool is for inference: the model is in eval mode, and adapters get no gradients.

    Args:
        model: the base model of the adapters, without adapters.
        folders: PEFT adapter folders (``adapter_config.json`` and ``adapter_model.safetensors``).
        budget: bytes that the weights of the adapters in memory take at most, all layers together, in float32. The
            arena is allocated at once, on the model's device.
        names: the adapters' names, by default the folders'.
        engine, fuse: as for ``one_pass``.

    Attributes:
        model: the model, as it was given.
        adapters: the adapters' names.
        budget: as given.

    Raises:
        FileNotFoundError, TypeError, ValueError: a folder is incomplete, is of another kind or belongs to another
            model, or the budget is less than one adapter takes; the message names it.

    Source: the unified paging of S-LoRA (Sheng et al. 2023).

    Example:
        >>> folders = ["runs/task0", "runs/task1", "runs/task2"]
        >>> pool = fastcss.AdapterPool(model, folders, budget=2 * 2**30)
        >>> pool(pixel_values=batch, route=["task1", None, "task0"]).last_hidden_state.shape  # [B, N, C]
        >>> pool.prefetch(["task2"])  # reads what the next batch wants, in a thread beside this one
    """

    def __init__(
        self,
        model: nn.Module,
        folders: Sequence[str | Path],
        *,
        budget: int,
        names: Sequence[str] | None = None,
        engine: str = "auto",
        fuse: bool | None = None,
    ) -> None:
        super().__init__()
        paths = [Path(folder) for folder in folders]
        named = [path.name for path in paths] if names is None else list(names)
        if not paths or len(named) != len(paths) or len(set(named)) != len(named):
            twice = next((name for name in named if named.count(name) > 1), None)
            raise ValueError(
                f"{POOL}: wants folders, and a different name for each; got {len(paths)} folders and {len(named)} names"
                + (f", {twice!r} twice" if twice else "")
            )
        if isinstance(budget, bool) or not isinstance(budget, int) or budget <= 0:
            raise ValueError(f"{POOL}: budget must be a whole number of bytes above 0, got {budget!r}")
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") or hasattr(module, "lora_embedding_A"):
                raise ValueError(f"{POOL}: layer {name!r} has adapters already; it wants the bare model")
        self.model, self.budget, self.adapters = model, budget, tuple(named)
        self.training = model.training
        self._options = {"engine": engine, "fuse": fuse}
        self._place = {name: t for t, name in enumerate(named)}
        reader = Reader(model)
        self._build([reader.read(name, path) for name, path in zip(named, paths, strict=True)])
        self._ahead: concurrent.futures.ThreadPoolExecutor | None = None

    def _build(self, files: list[AdapterFile]) -> None:
        given = PooledAdapters(self.adapters, self.model, files, self.budget)
        runner = OnePass._made_of(
            self.model, Lineup.of_folders(given), self._options["engine"], None, self._options["fuse"], 0
        )
        # Not registered: parameters() and state_dict() are the model's alone. Set at once, for calls of other threads.
        self.__dict__["_built"] = given, runner

    @property
    def _state(self) -> tuple[PooledAdapters, OnePass]:
        return self.__dict__["_built"]

    def forward(
        self, *args: Any, route: Sequence[str | None], per_sample: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """Call the model with an adapter for each sample.

        Args:
            *args, **kwargs: what the model takes.
            route: for each of the B samples of the batch, the name of its adapter, or None for the bare model.
            per_sample: as for ``one_pass``: the names of inputs that hold one entry per sample; None guesses them.

        Returns:
            The model's own output; a number (a loss, say) becomes one per sample, ``[B]``.

        Raises:
            KeyError: an unknown name; the message has the ones most like it.
            FileNotFoundError, RuntimeError: an adapter's folder is gone or has changed, or the model is in training
                mode.
            ValueError: the adapters of this call do not fit the budget together; the message says what they take.
        """
        if isinstance(route, str) or not isinstance(route, Sequence):
            raise TypeError(f"{POOL}: route must be a list of adapters' names, or None, got {type(route).__name__}")
        tasks = places(route, self._place, POOL)
        if self.model.training:
            raise RuntimeError(f"{POOL}: the model is in training mode, and a pool is for inference; call model.eval()")
        if self._state[0].has_moved():
            self._build(self._state[0].arena.files)
        given, runner = self._state
        arena = given.arena
        with arena.holding(sorted({t for t in tasks if t >= 0})):
            index = torch.tensor(tasks, dtype=torch.int64, device=arena.device)
            return runner(*args, route=index, per_sample=per_sample, **kwargs)

    def prefetch(self, names: Sequence[str]) -> None:
        """Begin to read adapters that a coming call will want, in a thread beside this one, and return at once.

        It reads in the order of ``names`` while there is room, for which it evicts others than these. What goes wrong
        with a folder is said by the call that wants it.

        Raises:
            KeyError: an unknown name.
        """
        wanted = [t for t in dict.fromkeys(places(list(names), self._place, POOL)) if t >= 0]
        if self._ahead is None:
            self._ahead = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="fastcss-prefetch")
        self._ahead.submit(self._state[0].arena.prefetch, wanted)

    def refresh(self, name: str) -> None:
        """Read an adapter's folder anew, because it has changed.

        If it has other layers or ranks than before, the whole pool begins anew with nothing in memory.

        Raises:
            KeyError: an unknown name.
            FileNotFoundError, TypeError, ValueError: as in the beginning; the pool is then as it was.
        """
        (t,) = places([name], self._place, POOL)
        given, _ = self._state
        file = Reader(self.model).read(name, given.arena.files[t].folder)
        if alike(file, given.arena.files[t]):
            given.arena.replace(t, file)
        else:
            self._build([*given.arena.files[:t], file, *given.arena.files[t + 1 :]])

    @property
    def resident(self) -> tuple[str, ...]:
        """Return the adapters in memory, the least recently used first."""
        return tuple(self.adapters[t] for t in self._state[0].arena.resident)

    @property
    def loads(self) -> int:
        """Return how many times an adapter has been read from its folder."""
        return self._state[0].arena.loads

    @property
    def engine(self) -> str:
        """Return the engine that runs the model, "vmap" or "replay"."""
        return self._state[1].engine

    def __reduce_ex__(self, protocol: object) -> tuple:
        given, _ = self._state
        folders = [file.folder for file in given.arena.files]
        return _made_again, (self.model, folders, self.budget, self.adapters, self._options)

    def __repr__(self) -> str:
        return f"AdapterPool({type(self.model).__name__}, {len(self.adapters)} adapters, budget={self.budget:,})"


def _made_again(
    model: nn.Module, folders: list[Path], budget: int, names: tuple[str, ...], options: dict
) -> AdapterPool:
    return AdapterPool(model, folders, budget=budget, names=names, **options)


def alike(one: AdapterFile, other: AdapterFile) -> bool:
    """Tell whether two folders have the same layers, ranks and scales in the same order."""
    said = [[(piece.layer, piece.a.shape, piece.b.shape, piece.scale) for piece in f.pieces] for f in (one, other)]
    return said[0] == said[1]


class PooledAdapters:
    """Holds the adapters of a pool as a runner takes them, and the arena in which they lie."""

    def __init__(self, names: tuple[str, ...], model: nn.Module, files: list[AdapterFile], budget: int) -> None:
        self.names, self.model, self._files, self._budget = names, model, files, budget
        modules, layers = (
            dict(model.named_modules()),
            dict.fromkeys(piece.layer for file in files for piece in file.pieces),
        )
        self._kinds = {layer: self._kind(modules[layer]) for layer in layers}
        self._widths = {layer: sum(shape) for layer, (kind, shape) in self._kinds.items() if kind == "linear"}
        self._first = next(iter(self._kinds))
        self.arena = Arena(files, self._widths, budget, self._device)

    @staticmethod
    def _kind(base: Any) -> tuple[str | None, tuple[int, ...]]:
        return kind_of(base), tuple(base.weight.shape)

    @property
    def _device(self) -> torch.device:
        layer: Any = self.model.get_submodule(self._first)
        return layer.weight.device

    def has_moved(self) -> bool:
        """Tell whether the model is on another device than the arena."""
        return self._device != self.arena.device

    def built_on(self, model: nn.Module) -> tuple[nn.Module, Adapters, list]:
        """Return the model and its adapters, which still fit it."""
        modules = dict(model.named_modules())
        for layer, kind in self._kinds.items():
            if layer not in modules or self._kind(modules[layer]) != kind:
                raise ValueError(f"{POOL}: layer {layer!r} is another now, which the adapters do not fit")
        layers: dict[str, Any] = {layer: Paged(self.arena, layer) for layer in self._kinds}
        return model, Adapters(self.names, layers), []
