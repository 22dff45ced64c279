# `make demo` and `make test` do everything on a bare machine with Python 3.11, pip and make.

PYTHON ?= python3
# for pip install, such as PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" where there is no GPU
PIP_FLAGS ?=
# for pytest, such as PYTEST_FLAGS="-k collator -x"
PYTEST_FLAGS ?=
# for vlmtune.run, such as DEMO_FLAGS="train.seed=1"
DEMO_FLAGS ?=

# two threads are enough for small models; on busy cores OpenMP's threads should sleep where they would spin
export OMP_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= passive

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint slow install clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: $(INSTALLED)  ## fine-tune a small vision-language model on the CPU, offline, and show what it learnt
	$(BIN)/python -m vlmtune.run recipes/demo.yaml --overwrite $(DEMO_FLAGS)

test: lint  ## lint, types and all tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_FLAGS)

lint: $(INSTALLED)  ## ruff, import-linter, pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

slow: $(INSTALLED)  ## the longer proofs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(PYTEST_FLAGS)

install: $(INSTALLED)  ## the environment in .venv

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("$(PYTHON) is older than Python 3.11: name another one, make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable ".[dev]"
	touch $@

clean:  ## remove the environment and what tools left behind
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache .hypothesis
