"""What every test of the whole systems wants."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """The models are tiny: threads would cost more than they give."""
