# Every target installs what it needs. A fresh machine needs Python 3.11 or newer, git and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
PARALLEL := -n auto --maxprocesses 4  # test processes; for a single file, call pytest directly

.PHONY: help demo test test-all check format lint types docs clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "bnlab needs Python 3.11 or newer; use make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing what bnlab needs into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)  ## the whole workflow on handwritten digits, with and without batch normalisation
	@$(BIN)/bnlab demo

test: $(READY)  ## the fast tests
	@$(BIN)/python -m pytest $(PARALLEL)

test-all: $(READY)  ## every test, the slow ones too
	@$(BIN)/python -m pytest $(PARALLEL) -m 'slow or not slow'

format: $(READY)  ## format the code
	@$(BIN)/ruff format --quiet . && $(BIN)/ruff check --quiet --fix .

lint: $(READY)
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: make format" >&2; exit 1; }
	@$(BIN)/ruff check --quiet .

types: $(READY)
	@$(BIN)/mypy

docs: $(READY)  ## write the generated pages of docs/
	@$(BIN)/python docs/generate.py

check: lint types test  ## what CI runs: format, lint, types, tests

clean:  ## remove .venv and caches
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
