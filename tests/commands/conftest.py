"""Calls the command line, and makes a run of DecoupleCSS for it."""

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
    """``command(*arguments)`` returns the exit code and what was printed."""
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
    """Builds a model of three tasks and six classes; tests must not change it."""
    from decouplecss_models import SIZES, build

    return build(SIZES[:3])


@pytest.fixture(scope="session")
def tiny_run(tiny_model, tmp_path_factory) -> Path:
    """Saves the model in a folder, with a plan of small pictures; tests must not change it."""
    from saved_runs import PLAN, save_run

    return save_run(tiny_model, tmp_path_factory.mktemp("tiny") / "run", PLAN)


@pytest.fixture(scope="module")
def pixels():
    """[36, 48, 4], with some transparency."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (36, 48, 4), dtype=np.uint8)


@pytest.fixture
def picture(pixels, tmp_path) -> Path:
    """Writes a picture that ``segment`` can read."""
    from PIL import Image

    Image.fromarray(pixels[..., :3]).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


@pytest.fixture(scope="session")
def digit_models(tmp_path_factory) -> Path:
    """Makes a run without tasks: frozen models and a tokenizer; tests must not change it."""
    from continual_runs import save_models

    return save_models(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def digit_run(digit_models, tmp_path_factory) -> Path:
    """Trains a run with ``SMALL_DIGITS``; tests must not change it."""
    import torch
    from continual_runs import SMALL_DIGITS

    from fastcss.__main__ import main

    run, threads = tmp_path_factory.mktemp("digits") / "run", torch.get_num_threads()
    torch.set_num_threads(1)  # the tests have one, too: another number changes the last bits
    main(["train", *SMALL_DIGITS, "--base", str(digit_models), "--out", str(run)])
    torch.set_num_threads(threads)
    return run
