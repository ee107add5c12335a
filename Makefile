# Each command makes the environment it needs. PYTHON=python3.12 make demo chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

demo: $(VENV)/demo.stamp
	$(BIN)/zolightning demo $(ARGS)

test: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q $(ARGS)

test-slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q -m slow $(ARGS)

$(VENV)/demo.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

.PHONY: demo test test-slow clean
