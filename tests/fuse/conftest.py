"""Sets up every test of fused models."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """The models are tiny: threads would cost more than they give."""
