"""Tells the tests where to read what the compilers made of the kernels."""

import os

import pytest
from reports import FOLDER, Reports


@pytest.fixture(scope="session")
def reports(pytestconfig, tmp_path_factory) -> Reports:
    """All processes of a run have one folder for what is made anew."""
    base = tmp_path_factory.getbasetemp()
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernel_reports"
    made.mkdir(exist_ok=True)
    return Reports(FOLDER, FOLDER if pytestconfig.getoption("--keep-reports") else made)
