# make search               find a policy for a bundled model (MODEL, BUDGET, ARGS)
# make test                 the quick tests
# make slow                 the others that need neither a GPU nor the network
# make check                everything a change must pass
# make schema               write docs/policy.schema.json anew
# make format               rewrite the code in the house format

PYTHON ?= python3
MODEL ?= ldm4
BUDGET ?= 1.5x
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: search install test slow check schema format

search: $(STAMP)
	$(BIN)/autofr search --model $(MODEL) --budget $(BUDGET) $(ARGS)

install: $(STAMP)

# torch comes first and alone, so that a CPU build offered by PIP_FIND_LINKS or
# PIP_EXTRA_INDEX_URL (its version sorts above the CUDA build) is the one that stays.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("autofr needs Python 3.11 or newer, not " + sys.version.split()[0] + "; try: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

# One thread per process: two test processes with a thread pool each only disturb one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test: $(STAMP)
	$(PYTEST)

slow: $(STAMP)
	$(PYTEST) -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test

schema: $(STAMP)
	$(BIN)/python -c "from autofr.policy_file import schema_text; print(end=schema_text())" > docs/policy.schema.json

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
