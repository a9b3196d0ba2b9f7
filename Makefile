# Two commands, each complete on its own on a machine with Python 3.10+ and PyPI (a C++ compiler too for the
# fast CPU kernels):  make demo   make test
VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/cuda/* tests/*.h tests/*.cpp)

.PHONY: help demo test lint format bench mutate clean
help:
	@echo "make demo    set up, then train the emoji retrieval example (about two minutes)"
	@echo "make test    set up, then run the tests"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make bench   time and memory against plain PyTorch and the peers that are installed, into the README (3 minutes)"
	@echo "make mutate  plant faults in a copy of the sources and see a test catch each"
	@echo "make clean   remove the virtual environment and everything built"

# Set-up: torch first (the extension compiles against it), then this package, in place.
$(READY): constraints.txt pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/cuda/*)
	@echo "== set-up 1/3: virtual environment $(VENV)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade -c constraints.txt pip setuptools wheel ninja
	@echo "== set-up 2/3: PyTorch and tools"
	$(PY) -m pip install --quiet --progress-bar on -c constraints.txt torch numpy
	@echo "== set-up 3/3: gssf_kernels, compiling its CPU kernels (about a minute)"
	$(PY) -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[triton,test,demo,lint]"
	$(PY) -m gssf_kernels
	@touch $@

demo: $(READY)
	$(PY) examples/emoji/train.py

test: $(READY)
	$(PY) -m pytest -n $(JOBS) --dist loadfile

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
	$(PY) -m bench report bench/results/cpu-quick.json --into README.md

mutate: $(READY)
	$(PY) tests/mutate.py

clean:
	rm -rf $(VENV) build *.egg-info gssf_kernels/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis examples/emoji/out
