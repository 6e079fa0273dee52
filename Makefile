# The door for people. Everything else is behind `python -m jobs`.

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# The first interpreter that is really there (a pyenv shim may not be), is 3.11 to 3.13 and can make environments.
PROBE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
BASE_PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c "$(PROBE)" >/dev/null 2>&1 && echo $$python && break; done)

.DEFAULT_GOAL := help
.PHONY: help demo test check clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(STAMP) ## corpora -> dataset -> pretraining -> evaluation -> promotion -> pictures (under 20 minutes on 2 cores)
	$(PYTHON) -m jobs story

test: $(STAMP) ## the whole test suite
	$(PYTHON) -m pytest

check: $(STAMP) ## style, types, layering
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q tests/test_layering.py

clean: ## removes .venv and caches; what was built and trained stays in store/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(BASE_PYTHON)" || { echo "Python 3.11 to 3.13 with venv is needed; set BASE_PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
