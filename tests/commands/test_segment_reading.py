"""Tests that ``python -m fastcss segment`` reads the next picture beside the model, and ends when it is told to."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
pytest.importorskip("rich")
from PIL import Image
from processes import started

from fastcss import data
from fastcss.models.decouplecss import DecoupleCSS


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastcss segment reads"]


def test_the_next_picture_is_read_beside_the_model_and_no_further(
    command, tiny_run, pixels, picture, tmp_path, monkeypatch
):
    """One is read while the model works; all results are those of each picture alone, a broken one in between too."""
    pictures = [tmp_path / f"{k}.png" for k in range(5)]
    for k, path in enumerate(pictures):
        Image.fromarray(np.roll(pixels[..., :3], 5 * k, 1)).save(path)
    pictures[2].write_bytes(picture.read_bytes()[:2000])
    begun, real, segment = [threading.Event() for _ in pictures], data.read_image, DecoupleCSS.segment
    order, ahead = [], []

    def read_image(path):
        k = int(Path(path).stem)
        order.append(k)
        begun[k].set()
        return real(path)

    def watched(model, *given, **options):
        k = [0, 1, 3, 4][len(ahead)]
        arrived = k == 4 or begun[k + 1].wait(20)
        ahead.append((arrived, [j for j in order if j > k + 1]))
        return segment(model, *given, **options)

    monkeypatch.setattr(data, "read_image", read_image)
    monkeypatch.setattr(DecoupleCSS, "segment", watched)
    finished = command("segment", *pictures, "--model", tiny_run, "--out", tmp_path / "out")
    assert order == [0, 1, 2, 3, 4]
    assert ahead == [(True, [])] * 4
    assert finished.err.startswith(
        f"python -m fastcss segment: error: 1 of 5 pictures could not be labelled: {pictures[2]}: "
    )
    assert [line.partition(":")[0] for line in finished.out.splitlines() if not line.startswith(" ")] == [
        str(pictures[k]) for k in (0, 1, 3, 4)
    ]
    monkeypatch.undo()
    for k in (1, 3):
        command("segment", pictures[k], "--model", tiny_run, "--out", tmp_path / "alone")
        for name in (f"{k}.png", f"{k}_overlay.png"):
            assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_no_reader_stays_behind(command, tiny_run, picture, tmp_path, monkeypatch, error):
    def segment(*_, **__):
        raise error

    shutil.copy(picture, tmp_path / "second.png")
    monkeypatch.setattr(DecoupleCSS, "segment", segment)
    finished = command("segment", picture, tmp_path / "second.png", "--model", tiny_run, "--out", tmp_path / "out")
    assert finished.code == (130 if error is KeyboardInterrupt else 1)
    for thread in readers():
        thread.join(20)
    assert not readers()


def test_an_error_of_reading_that_is_no_pictures_fault_is_raised(command, tiny_run, picture, tmp_path, monkeypatch):
    def read_image(path):
        raise MemoryError(path)

    monkeypatch.setattr(data, "read_image", read_image)
    with pytest.raises(MemoryError):
        command("segment", picture, "--model", tiny_run, "--out", tmp_path / "out")


def test_a_file_that_never_ends_can_be_interrupted(tiny_run, picture, tmp_path):
    """Ctrl-C must end the process though its reader waits for a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "pipe.png")
    arguments = ("segment", picture, tmp_path / "pipe.png", "--model", tiny_run, "--out", tmp_path / "out")
    process = started("-m", "fastcss", *map(str, arguments))
    assert process.stdout.readline().startswith(str(picture))  # the picture is done, and the pipe is next
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
