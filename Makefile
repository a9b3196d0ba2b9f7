# Two commands, each complete on its own on a machine with Python 3.10+ and PyPI (a C++ compiler too for the
# fast CPU kernels):  make demo   make test
VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# A file is one worker's; files that took long (tests/durations.json) come first.
WORKERS = -n $(JOBS) --dist loadfile --no-loadscope-reorder
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/cuda/* tests/native/*.h tests/native/*.cpp)

# The Python, PyTorch and Triton of the GPU machine, on a machine without a GPU. The tree is copied, because the
# extension's file has one name whichever PyTorch it was built for.
PYTHON312 ?= python3.12
GPU_VENV ?= .venv-gpu
GPU_TREE ?= build/env-gpu
GPU_PY = $(abspath $(GPU_VENV))/bin/python
NVCC_HOME = $(or $(CUDA_HOME),$(abspath $(shell nvcc --dryrun -E -x cu /dev/null 2>&1 | sed -n 's/^\#$$ TOP=//p')))

.PHONY: help demo test lowering lint format bench mutate env-gpu test-env-gpu clean
help:
	@echo "make demo    set up, then train the emoji retrieval example (about two minutes)"
	@echo "make test    set up, then run the tests"
	@echo "make lowering   compile and launch every binary of every Triton kernel; make test does so with one in nine"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make bench   time and memory against plain PyTorch and the installed peers, into docs/benchmarks.md and README.md (3 minutes)"
	@echo "make mutate  plant faults in a copy of the sources and see a test catch each"
	@echo "make env-gpu       the GPU machine's Python 3.12, PyTorch 2.11 and Triton 3.6 (4 GB), the extension built with and without CUDA"
	@echo "make test-env-gpu  the tests in it, and bench/first_light.py --dry-run"
	@echo "make clean   remove the virtual environment and everything built"

# Set-up: torch first (the extension compiles against it), then this package, in place.
$(READY): constraints.txt pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/cuda/*)
	@echo "== set-up 1/3: virtual environment $(VENV)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade -c constraints.txt pip setuptools wheel ninja
	@echo "== set-up 2/3: PyTorch and tools"
	$(PY) -m pip install --quiet --progress-bar on -c constraints.txt torch numpy
	@echo "== set-up 3/3: gssf_kernels, compiling its CPU kernels (one to four minutes)"
	$(PY) -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[triton,test,demo,lint]"
	$(PY) -m gssf_kernels
	@touch $@

demo: $(READY)
	$(PY) examples/emoji/train.py

test: $(READY)
	$(PY) -m pytest -q --progress $(WORKERS)

# Not by several workers: it has a process for each core of its own.
lowering: $(READY)
	$(PY) -m pytest -q --every-binary tests/triton/test_lowering.py tests/triton/test_launcher.py

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

bench: $(READY)
	$(PY) -m bench suite quick --device cpu
	$(PY) -m bench report bench/results/cpu-quick.json --into docs/benchmarks.md README.md

mutate: $(READY)
	$(PY) tests/mutate.py

$(GPU_VENV)/.ready: constraints-gpu.txt
	$(PYTHON312) -m venv $(GPU_VENV)
	$(GPU_PY) -m pip install --quiet --no-cache-dir -c constraints-gpu.txt -r constraints-gpu.txt
	@touch $@

env-gpu: $(GPU_VENV)/.ready
	mkdir -p $(GPU_TREE) && find $(GPU_TREE) -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
	git ls-files -z --cached --others --exclude-standard | xargs -0 ls -d 2> /dev/null | xargs cp --parents -pt $(GPU_TREE)
	cd $(GPU_TREE) && $(GPU_PY) setup.py -q build_ext --inplace && $(GPU_PY) -m gssf_kernels
	@if command -v nvcc > /dev/null; then cd $(GPU_TREE) && CUDA_HOME=$(NVCC_HOME) FORCE_CUDA=1 $(GPU_PY) setup.py -q build_ext \
	    --build-temp build/cuda --build-lib build/with-cuda && ls -l build/with-cuda/gssf_kernels; \
	else echo "nvcc not found: the extension was not built with csrc/cuda"; fi

test-env-gpu: env-gpu
	cd $(GPU_TREE) && $(GPU_PY) -m pytest -q --progress $(WORKERS)
	cd $(GPU_TREE) && $(GPU_PY) bench/first_light.py --dry-run build/first-light

clean:
	rm -rf $(VENV) $(GPU_VENV) build *.egg-info gssf_kernels/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis examples/*/out
