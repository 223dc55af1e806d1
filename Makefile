# Each target sets up everything it needs. `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help lab test test-all coverage release fuzz soak lint format docs bench prerequisites

help:  ## list the targets
	@grep -E '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z.-]+):[^#]*## /\1\t/' | expand -t 12

prerequisites:
	@sh .ci/prerequisites $(PYTHON)

# The environment with the project installed in it. It is updated when its inputs change.
.venv: pyproject.toml constraints.txt | prerequisites
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch .venv

lab: .venv  ## build two isolated networks on this machine and run real clients across them (LAB="--turn coturn --stay")
	$(BIN)/crossnet lab $(LAB)

test: .venv  ## run the tests that take less than five minutes together; installs the real servers they need if it can
	@sh .ci/servers
	$(BIN)/pytest -n auto --maxprocesses 4 -m "not slow" $(TEST)

test-all: .venv  ## run every test, including those that take minutes and those against the previous version
	@sh .ci/servers
	$(BIN)/pytest -n auto --maxprocesses 4 $(TEST)

coverage: .venv  ## run every test, and fail where a package has fewer of its lines covered than its floor (.ci/coverage)
	@sh .ci/servers
	$(BIN)/python .ci/coverage -n auto --maxprocesses 4 $(TEST)

soak: .venv  ## send a gigabyte each way through real processes, on loopback and on shaped links: a quarter of an hour
	@sh .ci/servers
	CROSSNET_TEST_BYTES=1000000000 $(BIN)/pytest -v -s -k "bulk or two_hundred" tests/e2e/test_processes_bulk.py tests/netns

lint: .venv  ## format check, lint, types, import rules, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

docs: .venv  ## generate the pages of docs/ that come from the code
	$(BIN)/python -m crossnet.config.reference > docs/configuration.md

format: .venv  ## reformat the tree
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fuzz: .venv  ## fuzz the parsers of untrusted input, for FUZZ seconds each, by default a minute; needs Python 3.11
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]' || true
	@BIN=$(BIN) sh .ci/fuzz

release: .venv  ## build the sdist and the wheel, check both, and list the remaining steps
	@BIN=$(BIN) sh .ci/release

bench: .venv  ## measure against HAProxy and coturn, JSON into bench/results
	$(BIN)/python -m bench $(BENCH)
