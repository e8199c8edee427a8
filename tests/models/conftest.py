"""What every test of the whole systems wants, and a run of DecoupleCSS that is saved once."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """The models are tiny: threads would cost more than they give."""


@pytest.fixture(scope="module")
def saved_model():
    """Three tasks; tests leave it as it is."""
    from decouplecss_models import SIZES, build

    return build(SIZES[:3])


@pytest.fixture(scope="module")
def saved(saved_model, tmp_path_factory) -> Path:
    """The folder of ``saved_model``; tests leave it as it is."""
    from fastcss.models.decouplecss_folder import save_base, save_task

    folder = tmp_path_factory.mktemp("saved") / "run"
    save_base(saved_model, folder)
    for t in range(3):
        save_task(saved_model, t, folder)
    return folder


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "run"))
