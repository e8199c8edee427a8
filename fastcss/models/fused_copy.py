"""Runs a module on the fused ops, and leaves the module itself to its owner as it is."""

from __future__ import annotations

from torch import nn

from .._fuse.fusion import fuse
from .._one_pass.changes import Watch
from .._one_pass.structural_copy import StructuralCopy


class FusedCopy:
    """Holds a fused copy of ``module`` that shares its tensors, and follows later changes of it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._copy_anew()

    def __call__(self, *args, **kwargs):
        """Run the copy, which is made anew first if modules, parameters or hooks were exchanged since."""
        if not self._watch.is_as_built():
            self._copy_anew()
        self._watch.follow_mode()
        return self._fused(*args, **kwargs)

    def is_of(self, module: nn.Module) -> bool:
        """Tell whether this is a copy of ``module``."""
        return module is self._module

    def _copy_anew(self) -> None:
        copy = StructuralCopy(self._module)
        self._fused = copy.of(self._module)
        fuse(self._fused)
        self._watch = Watch(self._module, {}, {}, copy.pairs, ())
