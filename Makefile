# Everything from a fresh clone: `make up` starts a local stack, `make test` shows that all works. Both install first.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Where the CPU build of torch is, if pip's configured sources don't have it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Of bench-learning: smoke, small or full; bench-fst has smoke (its default), small, medium and full.
SIZE ?= small
# Of bench-learning: anything adds the arms that wait for adapters.
SLOW ?=
# Of bench-gateway: anything adds other gateways, installed below data/ on first use; and a PNG to draw.
PEERS ?=
PLOT ?=
# Of test-faults: names; all without (`python -m tests.faults --list`).
FAULTS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help up test model lint types unit e2e lock bench-gateway bench-feedback bench-scale bench-overload bench-prefix bench-recall bench-replicas bench-learning bench-fst bench-consolidation bench-slow bench-rounds test-faults clean $(VENV)
.DEFAULT_GOAL := help
# Two heavy targets at once would only take turns on the cores.
.NOTPARALLEL:

help:
	@echo "make up              start Redis, vLLM, gateway, worker and scheduler; Ctrl-C stops them"
	@echo "make test            install, lint, check types, run all tests (25 minutes on two quiet cores, up to 45 on busy ones)"
	@echo "make lint | types | unit | e2e      parts of it"
	@echo "make bench-gateway [PEERS=1] | bench-feedback | bench-scale | bench-overload | bench-prefix | bench-recall | bench-replicas      measure; the last line is JSON"
	@echo "make bench-learning SIZE=smoke|small|full   does it learn? small takes about half an hour, with SLOW=1 hours"
	@echo "make bench-fst SIZE=smoke|small|medium|full   Fast-Slow Training against its arms; medium and full want a GPU"
	@echo "make bench-slow             what adapters add to contexts, in one process (hours on two cores)"
	@echo "make bench-consolidation | bench-rounds     many adapters at once (10 minutes); ten rounds of one (half an hour)"
	@echo "make test-faults [FAULTS='kill-redis ...']    breaks one thing after the other under load (half an hour); the last line is JSON"
	@echo "make lock            resolve pyproject.toml again into constraints.txt"
	@echo "make clean           remove the environment and caches; data/ stays"

up: $(STAMP)
	@$(BIN)/fastslow up

test: $(STAMP) model lint types unit e2e

$(VENV): $(STAMP)

# The list is complete, so pip resolves nothing: what is installed is what was tested.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "Python 3.11 or newer is needed and '$(PYTHON)' is none: install it, or name one: make PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || { echo "Creating $(VENV)..."; $(PYTHON) -m venv $(VENV); }
	@echo "Installing the packages of constraints.txt (a few minutes and 3.6 GB the first time)..."
	@$(BIN)/python -m pip install -qq --no-deps -r constraints.txt || { \
		echo "pip's configured sources don't have them all; trying again with PyTorch's index..."; \
		$(BIN)/python -m pip install -qq --no-deps --extra-index-url $(TORCH_INDEX) -r constraints.txt; }
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $(STAMP)

model: $(STAMP)
	@$(BIN)/python -m workers.model --data-dir data

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP) model
	$(BIN)/pytest tests --ignore=tests/e2e --ignore=tests/gpu -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations=8

e2e: $(STAMP) model
	$(BIN)/pytest tests/e2e --durations=8

lock: $(STAMP)
	$(BIN)/python deploy/lock.py --fallback-index-url $(TORCH_INDEX)

bench-gateway: $(STAMP) model
	@$(BIN)/python -m tests.benchmarks.gateway $(if $(PEERS),--peers) $(if $(PLOT),--plot $(PLOT))

bench-feedback: $(STAMP) model
	@$(BIN)/python -m tests.benchmarks.feedback

bench-scale: $(STAMP) model
	@$(BIN)/python -m tests.benchmarks.scale

bench-overload: $(STAMP) model
	@$(BIN)/python -m tests.benchmarks.overload

bench-prefix: $(STAMP) model
	@$(BIN)/python -m tests.benchmarks.prefix

bench-recall: $(STAMP) model
	@$(BIN)/python -m tests.benchmarks.recall

bench-replicas: $(STAMP) model
	@$(BIN)/python -m tests.benchmarks.replicas

bench-learning: $(STAMP) model
	@$(BIN)/python -m tests.benchmarks.learning --size $(SIZE) $(if $(SLOW),--slow)

test-faults: $(STAMP) model
	@$(BIN)/python -m tests.faults $(FAULTS)

# Of its sizes, unless the command line says which.
bench-fst: SIZE = smoke
bench-fst: $(STAMP) model
	@$(BIN)/python -m tests.benchmarks.fst --size $(SIZE)

bench-consolidation: $(STAMP) model
	@$(BIN)/python -m tests.benchmarks.consolidation

bench-slow: $(STAMP) model
	@$(BIN)/python -m tests.benchmarks.slow

bench-rounds: $(STAMP) model
	@$(BIN)/python -m tests.benchmarks.rounds

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./data -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
