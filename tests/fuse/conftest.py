"""What every test of fused models wants."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The models are tiny: threads would cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
