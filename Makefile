# Every command of the project. Each does its own set-up; `make` alone lists them.
#
# Needs python3 >= 3.11 with venv, gcc and make. All else is installed into .venv, in the
# versions of constraints.txt.

PYTHON ?= python3
ARGS ?=
FUZZ ?= 60

BIN := .venv/bin
CORE := CMakeLists.txt $(wildcard $(addprefix src/memdesc/_core/*.,pyx pxi pxd h))
SOURCES := $(CORE) $(shell find src -name '*.py' -o -name '*.pyi')
# A folder changes when a file comes, goes or moves: the editable install must then be told.
FOLDERS := $(shell find src -type d -not -name __pycache__)
HEADERS := $(wildcard src/memdesc/_core/*.h)
BENCHMARKS := $(filter-out %/common.py,$(wildcard benchmarks/*.py benchmarks/*/__main__.py))
PIP_INSTALL := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install \
	-qq --disable-pip-version-check --constraint constraints.txt
EDITABLE := --no-build-isolation --config-settings build-dir=build/editable --editable

.NOTPARALLEL:
.PHONY: help demo test test-fast test-wheel test-user test-container storm interleave sanitize \
	fuzz bench gpu docs wheel lint types layers headers format clean

help:
	@echo "make demo            the main job; make demo ARGS='--json FILE ...' passes arguments on"
	@echo "make test            all that must hold: lint, types, layers, headers, and every test,"
	@echo "                     also from the wheel, as an ordinary user and as a container's root"
	@echo "make test-fast       the tests shorter than a quarter of a second"
	@echo "make test-wheel      the whole suite on the wheel, on every CPython >= 3.11 found"
	@echo "make test-user       the whole suite as an ordinary user (started as root)"
	@echo "make test-container  the whole suite as a container's root (started as root)"
	@echo "make storm           the long storm of SIGKILLs, and of histories of descriptors"
	@echo "make interleave      the lock-free algorithms of the core in every interleaving, at length"
	@echo "make sanitize        the core under the thread sanitizer, and the address sanitizer"
	@echo "make fuzz            a minute of hostile clients and peers; FUZZ=3600: an hour"
	@echo "make bench           the benchmarks, and what they measure against (iceoryx2, pyzmq)"
	@echo "make gpu             what needs an NVIDIA GPU: its tests and benchmarks, in ten minutes"
	@echo "make docs            the documentation, into docs/_build/html"
	@echo "make wheel           the abi3 wheel, into dist"
	@echo "make format          put the code into form"
	@echo "make clean           remove all that was made here, .venv too"

# --- The commands ---------------------------------------------------------------------------

demo: .venv/demo.stamp
	@$(BIN)/memdesc demo $(ARGS)

test: lint types layers headers .venv/torch.stamp
	@echo "== tests"
	@$(BIN)/pytest --quiet -n 2 -m "not alone" $(ARGS)
	@echo "== tests that measure the whole machine"
	@$(BIN)/pytest --quiet -m alone $(ARGS)
	@$(MAKE) --no-print-directory RUN_ARGS=--short test-wheel test-container test-user

test-fast: .venv/torch.stamp
	@$(BIN)/pytest --quiet -n 2 -m "not slow and not alone" $(ARGS)

test-wheel: wheel .venv/test.stamp
	@$(BIN)/python tests/runs.py wheel $(RUN_ARGS)

test-user: wheel .venv/test.stamp
	@$(BIN)/python tests/runs.py user $(RUN_ARGS)

test-container: .venv/test.stamp
	@$(BIN)/python tests/runs.py container $(RUN_ARGS)

storm: .venv/test.stamp
	@MEMDESC_STORM=long $(BIN)/pytest --timeout 3600 tests/storm tests/stateful $(ARGS)

interleave: .venv/test.stamp
	@MEMDESC_LOCKFREE=long $(BIN)/pytest --quiet tests/lockfree -k interleaving $(ARGS)

