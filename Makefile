# One command each on a fresh machine: `make demo`, `make test`. What they need, `make setup` makes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
RUN ?= runs/demo
ROUNDS ?= 300
SEED ?= 1
WORKERS ?= 3
TORTURE ?= build/torture
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=30

.PHONY: help setup demo test test-long gpu-test torture check format docs bench clean

help:
	@echo "make setup     .venv with pinned packages and the vernier command"
	@echo "make demo      train a small model on two ranks, score its checkpoints beside it, show which are better"
	@echo "make test      tests of everything, WORKERS=3 files at a time (make gpu-test: those that need a GPU)"
	@echo "make test-long the long tests besides: clusters, rounds of kills, the demo in full"
	@echo "make torture   trainings killed at random, ROUNDS=300 SEED=1, each held against one that was not; goes on if stopped"
	@echo "make check     lint, format, types"
	@echo "make docs      docs/cli.md, from the commands"
	@echo "make bench     benchmarks"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt .ci/install-torch .ci/install-system
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make setup PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "Python's venv is missing: sudo apt-get install -y python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	bash .ci/install-system
	bash .ci/install-torch $(BIN)/python $(TORCH)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/vernier prepare configs/demo.yaml
	$(BIN)/vernier train configs/demo.yaml run.dir=$(RUN)

test: setup
	$(PYTEST) -m "not long"

test-long: setup
	$(PYTEST) -m long

gpu-test: setup
	$(BIN)/python -m pytest -m gpu tests/gpu

torture: setup
	$(BIN)/python -m tests.faults.torture --rounds $(ROUNDS) --seed $(SEED) --dir $(TORTURE)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python -m typer launcher.cli utils docs --name vernier --output docs/cli.md

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache *.egg-info
