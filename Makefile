# Each target works from a bare clone: it creates .venv, installs what is needed, then does its job.
ifeq ($(VERSIONS),newest)
# The newest versions that fit together (docs/installation.md), which Python 3.12 and later have, in a venv of their own.
PYTHON ?= $(shell for version in 3.14 3.13 3.12; do python$$version -c "" 2>/dev/null && echo python$$version && break; done)
VENV ?= .venv-newest
endif
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# cpu or gpu; the other targets go on with what the venv has.
EXTRA ?= $(if $(wildcard $(VENV)/.installed-gpu),gpu,cpu)
INSTALLED := $(VENV)/.installed$(if $(filter gpu,$(EXTRA)),-gpu)
# The two builds of FBGEMM have the same files: one over the other is neither.
OTHER_BUILD := $(VENV)/lib/python3*/site-packages/fbgemm_gpu$(if $(filter gpu,$(EXTRA)),_cpu)-[0-9]*.dist-info

PRETENDED := .venv-pretended-gpu
# uv installs everything by one command and several times as fast; PIP_FLAGS are pip's.
UV ?= $(if $(PIP_FLAGS),,$(shell command -v uv))

.PHONY: install quickstart test test-fast test-thorough test-pretended-gpu gpu-check check format docs site lock check-install release clean help

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

install: $(INSTALLED)  ## create .venv and install torchdlrm in it (EXTRA=gpu: the CUDA builds; VENV=another folder)

$(INSTALLED): pyproject.toml requirements/torchrec.txt
	@test -n "$(PYTHON)" || { echo "VERSIONS=newest needs Python 3.12 or newer in PATH; or name one: PYTHON=/path/to/python3.13" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
	  { echo "torchdlrm needs Python 3.11 to 3.14; this is $$($(PYTHON) --version). Try: make install PYTHON=python3.11" >&2; exit 2; }
	@case '$(EXTRA)' in cpu|gpu) ;; *) echo "EXTRA=$(EXTRA): must be cpu or gpu" >&2; exit 2;; esac
	@ls -d $(OTHER_BUILD) >/dev/null 2>&1 && \
	  { echo "$(VENV) has the other build of FBGEMM; one over the other is neither. Try: make install EXTRA=$(EXTRA) VENV=.venv-$(EXTRA), or make clean first" >&2; exit 2; } || true
	@test $(EXTRA) = cpu || test $$(uname -m) = x86_64 || \
	  { echo "EXTRA=gpu: FBGEMM has CUDA builds for x86-64 alone; this is $$(uname -m), where EXTRA=cpu works" >&2; exit 2; }
	@echo "installing into $(VENV): gigabytes to fetch and unpack, which takes one to five minutes without a word (docs/installation.md)"
ifneq ($(UV),)
	UV_PROJECT_ENVIRONMENT=$(VENV) $(UV) sync --quiet --python $(PYTHON) --extra $(EXTRA) --extra dev
else
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --editable '.[$(EXTRA),dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps --requirement requirements/torchrec.txt
endif
	@touch $@

quickstart: $(INSTALLED)  ## train and evaluate a DLRM on a synthetic click log, in minutes
	$(BIN)/dlrm quickstart

test: $(INSTALLED)  ## run the tests on up to four cores (VERSIONS=newest: with the newest torch, in .venv-newest)
	@$(BIN)/python -m compileall -q src  # else each of a thousand processes does, where Python may not write bytecode
	$(BIN)/python -m pytest -n auto --maxprocesses 6 --dist loadfile --no-loadscope-reorder

test-fast: $(INSTALLED)  ## run the unit tests without the slow ones
	$(BIN)/python -m pytest -n auto --maxprocesses 6 --dist loadfile tests/unit tests/test_architecture.py -m "not slow and not thorough"

test-thorough: $(INSTALLED)  ## run the tests that `make test` leaves out because they take long: before a release
	$(BIN)/python -m pytest -n auto --maxprocesses 6 --dist loadfile -m thorough

test-pretended-gpu: $(PRETENDED)/.installed  ## run all host code of GPUs without one: needs gcc and 8 GB for the CUDA builds
	PRETENDED_GPUS=8 $(PRETENDED)/bin/python tests/pretended_gpu/libraries.py \
	  $(PRETENDED)/bin/python -m pytest tests/pretended_gpu -n auto --maxprocesses 4 --dist loadfile $(PYTEST_FLAGS)

$(PRETENDED)/.installed: pyproject.toml requirements/pretended-gpu.txt
	@test $$(uname -m) = x86_64 || { echo "FBGEMM has CUDA builds for x86-64 alone; this is $$(uname -m)" >&2; exit 2; }
	@command -v gcc nm >/dev/null || { echo "needs gcc and nm, which compile the pretended GPU" >&2; exit 2; }
	$(PYTHON) -m venv $(PRETENDED)
	$(PRETENDED)/bin/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --editable . --requirement requirements/pretended-gpu.txt
	@touch $@

gpu-check: $(INSTALLED)  ## examine this machine and its GPUs in under ten minutes; writes gpu-report.json, to send
	$(BIN)/python benchmarks/gpu_check.py --out gpu-report.json

check: $(INSTALLED)  ## run the linter, the format check and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## fix what lint and format can fix automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## regenerate what docs/ has of the code: configuration.md, and images/ of docs/performance/*.json
	$(BIN)/python -c 'import pathlib, torchdlrm.config as c; pathlib.Path("docs/configuration.md").write_text(c.configuration_markdown())'
	$(BIN)/python -m website.pictures

site: $(INSTALLED)  ## build the site of the documents in build/site; a broken link, an unlisted page or unknown code fails
	$(BIN)/python -m website.notebooks  # those that have changed since they were executed
	$(BIN)/python -m website.build

lock:  ## write requirements/cpu.lock and gpu.lock afresh: exact versions with hashes, for any pip (needs uv)
	@test -n "$(UV)" || { echo "make lock needs uv: pip install uv" >&2; exit 2; }
	$(UV) lock --quiet --upgrade
	for extra in cpu gpu; do $(UV) export --quiet --frozen --format requirements.txt --extra $$extra --no-emit-project \
	  --no-annotate --no-header --output-file requirements/$$extra.lock >/dev/null || exit; done

check-install:  ## install in every way that docs/installation.md has, from nothing, and try each: takes long (WAYS=lock)
	$(PYTHON) .ci/install.py $(WAYS) --python $$(command -v $(PYTHON))

release:  ## build and try a release: make release VERSION=0.3.0
	$(PYTHON) .ci/release.py $(VERSION)

clean:  ## remove .venv and caches (not .venv-pretended-gpu, which takes long to fetch)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
