"""Sets up every test of the whole systems, and makes runs of DecoupleCSS once for all."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """The models are tiny: threads would cost more than they give."""


@pytest.fixture(scope="module")
def saved_model():
    """Builds a model of three tasks; tests must not change it."""
    from decouplecss_models import SIZES, build

    return build(SIZES[:3])


@pytest.fixture(scope="module")
def saved(saved_model, tmp_path_factory) -> Path:
    """Saves ``saved_model`` in a folder; tests must not change it."""
    from fastcss.models.decouplecss_folder import save_base, save_task

    folder = tmp_path_factory.mktemp("saved") / "run"
    save_base(saved_model, folder)
    for t in range(3):
        save_task(saved_model, t, folder)
    return folder


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """Copies the folder, to spoil it."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture(scope="session")
def digit_models(tmp_path_factory) -> Path:
    """Makes a run without tasks: frozen models and a tokenizer; tests must not change it."""
    from continual_runs import save_models

    return save_models(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def digit_run(digit_models, tmp_path_factory) -> Callable[[str], Path]:
    """``digit_run(method)`` returns a finished run of two tasks; tests must not change it."""
    from continual_runs import SETTINGS, plan_of

    from fastcss.models.continual import begin, train

    @functools.cache
    def make(method: str) -> Path:
        folder = tmp_path_factory.mktemp(method) / "run"
        begin(folder, plan_of(method=method), digit_models, settings=SETTINGS)
        train(folder)
        return folder

    return make
