# setup, demo, test, soak, lint, bench, bench-fuxictr-quality, bench-peers, bench-profile,
# bench-scale, bench-serving, studies, lock.
# DEVICE=cpu (the default) or cuda picks the lock file.
DEVICE ?= cpu
ifeq ($(filter $(DEVICE),cpu cuda),)
$(error DEVICE is "$(DEVICE)": it must be cpu or cuda)
endif
PYTHON ?= python3.11 python3
UV ?= uv

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/$(DEVICE).lock
# Stamps: what the lock names is installed; so is the package itself.
LOCKED := $(VENV)/$(DEVICE).locked
READY := $(VENV)/$(DEVICE).ready
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check install --no-deps --no-compile

PEERS := .venv-peers

# By default idle OpenMP threads spin, which stalls torch as soon as another process wants the core.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test soak lint bench bench-fuxictr-quality bench-peers bench-profile \
    bench-scale bench-serving studies lock

setup: $(READY)
	@:

demo: setup
	@$(BIN)/recsys-compress demo

test: setup
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# Runs killed at random moments, 20 times alone and 20 times in two processes; 15 minutes.
soak: setup
	@$(BIN)/python -m tests.distributed.soak

lint: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: setup
	@$(BIN)/python -m benchmarks.run

# Stages of training and scoring, and how far each is from what memory and processor allow.
bench-profile: setup
	@$(BIN)/python -m benchmarks.profile

# Beside other libraries, which have an environment of their own: half an hour and more.
bench-peers: setup $(PEERS)/locked
	@$(BIN)/python -m benchmarks.peers.run

# Whether FuxiCTR reaches its published quality: DATA holds Frappe's train, valid and test.parquet.
bench-fuxictr-quality: setup $(PEERS)/locked
	@$(BIN)/python -m benchmarks.peers.run --quality $(DATA)

# Load on a scoring server that is up: make bench-serving URL=http://127.0.0.1:5001/invocations \
#     ROWS=rows.parquet PROCESS=its-id
bench-serving: setup
	@$(BIN)/python -m benchmarks.load $(URL) --rows $(ROWS) $(if $(PROCESS),--process $(PROCESS))
# Memory over a billion ids a field and 100 million rows: some minutes.
bench-scale: setup
	@$(BIN)/python -m benchmarks.scale

# The studies of real data, hours on 2 cores for what has no figures yet; DATA holds movielens-1m/
# and frappe/.
studies: setup
	@for study in movielens_1m frappe; do \
	    $(BIN)/recsys-compress compare studies/$$study.toml --processes 2 \
	        $(if $(DATA),--data $(DATA)); \
	done
	@$(BIN)/python -m benchmarks.method_curves

# A new lock, or another device, starts from an empty environment: nothing stale stays behind.
$(LOCKED): $(LOCK)
	@found=; \
	for python in $(PYTHON); do \
	    if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 11))' \
	        2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "setup needs Python 3.11 with venv: install it, or name it with PYTHON=PATH" >&2; \
	    exit 1; \
	fi; \
	echo "setup: installing $(LOCK) into $(VENV), 1-2 minutes"; \
	$$found -m venv --clear $(VENV)
	@$(PIP) --only-binary :all: --require-hashes --requirement $(LOCK) || { \
	    echo "setup: pip could not install $(LOCK). A torch that ends in +cpu comes from PyTorch's" \
	        "own CPU wheels: name their index or folder to pip (extra-index-url or find-links)" >&2; \
	    exit 1; }
	@# pip compiles on one core; the packages' own tests need no byte code.
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib >/dev/null || true
	@touch $@

$(READY): $(LOCKED) pyproject.toml
	@$(PIP) --no-build-isolation --editable .
	@touch $@
	@echo "setup: $(BIN)/recsys-compress is ready"

$(PEERS)/locked: benchmarks/peers/requirements.lock | $(READY)
	@echo "bench-peers: installing $< into $(PEERS)"
	@$(BIN)/python -m venv --clear $(PEERS)
	@$(PEERS)/bin/$(subst $(BIN)/,,$(PIP)) --only-binary :all: --require-hashes --requirement $<
	@touch $@

# Newest versions that pyproject.toml allows; pins already in a lock stay (remove it to renew all).
COMPILE := $(UV) pip compile --quiet --generate-hashes --only-binary :all: --no-header --no-annotate \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28 --group dev pyproject.toml

lock:
	@command -v $(UV) >/dev/null || { echo "lock needs uv: pip install uv" >&2; exit 1; }
	@$(COMPILE) --extra cpu requirements/cpu.in --excludes requirements/cpu.exclude \
	    $(addprefix --find-links ,$(PIP_FIND_LINKS)) \
	    --output-file requirements/cpu.lock >/dev/null
	@$(COMPILE) --extra cuda --output-file requirements/cuda.lock >/dev/null
