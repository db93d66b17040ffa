# Each target works from a bare clone: it creates .venv, installs what is needed, then does its job.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install quickstart test test-fast check format docs clean help

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## create .venv and install torchdlrm in it (CPU build)

$(INSTALLED): pyproject.toml requirements/torchrec.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "torchdlrm needs Python 3.11 or newer; this is $$($(PYTHON) --version). Try: make install PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --editable '.[cpu,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps --requirement requirements/torchrec.txt
	@touch $@

quickstart: $(INSTALLED)  ## train and evaluate a DLRM on a synthetic click log, in minutes
	$(BIN)/dlrm quickstart

test: $(INSTALLED)  ## run all tests on up to four cores
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-fast: $(INSTALLED)  ## run the unit tests without the slow ones
	$(BIN)/python -m pytest tests/unit tests/test_architecture.py -m "not slow"

check: $(INSTALLED)  ## run the linter, the format check and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## fix what lint and format can fix automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## regenerate docs/configuration.md from the config
	$(BIN)/python -c 'import pathlib, torchdlrm.config as c; pathlib.Path("docs/configuration.md").write_text(c.configuration_markdown())'

clean:  ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
