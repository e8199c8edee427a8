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
def tiny_model():
    """Three tasks of six classes; tests leave it as it is."""
    from decouplecss_models import SIZES, build

    return build(SIZES[:3])


@pytest.fixture(scope="session")
def tiny_run(tiny_model, tmp_path_factory) -> Path:
    """Its folder, with a plan of small pictures; tests leave it as it is."""
    from saved_runs import PLAN, save_run

    return save_run(tiny_model, tmp_path_factory.mktemp("tiny") / "run", PLAN)


@pytest.fixture(scope="session")
def digit_models(tmp_path_factory) -> Path:
    """A run without tasks: frozen models and a tokenizer; tests leave it as it is."""
    from continual_runs import save_models

    return save_models(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def digit_run(digit_models, tmp_path_factory) -> Path:
    """Trains a run with ``SMALL_DIGITS``; tests must not change it."""
    import torch
    from continual_runs import SMALL_DIGITS

    from fastcss.__main__ import main

    run, threads = tmp_path_factory.mktemp("digits") / "run", torch.get_num_threads()
    torch.set_num_threads(1)  # as the tests have it: with another number the last bits are others
    main(["train", *SMALL_DIGITS, "--base", str(digit_models), "--out", str(run)])
    torch.set_num_threads(threads)
    return run
