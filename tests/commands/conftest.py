"""Calls of the command line, and a run of DecoupleCSS for them."""

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))  # the tiny models are those of the models' tests


class Finished(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """The models are tiny: threads would cost more than they give."""


@pytest.fixture
def command(capsys):
    """``command(*arguments)`` → the exit code, and what was printed."""
    from fastcss.__main__ import main

    def call(*arguments) -> Finished:
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code or 0
        return Finished(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The folder of a run with three tasks of six classes; tests leave it as it is."""
    from decouplecss_models import SIZES, build

    from fastcss.models.decouplecss_folder import save_base, save_task

    folder = tmp_path_factory.mktemp("tiny") / "run"
    model = build(SIZES[:3])
    save_base(model, folder)
    for t in range(3):
        save_task(model, t, folder)
    return folder
