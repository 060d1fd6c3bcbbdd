# The commands of the README (make demo-quick, make demo, make test) and the small ones behind them.
# Everything is written below this folder: .venv (packages), .cache (downloads, models), runs (run folders).

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup models demo demo-quick test test-fast test-stack test-long lint format lock clean
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(shell command -v $(p))) python3)
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
MODELS := .cache/models
TEACHER := $(MODELS)/smollm2-135m-instruct
STUDENT := $(MODELS)/smollm2-135m-20-layers
STUDENT_LAYERS := 0-9,20-29
# The extras whose libraries are tested, and so are in the lock.
EXTRAS := cpu dev tensorboard wandb mlflow trackio
# Test files at once: most of a test is processes that start. Each worker takes up to 10 GB of memory.
WORKERS ?= 2
# In the order of tests/conftest.py: xdist's own begins with the files of most tests, and ends with the longest.
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Caches stay in the checkout; nothing phones home; bytecode is cached, or every worker process compiles the stack again.
export XDG_CACHE_HOME ?= $(CURDIR)/.cache
export TRITON_CACHE_DIR ?= $(XDG_CACHE_HOME)/triton
export TORCH_EXTENSIONS_DIR ?= $(XDG_CACHE_HOME)/torch_extensions
export PYTHONDONTWRITEBYTECODE :=
export VLLM_NO_USAGE_STATS := 1
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

# The stamp carries the hash of everything that decides what is installed, and the folder: a moved checkout is set up again.
SETUP_KEY := $(shell (pwd; cat requirements/*.txt setup.py) | sha256sum | cut -c1-16)
READY := $(VENV)/.ready-$(SETUP_KEY)

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## */\1\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY)  ## make .venv with the locked versions and this project (minutes, then nothing)

$(READY):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) else f"Python 3.11 or 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11 ...")'
	@rm -f $(VENV)/.ready-*
	@test -x $(BIN)/python && $(BIN)/python -c 'import os, sys; sys.exit(os.path.realpath(sys.prefix) != os.path.realpath("$(VENV)"))' \
	  || { echo "setup: making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv --clear $(VENV); }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@exports="$$($(BIN)/python requirements/uv_environment.py)" && eval "$$exports"; \
	if [ -n "$${UV_FIND_LINKS:-}" ]; then \
	  echo "setup: the CPU build of torch comes from pip's find-links: $$UV_FIND_LINKS"; \
	  backend=(); \
	else \
	  echo "setup: the CPU build of torch comes from the index of the PyTorch project (uv --torch-backend=cpu)"; \
	  backend=(--torch-backend=cpu); \
	fi; \
	uv="$(BIN)/uv pip install --quiet --python $(BIN)/python"; \
	echo "setup: installing $$(grep -c == requirements/cpu.txt) locked packages"; \
	$$uv --no-deps "$${backend[@]}" -r requirements/cpu.txt -r requirements/demo.txt; \
	$$uv --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "setup: ready; . $(BIN)/activate to use it by hand"

models: setup  ## convert the demo's teacher and cut its student out of it (seconds from a warm disk, then nothing)
	@DS_ACCELERATOR=cpu TQDM_DISABLE=1 $(BIN)/stillhouse prepare smollm2-135m-instruct $(TEACHER)
	@DS_ACCELERATOR=cpu $(BIN)/stillhouse prune $(TEACHER) $(STUDENT) --keep-layers $(STUDENT_LAYERS)

demo: models  ## distil a real teacher into a smaller student on this machine, and write a report
	@HF_HUB_OFFLINE=1 $(BIN)/stillhouse train configs/demo.yaml

demo-quick: models  ## a few minutes of the same: a falling loss, and an answer before and after
	@HF_HUB_OFFLINE=1 $(BIN)/stillhouse train configs/demo-quick.yaml

test: test-fast test-stack  ## all tests: the fast tier, then the tier on real Ray, vLLM and DeepSpeed

test-fast: setup  ## the fast tier alone: no Ray, no engine
	@$(BIN)/python -m pytest -q $(PARALLEL) -m "not stack and not gpu and not long"

test-stack: models  ## the real-stack tier alone
	@$(BIN)/python -m pytest -q $(PARALLEL) -m "stack and not gpu and not long" --durations=40 --durations-min=10

test-long: models  ## the long tests: a soak with kills, fuzzing (half an hour or more; one file at a time)
	@$(BIN)/python -m pytest -q -m "long and not gpu" --durations=10

lint: setup  ## ruff, as pre-commit runs it
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: setup  ## let ruff format and mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: setup  ## resolve requirements/cpu.txt again (what is pinned stays unless setup.py rules it out)
	@UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" $(BIN)/uv pip compile setup.py $(addprefix --extra ,$(EXTRAS)) \
	  --overrides requirements/overrides.txt --python-version 3.11 $(if $(PIP_FIND_LINKS),,--torch-backend=cpu) \
	  --no-emit-index-url --no-emit-find-links --no-header --no-annotate --quiet --output-file requirements/cpu.txt

clean:  ## remove .venv, caches and build leftovers; run folders stay
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
