# Two commands on a fresh machine: `make demo` and `make test`. They install the versions in constraints.txt, which `make lock` writes.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# A CPU build of torch is enough for everything here. Set TORCH= to keep the one you have, or to choose another. Set CONSTRAINTS= if
# that one conflicts with the locked versions.
TORCH       ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt
# Number of test processes.
JOBS        ?= 2
# The tests that other package versions are most likely to break: folders, caches, native decoding, the command line.
QUICK := $(addprefix tests/test_, $(addsuffix .py, checkpoint elastic packed native decoder cache quiet cli))

PIP    := $(BIN)/pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
OURS   := $(PIP) $(if $(CONSTRAINTS),--build-constraint $(CONSTRAINTS)) --editable
BUILT  := pyproject.toml CMakeLists.txt $(wildcard src/pliant/runtime/native/*)
PYTEST := $(BIN)/pytest --numprocesses $(JOBS) --dist worksteal
FLOOR  := VENV=.venv-floor CONSTRAINTS=constraints-floor.txt
NEWEST := VENV=.venv-newest CONSTRAINTS=

.PHONY: demo test suite quick unit lint generate test-floor test-newest quick-floor quick-newest checked newest lock clean

# The check only warns here: if this Python is too new for the file, pip takes the newest versions.
$(VENV)/.torch: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(if $(CONSTRAINTS),$(BIN)/python tools/versions.py check $(CONSTRAINTS) || true)
	$(PIP) --upgrade pip
	$(if $(TORCH),$(PIP) $(TORCH))
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(BUILT)
	$(OURS) '.[gguf]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(BUILT)
	$(OURS) '.[dev]'
	touch $(VENV)/.demo $@

demo: $(VENV)/.demo
	$(BIN)/pliant demo --out build/demo

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run --Werror src/pliant/runtime/native/*.cpp src/pliant/runtime/native/*.h

unit: $(VENV)/.dev
	$(PYTEST) -m 'not slow'

# The tables of README and the imports for type checkers, after a new step or architecture file.
generate: $(VENV)/.dev
	$(BIN)/python tools/generate.py

test: lint
	$(PYTEST) --cov --cov-report=term

suite: $(VENV)/.dev
	$(PYTEST)

quick: $(VENV)/.dev
	$(PYTEST) -m 'not slow' $(QUICK)

# The lowest versions that pyproject.toml declares, proven to be installed.
test-floor:
	$(MAKE) checked suite $(FLOOR)

quick-floor:
	$(MAKE) checked quick $(FLOOR)

checked: $(VENV)/.dev
	$(BIN)/python tools/versions.py check $(CONSTRAINTS)

# The newest versions on the index, in a fresh environment every time.
test-newest: newest
	$(MAKE) suite $(NEWEST)

quick-newest: newest
	$(MAKE) quick $(NEWEST)

newest:
	rm -rf .venv-newest

lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet --upgrade pip
	TORCH='$(TORCH)' build/lock/bin/python tools/versions.py lock

clean:
	rm -rf build dist .coverage .pytest_cache .ruff_cache .import_linter_cache .hypothesis .venv-floor .venv-newest
