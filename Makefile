# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
DOCS_NEEDS := furo myst-parser numpydoc sphinx sphinx-copybutton
BIN := $(VENV)/bin
# one thread a test process: the processes are the parallelism
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
WORKERS ?= 2

.PHONY: demo demo-distributed test test-all tiny lint docs bench sanitize studies sdist wheels clean

# pip's torch for Linux brings CUDA, several gigabytes. Without a GPU:
#   make demo TORCH_INDEX=ADDRESS   (what PyTorch's installation page gives for CPU)
TORCH_INDEX ?=
SOURCES := pyproject.toml lab/pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)

$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first: later packages then find what they need and fetch nothing else
	$(BIN)/pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch numpy
	$(BIN)/pip install --quiet -c constraints.txt scikit-build-core nanobind cmake ninja
	touch $@

# what the demonstration needs and no more: the core for this processor alone, no tools of development
$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[cli]' -e lab \
	  -C cmake.define.BATCHNORM_ISAS=$$(sh packaging/isa.sh)
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]' -e lab \
	  -C cmake.define.BATCHNORM_ISAS=all
	touch $@

demo: $(or $(wildcard $(VENV)/.installed),$(VENV)/.demo)
	$(BIN)/batchnorm demo

demo-distributed: $(or $(wildcard $(VENV)/.installed),$(VENV)/.demo)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m batchnorm_lab.demo.distributed

tiny: $(VENV)/.installed
	$(TEST_ENV) $(BIN)/pytest tests/test_tiny.py

test: $(VENV)/.installed
	$(TEST_ENV) $(BIN)/pytest tests/test_tiny.py
	$(TEST_ENV) $(BIN)/pytest -m 'not slow' -n $(WORKERS) --dist loadfile --ignore tests/test_tiny.py

test-all: $(VENV)/.installed
	$(TEST_ENV) $(BIN)/pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/check_docstrings.py
	$(BIN)/python tests/check_sizes.py

docs: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt $(DOCS_NEEDS)
	$(BIN)/python -m sphinx -b html -W --keep-going docs docs/_build/html

bench: $(VENV)/.installed
	$(BIN)/batchnorm bench

studies: $(VENV)/.installed
	$(BIN)/batchnorm study all

sdist: $(VENV)/.torch
	$(BIN)/pip install --quiet -c constraints.txt build
	$(BIN)/python -m build --sdist --no-isolation

wheels: sdist
	bash packaging/wheels.sh

sanitize:
	bash csrc/sanitize.sh

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
