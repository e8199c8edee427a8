"""Finds the layers of a model that a saved LoraConfig names, and the modules saved with them, by PEFT's rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from .read_adapters import is_conv1d

CLASSIFIERS = ("score", "classifier")  # "all-linear" leaves these out of a model for SEQ_CLS


def targeted(config: dict, model: nn.Module) -> list[str] | None:
    """Return the names of the layers that PEFT gives an adapter of this ``config``; None if the config does not say.

    A pattern in ``target_modules`` or ``exclude_modules`` matches whole names; an entry of a list is a name or, after a
    dot, the end of one. A module with several names goes by its first, under which alone PEFT finds it.
    """
    wanted, excluded = config.get("target_modules"), config.get("exclude_modules")
    if not wanted:  # PEFT then takes its default for the kind of model
        return None
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        wanted = _all_linear(config, model)
    matches = _matcher(excluded) if excluded else lambda _: False
    names = [name for name, _ in model.named_modules() if name and not matches(name)]
    whole = [re.compile(rf"(^|.*\.){entry}($|\..*)") for entry in config.get("modules_to_save") or ()]
    names = [name for name in names if not any(pattern.match(name) for pattern in whole)]
    names = list(filter(_matcher(wanted), names))
    return [name for name in names if _at_wanted_index(config, wanted, name)]


def saved_whole(config: dict, model: nn.Module) -> list[str]:
    """Return the names of the modules that PEFT saves whole with an adapter of this ``config``.

    An entry of ``modules_to_save`` is the end of a name, and also of one that has no dot before it.
    """
    entries = tuple(config.get("modules_to_save") or ())
    if not entries:
        return []
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name.endswith(entries)]


def _matcher(wanted: str | Sequence[str]) -> Callable[[str], object]:
    if isinstance(wanted, str):
        return re.compile(wanted).fullmatch
    whole, ends = frozenset(wanted), tuple(f".{entry}" for entry in wanted)
    return lambda name: name in whole or name.endswith(ends)


def _at_wanted_index(config: dict, wanted: str | Sequence[str], name: str) -> bool:
    """Tell whether ``name`` lies in a layer of ``layers_to_transform``; names given in full always do."""
    indices = config.get("layers_to_transform")
    if indices is None or indices == [] or isinstance(wanted, str) or name in wanted:
        return True
    given = config.get("layers_pattern") or []
    given = [given] if isinstance(given, str) else given
    patterns = [rf"(?:^|.*?\.){pattern}" for pattern in given] or [r".*?\.[^.]*"]
    found = next(filter(None, (re.match(rf"{pattern}\.(?P<index>\d+)\.", name) for pattern in patterns)), None)
    return found is not None and int(found["index"]) in ([indices] if isinstance(indices, int) else indices)


def _all_linear(config: dict, model: nn.Module) -> list[str]:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head = next((name for name in CLASSIFIERS if getattr(model, name, None) is not None), None)
    left_out = getattr(model, head) if output is None and head and config.get("task_type") == "SEQ_CLS" else output
    modules = model.named_modules()
    linears = [(name, module) for name, module in modules if isinstance(module, nn.Linear) or is_conv1d(module)]
    return [name for name, module in linears if module is not left_out]
