# make help        what there is
# PYTHON=python3.12        another interpreter (3.11 or newer)
# TORCH_INDEX=URL          another build of torch: the address of a wheel index
# JOBS=2                   so many trials of a soak at once
PYTHON ?= python3
TORCH_INDEX ?=
JOBS ?= 1
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test matrix check-elsewhere plan-grid plan-limit fuzz lint base clean FORCE
.PHONY: soak-fetch soak-files soak-secrets soak-tokenise soak-kill soak-rot soak-disk soak-nan soak-trainer

help: ## this list
	@awk -F ':.*## ' '/^[a-z -]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  make setup TORCH_INDEX=URL   torch from another wheel index, such as the CPU one its install page names"

setup: $(VENV)/.runtime $(VENV)/.tools ## .venv with the exact versions of constraints.txt

demo: $(VENV)/.runtime ## the main job on the embedded model: plan, tune, measure, report (offline)
	$(BIN)/weitiao demo

test: setup ## every test, on a CPU, offline
	$(BIN)/python -m pytest

matrix: setup ## every method on every model family and kind of base (an hour)
	WEITIAO_MATRIX=1 $(BIN)/python -m pytest tests/methods

soak-kill soak-rot soak-disk soak-nan soak-trainer: setup ## runs hit at random instants, bits, bytes and steps (docs: reliability)
	$(BIN)/python -m tests.soak.$(@:soak-%=%) --jobs $(JOBS)

soak-tokenise: setup ## five million rows to tokens: memory, a kill, broken lines, the second run, the rate
	$(BIN)/python -m tests.soak.tokenise

check-elsewhere: setup ## adapters saved here, loaded by PEFT in another environment (OTHER=its/bin/python): the same logits?
	rm -rf runs/elsewhere
	$(BIN)/python -m tests.methods.elsewhere write runs/elsewhere
	$(OTHER) tests/methods/elsewhere.py read runs/elsewhere

soak-fetch: setup ## 1,000 seeded schedules of download faults; goes on where it stopped
	$(BIN)/python -m tests.hub
	$(BIN)/python -m tests.hub --client huggingface_hub --every 20

soak-files: setup ## 650 hostile and 130 valid files through every entry point, watched (ten minutes; goes on where it was)
	$(BIN)/python -m tests.hostile.soak runs/soak-files

fuzz: setup ## 200,000 sound files with a few bytes changed through the parsers of files from outside (minutes)
	$(BIN)/python -m tests.hostile.fuzz 200000

soak-secrets: setup ## planted secrets through train, crash, resume and merge; every byte searched (goes on where it was)
	$(BIN)/python -m tests.hostile.planted runs/soak-secrets 5

lint: setup ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

plan-grid: setup ## the plan against fresh processes on 168 cells (an hour; goes on where it was)
	$(BIN)/python bench/plan/grid.py runs/plan-grid
	$(BIN)/python bench/plan/grid.py --table runs/plan-grid

plan-limit: setup ## solved plans run under a hard limit of plan + 5 % (hours; goes on where it was)
	$(BIN)/python bench/plan/limit.py runs/plan-limit

base: $(VENV)/.runtime ## make the embedded base model again, into the package (about an hour on two cores)
	$(BIN)/weitiao train recipes/tiny-zh-base.yaml
	cd runs/tiny-zh-base/search/model && cp *config.json model.safetensors tokenizer.json chat_template.jinja weitiao_template.json \
	  $(CURDIR)/weitiao/demo/weitiao-tiny-zh/

clean: ## remove .venv, caches and build outputs; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An index asked for by name that differs from the one set up: torch is installed again from there.
ifneq ($(TORCH_INDEX),)
ifneq ($(TORCH_INDEX),$(shell cat $(VENV)/.torch 2>/dev/null))
$(VENV)/.torch: FORCE
endif
endif

$(VENV)/.torch: | $(BIN)/python
	$(PIP) $(if $(TORCH_INDEX),--force-reinstall --no-deps --index-url $(TORCH_INDEX)) torch
	@echo "$(TORCH_INDEX)" > $@

$(VENV)/.runtime: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) -e .
	@touch $@

$(VENV)/.tools: $(VENV)/.runtime
	$(PIP) -e '.[dev]'
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) here; name one with make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$($(PYTHON) --version) is too old: Python 3.11 or newer is needed; name one with make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
