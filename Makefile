# Set-up, the main job and the tests. Needs Python 3.11 or later, git and make; everything else is installed below .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# All files are checked against the hashes of .ci/locked, which .ci/lock.py writes; torch has a build for each hardware.
LOCKED := $(PIP) --require-hashes --no-deps --requirement .ci/locked

.PHONY: anchors cluster compare help install quickstart test test-all lint smollm2 soups switch bench clean

help:
	@echo "make quickstart  build a tiny pair, search its merges, report and export (runs/quickstart)"
	@echo "make test        lint, types and the fast tests"
	@echo "make test-all    the slow tests and the advisories on pinned packages, too; ends with the table of faults"
	@echo "make smollm2     the same as quickstart on a real 135M pair (about 45 minutes on two cores)"
	@echo "make compare     engines at equal scored tokens on the quickstart's pair"
	@echo "make anchors     Functional Dual Anchors beside other merges and controls, three seeds (about half an hour)"
	@echo "make soups       six experts of one base, and a merge for every taste (about 25 minutes on two cores)"
	@echo "make switch      checkpoints that take turns beside every other way to use them, five seeds"
	@echo "make cluster     how many workers a study takes, by simulation, and what large searches need"
	@echo "make bench       scoring, trials and merges beside lm-eval and mergekit on the 135M pair (about 40 minutes)"

install: $(VENV)/.product

$(VENV)/.product: pyproject.toml .ci/locked/product.txt
	$(PYTHON) -m venv $(VENV)
	$(LOCKED)/product.txt
	$(PIP) --constraint .ci/constraints.txt $(TORCH)
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.product .ci/locked/test.txt
	$(LOCKED)/test.txt
	@touch $@

$(VENV)/.prepare: $(VENV)/.test .ci/locked/prepare.txt
	$(LOCKED)/prepare.txt
	@touch $@

quickstart: $(VENV)/.product
	$(BIN)/python studies/quickstart/prepare.py
	$(BIN)/mergefront launch studies/quickstart/study.yaml
	$(BIN)/mergefront calibrate quickstart --method naive --method daca --method dual-align --select post --select knee
	$(BIN)/mergefront report quickstart --out runs/quickstart/report
	$(BIN)/mergefront export quickstart --select knee --weights --overwrite --out runs/quickstart/export
	for folder in runs/quickstart/export/trial-*; do $(BIN)/mergefront calibrate $$folder --method dual-align || exit 1; done
	$(BIN)/mergefront verify runs/quickstart/export
	$(BIN)/mergefront launch studies/quickstart/diversity.yaml
	$(BIN)/mergefront calibrate quickstart-diversity --method naive --method daca --method dual-align --select post --select knee

compare: $(VENV)/.product
	$(BIN)/python studies/quickstart/prepare.py
	$(BIN)/mergefront compare studies/quickstart/study.yaml --budget 60x --seeds 5 --workers 2 \
		--engines composite,gp,tpe,pymoo:nsga2,gradient --out runs/quickstart/compare

smollm2: $(VENV)/.prepare
	$(BIN)/python studies/smollm2-135m/prepare.py
	$(BIN)/mergefront launch studies/smollm2-135m/study.yaml --profile
	$(BIN)/mergefront calibrate smollm2-135m --method all --select post --select knee
	$(BIN)/mergefront report smollm2-135m --out runs/smollm2-135m/report
	$(BIN)/mergefront export smollm2-135m --all --overwrite --out runs/smollm2-135m/export

anchors: $(VENV)/.product
	$(BIN)/python studies/functional-dual-anchors/run.py

soups: $(VENV)/.product
	PYTHONPATH=studies/quickstart $(BIN)/python studies/personalized-soups/soups.py --seeds 3 --workers 2

switch: $(VENV)/.product
	$(BIN)/python studies/switch-generation/run.py --seeds 5 --workers 2

cluster: $(VENV)/.test quickstart
	$(BIN)/mergefront launch studies/quickstart/study.yaml --storage sqlite:///runs/quickstart/study.db --set name=quickstart-qmc \
		--set 'sampler={engine: optuna, name: qmc, seed: 0}' --set trials=100 --set split.report=front
	$(BIN)/python -m tests.postgresql_server $(BIN)/python studies/cluster/simulate.py
	$(BIN)/python studies/cluster/sizing.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

PARALLEL := --numprocesses auto --maxprocesses 8

test: lint
	$(BIN)/pytest $(PARALLEL)

$(VENV)/.audit: $(VENV)/.test .ci/locked/audit.txt
	$(LOCKED)/audit.txt
	@touch $@

# Ends with the table of faults: how often each struck, and what was lost.
test-all: lint $(VENV)/.audit
	$(BIN)/python .ci/audit.py
	$(BIN)/pytest $(PARALLEL) -m 'slow or not slow'

$(VENV)/.bench: $(VENV)/.prepare .ci/locked/bench.txt
	$(LOCKED)/bench.txt
	@touch $@

bench: $(VENV)/.bench
	$(BIN)/python studies/smollm2-135m/prepare.py
	TQDM_DISABLE=1 $(BIN)/python studies/bench/run.py

clean:
	rm -rf $(VENV) runs studies/*/build .mypy_cache .pytest_cache .ruff_cache .hypothesis
