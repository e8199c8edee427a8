"""An op has a file of its name in every room, and stands in the lists of the tests that every op is in."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from arguments import ARGUMENTS

from benchmarks.registry import all_cases
from fastcss import composed, ops, reference
from fastcss._dispatch import backends
from fastcss._import_files import import_files
from fastcss._schema._library import raw_op

ROOT = Path(__file__).parents[2]
OPS = sorted({getattr(ops, name).__module__.rpartition(".")[2] for name in ops.__all__})
FILES = (
    "fastcss/reference/{}.py",
    "fastcss/_schema/{}.py",
    "fastcss/composed/{}.py",
    "fastcss/_ops/{}.py",
    "tests/ops/test_{}.py",
    "csrc/cpu/{}.cpp",
    "kernels/{}.py",
    "benchmarks/{}.py",
)
#: The first tells whether tensors have changed, for the caches of ``one_pass``, the second is for ``fuse``, which has
#: torch's calls in other places: nobody calls them, so they have no other forms.
INTERNAL = {"fingerprint", "mlp"}
RAW_OPS = {
    name.removeprefix("fastcss::").removesuffix(".cpu")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("fastcss::") and name.endswith(".cpu")
}


@pytest.mark.parametrize("op", OPS)
def test_it_has_a_file_in_every_room(op):
    missing = [file for file in (name.format(op) for name in FILES) if not (ROOT / file).exists()]
    assert not missing, f"docs/adding-an-op.md says what is in {', '.join(missing)}"


@pytest.mark.parametrize("room", ["reference", "_schema", "composed", "_ops"])
def test_a_room_of_ops_has_no_other_files(room):
    files = {path.stem for path in (ROOT / "fastcss" / room).glob("*.py") if not path.stem.startswith("_")}
    more = files - INTERNAL - set(OPS)
    assert not more, f"fastcss/ops.py lacks {', '.join(sorted(more))}"


@pytest.mark.parametrize("op", OPS)
def test_its_function_has_its_name(op):
    import_files(reference.__name__, reference.__path__)
    import_files(composed.__name__, composed.__path__)
    for room in (reference, composed):
        assert callable(getattr(getattr(room, op), op)), room.__name__
    assert op in ops.__all__


@pytest.mark.parametrize(
    ("table", "entries"),
    [
        # multi_lora has its inputs in tests/ops/lora_inputs.py.
        ("tests/ops/arguments.py", ARGUMENTS.keys() | {"multi_lora"}),
        ("cases(device, quick) in benchmarks", {case.op for case in all_cases("cpu", quick=True)}),
    ],
)
def test_it_is_in_the_table(table, entries):
    missing = set(OPS) - entries
    assert not missing, f"{table} lacks {', '.join(sorted(missing))}"


def test_every_raw_op_has_a_kernel_of_each_kind():
    if backends.UNAVAILABLE["cpu"] is None:
        assert backends.KERNELS["cpu"] == RAW_OPS
    pytest.importorskip("triton")
    from fastcss import kernels

    kernels.register()
    assert backends._kernels("triton", "CompositeExplicitAutograd") == RAW_OPS - INTERNAL


def test_every_triton_implementation_launches_on_the_device_of_its_tensors():
    """The source says so: what goes wrong without it, on the second of two GPUs, no other test here can see."""
    pytest.importorskip("triton")
    from fastcss import kernels

    kernels.register()
    seen = set()
    for path in (ROOT / "kernels").glob("*.py"):
        for op in re.findall(r'^LIBRARY\.impl\("(\w+)\.triton"', path.read_text(), re.MULTILINE):
            function = getattr(sys.modules[f"fastcss.kernels.{path.stem}"], op)
            assert "with torch.cuda.device_of(" in inspect.getsource(function), f"{op} in {path}"
            seen.add(op)
    assert seen == RAW_OPS - INTERNAL


def test_every_raw_op_with_a_gradient_has_it_in_the_dispatcher():
    """Else torch.compile and torch.func would take the op for a constant, without a word."""
    gradients = {name for name in RAW_OPS if name.endswith("_backward")}
    assert len(gradients) > 10
    for name in gradients | {name.removesuffix("_backward") for name in gradients}:
        for impl in ("cpu", "cuda", "triton"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastcss::{name}.{impl}", "Autograd"), name


def test_a_second_raw_op_of_the_name_is_refused():
    def merge_masks(score):
        return score.new_empty(score.shape)

    with pytest.raises(RuntimeError, match="merge_masks"):
        raw_op("(Tensor score) -> Tensor", flops=None)(merge_masks)


def test_every_file_of_a_room_is_found(tmp_path, monkeypatch):
    room = tmp_path / "room_of_this_test"
    room.mkdir()
    for name in ("__init__", "one", "two"):
        (room / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    import_files(room.name, [str(room)])
    try:
        assert {name for name in sys.modules if name.startswith(room.name)} == {
            room.name, f"{room.name}.one", f"{room.name}.two"
        }  # fmt: skip
        (room / "three.py").write_text("raise ValueError('of the file itself')")
        with pytest.raises(ValueError, match="of the file itself"):
            import_files(room.name, [str(room)])
    finally:
        for name in [name for name in sys.modules if name.startswith(room.name)]:
            del sys.modules[name]
