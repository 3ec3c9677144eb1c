# Two commands do everything on a fresh machine: `make demo` and `make test`. Nothing outside $(VENV) is touched.
VENV ?= .venv
PYTHON ?= python3
# processes that share the tests, one thread each
WORKERS ?= 2
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
export PYTHON

.PHONY: help demo test test-all check docs bench clean

help:
	@echo "make demo      install, fetch real photos, embed, search, classify; pictures in demo/"
	@echo "make test      install, ruff, mypy, the default tests (a few minutes)"
	@echo "make test-all  the slow tests as well"
	@echo "make bench     the measurements, into benchmarks/results/"
	@echo "make docs      rebuild the generated pages and the examples' output"
	@echo "make clean     remove the environment, the demo and all caches"

demo: $(VENV)/.core
	$(BIN)/python scripts/demo.py

test: check
	$(PYTEST) -m "not slow"

test-all: check
	$(PYTEST)

check: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks scripts docs
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/python docs/build.py

bench: $(VENV)/.dev
	set -e; for script in $$(grep -l __main__ benchmarks/*.py | grep -v second_encoder); do $(BIN)/python $$script; done

clean:
	rm -rf $(VENV) demo build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.core: pyproject.toml scripts/install.sh
	scripts/install.sh $(VENV)
	touch $@

$(VENV)/.dev: pyproject.toml scripts/install.sh
	scripts/install.sh $(VENV) dev
	touch $@ $(VENV)/.core
