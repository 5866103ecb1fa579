# Two commands do all the set-up they need and their job: `make quickstart` and `make test`.
# VENV=dir uses another environment, PYTHON=python3.12 makes it with a certain Python.
VENV ?= .venv
PYTHON ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.ovseg_d2_installed

.DEFAULT_GOAL := help
.PHONY: help setup quickstart compare test lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make the environment (the other commands do it by themselves)

quickstart: setup ## a small world: train FC-CLIP on seen classes, test on all, draw
	$(BIN)/python tools/quickstart.py

compare: setup ## every method on OVShapes: run what has no results yet, write docs/ovshapes.md (ARGS='--render': write only)
	$(BIN)/python tools/compare.py $(ARGS)

test: lint ## check style and run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: setup ## check style only
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: setup ## put the code into its style
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean: ## remove caches and build files (not the environment, data or output)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -path './$(VENV)' -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

# A stamp newer than what it was made from means that nothing is to be done.
$(STAMP): setup.py tools/install_detectron2.py
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { $(find_python); echo "making $(VENV) with $$python"; $$python -m venv $(VENV); }
	@echo "installing the requirements (torch is large: a few minutes the first time)"
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python tools/install_detectron2.py
	@touch $@

# Sets $$python: the PYTHON given, else the first that runs, is new enough and can make an environment
# (3.10 to 3.13 before others: those are tested).
define find_python
	python=; \
	for range in '(3, 10) <= v <= (3, 13)' 'v >= (3, 10)'; do \
	  for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10 python); do \
	    if [ -z "$$python" ] && "$$candidate" -c "import ensurepip, sys, venv; v = sys.version_info[:2]; sys.exit(not ($$range))" 2>/dev/null; then python=$$candidate; fi; \
	  done; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: $(or $(PYTHON),python3): need Python 3.10 or newer with its venv module (on Debian: apt install python3-venv); name one with PYTHON=/path/to/python" >&2; exit 1; \
	fi
endef
