# make            list the targets
# make demo       set up, then test a detector on generated images
# make test       set up, then run all tests except the slow ones, which make contract runs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
TOOLS := .venv-tools
LOWEST ?= python3.10

.DEFAULT_GOAL := help
.PHONY: help setup demo test contract docs-test soak lowest newest audit dist lint format bench bench-status clean

help:  ## show this list
	@echo "anomaly_clip: visual anomaly detection with CLIP"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12 selects the Python of the environment (3.10 or newer)"

setup: $(STAMP)  ## create .venv with all dependencies, if it is not up to date

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make setup: $(PYTHON) not found: install Python 3.10 or newer, or select one, as in make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make setup: Python 3.10 or newer is required, $(PYTHON) is $$($(PYTHON) -c 'import platform; print(platform.python_version())'): select another, as in make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "setting up $(VENV) (once; this takes some minutes, as PyTorch is large)"
	@if command -v uv >/dev/null; then \
	  uv venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" $(VENV) && \
	  uv pip install --quiet --python $(BIN)/python --editable '.[dev]'; \
	else \
	  $(PYTHON) -m venv $(VENV) && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'; \
	fi
	@touch $(STAMP)

demo: $(STAMP)  ## test a detector on generated images; needs no data and no network
	@$(BIN)/anomaly_clip test --config configs/demo.yaml
	@echo
	@echo "Look at $$(ls -t runs/demo/*/report.html | head -n 1). To try next:"
	@echo "  source $(VENV)/bin/activate"
	@echo "  anomaly_clip test --config configs/demo.yaml --data.seed 7    different images of the same objects"
	@echo "  anomaly_clip preview --data Demo                              all 48 generated categories"
	@echo "  anomaly_clip predict --config configs/own_images.yaml --data.root PHOTOS --data.category 'steel plate'"
	@echo "      your own images; CLIP's weights are downloaded on first use"

test: $(STAMP)  ## run all tests except the slow ones
	@$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m 'not slow'

contract: $(STAMP)  ## run the slow tests: resumed and distributed fits, shipped configurations
	@$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m 'slow and not docs' tests

docs-test: $(STAMP)  ## run all commands and Python blocks of README.md, CONTRIBUTING.md, docs/ and examples/
	@$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m docs --durations 0 --durations-min 1 tests/test_docs_run.py tests/test_option_pages.py

soak: $(STAMP)  ## kill fits, fill disks, read damaged files, compare processes; writes a result
	@$(BIN)/python benchmarks/soak.py

# The lowest versions need the lowest Python (LOWEST=PATH). TESTS=tests/test_cli.py selects tests, also for newest.
lowest: $(TOOLS)/.complete  ## run the tests with the lowest declared versions, on Python 3.10
	@$(TOOLS)/bin/uv venv --quiet --allow-existing --no-python-downloads --python $(LOWEST) .venv-lowest
	@$(TOOLS)/bin/uv pip install --quiet --resolution lowest-direct --python .venv-lowest/bin/python --editable '.[dev]'
	@.venv-lowest/bin/python -m pytest --numprocesses 2 --dist worksteal -m 'not slow' $(TESTS)

# PRERELEASE=allow admits pre-releases.
newest: $(TOOLS)/.complete  ## run the tests with the newest versions of all dependencies
	@$(TOOLS)/bin/uv venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" .venv-newest
	@$(TOOLS)/bin/uv pip install --quiet --upgrade --prerelease $${PRERELEASE:-if-necessary} --python .venv-newest/bin/python --editable '.[dev]'
	@.venv-newest/bin/python -m pytest --numprocesses 2 --dist worksteal -m 'not slow' $(TESTS)

audit: $(TOOLS)/.complete  ## look for weaknesses of the workflows and known vulnerabilities of the dependencies
	@$(TOOLS)/bin/zizmor --offline --quiet .github
	@$(TOOLS)/bin/uv pip compile --quiet --no-header --no-annotate --extra all --python $(TOOLS)/bin/python pyproject.toml --output-file $(TOOLS)/audited.txt
	@$(TOOLS)/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off --requirement $(TOOLS)/audited.txt

dist: $(TOOLS)/.complete  ## build and check the files of a release, with an SBOM, in dist/
	@.ci/dist $(TOOLS)

$(TOOLS)/.complete: .ci/tools.txt
	@$(PYTHON) -m venv --clear $(TOOLS)
	@$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement .ci/tools.txt
	@touch $@

lint: $(STAMP)  ## run ruff, codespell, mypy and the check of the prose
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell
	@$(BIN)/mypy
	@$(BIN)/python tests/prose.py

format: $(STAMP)  ## format and fix with ruff
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# BENCH="--tiles DIR --squeezenet FILE --only startup export" gives data and chooses benchmarks.
bench: $(STAMP)  ## run all benchmarks in order, which takes hours, and print a table of their bounds
	@$(BIN)/python benchmarks/bench.py $(BENCH)

bench-status: $(STAMP)  ## list the bounds of all benchmark results and report which are missed
	@$(BIN)/python benchmarks/status.py

clean:  ## remove the environment and all caches
	@rm -rf $(VENV) $(TOOLS) .venv-lowest .venv-newest .mypy_cache .ruff_cache .pytest_cache .hypothesis
