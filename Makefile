# Every command sets itself up: the first one makes .venv, later ones only when what it was made from has changed.
# PYTHON=... names the interpreter to make it with (3.11 or later).

PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
BIN := .venv/bin
READY := .venv/.ready

# One thread a process: several test workers and shards share the cores, and one thread gives the same bits everywhere.
# Bytecode is kept whatever the environment says: tests start some hundred processes, and one compiles for all.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=
TEST_WORKERS ?= 2

# matplotlib's list of fonts: here, not in the home folder
export MPLCONFIGDIR := $(CURDIR)/.venv/matplotlib

.PHONY: help setup demo test test-wide fuzz check bench families gpu-test format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      a small real model on 2 stages x 2 ranks, 8 users at once, two pictures in out/"
	@echo "make test      all tests, of large grids one cell for each way through the code"
	@echo "make test-wide every cell of every grid, and more of what is drawn at random"
	@echo "make fuzz      the tests of strange calls and bytes, with FUZZ=1000 examples each"
	@echo "make check     ruff, mypy --strict, import-linter"
	@echo "make bench     the benchmarks; one JSON line each in bench/results/"
	@echo "make families  every causal language model class tried from a tiny configuration; writes docs/families.md"
	@echo "make gpu-test  the tests that need a CUDA device"
	@echo "make format    put the sources into the house format, and the file tree into README.md"
	@echo "make clean     remove everything that was made here"

setup: $(READY)

$(READY): pyproject.toml constraints.txt scripts/install.py
	@test -n "$(PYTHON)" || { echo "polytrace needs Python 3.11 or later: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) scripts/install.py .venv
	@touch $@

demo: $(READY)
	$(BIN)/polytrace demo

test: $(READY)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

test-wide: $(READY)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m "not gpu"

# Other examples each time; a failure tells its own.
FUZZ ?= 1000
fuzz: $(READY)
	$(TEST_ENV) POLYTRACE_FUZZ=$(FUZZ) $(BIN)/python -m pytest -o timeout=0 tests/api/test_fuzzing.py tests/polytrace/test_wire_fuzzing.py

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m bench.run

families: $(READY)
	$(TEST_ENV) $(BIN)/python -m bench.families

gpu-test: $(READY)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
		|| { echo "no CUDA device here: there is nothing that gpu-test could test"; exit 1; }
	$(TEST_ENV) $(BIN)/python -m pytest -m gpu

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/python scripts/tree.py

clean:
	rm -rf .venv out build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
