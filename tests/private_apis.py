"""Has all that tests use of torch and Triton though it is private there, and says for which versions.

Another version may have it elsewhere or not at all: look here first when you change versions.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import inspect
from pathlib import Path

import torch

# --- torch 2.10 to 2.13: libc10's table of device guards -------------------------------------------------------------

#: Places in the table, by c10::DeviceType.
CUDA, META = 1, 14


def device_guards() -> ctypes.Array:
    """Return how torch switches devices around a call, by type of device; for meta tensors it does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    return (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")


# --- Triton 3.6 to 3.9: its interpreter ------------------------------------------------------------------------------


def mend_triton_interpreter() -> None:
    """Give Triton's interpreter what a GPU does, and a fifth of its time.

    - NumPy 2.4 refuses the int() of an array [1] that 3.6 takes (triton issue 9171, mended in 3.7).
    - A float32 becomes a bfloat16 by cutting it off, up to 3.9; a GPU rounds to nearest.
    - Masks of integers are taken, as 3.9 and a GPU do not.
    - Two thirds of its time is what it makes again and again: the language's functions its own at every call of a
      function from a kernel, and for every value a table of types, its shape, the constants in it and their text.
    - A third of the rest is a look for overflows of integers, whose outcome it drops unless it debugs.
    """
    import triton.language as tl
    from triton.runtime import interpreter

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

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    core.tuple.__eq__ = lambda self, other: core.constexpr(True) if other is self else equal_tuples(self, other)
    interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.cast_impl = patch_lang_tensor, cast_impl
    interpreter._patch_lang = patch_lang
    interpreter._get_np_dtype = get_np_dtype
    for name in ("create_masked_load", "create_masked_store"):
        setattr(interpreter.InterpreterBuilder, name, strict(getattr(interpreter.InterpreterBuilder, name)))
