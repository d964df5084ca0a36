VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TRAIN := deepspeed launch/train.py --ds_config ds_configs/p40_zero2.json
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help setup train test test-slow multinode-test faults lint format clean

help:
	@echo "make train      set up $(VENV), then train the Mini model on the embedded Spanish sample and export it"
	@echo "make test       set up $(VENV), then run the tests"
	@echo "make test-slow  also the tests marked slow"
	@echo "make multinode-test  two virtual machines: real ssh, launchers and network faults (root; skips with a reason)"
	@echo "make faults     break runs in every way we know and show what they survive (20 minutes)"
	@echo "make lint       ruff's checks and format; make format applies them"
	@echo "make setup      only the environment; TORCH and TORCH_INDEX choose another torch, see tools/setup_env.py"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml tools/setup_env.py
	$(PYTHON) tools/setup_env.py --venv $(VENV)
	@touch $@

train: $(INSTALLED)
	@echo '+ $(TRAIN)'
	@$(TRAIN)

test: $(INSTALLED)
	python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(INSTALLED)
	python -m pytest

multinode-test: $(INSTALLED)
	python -m pytest tests/multinode

faults: $(INSTALLED)
	python -m tests.faults

lint: $(INSTALLED)
	ruff check .
	ruff format --check .

format: $(INSTALLED)
	ruff check --fix .
	ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
