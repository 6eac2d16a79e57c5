# What operators type. Every target sets up .venv first; it is made anew only when requirements-dev.txt changes.

# The first of these that is new enough. Assigned once, because each expansion of the shell call starts every one of them.
ifeq ($(origin PYTHON),undefined)
PYTHON := $(or $(shell for it in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$it -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$it && break; done),python3)
endif
VENV := .venv
RUN := $(VENV)/bin/python
UV := $(VENV)/bin/uv
READY := $(VENV)/.installed
SOURCES := bot.py benchmarks cogs migrations models simulator testing tests utils
# More workers than cores: tests wait for servers and processes most of the time.
WORKERS ?= 6
PYTEST := $(RUN) -m pytest -n $(WORKERS) --dist load --maxschedchunk 1
# What depends on the version of the database, and on a pooler before it.
DATABASE_TESTS := tests/database tests/repositories tests/documents tests/worlds

.DEFAULT_GOAL := help
.PHONY: help setup demo run test test-all test-databases bench soak lint format psql migration docs lock

help: ## Show what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(READY) ## Make .venv from the lock file

$(READY): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Guildbook needs Python 3.11 or newer as $(PYTHON) (found: $$(command -v $(PYTHON) >/dev/null && $(PYTHON) --version 2>&1 || echo none)). Name another one: make setup PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no module venv: install it (Debian, Ubuntu: apt-get install python3-venv), then try again" >&2; exit 2; }
	@if [ -x $(RUN) ] && ! $(RUN) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then rm -rf $(VENV); fi
	@[ -x $(RUN) ] || $(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	@touch $@

demo: setup ## See the real bot at work, without token or database (ARGS=--keep: until Ctrl-C)
	@$(RUN) bot.py demo $(ARGS)

run: setup ## Run the bot with the settings of .env
	@$(RUN) bot.py $(ARGS)

test: setup ## Run the tests in parallel (ARGS="-m quick" for the quick ones, ARGS="tests/bot -k sync" for some)
	@$(PYTEST) $(ARGS)

test-all: setup ## Run the tests, long histories, soaks and fuzzing included
	@GUILDBOOK_TEST_PROFILE=exhaustive GUILDBOOK_PROPERTY_EXAMPLES=400 $(PYTEST) -m "" --timeout 3600 $(ARGS)
	@$(MAKE) --no-print-directory test-databases

test-databases: setup ## Run the tests of the database on other versions of PostgreSQL and through PgBouncer
	@for it in $$($(RUN) -m tests.servers); do echo "$$it"; env $$it $(PYTEST) $(DATABASE_TESTS) || exit 1; done

bench: setup ## Measure, and write benchmarks/results/
	@$(RUN) -m benchmarks $(ARGS)

soak: setup ## Break everything for ten minutes (ARGS="--minutes 2 --kills 20", ARGS=--restores for the database, ARGS=--backups for backups)
	@$(RUN) -m tests.faults $(ARGS)

lint: setup ## ruff, mypy --strict, the migrations against the models, squawk; list very long and very short files
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy .
	@$(RUN) -m utils.operations.migrations check
	@$(RUN) -m utils.operations.migrations lint
	@find $(SOURCES) -name '*.py' ! -name __init__.py -exec wc -l {} + | sort -n | awk '$$2 != "total" && ($$1 < 40 || $$1 > 500) \
	  { print $$2 ": " $$1 " lines: " ($$1 < 40 ? "part of another file?" : "two subjects?") }'

format: setup ## Format the code
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

psql: setup ## Open psql on the database (DATA_DIR=.data/demo for the demo's, ARGS='-c "SELECT 1"' for psql)
	@$(RUN) bot.py db psql $(if $(filter command,$(firstword $(origin DATA_DIR))),--data-dir $(DATA_DIR)) $(ARGS)

migration: setup ## Write a revision from the models: make migration m="add a table" (ARGS=--empty for changes of rows)
	@test -n "$(m)" || { echo 'make migration m="what it does"' >&2; exit 2; }
	@$(RUN) -m utils.operations.migrations revision "$(m)" $(ARGS)

docs: setup ## Write docs/reference/ and docs/images/ from the code
	@$(RUN) -m docs.generate

lock: setup ## Resolve the dependencies of pyproject.toml anew
	$(UV) pip compile pyproject.toml --universal --generate-hashes --python-version 3.11 --no-header --no-annotate -o requirements.txt
	$(UV) pip compile pyproject.toml --group dev -c requirements.txt --universal --generate-hashes --python-version 3.11 --no-header --no-annotate -o requirements-dev.txt
