# `make demo` and `make test` need Python 3.11 or newer, git and make; everything else goes into .venv.

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,$(if $(shell $(name) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(name))) python3)
BIN := .venv/bin
READY := .venv/.ready
FULL := .venv/.ready-full
# Two test processes with one compute thread each: see tests/conftest.py.
TEST_WORKERS ?= 2
# For all readers together; says so and does nothing where atheris has no wheel.
FUZZ_MINUTES ?= 60

.PHONY: demo test test-full mutants lint lint-style lint-format lint-types docs bench setup clean
.DEFAULT_GOAL := demo

demo: $(READY)  ## The whole way on Fashion-MNIST: choose, train, export, check, report.
	@tools/apt-missing dataset-fashion-mnist
	$(BIN)/convscale demo

test: $(READY)  ## The test suite: under 12 minutes on 2 cores.
	@tools/apt-missing dataset-fashion-mnist chromium
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

test-full: $(FULL)  ## The suite, the sweeps over every model, what only installs, and an hour of fuzzing.
	@tools/apt-missing dataset-fashion-mnist chromium
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal -m "slow or not slow"
	$(BIN)/python tools/fuzz.py --minutes $(FUZZ_MINUTES)

# Lines broken on purpose, each against its named tests: `make mutants MUTANTS="--only 'learn/*' --jobs 2"`; not in CI.
mutants: $(READY)  ## The record is results/mutants.jsonl; what was run is not run again.
	$(BIN)/python tools/mutants.py $(MUTANTS)

lint: lint-style lint-format lint-types  ## What pre-commit runs too.

lint-style: $(READY)
	$(BIN)/ruff check .

lint-format: $(READY)
	$(BIN)/ruff format --check .

lint-types: $(READY)
	$(BIN)/pyright

docs: $(READY)  ## The site, in build/docs/index.html; a warning is an error.
	$(BIN)/python -m sphinx -W --keep-going --quiet -E -b html docs build/docs

# Those that need no file of the user's own; `python -m benchmarks.NAME --help` tells about the others.
BENCHMARKS ?= parity scaling memory loader ablation light ship ship_classify ship_gate kill_loop accidents

bench: $(READY)  ## Side by side with peers; each benchmark writes its records to results/.
	@failed=; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name || failed="$$failed $$name"; \
	done; test -z "$$failed" || { echo "these failed:$$failed" >&2; exit 1; }

setup: $(READY)  ## The virtual environment with everything that development needs.

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "convscale needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "$(PYTHON) can not make a virtual environment (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	@echo "setting up .venv: some minutes and some gigabytes, once"
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,openvino,timm,search,detect,explain,serve,ray,schedule-free]' --group dev
	@touch $@

# What the tests of `make test-full` alone need: `make test` and CI do not wait for it.
$(FULL): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt --group full
	@touch $@

clean:  ## Remove what was built; records, runs and results stay.
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
