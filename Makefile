# make demo | test | install | check | test-matrix | test-slurm
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
# Several processes on one machine: a thread each, or they take the cores from each other.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-matrix test-slurm install check clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/installed
	@rm -rf runs/demo
	$(BIN)/deepspeed ufo_ds/train.py --deepspeed ds_configs/moe.json --run_dir runs/demo
	@echo; $(BIN)/ufo evaluate runs/demo --pixels
	@echo; $(BIN)/ufo evaluate runs/demo
	@echo; for task in digits glyphs; do $(BIN)/ufo extract runs/demo --task $$task --out runs/demo/$$task --verify; done
	@echo; $(BIN)/ufo report runs/demo

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not matrix and not slurm"

test-matrix: .venv/installed
	$(BIN)/python -m pytest -m matrix -s

# On a Slurm of two virtual nodes that it starts here: as root, with Slurm installed (slurm/local_cluster.sh says how).
# SLURM_TESTS=tests/slurm/test_short.py is the part that CI runs.
SLURM_TESTS ?= tests/slurm
test-slurm: .venv/installed
	$(BIN)/python -m pytest -m slurm $(SLURM_TESTS)

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs build *.egg-info
