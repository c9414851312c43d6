# `make demo` and `make test` need Python 3.10 or newer and nothing else: both install into .venv first.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CACHES := .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist htmlcov site

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check docs format clean

help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP)  ## Train a ResNet-18 DQN on Pong through RL-Zoo: a few minutes on two CPU cores
	@$(PY) scripts/demo.py

# One process a core and one thread a process: several torch threads in each would fight for the cores.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4

test: $(STAMP)  ## Run the tests but the slow ones, with coverage
	@$(PYTEST) -m 'not slow' --cov --cov-report=term --cov-fail-under=95

test-slow: $(STAMP)  ## Run the slow tests: RL-Zoo, second processes, thousands of updates
	@$(PYTEST) -m slow

check: $(STAMP)  ## Lint, formatting, types and the layers; changes nothing
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

docs: $(STAMP)  ## Build the documentation into site/; warnings are errors
	@# The variable silences a notice of the theme about its successor. With --quiet, --strict would let warnings pass.
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

format: $(STAMP)  ## Repair what ruff can
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

clean:  ## Remove caches and build output; .venv and logs stay
	rm -rf $(CACHES)
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# The stamp makes a second call start at once, until pyproject.toml changes.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Needs Python 3.10 or newer: make PYTHON=python3.12")'
	@echo "Installing into $(VENV). PyTorch is large: the first time takes some minutes."
	@# A .venv of another tool may have no pip; one that was moved or cut off has not even a Python.
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PY) -m pip install -q --upgrade pip
	@$(PY) -m pip install -q -e '.[atari,zoo,contrib,tools,dev,docs]'
	@touch $@
