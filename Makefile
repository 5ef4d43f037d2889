# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# A CPU build of torch is enough for everything here. Set TORCH= to keep the one you have, or to choose another.
TORCH  ?= torch==2.13.0

.PHONY: demo test unit lint clean

$(VENV)/.demo: pyproject.toml CMakeLists.txt $(wildcard src/pliant/runtime/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e '.[gguf]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/pliant demo --out build/demo

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(VENV)/.dev
	$(BIN)/pytest -m 'not slow'

test: lint
	$(BIN)/pytest --cov --cov-report=term

clean:
	rm -rf build dist .coverage .pytest_cache .ruff_cache .import_linter_cache .hypothesis
