"""What a benchmark case is, and the list of all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import measure

#: The provider every ratio is taken against.
OURS = "fastcss"
MODES = ("fwd", "bwd")

Step = Callable[[], Sequence[Tensor]]

# As torch.mm's, and as every tolerance has it: by default convolutions of float32 have 11 bits on a GPU. This is the
# older of torch's two settings: after the newer, cudnn.conv.fp32_precision, torch.export fails in the process (2.13).
torch.backends.cudnn.allow_tf32 = False


def largest_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of any tensor, relative to its largest expected value.

    inf where shapes or NaNs differ, and where any whole number does: how far apart two class numbers are says nothing.
    """
    if len(got) != len(expected) or any(a.shape != b.shape for a, b in zip(got, expected, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        if not b.is_floating_point():
            worst = max(worst, float("inf") if (a != b).any() else 0.0)
        elif b.numel():
            difference = (a.detach().to(b.dtype) - b).abs().max() / b.abs().max().clamp(min=1e-30)
            worst = max(worst, difference.nan_to_num(float("inf")).item())
    return worst


@dataclasses.dataclass
class Problem:
    """A case with its inputs made: the same work for every provider.

    Attributes:
        providers: name → a function that prepares the provider and returns its step. A step does the work once and
            returns its tensors: the output, and in mode "bwd" the gradients after it, in the order of ``expected``.
            Preparing may raise where a provider does not exist on this machine.
        expected: computes what every step must return; a provider whose step it is has that for its first call.
        tolerance: largest error, of what ``error`` measures.
        flops: that the work needs at least.
        bytes: that must be moved between memory and chip at least.
        error: how far a step's tensors are from ``expected``.
        capture: provider's name and its step → the step as a CUDA graph.
    """

    providers: dict[str, Callable[[], Step]]
    expected: Callable[[], Sequence[Tensor]]
    tolerance: float
    flops: float
    bytes: float
    error: Callable[[Sequence[Tensor], Sequence[Tensor]], float] = largest_error
    capture: Callable[[str, Step], Step] = lambda _, step: measure.captured(step)


@dataclasses.dataclass(frozen=True)
class Case:
    """One point of the benchmark.

    ``build(device, mode)`` makes its inputs, ``sources`` are patterns of what runs.
    """

    op: str
    name: str  # "<op>/<what>"
    shape: dict
    dtype: torch.dtype
    build: Callable[[str, str], Problem]
    sources: tuple[str, ...]
    modes: tuple[str, ...] = MODES
    by_name: bool = False  # so long that it runs only where its name was asked for


def all_cases(device: str, quick: bool = False) -> list[Case]:
    """Every case of a device. ``quick`` gives small stand-ins under their own names, which end in ``-quick``."""
    from . import (
        affinity_attention,
        affinity_loss,
        bi_attention,
        caa,
        class_affinity,
        class_centers,
        cost_filter,
        decouplecss,
        decouplecss_training,
        deformable_attention,
        fuse,
        merge_masks,
        multi_lora,
        one_pass,
        phrase_pool,
        prompt_mlp,
        select_tokens,
        top_margin,
        topk_queries,
        window_attention,
    )

    affinity = (affinity_attention, class_affinity, affinity_loss, class_centers, caa)
    selection = (cost_filter, phrase_pool, select_tokens, prompt_mlp, merge_masks, topk_queries, top_margin)
    fused = (deformable_attention, bi_attention, window_attention, fuse)
    modules = (multi_lora, one_pass, *affinity, *selection, *fused, decouplecss, decouplecss_training)
    return [case for module in modules for case in module.cases(device, quick)]


def select(cases: Sequence[Case], ops: Sequence[str] = (), names: Sequence[str] = ()) -> list[Case]:
    """The cases of these ops whose name starts with one of ``names``, with or without the op in front; all by default.

    Raises:
        ValueError: an op or a name that matches nothing; the message lists what there is.
    """
    known = list(dict.fromkeys(case.op for case in cases))
    for op in ops:
        if op not in known:
            raise ValueError(f"no op {op!r}; there are: {', '.join(known)}")
    cases = [case for case in cases if matches(case.op, case.name, ops)]
    for name in names:
        if not any(matches(case.op, case.name, prefixes=[name]) for case in cases):
            listed = "\n  ".join(case.name for case in cases)
            raise ValueError(f"no case starts with {name!r}; there are:\n  {listed}")
    return [case for case in cases if matches(case.op, case.name, prefixes=names) and (names or not case.by_name)]


def matches(op: str, case: str, ops: Sequence[str] = (), prefixes: Sequence[str] = ()) -> bool:
    """Whether a case is one of these ops' and starts so, with or without the op in front."""
    starts = tuple(prefixes) or ("",)
    return (not ops or op in ops) and (case.startswith(starts) or case.removeprefix(op + "/").startswith(starts))
