# Every target sets up what it needs in $(VENV); `make help` lists them.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Each worker has up to ten ranks of its own, most of them waiting: more than four workers would cost memory for nothing.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal
PACKAGES := hf_megatron,hf_megatron_conversion
# What notices that a release of another library changed something this package relies on.
TRIPWIRES := tests/packaging/test_private_interfaces.py tests/packaging/test_public_api.py \
	tests/models/test_transformers_interfaces.py tests/models/test_arguments.py tests/models/test_registration.py \
	tests/models/test_equality.py tests/models/test_generate.py tests/models/test_loading.py \
	tests/models/test_saving.py tests/models/test_fsdp.py tests/training/test_trainer.py tests/peft/test_equality.py

.DEFAULT_GOAL := help
.PHONY: help install format lint typecheck test test-all test-gpu test-fake-gpu test-mutants fuzz test-newest test-oldest \
	tripwires bench cards docs build check quickstart clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Set up .venv with the package, editable, and all tools

# torch goes first and alone: it is the one package with builds of very different sizes, and a resolver that meets it
# among other requirements may fetch several before it settles.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; choose one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable . --group dev
	@touch $@

format: install ## Reformat the code and mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lint: install ## Style, spelling, metadata and the directions of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/validate-pyproject pyproject.toml
	$(BIN)/lint-imports

typecheck: install ## mypy --strict
	$(BIN)/mypy

test: install ## The tests that run in minutes on a CPU
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PARALLEL)

test-all: install ## All tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu" $(PARALLEL)

test-gpu: install ## The tests that need a GPU
	$(BIN)/python -m pytest -m gpu

# TORCH=torch==2.14.1 chooses the build; without it, the newest that the package index has.
FAKE_GPU := $(VENV)-fake-gpu
test-fake-gpu: $(FAKE_GPU)/libcuda.so.1 ## A GPU's code path at the paper's sizes without a GPU, in .venv-fake-gpu (5 GB)
	LD_PRELOAD=$(abspath $<) $(FAKE_GPU)/bin/python -m pytest $(PARALLEL) tests/fake_gpu

$(FAKE_GPU)/.installed: pyproject.toml constraints.txt
	.ci/environment pinned $(FAKE_GPU) $(PYTHON) $(TORCH)

# triton, which CUDA builds of torch need, has the headers.
$(FAKE_GPU)/libcuda.so.1: tests/fake_gpu/driver.c $(FAKE_GPU)/.installed
	@$(FAKE_GPU)/bin/python -c 'import sys, torch; sys.exit(None if torch.version.cuda else "This torch is no CUDA build; choose one with TORCH=")'
	cc -shared -fPIC -o $@ -Wl,-soname,libcuda.so.1 \
		-I$$(echo $(FAKE_GPU)/lib/python*/site-packages/triton/backends/nvidia/include) $<

test-mutants: install ## Plant defects in a copy, one at a time, and see that the tests catch them
	$(BIN)/python -m tests.mutants $(MUTANTS)

SECONDS := 60
fuzz: install ## Change checkpoints, token files and texts at random for SECONDS of CPU time, and see that the readers stay safe
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

# TORCH=torch==2.13.0 keeps to a build of torch that is at hand: others may be downloads of gigabytes.
test-newest: ## Fast tests and quickstart with the newest releases that pyproject.toml admits, in .venv-newest
	.ci/environment newest $(VENV)-newest $(PYTHON) $(TORCH)
	$(MAKE) test quickstart VENV=$(VENV)-newest

test-oldest: ## The same with the oldest releases, in .venv-oldest
	.ci/environment oldest $(VENV)-oldest $(PYTHON) $(TORCH)
	$(MAKE) test quickstart VENV=$(VENV)-oldest

tripwires: install ## The tests that notice a change in another library, and the quickstart; part of test
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PARALLEL) $(TRIPWIRES)
	$(BIN)/hf-megatron quickstart --overwrite

bench: install ## Every benchmark; figures go to benchmarks/results
	@set -e; for script in benchmarks/bench_*.py; do \
		echo "$$script"; $(BIN)/python -m "benchmarks.$$(basename "$$script" .py)"; \
	done

cards: install ## Rewrite the model cards from presets and planner
	$(BIN)/python model_cards/generate.py

$(VENV)-docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --constraint constraints.txt pip
	$(VENV)-docs/bin/python -m pip install --quiet --constraint constraints.txt --group docs
	@touch $@

docs: $(VENV)-docs/.installed ## The documentation as a site, in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build

build: install ## Source distribution and wheel, checked and tried in a fresh environment
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/check-wheel-contents --toplevel $(PACKAGES) dist
	.ci/try-wheel dist/*.whl $(BIN)/python

check: lint typecheck test ## What CI runs before the build

quickstart: install ## Train, convert and check a small GPT-2 on two CPU ranks, without a download
	$(BIN)/hf-megatron quickstart --overwrite

clean: ## Remove what builds and tools leave behind, but not .venv
	rm -rf build dist *.egg-info conversion/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
