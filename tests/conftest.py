"""Options, tolerances and printed tables that every test shares."""

from __future__ import annotations

import functools
import inspect
import os
from collections import defaultdict

import pytest
import torch

_tables: dict[str, list[dict]] = defaultdict(list)


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the tensors of the tests live")
    parser.addoption(
        "--all-transforms", action="store_true", help="every op under every pair of transforms (tests/hardening)"
    )
    parser.addoption(
        "--fuzz-examples", type=int, help="random examples of each op, new ones each time (tests/hardening)"
    )
    parser.addoption(
        "--sequences", type=int, help="random sequences of changes under a runner, new ones each time (tests/one_pass)"
    )


def pytest_configure(config):
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before fastcss is imported: it decides there what is available
        _mend_triton_interpreter()
    else:
        torch.backends.cudnn.allow_tf32 = False  # by default it is, and has 11 bits; see benchmarks/cases.py


def _mend_triton_interpreter() -> None:
    """Of Triton 3.6's interpreter: numpy 2.4 refuses its int() of an array [1] (triton issue 9171, mended in 3.7); its
    float32 → bfloat16 truncates, where a GPU rounds to nearest; and two thirds of its time is what it makes again and
    again: the language's functions its own at every call of a function from a kernel, and for every value a table of
    types, its shape, the constants in it and their text. And it takes masks of integers, which 3.9's does not."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, cast = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.cast_impl
    patch_language, numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
    cached_type = functools.cache(numpy_type)

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(src.data).to(torch.bfloat16).view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, tl.bfloat16)
        return cast(self, src, dst_type)

    def patch_lang(function):
        used = [module for module in function.__globals__.values() if module is tl or module is tl.core]
        is_patched = used and not any(tl.core.is_builtin(module.load) for module in used)
        return interpreter._LangPatchScope() if is_patched else patch_language(function)

    def get_np_dtype(type):
        return (numpy_type if isinstance(type.scalar, tl.pointer_type) else cached_type)(type.scalar)

    def strict(function):
        place = list(inspect.signature(function).parameters).index("mask")

        @functools.wraps(function)
        def checked(*args):
            if args[place].data.dtype != bool:
                raise ValueError("mask has unsupported dtype")
            return function(*args)

        return checked

    core, equal_tuples = tl.core, tl.core.tuple.__eq__

    @functools.cache
    def known(sizes):
        shape, numel = core.tuple(sizes), core.validate_block_shape(sizes)
        return shape, numel, str(shape), core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(numel)

    def block_type(self, element_ty, shape):
        sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
        assert sizes, "0d block_type is forbidden"
        self.element_ty = element_ty
        self.shape, self.numel, text, *_ = known(sizes)
        self.name = f"<{text}, {element_ty}>"

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        *_, self.shape, self.numel = known(tuple(type.shape.values) if type.is_block() else ())

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    core.tuple.__eq__ = lambda self, other: core.constexpr(True) if other is self else equal_tuples(self, other)
    interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.cast_impl = patch_lang_tensor, cast_impl
    interpreter._patch_lang = patch_lang
    interpreter._get_np_dtype = get_np_dtype
    for name in ("create_masked_load", "create_masked_store"):
        setattr(interpreter.InterpreterBuilder, name, strict(getattr(interpreter.InterpreterBuilder, name)))


@pytest.fixture
def one_thread():
    """torch starts all threads for the smallest of tensors, and those of several processes wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def device(pytestconfig) -> str:
    return pytestconfig.getoption("--device")


@pytest.fixture(scope="session")
def tolerances() -> dict[torch.dtype, float]:
    from fastcss.selftest.comparison import TOLERANCES  # not before TRITON_INTERPRET is set, see above

    return TOLERANCES


@pytest.fixture(scope="session")
def record_table():
    """``record_table(title, row)``: rows of figures, printed as a table after the tests."""
    return lambda title, row: _tables[title].append(row)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes
        session.config.workeroutput["tables"] = dict(_tables)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for title, rows in getattr(node, "workeroutput", {}).get("tables", {}).items():
        _tables[title].extend(rows)


def pytest_terminal_summary(terminalreporter):
    for title, rows in _tables.items():
        terminalreporter.section(title)
        cells = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            terminalreporter.line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
