# Every target makes .venv first, with the versions of constraints.txt, and again when those change.
#   make demo    the product's main job on this machine, for real
#   make test    lint, types and tests
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The first Python of at least 3.11 that answers; override with `make PYTHON=/path/to/python`.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$python; break; fi; done)

.PHONY: setup demo test lint format bench clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11 or newer is needed: install it, or name it with make PYTHON=..." >&2; exit 1; fi
	@echo "Installing into $(VENV); this takes some minutes the first time"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[runtime,web,dev]'
	$(BIN)/python -m compileall -q planner runtime
	@touch $@

demo: $(STAMP)
	$(BIN)/plan demo

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy planner runtime

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m bench

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info