sanitize: .venv/test.stamp
	@MEMDESC_LOCKFREE=long $(BIN)/pytest --quiet tests/lockfree -k sanitizer $(ARGS)
	@$(BIN)/python tests/runs.py sanitized

fuzz: .venv/test.stamp
	@$(BIN)/python tests/runs.py fuzz --seconds $(FUZZ)

bench: .venv/bench.stamp
	@for file in $(BENCHMARKS); do $(BIN)/python $$file $(ARGS) || exit; done

gpu: .venv/gpu.stamp
	@$(BIN)/python tests/runs.py gpu $(RUN_ARGS)

docs: .venv/docs.stamp
	@$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

wheel: build/wheel.stamp

lint: .venv/test.stamp
	@echo "== lint"
	@$(BIN)/ruff check --quiet && $(BIN)/ruff format --check --quiet

types: .venv/test.stamp
	@echo "== types"
	@$(BIN)/mypy

layers: .venv/test.stamp
	@echo "== layers"
	@$(BIN)/lint-imports

headers:
	@echo "== headers"
	@for header in $(HEADERS); do \
		$(CC) -std=gnu11 -Wall -Wextra -Werror -fsyntax-only -x c $$header || exit; done

format: .venv/test.stamp
	@$(BIN)/ruff check --fix --quiet && $(BIN)/ruff format

clean:
	rm -rf .venv build dist docs/_build .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# --- Set-up ---------------------------------------------------------------------------------

# What builds the core stays in .venv (no build isolation), so that a change of the core is
# compiled in a second. CMake and Ninja come as packages.
.venv/build.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("memdesc needs Python \
	3.11 or later, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@echo "== setting up .venv"
	@$(PYTHON) -m venv .venv
	@$(PIP_INSTALL) scikit-build-core cython cython-cmake cmake ninja
	@touch $@

.venv/demo.stamp: .venv/build.stamp pyproject.toml $(CORE) $(FOLDERS)
	@$(PIP_INSTALL) $(EDITABLE) '.[cli]'
	@touch $@

.venv/test.stamp: .venv/build.stamp pyproject.toml $(CORE) $(FOLDERS)
	@$(PIP_INSTALL) $(EDITABLE) '.[cli,cuda,fuzz,lint,test]'
	@touch .venv/demo.stamp $@

# PyTorch only in a build without CUDA, a tenth of the size, where such a one is to be had.
.venv/torch.stamp: .venv/test.stamp
	@$(PIP_INSTALL) --only-binary torch "$$(sed -n 's/^torch==.*/&+cpu/p' constraints.txt)" \
		2>/dev/null || echo "== no build of PyTorch without CUDA is to be had here: its tests are \
	skipped; $(BIN)/pip install '.[torch]' brings another build"
	@touch $@

# PyTorch in the build for CUDA (===: not the one without, which is of the same version).
.venv/gpu.stamp: .venv/test.stamp
	@$(PIP_INSTALL) --only-binary torch "$$(sed -n 's/^torch==/torch===/p' constraints.txt)" \
		|| echo "== PyTorch for CUDA is not to be had here: what needs it is left out"
	@touch $@

.venv/bench.stamp: .venv/build.stamp pyproject.toml $(CORE) $(FOLDERS)
	@$(PIP_INSTALL) $(EDITABLE) '.[cli,bench]'
	@touch .venv/demo.stamp $@

.venv/docs.stamp: .venv/build.stamp pyproject.toml $(CORE) $(FOLDERS)
	@$(PIP_INSTALL) $(EDITABLE) '.[cli,docs]'
	@touch .venv/demo.stamp $@

build/wheel.stamp: .venv/build.stamp pyproject.toml README.md LICENSE $(SOURCES) $(FOLDERS)
	@echo "== building the wheel"
	@rm -rf dist
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip wheel -qq --no-deps \
		--disable-pip-version-check --no-build-isolation \
		--config-settings build-dir=build/wheel --wheel-dir dist .
	@touch $@
