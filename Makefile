# `make` alone lists the targets. The work is done in tools/, which can be run without make.

VLLM ?= 0.32.0
PYTHON ?= python3
PORT ?= 8000
TESTS ?= tests
ARGS ?=
PYTEST_ARGS ?=

DEFAULT_VLLM := 0.32.0
VERSIONS := $(patsubst requirements/cpu-%.lock,%,$(sort $(wildcard requirements/cpu-*.lock)))
# One environment per version of vLLM, so that `make test VLLM=0.30.0` leaves .venv alone.
VENV ?= $(if $(filter $(DEFAULT_VLLM),$(VLLM)),.venv,.venv-$(VLLM))
BIN = $(VENV)/bin
SETUP = $(PYTHON) tools/setup_env.py --vllm $(VLLM) --venv $(VENV) $(if $(CPU),--cpu)

.DEFAULT_GOAL := help
.PHONY: help setup environment wheels triton serve test test-all test-modes stress gpu bench lint format types doctor lock \
        clean distclean

help: ## this list
	@echo "make TARGET [VLLM=$(VLLM)] [PYTHON=$(PYTHON)] [VENV=$(VENV)]"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "vLLM versions with a lock file: $(VERSIONS)"

setup: ## create or repair the environment; CPU=1 also where there is a GPU
	@$(SETUP)

# What the targets below need: the same, silent when there is nothing to do.
environment:
	@$(SETUP) --quiet

# vLLM releases to check patches against without installing them.
wheels: environment
	@if [ -f tools/fetch_wheels.py ]; then $(BIN)/python tools/fetch_wheels.py; fi

# Triton, beside the environment: GPU kernels are tested in its interpreter. Without it, skipped.
triton: environment
	@-$(BIN)/python tools/fetch_triton.py

serve: environment ## serve the demo model: PORT=8000, ARGS="more options of vllm serve"
	@exec $(BIN)/python tools/serve_demo.py --port $(PORT) -- $(ARGS)

test: environment wheels triton ## all tests: TESTS="tests/test_x.py", PYTEST_ARGS="-x -k name", VLLM=0.30.0
	$(BIN)/python -m pytest $(TESTS) $(PYTEST_ARGS)

test-all: ## all tests on every version of vLLM that has a lock file
	@set -e; for version in $(VERSIONS); do \
	    echo "== vLLM $$version"; $(MAKE) --no-print-directory test VLLM=$$version; done

gpu: ## on a machine with a GPU, torch and Triton: the kernels there, beside cuBLAS
	@tools/gpu_check.sh

# Frontend, shared memory and scheduler switched off in turn, and vLLM's own API servers.
MODES = "--scalellm.ipc off" "--scalellm.scheduler off" "--scalellm.frontend off" \
    "--scalellm.frontend off --api-server-count 3"

test-modes: environment ## the API tests with features off, and under vLLM's own API servers
	@set -e; for mode in $(MODES); do echo "== $$mode"; \
	    SCALELLM_TEST_OPTIONS="$$mode" $(BIN)/python -m pytest \
	    tests/test_differential.py tests/test_clients.py $(PYTEST_ARGS); done

stress: environment ## proofs of shared memory at full size: 10 million records, 5,000 kills
	SCALELLM_STRESS=full $(BIN)/python -m pytest -s tests/test_ring_processes.py $(PYTEST_ARGS)

bench: environment ## compare with plain vLLM: ARGS="options of scalellm bench compare"
	$(BIN)/scalellm bench compare $(ARGS)

lint: environment ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: environment ## let ruff format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: environment ## mypy
	$(BIN)/python tools/check_types.py

doctor: environment ## which features work on this vLLM, and why not
	$(BIN)/scalellm doctor $(ARGS)

lock: environment ## resolve requirements/cpu-$(VLLM).lock anew; ARGS=--upgrade for newer versions
	$(BIN)/python tools/lock.py --vllm $(VLLM) $(ARGS)

clean: ## remove caches and build output
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## remove the environment of VLLM=… and downloads, too
	rm -rf $(VENV) .cache
