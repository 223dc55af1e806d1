# Each target sets up what it needs by itself. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help lab test test-all release fuzz soak lint format docs bench prerequisites

help:  ## list the targets
	@grep -E '^[a-z.]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z.]+):[^#]*## /\1\t/' | expand -t 12

prerequisites:
	@sh .ci/prerequisites $(PYTHON)

# The environment with the project installed in it. Made anew in place when what it is made from changes.
.venv: pyproject.toml constraints.txt | prerequisites
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch .venv

lab: .venv  ## build two isolated networks on this machine and run real clients across them (LAB="--turn coturn --stay")
	$(BIN)/crossnet lab $(LAB)

test: .venv  ## run the tests that take less than five minutes together; installs the real servers they need where it may
	@sh .ci/servers
	$(BIN)/pytest -n auto --maxprocesses 4 -m "not slow" $(TEST)

test-all: .venv  ## run every test, those of minutes and of older versions included
	@sh .ci/servers
	$(BIN)/pytest -n auto --maxprocesses 4 $(TEST)

soak: .venv  ## a gigabyte each way through real processes, on loopback and on shaped links: a quarter of an hour
	@sh .ci/servers
	CROSSNET_TEST_BYTES=1000000000 $(BIN)/pytest -v -s -k "bulk or two_hundred" tests/e2e/test_processes_bulk.py tests/netns

lint: .venv  ## format check, lint, types, import rules, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

docs: .venv  ## make the pages of docs/ that come from the code
	$(BIN)/python -m crossnet.config.reference > docs/configuration.md

format: .venv  ## rewrite the tree in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fuzz: .venv  ## feed what strangers reach with garbage, for FUZZ seconds each, a minute by default; needs Python 3.11
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]' || true
	@BIN=$(BIN) sh .ci/fuzz

release: .venv  ## build the sdist and the wheel, check both, and say what is left to do
	@BIN=$(BIN) sh .ci/release

bench: .venv  ## measure beside real peers, JSON into bench/results
	$(BIN)/python -m bench $(BENCH)
