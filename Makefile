# make            what there is
# make demo       set up, then the main job on pictures made by code
# make test       set up, then all tests but the long ones, which make contract runs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete

.DEFAULT_GOAL := help
.PHONY: help setup demo test contract lint format bench-status clean

help:  ## show this
	@echo "anomaly_clip: visual anomaly detection with CLIP"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12 chooses the Python of the first set-up (3.10 or newer)"

setup: $(STAMP)  ## make .venv with everything in it; a second call does nothing

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make setup: there is no $(PYTHON): install Python 3.10 or newer, or name one, as in make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make setup: Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) -c 'import platform; print(platform.python_version())'): name another, as in make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "setting up $(VENV) (once; some minutes, as PyTorch is large)"
	@if command -v uv >/dev/null; then \
	  uv venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" $(VENV) && \
	  uv pip install --quiet --python $(BIN)/python --editable '.[dev]'; \
	else \
	  $(PYTHON) -m venv $(VENV) && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'; \
	fi
	@touch $(STAMP)

demo: $(STAMP)  ## the main job on pictures made by code, without data or network
	@$(BIN)/anomaly_clip test --config configs/demo.yaml
	@echo
	@echo "Look at $$(ls -t runs/demo/*/report.html | head -n 1). To try next:"
	@echo "  source $(VENV)/bin/activate"
	@echo "  anomaly_clip test --config configs/demo.yaml --data.seed 7    other pictures of the same things"
	@echo "  anomaly_clip preview --data Demo                              all 48 of them"
	@echo "  anomaly_clip predict --config configs/own_images.yaml --data.root PHOTOS --data.category 'steel plate'"
	@echo "      your own pictures; CLIP's weights are downloaded on first use"

test: $(STAMP)  ## all tests but the long real runs
	@$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m 'not slow'

contract: $(STAMP)  ## the long real runs: fits resumed, of several processes, as configured
	@$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m slow tests

lint: $(STAMP)  ## ruff, codespell, mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell
	@$(BIN)/mypy

format: $(STAMP)  ## let ruff format and fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench-status: $(STAMP)  ## bounds of the measured results, and which are missed
	@$(BIN)/python benchmarks/status.py

clean:  ## remove the environment and all caches
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
