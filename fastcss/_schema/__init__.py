"""Every raw op's schema, fake kernel and FLOPs, one file an op. Imports torch only, so the package works where nothing
is compiled."""

from .._import_files import import_files
from ._library import COMPILED, LIBRARY

__all__ = ["COMPILED", "LIBRARY"]

import_files(__name__, __path__)
