"""Sets how many threads the tests of the ops have."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _threads(request):
    """The CPU kernels divide their work between two threads; the tensors are too small for more than one in all other
    implementations."""
    callspec = getattr(request.node, "callspec", None)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if callspec and callspec.params.get("impl") == "cpu" else 1)
    yield
    torch.set_num_threads(threads)
