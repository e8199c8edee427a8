"""Lists all benchmark cases, and finds those that a name means."""

from __future__ import annotations

from collections.abc import Sequence

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
from .cases import Case

AFFINITY = (affinity_attention, class_affinity, affinity_loss, class_centers, caa)
SELECTION = (cost_filter, phrase_pool, select_tokens, prompt_mlp, merge_masks, topk_queries, top_margin)
FUSED = (deformable_attention, bi_attention, window_attention, fuse)
MODULES = (multi_lora, one_pass, *AFFINITY, *SELECTION, *FUSED, decouplecss, decouplecss_training)


def all_cases(device: str, quick: bool = False) -> list[Case]:
    """List every case of a device. ``quick`` gives small stand-ins under their own names, which end in ``-quick``."""
    return [case for module in MODULES for case in module.cases(device, quick)]


def select(cases: Sequence[Case], ops: Sequence[str] = (), names: Sequence[str] = ()) -> list[Case]:
    """Select these ops' cases whose name starts with one of ``names``, with or without the op in front; default: all.

    Raises:
        ValueError: an op or a name matches nothing; the message lists what there is.
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
    """Tell whether a case belongs to one of these ops and starts so, with or without the op in front."""
    starts = tuple(prefixes) or ("",)
    return (not ops or op in ops) and (case.startswith(starts) or case.removeprefix(op + "/").startswith(starts))
