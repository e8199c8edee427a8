"""Tests the command line's frame: what is listed, and what errors become."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys

import pytest
from processes import started

import fastcss
from fastcss import __main__ as frame
from fastcss.commands import info

ARGUMENTS = {
    "convert-sam": ("checkpoint", "out"),
    "demo": ("--out",),
    "evaluate": ("RUN",),
    "info": ("--help",),
    "segment": ("PICTURE", "--model", "--out", "--mode"),
    "train": ("--data", "--setting", "--out"),
}


def run_process(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "fastcss", *arguments], capture_output=True, text=True, timeout=120)


def test_the_help_lists_every_command_with_what_it_does(command):
    finished = command("--help")
    assert (finished.code, finished.err) == (0, "")
    words = " ".join(finished.out.split())
    for name in frame.COMMANDS:
        module = importlib.import_module(f"fastcss.commands.{name.replace('-', '_')}")
        assert f"{name} {module.HELP}" in words
        assert "\n" not in module.HELP
    assert "examples: python -m fastcss " in words


@pytest.mark.parametrize("name", frame.COMMANDS)
def test_every_command_tells_its_arguments(command, name):
    finished = command(name, "--help")
    assert (finished.code, finished.err) == (0, "")
    assert finished.out.startswith(f"usage: python -m fastcss {name} ")
    for argument in ARGUMENTS.get(name, ()):
        assert argument in finished.out


def test_the_version(command):
    assert command("--version") == (0, f"{fastcss.__version__}\n", "")


@pytest.mark.parametrize("arguments", [(), ("paint",), ("info", "--colour"), ("segment",)])
def test_wrong_usage_is_2(command, arguments):
    finished = command(*arguments)
    assert (finished.code, finished.out) == (2, "")
    assert "usage: python -m fastcss" in finished.err


def test_info_tells_versions_and_implementations(command):
    finished = command("info")
    assert (finished.code, finished.err) == (0, "")
    for line in ("versions", "devices", "implementations"):
        assert f"{line}\n" in finished.out
    assert f"  {fastcss.info()['devices'][0]}\n" in finished.out


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("no such colour:\nblue"), 2, "no such colour: blue"),
        (FileNotFoundError(2, "No such file or directory", "a.png"), 2, "a.png: No such file or directory"),
        (FileExistsError("out is there already"), 2, "out is there already"),
        (NotADirectoryError("out is no folder"), 2, "out is no folder"),
        (IsADirectoryError(21, "Is a directory", "a.png"), 2, "a.png: Is a directory"),
        (OSError(28, "No space left on device", "a.png"), 1, "a.png: No space left on device"),
        (PermissionError(13, "Permission denied", "out"), 1, "out: Permission denied"),
        (FloatingPointError("the loss is nan"), 1, "the loss is nan"),
        (
            ModuleNotFoundError("No module named 'rich'", name="rich"), 2,
            "rich is not installed: pip install 'fastcss[commands]'",
        ),
        (
            ModuleNotFoundError("pictures want Pillow: pip install 'fastcss[data]'", name="PIL"), 2,
            "pictures want Pillow: pip install 'fastcss[data]'",
        ),
    ],
)  # fmt: skip
def test_an_error_is_one_line_and_a_code(command, monkeypatch, error, code, message):
    def fail(options):
        raise error

    monkeypatch.setattr(info, "run", fail)
    assert command("info") == (code, "", f"python -m fastcss info: error: {message}\n")


@pytest.mark.parametrize(
    "error", [TypeError("a bug"), RuntimeError("a bug"), ModuleNotFoundError("a bug", name="fastcss.oops")]
)
def test_a_bug_keeps_its_traceback(command, monkeypatch, error):
    def fail(options):
        raise error

    monkeypatch.setattr(info, "run", fail)
    with pytest.raises(type(error), match="a bug"):
        command("info")


def test_an_interrupt_is_130():
    script = (
        "import time; from fastcss import __main__; from fastcss.commands import info\n"
        "info.run = lambda options: (print('ready', flush=True), time.sleep(60))\n"
        "__main__.main(['info'])"
    )
    process = started("-c", script, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130


def test_a_reader_that_has_gone_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    finished = subprocess.run([sys.executable, "-m", "fastcss", "info"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (finished.returncode, finished.stderr) == (1, b"")


def test_a_name_that_the_terminal_cannot_show_is_no_error():
    script = (
        "from fastcss import __main__; from fastcss.commands import info\n"
        "info.run = lambda options: print('ж × \\ud800')\n"
        "__main__.main(['info'])"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    finished = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert finished.stdout == "\\u0436 \\xd7 \\ud800\n"
    assert (finished.returncode, finished.stderr) == (0, "")


def test_no_command_imports_what_only_some_want():
    script = (
        "import sys; from fastcss import __main__; __main__._parser()\n"
        "print([name for name in ('transformers', 'peft', 'PIL', 'rich', 'sklearn', 'torchmetrics', 'matplotlib') "
        "if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (finished.stdout, finished.stderr) == ("[]\n", "")


def test_the_process_has_the_code():
    finished = run_process("convert-sam", "nowhere.pth", "out")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "python -m fastcss convert-sam: error: no such checkpoint: nowhere.pth\n"
