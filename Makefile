# `make run` and `make test` need nothing but make and Python 3.10 or newer: each sets up .venv the first time.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The trainer that `make bench` compares with needs another release of trl.
PEER := .venv-peer
# Tools that look at what is installed, in an environment of their own.
AUDIT := .venv-audit
AUDIT_TOOLS := pip-audit==2.10.1 cyclonedx-bom==7.5.0
EXTRAS := deepspeed,quantize,openai,serve,tracking,dev

# Tests start `chatrlhf`, `torchrun` and, through torch, `ninja`: the environment's own must come first.
# One thread a worker: models of tests are too small for more, and two that share the cores wait for each other.
WORKERS ?= auto
PYTEST = PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two goals at once would run two pips in one environment.
.NOTPARALLEL:
.PHONY: help run test test-slow test-nightly lint docs bench audit sbom clean distclean

help:  ## list the targets
	@echo "usage: make <target> [PYTHON=python3.12] [ARGS='more arguments']"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

run: $(VENV)/.stamp-run  ## train the embedded default: actor, reward model and RL, on a CPU, in minutes
	$(BIN)/python main.py config.yaml --type ALL $(ARGS)

test: $(VENV)/.stamp-test  ## the default test suite
	$(PYTEST) -m "not slow" $(ARGS)

# Exit status 5 means that no test was selected, which is fine here and an error in `test`.
test-slow: $(VENV)/.stamp-test  ## the tests that take minutes
	$(PYTEST) -m "slow and not nightly" $(ARGS) || [ $$? -eq 5 ]

test-nightly: $(VENV)/.stamp-test  ## the widest matrices: every family by every way, further seeds
	$(PYTEST) -m nightly $(ARGS)

lint: $(VENV)/.stamp-test  ## check style, formatting, types and words
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python tests/lint_words.py
	$(BIN)/python -m mypy

docs: $(VENV)/.stamp-docs  ## build the site, strictly, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/.stamp-run $(PEER)/.stamp  ## time a PPO iteration against TRL 1.12.0's, a quarter of an hour
	$(BIN)/python -m benchmarks.ppo_step --peer-python $(PEER)/bin/python $(ARGS)

# Strict: a package that could not be looked up is a failure, not a pass.
audit: $(AUDIT)/.stamp  ## look the pins up in the database of known vulnerabilities, which takes the network
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt $(ARGS)

sbom: $(VENV)/.stamp-run $(AUDIT)/.stamp  ## list what is installed, with licences and versions (CycloneDX), in build/sbom.json
	@mkdir -p build
	$(AUDIT)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON \
		--output-file build/sbom.json $(BIN)/python

clean:  ## remove caches and build results
	rm -rf build dist .pytest_cache .ruff_cache
	find . \( -path ./.git -o -path ./$(VENV) \) -prune -o -type d \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +

distclean: clean  ## the same, and remove .venv, .venv-peer and .venv-audit
	rm -rf $(VENV) $(PEER) $(AUDIT)

# The stamps make a second call install nothing.
$(VENV)/.stamp-run: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e .
	@touch $@

# DeepSpeed comes as source and compiles its kernels when they are first used, not here (DS_BUILD_OPS=0).
$(VENV)/.stamp-test: pyproject.toml constraints.txt | $(BIN)/python
	DS_BUILD_OPS=0 $(PIP) install -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $(VENV)/.stamp-run $@

$(VENV)/.stamp-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[docs]"
	@touch $@

$(PEER)/.stamp: constraints.txt
	"$(PYTHON)" -m venv $(PEER)
	grep -v '^trl==' constraints.txt > $(PEER)/constraints.txt
	$(PEER)/bin/python -m pip --disable-pip-version-check install -c $(PEER)/constraints.txt "trl==1.12.0" rich
	@touch $@

$(AUDIT)/.stamp: Makefile
	"$(PYTHON)" -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip --disable-pip-version-check install $(AUDIT_TOOLS)
	@touch $@

# Releases of pip before 21.3 (in Python 3.10.0 to 3.10.2) cannot install this project in editable mode; with a
# newer pip the last command does nothing. A half-made environment is removed, or the next call would take it.
$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "error: '$(PYTHON)' was not found; name a Python >= 3.10 with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python >= 3.10 is needed, '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1);" \
		  "name another with: make PYTHON=/path/to/python3" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	$(PIP) install --quiet "pip>=21.3" || { rm -rf $(VENV); exit 1; }
