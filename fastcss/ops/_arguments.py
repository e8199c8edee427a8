"""Checks of arguments that several ops share; each names the argument, what it got and what it wants."""

from __future__ import annotations

import torch
from torch import Tensor


def check_shapes(op: str, **arguments: tuple[Tensor, str]) -> dict[str, int]:
    """Each argument is ``name=(tensor, "B N D")``: a letter is a size, and the same everywhere. Returns the sizes.

    Raises:
        TypeError: not a tensor.
        ValueError: a tensor with another number of dimensions, or with another size than an argument before it.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, wanted) in arguments.items():
        letters = wanted.split()
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor [{', '.join(letters)}], got {type(tensor).__name__}")
        fits = tensor.dim() == len(letters) and all(
            sizes.get(letter, size) == size for letter, size in zip(letters, tensor.shape, strict=True)
        )
        if not fits:
            known = [f"{letter} = {sizes[letter]}" for letter in letters if letter in sizes]
            having = f" with {', '.join(known)}" if known else ""
            raise ValueError(f"{op}: {name} must be [{', '.join(letters)}]{having}, got {list(tensor.shape)}")
        sizes |= zip(letters, tensor.shape, strict=True)
    return sizes


def check_alike(op: str, **tensors: Tensor) -> None:
    """Floating-point tensors of one device and, but for autocast, of one dtype: those of the first.

    Raises:
        TypeError: another dtype.
        ValueError: another device.
    """
    (first_name, first), *others = tensors.items()
    if not first.is_floating_point():
        raise TypeError(f"{op}: {first_name} must be a floating-point tensor, got {first.dtype}")
    for name, tensor in others:
        check_device(op, first_name, first, name, tensor)
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.dtype != first.dtype and not _autocasts(first):
            raise TypeError(f"{op}: {name} must have the dtype of {first_name}, {first.dtype}, got {tensor.dtype}")


def check_device(op: str, first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    """``tensor`` is on the device of ``first``, or ValueError."""
    if tensor.device != first.device:
        raise ValueError(f"{op}: {name} must be on the device of {first_name}, {first.device}, got {tensor.device}")


def readable(tensor: Tensor) -> bool:
    """Its values can be read without a stall: not on CUDA, not while tracing, not under vmap."""
    return (
        tensor.device.type == "cpu"
        and tensor.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on for their device."""
    if not _autocasts(tensors[0]):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(tensor.device.type)) for tensor in tensors)


def _autocasts(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)
