"""Cuts the inputs of a batch into samples that each go through their own adapter, and joins the outputs again.

The caller says which inputs hold one entry per sample, or they are guessed by their lengths. A guess is checked: the
bare model has to give the same for a sample alone and for it in its batch. The same two runs show along which axis each
output has its batch.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .._dispatch.private_apis import pytree
from .inputs_outputs import Inputs, Output

# Tolerances relative to an output's largest value: most elements of a sample alone and in its batch differ by rounding.
SAME = {torch.float64: 1e-6, torch.float32: 1e-3}
SAME_HALF = 5e-2


class Samples:
    """Holds the inputs of a batch of ``size`` samples.

    Args:
        inputs: the inputs of the whole batch.
        names: names of the model's arguments that hold one entry per sample; None guesses them.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, size: int, names: Sequence[str] | None) -> None:
        self.inputs, self.size, self.guessed = inputs, size, names is None
        arguments = [*zip(_positional(model, len(inputs.args)), inputs.args, strict=True), *inputs.kwargs.items()]
        if names is None:
            self.names = [name for name, value in arguments if _is_cut(value, size)]
            if not self.names:
                raise ValueError(
                    f"one_pass: route has {size} entries, and no input has a batch of that length; per_sample=[…] "
                    "names inputs that have several rows a sample"
                )
            for name, value in arguments:
                _check_one_reading(name, value, size)
        else:
            self.names = [names] if isinstance(names, str) else list(names)
            given = dict(arguments)
            for name in self.names:
                if name not in given:
                    raise KeyError(f"one_pass: per_sample names {name!r}, and the inputs are {', '.join(given)}")
                if not _can_be_cut(given[name], size):
                    raise ValueError(f"one_pass: per_sample names {name!r}, which has no {size} entries, as route has")
        self._cut_args = [name in self.names for name, _ in arguments[: len(inputs.args)]]

    @property
    def kind(self) -> tuple:
        """Return a key that is equal for batches that are cut and joined alike."""
        leaves, structure = pytree.tree_flatten((self.inputs.args, self.inputs.kwargs))
        tensors = ((leaf.dim(), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
        return self.size, tuple(self.names), structure, tuple(tensors)

    def of(self, i: int) -> Inputs:
        """Return the inputs of sample ``i`` as a batch of one."""
        return self._each(lambda value: _entry(value, i, self.size))

    def _each(self, cut: Callable) -> Inputs:
        args = tuple(cut(arg) if is_cut else arg for arg, is_cut in zip(self.inputs.args, self._cut_args, strict=True))
        return Inputs(args, {k: cut(v) if k in self.names else v for k, v in self.inputs.kwargs.items()})

    def shared(self) -> Inputs:
        """Return the inputs without those that hold one entry per sample."""
        return self._each(lambda _: None)

    def stacked(self) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Inputs]] | None:
        """Stack the samples' tensors; return them, and a function that makes one sample's inputs of a slice of each.

        Return None if the samples' inputs differ in more than values, so that vmap cannot run them side by side.
        """
        flat = [pytree.tree_flatten((s.args, s.kwargs)) for s in map(self.of, range(self.size))]
        whole = self._each(lambda value: _above_each_other(value, self.size))
        first, structure = flat[0]
        if any(other != structure for _, other in flat):
            return None
        tensors = {}
        for place, above in enumerate(pytree.tree_leaves((whole.args, whole.kwargs))):
            values = [leaves[place] for leaves, _ in flat]
            if all(value is values[0] for value in values):
                continue
            if not _are_alike(values):
                if all(isinstance(v, (int, float, str)) and v == values[0] for v in values):
                    continue
                return None
            tensors[place] = torch.stack(values) if above is values[0] else above

        def rebuild(slices: Sequence[Tensor]) -> Inputs:
            others = dict(zip(tensors, slices, strict=True))
            return Inputs(*pytree.tree_unflatten([others.get(i, leaf) for i, leaf in enumerate(first)], structure))

        return list(tensors.values()), rebuild


