# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
DOCS_NEEDS := furo myst-parser numpydoc sphinx sphinx-copybutton
BIN := $(VENV)/bin
# one thread a test process: the processes are the parallelism
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
WORKERS ?= 2

.PHONY: demo demo-distributed test test-all tiny lint docs bench sanitize studies clean

$(VENV)/.installed: pyproject.toml lab/pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first: later packages then find what they need and fetch nothing else
	$(BIN)/pip install --quiet -c constraints.txt torch numpy
	$(BIN)/pip install --quiet -c constraints.txt scikit-build-core nanobind cmake ninja
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]' -e lab
	touch $@

demo: $(VENV)/.installed
	$(BIN)/batchnorm demo

demo-distributed: $(VENV)/.installed
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

sanitize:
	bash csrc/sanitize.sh

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
