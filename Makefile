# One command each; every one of them sets up what it needs.
#
#   make setup | demo | test | test-full | lint | bench
#   make test TORCH=2.15.0          the same with another torch release, in an environment of its own
#   make test PYTHON=python3.13     the interpreter a new environment is made from

PYTHON ?= python3
WORKERS ?= 2
PINNED_TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH ?= $(PINNED_TORCH)
VENV := $(if $(filter $(TORCH),$(PINNED_TORCH)),.venv,.venv-torch$(TORCH))
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# Another release of torch brings the Triton that it was built with.
FOR_TORCH := $(if $(filter $(TORCH),$(PINNED_TORCH)),'',-e 's/^torch==.*/torch==$(TORCH)/' -e '/^triton==/d')
BENCH_RESULTS ?= bench-output

# Tests run side by side and each compiles kernels of its own: more threads per process only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full lint format bench clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed $(FOR_TORCH) constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[test,lint]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(PYTEST) -m 'not full'

test-full: $(STAMP)
	$(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/recall.py $(BENCH_RESULTS)
	$(BIN)/python benchmarks/matrix.py $(BENCH_RESULTS)
	$(BIN)/python benchmarks/whole_models.py $(BENCH_RESULTS)
	$(BIN)/python benchmarks/cpu.py $(BENCH_RESULTS)
	$(BIN)/python benchmarks/exported.py $(BENCH_RESULTS)

clean:
	rm -rf .venv .venv-torch* build dist *.egg-info bench-output demo-output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
