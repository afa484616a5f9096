# `make demo` and `make test` set up everything they need in .venv and run; both work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# What CI runs of PEFT's own tests; `python tests/peft_suite/run.py` runs all parts that concern LoRA.
PEFT_PARTS := test_config test_custom_models test_decoder_models test_lora_variants test_low_level_api

.PHONY: demo bench real gpu test serve-test peft-suite lint rooms types docs build clean

demo: $(VENV)/.demo
	$(BIN)/python -m examples.demo

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.mini_ucit --quick

# On weights and pictures that package registries carry; a night on two cores. `.venv/bin/python -m benchmarks.real_weights`
# takes other models and tasks.
real: $(VENV)/.real
	$(BIN)/python -m benchmarks.real_weights

# Needs a GPU; `.venv/bin/python -m benchmarks.gpu --tiny` does the same in miniature without one.
gpu: $(VENV)/.gpu
	$(BIN)/python -m benchmarks.gpu

# What the tests of a file share is made once, where one process runs them all.
test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# With a real vLLM, which wants other versions and so has an environment of its own; two cores, CPUs will do.
serve-test: $(VENV)-vllm/.ready
	$(VENV)-vllm/bin/python -m pytest --numprocesses auto tests/serving

peft-suite: $(VENV)/.dev
	$(BIN)/python tests/peft_suite/run.py --parts $(PEFT_PARTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# docs/architecture.svg: the rooms and their imports as they are.
rooms: $(VENV)/.dev
	$(BIN)/python scripts/draw_rooms.py

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/zensical build --strict

build: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[demo]"
	touch $@

$(VENV)/.real: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[real]"
	touch $@

$(VENV)/.gpu: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[demo,test,lint,docs,build]"
	touch $@

$(VENV)-vllm/.ready: scripts/vllm_environment.sh pyproject.toml
	rm -rf $(VENV)-vllm
	PYTHON=$(PYTHON) scripts/vllm_environment.sh $(VENV)-vllm
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-vllm build dist site *.egg-info many-demo many-bench many-gpu many-real
