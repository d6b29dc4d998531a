# Two commands are enough on a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-hosts check lint browser docs release-check bench bench-full bench-features pins clean

demo: $(VENV)/.demo ## compare SAEs without and with MonoLoss on real images
	$(BIN)/monoloss demo

test: lint browser ## ruff, mypy and every test
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m tests.hosts

test-hosts: $(VENV)/.dev ## the tests of trainers that need an environment of their own
	$(BIN)/python -m tests.hosts

check: lint ## ruff, mypy and the quick tests
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

browser: ## the Chromium that the tests of the page need; installed if this is Debian and you are root
	@for name in chromium chromium-browser google-chrome chrome; do \
	    command -v $$name >/dev/null && exit 0; \
	done; \
	{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } \
	    || echo "There is no Chromium. Install it, or the tests of the page are left out."

docs: $(VENV)/.docs ## build the site into site/, running its tutorials
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

release-check: $(VENV)/.release ## what a release must pass: build, metadata, clean installs
	$(BIN)/python tests/release_check.py

bench: $(VENV)/.dev ## speed and memory against the papers' algorithms, in under 3 minutes
	$(BIN)/python -m benchmarks

bench-full: $(VENV)/.dev ## the same with more rounds and samples
	$(BIN)/python -m benchmarks --full

bench-features: $(VENV)/.dev ## extracting and loading features, about a quarter of an hour
	$(BIN)/python -m benchmarks --features --full

pins: $(VENV)/.release ## choose the versions in constraints.txt anew
	$(BIN)/uv pip compile pyproject.toml --quiet --upgrade --universal --python-version 3.10 \
	    --extra all --extra dev --extra release --no-annotate \
	    --custom-compile-command "make pins" --no-emit-package monoloss_plugin --output-file constraints.txt

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis

# constraints.txt pins the versions that CI installs; pyproject.toml keeps the honest ranges.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable ".[$*]"
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
