"""Triton kernels, one file an op. Imported only where Triton is there."""


def register() -> None:
    """Give the raw ops their Triton implementations. Called when the package finds a working Triton."""
    # Imported here: transformers looks for a package "kernels", and in a checkout finds this folder, without a parent.
    from .._import_files import import_files

    import_files(__name__, __path__)
