"""Builds the compiled modules: ``_cpu.abi3.so`` with GCC 12 or newer, ``_cuda.abi3.so`` with FASTCSS_CUDA=1 and nvcc.

Both use LibTorch's stable ABI only, so one cp310-abi3 wheel serves torch >= 2.10. Without such a compiler the package
still installs; ``python -m fastcss info`` then says which implementations are missing, with the compiler's first error.
GCC 11 has no _Float16 in C++, and clang (14 was tried) no __builtin_shuffle.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths, library_paths

WITH_CUDA = os.environ.get("FASTCSS_CUDA") == "1"
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=gnu++20",
    "-ffp-contract=fast",
    "-fno-wrapv",  # Python's own flags have it, and loops that count in 32 bits do not vectorise with it
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    *STABLE_ABI,
]
# GCC's own conversions of 16-bit floats, for CPUs without: from libgcc.a, as no libgcc_s before GCC 12's has them.
LINK_FLAGS = ["-lgcc"]
# Compiled into both modules: without it they need glibc 2.32.
OLD_GLIBC = "csrc/old_glibc.cpp"
CUDA_TARGETS = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_100,code=[sm_100,compute_100]",
]
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-psabi",
    "-DUSE_CUDA",
    *STABLE_ABI,
    *CUDA_TARGETS,
]


def sources(folder: str, *suffixes: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc", folder).glob("*") if path.suffix in suffixes)


def extensions() -> list:
    cpu = CppExtension(
        "fastcss._cpu",
        [*sources("cpu", ".cpp"), OLD_GLIBC],
        depends=sources("cpu", ".h"),
        py_limited_api=True,
        extra_compile_args=CXX_FLAGS,
        extra_link_args=LINK_FLAGS,
    )
    if not WITH_CUDA:
        return [cpu]
    return [cpu, Extension("fastcss._cuda", [], depends=sources("cuda", ".cu", ".cuh", ".h"), py_limited_api=True)]


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=home and str(Path(home, "bin"))) or shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("FASTCSS_CUDA=1 asks for the CUDA module, but no nvcc was found (set CUDA_HOME)")
    return nvcc


def version() -> str:
    """The package's own; with the CUDA module it names the CUDA of the nvcc that builds it, as in 0.1.0+cu130."""
    own = re.search(r'__version__ = "(.+)"', Path("fastcss/__init__.py").read_text())[1]
    if not WITH_CUDA:
        return own
    printed = subprocess.run([find_nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    return f"{own}+cu" + "".join(re.search(r"release (\d+)\.(\d+)", printed).groups())


def project_urls() -> dict[str, str]:
    """Name the project's addresses by FASTCSS_URL: the public CI names the repository that it builds. The sources name
    no host, and so nothing that is built elsewhere sends a user to an address that is not its own."""
    home = os.environ.get("FASTCSS_URL", "").rstrip("/")
    pages = {"Changelog": "CHANGELOG.md", "Documentation": "docs", "Source": ""}
    urls = {name: f"{home}/blob/HEAD/{page}" if page else home for name, page in pages.items()}
    return {**urls, "Issues": f"{home}/issues"} if home else {}


def build_cuda(module: Path, temporary: Path) -> None:
    """nvcc by itself: torch's CUDAExtension wants a CUDA build of torch, which the stable ABI does not need."""
    nvcc = find_nvcc()
    temporary.mkdir(parents=True, exist_ok=True)
    module.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in include_paths()]

    def compile_one(source: str) -> str:
        target = str(temporary / f"{Path(source).stem}.cuda.o")
        subprocess.run([nvcc, *NVCC_FLAGS, *includes, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*sources("cuda", ".cu"), OLD_GLIBC]))
    # Symbols that only a CUDA build of torch has are found through libtorch when the module is loaded.
    libraries = [*(f"-L{path}" for path in library_paths()), "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu"]
    subprocess.run([nvcc, "-shared", "-cudart=static", *objects, *libraries, "-o", str(module)], check=True)


def first_error() -> str | None:
    """Why this machine's compiler cannot compile the CPU kernels, by a file that has what any of them needs."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    includes = [f"-I{path}" for path in include_paths()]
    command = [*compiler, *CXX_FLAGS, *includes, "-c", "csrc/cpu/instruction_set.cpp", "-o", os.devnull]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    except OSError as error:
        return f"the C++ compiler {compiler[0]} does not run: {error.strerror}"
    errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
    return None if done.returncode == 0 else f"{compiler[0]} says {' '.join(errors[:1])}"


class OptionalBuild(BuildExtension):
    """A missing C++ compiler leaves a working, slower package; FASTCSS_REQUIRE_COMPILED=1 makes it an error."""

    def build_extensions(self) -> None:
        self.note().unlink(missing_ok=True)
        try:
            super().build_extensions()
        except Exception as error:
            if WITH_CUDA or os.environ.get("FASTCSS_REQUIRE_COMPILED") == "1":
                raise
            reason = first_error() or str(error)
            self.note().parent.mkdir(parents=True, exist_ok=True)
            self.note().write_text(reason + "\n")
            line = "*" * 100
            print(
                f"{line}\nfastcss: THE COMPILED CPU KERNELS WERE NOT BUILT, every op will run slower without them:\n"
                f"{reason}\nGCC 12 or newer compiles them (set CXX); FASTCSS_REQUIRE_COMPILED=1 makes this an error.\n"
                f"{line}",
                file=sys.stderr,
            )
            self.extensions = []

    def note(self, folder: Path | None = None) -> Path:
        """The file that says why there is no ``_cpu.abi3.so`` beside it: fastcss/_dispatch/backends.py reads it."""
        return (folder or Path(self.get_ext_fullpath("fastcss._cpu")).parent) / "_cpu.not_built.txt"

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "fastcss._cuda":
            build_cuda(Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp))
        else:
            super().build_extension(ext)

    def copy_extensions_to_source(self) -> None:
        # An editable install copies what was built; what failed above is not there to copy, but for the note of it.
        kept, source = self.note(Path(self.build_lib, "fastcss")), self.note(Path("fastcss"))
        source.unlink(missing_ok=True)
        if kept.exists():
            shutil.copy(kept, source)
        self.extensions = [
            e
            for e in self.extensions
            if Path(self.get_ext_fullpath(e.name)).exists()
            or Path(self.build_lib, self.get_ext_filename(e.name)).exists()
        ]
        super().copy_extensions_to_source()


setup(
    version=version(),
    project_urls=project_urls(),
    packages=[
        # Every folder of fastcss/ with an __init__.py, and two from elsewhere: a checkout may have links to those.
        *find_packages(include=["fastcss", "fastcss.*"], exclude=["fastcss.kernels", "fastcss.cuda"]),
        "fastcss.kernels",
        "fastcss.cuda",
    ],
    package_dir={"fastcss": "fastcss", "fastcss.kernels": "kernels", "fastcss.cuda": "csrc/cuda"},
    # Device code travels as text: where the compiled module is missing it is compiled at first use.
    package_data={"fastcss.cuda": ["*.cuh"], "fastcss": ["py.typed", "assets/**"]},
    include_package_data=False,
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
