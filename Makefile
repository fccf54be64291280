# make run    set up, then search the smallest space and write its report
# make check  format, lint, types, imports, unit tests
# make test   make check, then the suites that plant faults, start Ray or a cluster, or browse
#
# The first call sets up .venv; later calls find its stamp files and start at once.

SHELL := /bin/bash
.NOTPARALLEL:
.PHONY: run check test clean

# The suites start this program hundreds of times: it is compiled once.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q
# On every core; Ray and the browser want them for themselves.
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n auto
SOURCES := $(shell find stability_search search_spaces -type f -not -name '*.pyc')

# The first of these that is Python 3.11 or newer and can make an environment.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	"$$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo "$$name" && break; done)

run: $(VENV)/.installed
	$(BIN)/stability-search run --space quickstart.yaml

# One suite: its name, its command, and what it took. A suite of a marker that no test carries
# yet (pytest's exit status 5) says so and passes.
define suite
	@printf '\n== %s\n' '$(1)'; start=$$SECONDS; status=0; $(2) || status=$$?; \
	if [ "$$status" = 5 ] && [ -n '$(3)' ]; then echo 'no test carries this marker'; status=0; fi; \
	if [ "$$status" != 0 ]; then echo "== $(1): FAILED after $$((SECONDS - start)) s"; exit 1; fi; \
	echo "== $(1): ok, $$((SECONDS - start)) s" | tee -a $(VENV)/.times
endef

check: $(VENV)/.ready
	@rm -f $(VENV)/.times
	$(call suite,format,$(BIN)/ruff format --check .)
	$(call suite,lint,$(BIN)/ruff check .)
	$(call suite,types,$(BIN)/mypy)
	$(call suite,imports,$(BIN)/lint-imports)
	$(call suite,unit tests,$(PARALLEL))

test: check
	$(call suite,fault,$(PARALLEL) -m 'fault and not (ray or cluster or gpu or slow)' --timeout 120,marker)
	$(call suite,ray,$(PYTEST) -m 'ray and not (cluster or gpu or slow)' --timeout 180,marker)
	$(call suite,cluster,$(PYTEST) -m 'cluster and not (gpu or slow)' --timeout 180,marker)
	$(call suite,browser,$(PYTEST) -m 'browser and not slow' --timeout 120,marker)
	@printf '\nEvery suite passed:\n'; cat $(VENV)/.times

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or newer with venv is needed, and none was found.' \
		'Install it (Debian: apt-get install python3-venv), or call: make PYTHON=/path/to/python'; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)

# Development installs the checkout itself, so there is nothing left for `run` to install.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt $(SOURCES)
	[ $(VENV)/.ready -nt pyproject.toml ] && [ $(VENV)/.ready -nt constraints.txt ] \
		|| { rm -rf build; $(BIN)/python -m pip install --quiet -c constraints.txt .; }
	@touch $@

$(VENV)/.ready: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
