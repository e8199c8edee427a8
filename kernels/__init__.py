"""Triton kernels, one file an op. Imported only where Triton is there."""


def register() -> None:
    """Give the raw ops their Triton implementations. Called once, when the package finds a working Triton."""
    from . import multi_lora, multi_lora_backward  # noqa: F401  registers fastcss::multi_lora.triton and its backward
