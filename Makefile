# Two commands are enough on a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint docs bench clean

demo: $(VENV)/.demo ## compare SAEs without and with MonoLoss on real images
	$(BIN)/monoloss demo

test: lint ## everything that CI runs
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs ## build the site into site/
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.dev ## what MonoLoss adds to a training step
	$(BIN)/python benchmarks/training_step.py

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis

# constraints.txt pins the versions that CI installs; pyproject.toml keeps the honest ranges.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable ".[$*]"
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