def _are_alike(values: Sequence) -> bool:
    kinds = {(v.shape, v.dtype, v.device) if isinstance(v, Tensor) else None for v in values}
    return len(kinds) == 1 and None not in kinds


def _positional(model: nn.Module, count: int) -> list[str]:
    """Return the names of the first ``count`` arguments of the model."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds][:count]
    return names + [f"argument {i}" for i in range(len(names), count)]


def _is_cut(value: object, size: int) -> bool:
    """Tell whether ``value`` holds one entry per sample, judged by its length."""
    if isinstance(value, Tensor):
        return value.shape[:1] == (size,)
    if isinstance(value, Mapping):
        return any(_is_cut(item, size) for item in value.values())
    if isinstance(value, (list, tuple)):
        of_samples = any(isinstance(item, (Tensor, Mapping, list, str)) for item in value)  # excludes (height, width)
        return (len(value) == size and of_samples) or any(_is_cut(item, size) for item in value)
    return False


def _can_be_cut(value: object, size: int) -> bool:
    """Tell whether an input that the caller named can be cut; a tensor may have several successive rows per sample."""
    if isinstance(value, Tensor):
        return value.dim() > 0 and len(value) > 0 and len(value) % size == 0
    return (isinstance(value, (list, tuple)) and len(value) == size) or _is_cut(value, size)


def _check_one_reading(name: str, value: object, size: int) -> None:
    """Raise if ``value`` is a list of B tensors that may hold either one tensor per sample or B batches."""
    if not isinstance(value, (list, tuple)) or len(value) != size or size == 1:
        return
    if all(isinstance(item, Tensor) and item.shape[:1] == (size,) for item in value):
        raise ValueError(
            f"one_pass: {name!r} is a list of {size} tensors of length {size}, which route may take as one tensor a "
            "sample or as batches; say per_sample=[…] with the names of all inputs that hold an entry a sample"
        )


def _entry(value: object, i: int, size: int, top: bool = True) -> object:
    """Return entry ``i`` of an input, as a batch of one."""
    if isinstance(value, Tensor):
        rows = len(value) // size if top else 1
        return value[i * rows : (i + 1) * rows] if top or value.shape[:1] == (size,) else value
    return _entries(value, lambda item: _entry(item, i, size, False), i, size)


def _above_each_other(value: object, size: int, top: bool = True) -> object:
    """Return all slices of a tensor, [B, rows, …], if ``_entry`` slices it; otherwise its result for sample 0."""
    if isinstance(value, Tensor):
        return value.unflatten(0, (size, -1)) if top or value.shape[:1] == (size,) else value
    return _entries(value, lambda item: _above_each_other(item, size, False), 0, size)


def _entries(value: object, inside: Callable, i: int, size: int) -> object:
    if isinstance(value, Mapping):
        return {key: inside(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_plain(value[i])] if len(value) == size else map(inside, value))
    return value


def _plain(value: object) -> object:
    """Turn objects that behave like dicts (transformers' BatchFeature) into dicts, so that their tensors are seen."""
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


# ------------------------------------------------------------------------------------------------------- the outputs


@dataclasses.dataclass(frozen=True)
class Axes:
    """Says along which axis each leaf of an output has its batch; None for a leaf without a batch."""

    names: list[str]
    axes: list[int | None]

    @classmethod
    def of_one_sample(cls, output: Output) -> Axes:
        """Return the axes for a single sample: no output has a batch, each belongs to that sample."""
        return cls(["" for _ in output.leaves], [None] * len(output.leaves))

    @classmethod
    def measure(cls, run: Callable[[Inputs], object], samples: Samples, check: bool) -> Axes:
        """Find the axes by a run of the whole batch and runs of single samples; ``check`` compares their values."""
        whole, structure = pytree.tree_flatten_with_path(run(samples.inputs))
        names = [".".join(map(_key, path)) or "output" for path, _ in whole]
        axes: list[int | None] = [None] * len(whole)
        for i in dict.fromkeys((0, samples.size - 1)):
            alone, form = pytree.tree_flatten(run(samples.of(i)))
            if form != structure:
                raise ValueError(
                    f"one_pass: the model's output for one sample has another structure than for {samples.size}, so "
                    f"route cannot put it together; {_remedy(samples)}"
                )
            for place, (_, leaf) in enumerate(whole):
                if isinstance(leaf, Tensor):
                    axes[place] = _axis(names[place], leaf, alone[place], samples)
                    if check and axes[place] is not None:
                        _check_same(names[place], leaf, alone[place], axes[place], i, samples)
        return cls(names, axes)

    def joined(self, output: Output) -> object:
        """Join the samples of ``output``, each a batch of one, into the model's output for the whole batch."""
        given = zip(self.names, self.axes, output.leaves, output.mapped, strict=True)
        leaves = [self._leaf(*each, output) for each in given]
        return pytree.tree_unflatten(leaves, output.structure)

    def _leaf(self, name: str, axis: int | None, leaf: object, mapped: bool, output: Output) -> object:
        if not isinstance(leaf, Tensor) or (not mapped and axis is None):
            return leaf
        if axis is not None:
            slots = leaf if mapped else leaf.expand(output.size, *leaf.shape)
            return slots.movedim(0, axis).flatten(axis, axis + 1)
        if leaf.dim() > 1 and not bool((leaf == leaf[:1]).all()):
            raise ValueError(
                f"one_pass: output {name!r}, {list(leaf.shape[1:])} for each sample, has no batch axis, so route "
                "cannot put the samples' together; leave it out of the output, or call the runner once an adapter"
            )
        return leaf[0] if leaf.dim() > 1 else leaf


def _key(step: object) -> str:
    """Return a step of the path to a leaf as text: a key, an index or an attribute's name."""
    return str(next((getattr(step, name) for name in ("key", "idx", "name") if hasattr(step, name)), step))


def _axis(name: str, whole: Tensor, alone: Tensor, samples: Samples) -> int | None:
    """Return the axis that is B times as long for the batch as for one sample, or None."""
    differ = [d for d in range(whole.dim()) if whole.shape[d] != alone.shape[d]] if whole.dim() == alone.dim() else [-1]
    if not differ:
        return None
    if len(differ) != 1 or differ == [-1] or whole.shape[differ[0]] != samples.size * alone.shape[differ[0]]:
        raise ValueError(
            f"one_pass: output {name!r} is {list(whole.shape)} for {samples.size} samples and {list(alone.shape)} for "
            f"one of them, so route cannot put the samples' together; {_remedy(samples)}"
        )
    return differ[0]


def _check_same(name: str, whole: Tensor, alone: Tensor, axis: int, i: int, samples: Samples) -> None:
    if not whole.is_floating_point() or not alone.numel():
        return
    length = alone.shape[axis]
    whole, tolerance = whole.narrow(axis, i * length, length), SAME.get(whole.dtype, SAME_HALF)
    scale = torch.nan_to_num(whole, 0, 0, 0).abs().max()
    far = ~torch.isclose(whole, alone, rtol=0, atol=float(tolerance * scale), equal_nan=True)
    if far.float().mean() > 0.5:
        raise ValueError(
            f"one_pass: output {name!r} of sample {i} alone is another than in its batch; {_remedy(samples)} (a model "
            "that mixes the samples of a batch gives each what it gives it alone)"
        )


def _remedy(samples: Samples) -> str:
    names = ", ".join(samples.names)
    if samples.guessed:
        return f"route took as an entry a sample: {names}; say per_sample=[…] with the inputs that are"
    return f"per_sample names {names}; see whether the others hold no entry a sample"
