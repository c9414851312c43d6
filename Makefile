# `make demo` and `make test` need Python 3.10 or newer and nothing else: both install into .venv first.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
EXTRAS := .[atari,zoo,contrib,tools,dev,docs]
# Beside the lowest and newest versions the tests of reports and of Ray are skipped: rliable needs an older pandas, and Ray
# comes late to a new Python.
WITH_ALL := .[atari,zoo,contrib,tools,evidence,ray,dev,docs]
LOWEST := .venv-lowest
NEWEST := .venv-newest
CACHES := .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist htmlcov site

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test coverage test-slow test-lowest test-newest test-wheel check docs dist format clean

help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP)  ## Watch a ResNet-18 DQN learn a game through RL-Zoo: a few minutes on two CPU cores
	@$(PY) scripts/demo.py

# One process a core and one thread a process: several torch threads in each would fight for the cores. A process that is
# done takes tests from the other, so that none waits at the end.
PYTEST_OPTIONS := -n auto --maxprocesses 4 --dist worksteal
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_OPTIONS)

test: $(STAMP)  ## Run the tests but the slow ones
	@$(PYTEST) -m 'not slow' $(COVERAGE)

# Counting statements takes a quarter of the time.
coverage:  ## Run the same tests with coverage, which must be at least 95 %
	@$(MAKE) --no-print-directory test COVERAGE='--cov --cov-report=term --cov-fail-under=95'

test-slow: $(STAMP)  ## Run the slow tests: RL-Zoo, second processes, thousands of updates
	@$(PYTEST) -m slow

test-lowest: $(LOWEST)/.installed  ## Run all tests on the lowest versions that pyproject.toml allows, in .venv-lowest
	@OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest $(PYTEST_OPTIONS)

# No stamp: each call looks for newer releases.
test-newest:  ## Run all tests on the newest versions that pyproject.toml allows, in .venv-newest
	@$(NEWEST)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(NEWEST)
	@$(NEWEST)/bin/python -m pip install -q --upgrade pip
	@$(NEWEST)/bin/python -m pip install -q --upgrade --upgrade-strategy eager -e '$(EXTRAS)'
	@OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(PYTEST_OPTIONS)

check: $(STAMP)  ## Lint, spelling, formatting, types and the layers; changes nothing
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/codespell

docs: $(STAMP)  ## Build the documentation into site/; warnings are errors
	@# The variable silences a notice of the theme about its successor. With --quiet, --strict would let warnings pass.
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

dist: $(STAMP)  ## Build the package into dist/, check it, and try the wheel in an environment of its own
	rm -rf dist
	$(PY) -m build
	$(PY) -m twine check --strict dist/*
	$(PY) scripts/smoke_wheel.py --borrow

test-wheel: dist  ## Try the wheel in an empty environment that gets everything from the registry: some minutes
	$(PY) scripts/smoke_wheel.py

format: $(STAMP)  ## Repair what ruff can
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

clean:  ## Remove caches and build output; .venv, .venv-lowest, .venv-newest and logs stay
	rm -rf $(CACHES)
	find . -path './.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +

# The stamp makes a second call start at once, until pyproject.toml changes.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Needs Python 3.10 or newer: make PYTHON=python3.12")'
	@echo "Installing into $(VENV). PyTorch is large: the first time takes some minutes."
	@# A .venv of another tool may have no pip; one that was moved or cut off has not even a Python.
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PY) -m pip install -q --upgrade pip
	@$(PY) -m pip install -q -e '$(WITH_ALL)'
	@touch $@

# Built anew after each change of a bound, so that nothing of an earlier one stays.
$(LOWEST)/.installed: pyproject.toml scripts/lowest.py
	@$(PYTHON) -m venv --clear $(LOWEST)
	@$(LOWEST)/bin/python -m pip install -q --upgrade pip
	@$(LOWEST)/bin/python -m pip install -q packaging 'tomli; python_version < "3.11"'
	@$(LOWEST)/bin/python scripts/lowest.py > $(LOWEST)/lowest.txt
	@$(LOWEST)/bin/python -m pip install -q -c $(LOWEST)/lowest.txt -e '$(EXTRAS)'
	@touch $@
