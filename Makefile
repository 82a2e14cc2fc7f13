# Everything a fresh clone needs: `make demo` and `make test` install what they need by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
FUZZ_SECONDS ?= 60
BENCHMARKS := $(sort $(wildcard tests/benchmarks/bench_*.py))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test lint format bench fuzz clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv with the pinned dependencies (again when these change)

# The stamp comes last, so that an interrupted installation is made again. Running pip over an existing environment
# leaves what already fits; packages that are no longer pinned do no harm. Python compiles what is imported, a fraction
# of all, when it is imported first.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): about 7 GB, a few minutes the first time ..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt \
	  -e '.[demo,dev,openvino]'
	@touch $@

demo: demo/ground_truth.csv ## index, search and measure a small collection of real photographs, in a minute or two
	$(BIN)/cbir index configs/quickstart.yaml
	$(BIN)/cbir search configs/quickstart.yaml "$$(ls demo/queries/*.jpg | head -n 1)" --html demo/search.html
	$(BIN)/cbir evaluate configs/quickstart.yaml --report demo
	@echo
	@echo "One search:    $(CURDIR)/demo/search.html"
	@echo "The report:    $(CURDIR)/demo/report.html"

demo/ground_truth.csv: $(INSTALLED) pipelines/demo.py
	@rm -rf demo/images demo/queries $@
	$(BIN)/python -m pipelines.demo demo

# In two processes, which have no terminal to take a width from; tests that start servers and clusters come last, in
# three, because they often wait, and in the order of tests/service/conftest.py.
test: $(INSTALLED) ## run all tests
	COLUMNS=240 $(BIN)/pytest -n 2 --dist loadfile --durations 10 --ignore tests/service
	COLUMNS=240 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 20 tests/service

lint: $(INSTALLED) ## check style, format, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## let ruff format and repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## run the benchmarks one by one and print their tables
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]' \
	  || echo "asmk could not be built (it needs a C compiler): the comparisons with it are left out"
	@set -e; for script in $(BENCHMARKS); do echo; echo "== $$script"; PYTHONPATH=. $(BIN)/python "$$script"; done

fuzz: $(INSTALLED) ## fuzz every parser of strangers' files with atheris, FUZZ_SECONDS (60) each
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	@set -e; for parser in $$($(BIN)/python -c 'from tests.fuzz.parsers import PARSERS; print(*PARSERS)'); do \
	  echo "== $$parser"; $(BIN)/python -m tests.fuzz.atheris_parsers $$parser -max_total_time=$(FUZZ_SECONDS); done

clean: ## remove the demo, caches and built files, but not .venv
	rm -rf demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find cbir pipelines tests -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)
