# `make demo` and `make test` need only python3 (>= 3.11, with venv and pip) and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS = $(shell $(BIN)/python -c 'import os; print(min(2, os.cpu_count() or 1))')

.PHONY: help setup demo test test-exhaustive test-faults test-clusters test-clusters-quick check clean

help:
	@echo "make demo    train a small GPT on the source code of Python's library: about three minutes"
	@echo "make test    run the tests: about ten minutes on two cores"
	@echo "make test-exhaustive  run the tests that take minutes, which are too slow for every change"
	@echo "make test-faults  run only those that kill runs 200 times"
	@echo "make test-clusters  run the tests with a real Slurm, MPICH and Open MPI (Debian's, see .ci/run), as root"
	@echo "make test-clusters-quick  run only those that take seconds, and one run that reaches its walltime"
	@echo "make check   check lint, format, types and import layers"
	@echo "make setup   install everything into $(VENV) (the other targets do it when needed)"
	@echo "make clean   remove all files that these targets make, $(VENV) and runs/demo included"

setup: $(STAMP)

# Install again only when one of these files has changed.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit("error: Python 3.11 or newer is needed, this is %d.%d; try: make setup PYTHON=python3.12" % v[:2] if v < (3, 11) else 0)'
	@echo "Installing into $(VENV); the first time takes a few minutes."
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m llm.trainers.gpt --config examples/demo.toml

test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS)

test-exhaustive: $(STAMP)
	$(BIN)/python -m pytest -q -m "exhaustive and not clusters"

test-faults: $(STAMP)
	$(BIN)/python -m pytest -q -m exhaustive tests/faults

# One test at a time, because they measure time.
test-clusters: $(STAMP)
	$(BIN)/python -m pytest -q -rs -m clusters tests/clusters

test-clusters-quick: $(STAMP)
	$(BIN)/python -m pytest -q -rs -m "clusters and not exhaustive" tests/clusters

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) runs/demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage .coverage.*
	find llm tests -name __pycache__ -type d -prune -exec rm -rf {} +
