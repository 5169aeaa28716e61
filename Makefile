# `make train` and `make test` each work alone on a fresh clone: Python 3.11+, git and make are all they need.
.DEFAULT_GOAL := help

# The first interpreter that is new enough; `make PYTHON=/path/to/python3.12 test` overrides it.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
ARGS ?=
# Several processes share the cores in every test, so each gets one thread; DeepSpeed is told not to look for GPUs.
ON_CPU := DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
PYTEST := $(BIN)/python -m pytest

.PHONY: help install train test test-gpu test-cluster test-faults lint format parity board clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-14s %s\n", $$1, $$2}'

# torch comes first, and DeepSpeed without build isolation: its setup imports torch, and an isolated build would fetch a
# second one. DS_BUILD_OPS=0 because nothing here uses its compiled operators.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) torch==2.13.0
	$(PIP_INSTALL) setuptools wheel ninja packaging psutil py-cpuinfo
	DS_BUILD_OPS=0 $(PIP_INSTALL) --no-build-isolation deepspeed
	$(PIP_INSTALL) --no-build-isolation -e '.[test]'
	@touch $@

install: $(STAMP)  ## Make .venv and install the project into it (the other targets do it by themselves)

train: $(STAMP)  ## Train the quickstart on four processes; ARGS="training.max_steps=20" changes keys
	@if [ "$$($(BIN)/python -c 'import torch; print(torch.cuda.device_count())')" -ge 4 ]; then \
		export DS_ACCELERATOR=cuda; \
	else \
		export $(ON_CPU); \
	fi; \
	$(BIN)/deepspeed --quiet --num_gpus 4 launch/train.py --config configs/quickstart.yaml $(ARGS)

test: $(STAMP)  ## Everything that needs no GPU, no root and no killing (15 minutes on two cores)
	$(ON_CPU) $(PYTEST) --durations=10 $(ARGS)

test-gpu: $(STAMP)  ## What needs GPUs
	$(PYTEST) -m gpu -rs $(ARGS)

test-cluster: $(STAMP)  ## Two nodes made of namespaces, under sshd and pdsh, and under Slurm (root)
	$(ON_CPU) $(PYTEST) -m cluster -rs --durations=0 $(ARGS)

test-faults: $(STAMP)  ## kill -9 at bad moments, full disks, damaged files
	$(ON_CPU) $(PYTEST) -m faults -rs --durations=0 $(ARGS)

lint: $(STAMP)  ## ruff check, ruff format --check, mypy over the three packages, and over calls that no CPU makes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file mypy-calls.ini

format: $(STAMP)  ## Let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

parity: $(STAMP)  ## The parity table: each layout and ZeRO stage against one process
	$(ON_CPU) $(BIN)/python -m tests.distributed.parity $(ARGS)

board: $(STAMP)  ## TensorBoard on the newest run
	@run=$$(ls -td runs/*/ 2>/dev/null | head -n 1); \
	test -n "$$run" || { echo "runs/ holds no run yet: make train"; exit 1; }; \
	echo "TensorBoard on $$run"; $(BIN)/tensorboard --logdir "$$run" $(ARGS)

clean:  ## Remove .venv, build outputs and caches; runs/ stays
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
