"""Tests ``train`` in a process of its own: killed and resumed, it must give the same run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from continual_runs import SMALL_DIGITS, learned, lines
from processes import started

from fastcss.__main__ import main


def stop_when(path: Path, text: str, how: signal.Signals, *arguments: str) -> subprocess.Popen:
    """Start the command, and send it a signal as soon as this text stands in a file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = started("-m", "fastcss", "train", *arguments, env=environment, stderr=subprocess.STDOUT)
    while process.poll() is None:
        with contextlib.suppress(OSError):
            if text in path.read_text():
                process.send_signal(how)
                break
        time.sleep(0.002)
    return process


def test_killed_and_taken_up_again(digit_models, digit_run, tmp_path):
    run = tmp_path / "run"
    moments = [
        (run / "progress/progress.json", '"epoch": 1', signal.SIGKILL),
        (run / "task_0/task.json", "zero", signal.SIGKILL),
        (run / "progress/progress.json", '"task": 1, "epoch": 2', signal.SIGINT),
    ]
    for path, text, how in moments:
        process = stop_when(path, text, how, *SMALL_DIGITS, "--base", str(digit_models), "--out", str(run))
        out, _ = process.communicate(timeout=300)
        assert process.returncode == (130 if how == signal.SIGINT else -how), out
    assert "the same command goes on" in out
    assert not any(line["kind"] == "summary" for line in lines(run))
    main(["train", "--out", str(run)])
    assert learned(run) == learned(digit_run)
    assert lines(run) == lines(digit_run)
