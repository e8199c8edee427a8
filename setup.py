"""Builds the compiled modules: ``_cpu.abi3.so`` with any C++ compiler, ``_cuda.abi3.so`` with FASTCSS_CUDA=1 and nvcc.

Both use LibTorch's stable ABI only, so one cp310-abi3 wheel serves torch >= 2.10. Without a compiler the package still
installs; ``python -m fastcss info`` then says which implementations are missing.
"""

import os
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=gnu++20",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    *STABLE_ABI,
]
CUDA_TARGETS = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_100,code=[sm_100,compute_100]",
]


def sources(folder: str, *suffixes: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc", folder).glob("*") if path.suffix in suffixes)


def extensions() -> list:
    found = [CppExtension("fastcss._cpu", sources("cpu", ".cpp"), py_limited_api=True, extra_compile_args=CXX_FLAGS)]
    if os.environ.get("FASTCSS_CUDA") == "1":
        if not sources("cuda", ".cu"):
            raise SystemExit(
                "FASTCSS_CUDA=1 asks for the CUDA module, but csrc/cuda holds no kernel yet: see impl='triton'"
            )
        if CUDA_HOME is None:
            raise SystemExit("FASTCSS_CUDA=1 asks for the CUDA module, but no nvcc was found (set CUDA_HOME)")
        found.append(
            CUDAExtension(
                "fastcss._cuda",
                sources("cuda", ".cu", ".cpp"),
                py_limited_api=True,
                extra_compile_args={
                    "cxx": [*CXX_FLAGS, "-DUSE_CUDA"],
                    "nvcc": ["-O3", "-std=c++20", "-DUSE_CUDA", *STABLE_ABI, *CUDA_TARGETS],
                },
            )
        )
    return found


class OptionalBuild(BuildExtension):
    """A missing C++ compiler leaves a working, slower package; FASTCSS_REQUIRE_COMPILED=1 makes it an error."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            if os.environ.get("FASTCSS_REQUIRE_COMPILED") == "1" or os.environ.get("FASTCSS_CUDA") == "1":
                raise
            print(f"fastcss: the compiled kernels were not built, the package will run without them: {error}")
            self.extensions = []

    def copy_extensions_to_source(self) -> None:
        # An editable install copies what was built; what failed above is not there to copy.
        self.extensions = [
            e
            for e in self.extensions
            if Path(self.get_ext_fullpath(e.name)).exists()
            or Path(self.build_lib, self.get_ext_filename(e.name)).exists()
        ]
        super().copy_extensions_to_source()


setup(
    packages=[
        "fastcss",
        "fastcss._schema",
        "fastcss.ops",
        "fastcss.reference",
        "fastcss.composed",
        "fastcss.nn",
        "fastcss.models",
        "fastcss.data",
        "fastcss.kernels",
    ],
    package_dir={"fastcss": "fastcss", "fastcss.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
