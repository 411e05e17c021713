# cellray: the two commands are `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint slow bench clean help

help:
	@echo "make demo   install, then cells -> store -> pretraining -> fine-tuning -> table, in minutes"
	@echo "make test   install, then lint, types and all tests"
	@echo "make slow   the tests that take minutes each"
	@echo "make bench  the benchmarks of tests/benchmarks"

# torch first and pinned: a free range would take the newest CUDA build, several GB.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python jobs/demo.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy platform/cellray

test: lint
	$(BIN)/python -m pytest

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

bench: $(VENV)/.installed
	$(BIN)/python tests/benchmarks/tokenizers.py
	$(BIN)/python tests/benchmarks/padding.py
	$(BIN)/python tests/benchmarks/families.py
	$(BIN)/python tests/benchmarks/train_step.py --threads 1
	test -d build/atlas || $(BIN)/cellray synthesize uri=build/atlas num_cells=50000
	$(BIN)/python tests/benchmarks/data_path.py build/atlas

clean:
	rm -rf runs build .pytest_cache .mypy_cache .ruff_cache
