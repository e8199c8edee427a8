# Every target works from a fresh clone with python3, g++ and make; what is made once is not made again.
#
#   make demo    handwritten digits in photographs, six tasks in one pass   → out/demo.png
#   make test    lint and the whole test suite
#   make train-digits   the demo's model anew, from a seed (an hour)        → fastcss/assets/digits
#   make bench   the CPU benchmarks and their plots                         → benchmarks/results
#   make gpu     on a CUDA machine whose PYTHON has torch: build, tests, benchmarks → $OUT or benchmarks/results
#   make wheel   the abi3 wheel, checked in an empty environment            → dist

PYTHON ?= python3
# Another build of torch: make TORCH=… Left empty, the torch that PYTHON already has is used.
TORCH ?= torch==2.13.0
# For the kernels' tests; a CUDA build of torch brings its own.
TRITON ?= triton==3.6.0
VENV ?= .venv
OUT ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(wildcard csrc/*/*) setup.py pyproject.toml
# Kernels that do not compile are an error here, not a slower package.
export FASTCSS_REQUIRE_COMPILED := 1

.PHONY: demo test lint train-digits bench gpu wheel clean

demo: $(VENV)/installed
	$(BIN)/python -m fastcss demo --out out/demo.png

test: lint
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Both commands go on from where they were killed; the kept model is replaced when there is another.
train-digits: $(VENV)/installed
	test -e out/digits-base/config.json || $(BIN)/python -m benchmarks.pretrain out/digits-base
	$(BIN)/python -m fastcss train --data digits --setting 5-1 --base out/digits-base --out out/digits
	rm -rf fastcss/assets/digits
	cp -r out/digits fastcss/assets/digits

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks --out benchmarks/results/
	$(BIN)/python -m benchmarks.plot

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
# Without nvcc the CUDA kernels are compiled at first use, where CuPy is there.
NVCC := $(shell command -v nvcc)
gpu:
	$(if $(NVCC),FASTCSS_CUDA=1) $(PYTHON) -m pip install --no-build-isolation --no-deps --editable .
	$(PYTHON) -m fastcss info
	$(PYTHON) -m pytest tests --device cuda
	@if command -v compute-sanitizer > /dev/null; then \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
	        $(PYTHON) -m pytest tests/ops --device cuda -k "any_strides or out_of_range_gives_nan" --maxfail 1; \
	else echo "compute-sanitizer is not on PATH: memory was not checked"; fi
	$(PYTHON) -m benchmarks --device cuda --out $(or $(OUT),benchmarks/results)/
	$(PYTHON) -m benchmarks.plot --out $(or $(OUT),benchmarks/results) $(or $(OUT),benchmarks/results)/*.jsonl

wheel: $(VENV)/installed
	rm -rf dist build/check
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	$(PYTHON) -m venv build/check
	build/check/bin/python -m pip --disable-pip-version-check install $(or $(TORCH),torch) dist/*.whl
	cd build/check && bin/python -m fastcss info && bin/python -c "$$CHECK"
	@ls -l dist

define CHECK
import fastcss, torch
lora = fastcss.PackedLora.pack([torch.randn(4, 40)] * 3, [torch.randn(24, 4)] * 3, [0.5] * 3)
x, weight, bias = torch.randn(7, 40), torch.randn(24, 40), torch.randn(24)
compiled, reference = (fastcss.multi_lora(x, weight, lora, bias, impl=impl) for impl in ('cpu', 'reference'))
torch.testing.assert_close(compiled, reference)
print('the wheel works:', fastcss.__file__)
endef
export CHECK

clean:
	rm -rf build dist out *.egg-info fastcss/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
