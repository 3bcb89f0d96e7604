# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
THREADS ?= 2
WORKERS ?= 2

.PHONY: demo test lint bench clean

demo: $(READY)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/quickstart.py

# First, beside nothing else: the tests whose leases run out in seconds.
LEASES := $(addprefix tests/test_,cli.py heartbeat.py kills.py leases.py races.py workers.py)
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST) $(LEASES)
	$(PYTEST) $(addprefix --ignore=,$(LEASES))

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	@echo "Each benchmark is run by hand; its docstring says what it takes:"
	@ls benchmarks/*.py benchmarks/reliability/[a-z]*.py | sed 's|^|  $(BIN)/python |'

# torch comes first and pinned: a resolver left to choose takes a build with gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,bench,dashboard]"
	@touch $@

clean:
	rm -rf .venv
