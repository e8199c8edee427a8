"""Checks of arguments that several ops share; each names the argument, what it got and what it wants."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .._dispatch.readable_values import readable


def check_shapes(op: str, **arguments: tuple[Tensor, str]) -> dict[str, int]:
    """Each argument is ``name=(tensor, "B N D")``: a letter is a size, and the same everywhere. Returns the sizes.

    Raises:
        TypeError: not a tensor.
        ValueError: a tensor with another number of dimensions, or with another size than an argument before it.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, wanted) in arguments.items():
        letters = wanted.split()
        check_tensor(op, name, tensor, f"[{', '.join(letters)}]")
        fits = tensor.dim() == len(letters) and all(
            sizes.get(letter, size) == size for letter, size in zip(letters, tensor.shape, strict=True)
        )
        if not fits:
            known = [f"{letter} = {sizes[letter]}" for letter in letters if letter in sizes]
            having = f" with {', '.join(known)}" if known else ""
            raise ValueError(f"{op}: {name} must be [{', '.join(letters)}]{having}, got {list(tensor.shape)}")
        sizes |= zip(letters, tensor.shape, strict=True)
    return sizes


def check_tensor(op: str, name: str, tensor: object, shape: str) -> None:
    """``tensor`` is one whose elements lie in memory one by one, or TypeError, which says ``shape``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {shape}, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "a nested" if tensor.is_nested else "a quantized" if tensor.is_quantized else f"a {tensor.layout}"
        raise TypeError(f"{op}: {name} must be a dense tensor {shape}, got {kind} one")


def check_alike(op: str, **tensors: Tensor) -> None:
    """Floating-point tensors of one device and, but for autocast, of one dtype: those of the first.

    Raises:
        TypeError: another dtype.
        ValueError: another device.
    """
    (first_name, first), *others = tensors.items()
    check_floating(op, first_name, first)
    for name, tensor in others:
        check_device(op, first_name, first, name, tensor)
        check_floating(op, name, tensor)
        if tensor.dtype != first.dtype and not autocasts(first):
            raise TypeError(f"{op}: {name} must have the dtype of {first_name}, {first.dtype}, got {tensor.dtype}")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """``tensor`` is of a dtype that torch itself can compute with, or TypeError."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        wanted = "of at least 16 bits, " if tensor.is_floating_point() else ""
        raise TypeError(f"{op}: {name} must be a floating-point tensor, {wanted}got {tensor.dtype}")


def check_device(op: str, first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    """``tensor`` is on the device of ``first``, or ValueError."""
    if tensor.device != first.device:
        raise ValueError(f"{op}: {name} must be on the device of {first_name}, {first.device}, got {tensor.device}")


def check_labels(op: str, first_name: str, first: Tensor, labels: Tensor, ignore_index: int, classes: int) -> None:
    """``labels`` are integers on the device of ``first``, and where they can be read each is a class or ignored.

    Raises:
        TypeError: not a tensor of integers.
        ValueError: another device.
        IndexError: a label that is no class.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{op}: labels must be a tensor of integers, got {got}")
    check_tensor(op, "labels", labels, "of integers")
    check_device(op, first_name, first, "labels", labels)
    if readable(labels) and not _within(labels, classes):
        counted = labels[labels != ignore_index]
        if counted.numel() and not _within(counted, classes):
            raise IndexError(
                f"{op}: labels must be at least 0 and below {classes}, or ignore_index = {ignore_index}; "
                f"got values from {int(counted.min())} to {int(counted.max())}"
            )


def _within(labels: Tensor, classes: int) -> bool:
    low, high = labels.aminmax()
    return int(low) >= 0 and int(high) < classes


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on for their device."""
    if not autocasts(tensors[0]):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(tensor.device.type)) for tensor in tensors)


def no_autocast(tensor: Tensor) -> AbstractContextManager:
    """Let the composed form's products keep the dtype of ``tensor`` under autocast."""
    return torch.autocast(tensor.device.type, enabled=False) if autocasts(tensor) else nullcontext()


def autocasts(tensor: Tensor) -> bool:
    """Autocast is on for its device."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def check_count(op: str, name: str, value: int) -> int:
    """A whole number of at least 1, or TypeError, ValueError."""
    return check_integer(op, name, value, least=1)


def check_integer(op: str, name: str, value: int, *, least: int = -(2**63), most: int = 2**63 - 1) -> int:
    """A whole number from ``least`` to ``most``, or TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{op}: {name} must be at most {most}, got {value}")
    return value


def check_number(op: str, name: str, value: float) -> float:
    """A number of Python's, or TypeError: one in a tensor would have to be waited for."""
    if not isinstance(value, float | int | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    return float(value)


def check_flag(op: str, name: str, value: bool) -> None:
    """True or False, or TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {type(value).__name__}")


def widest(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one dtype where autocast lets them have several: a cosine is not worth rounding its inputs."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return tuple(tensor.to(dtype) for tensor in tensors)
