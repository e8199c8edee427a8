"""Triton kernels, one file an op. Imported only where Triton is there."""

from .._rooms import import_files


def register() -> None:
    """Give the raw ops their Triton implementations. Called once, when the package finds a working Triton."""
    import_files(__name__, __path__)
