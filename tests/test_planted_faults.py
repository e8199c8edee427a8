"""Tests that the faults which tests/planted_faults.py plants have their places; planting them takes minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted_faults import FAULTS, why_not

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_it_has_its_place(fault):
    assert why_not(ROOT, fault) is None
