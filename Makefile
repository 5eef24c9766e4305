# Two commands: `make walkthrough` and `make test`. Both need only Python 3.11+ and make; set-up runs once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: walkthrough test setup lab lint lock clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(f"esm2kit needs Python 3.11 or newer, found {sys.version.split()[0]}: make PYTHON=python3.12 $(MAKECMDGOALS)") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

walkthrough: setup
	@$(BIN)/esm2kit run --tier sample

test: setup
	@$(BIN)/lint-imports --config pyproject.toml
	@$(BIN)/ruff check .
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# PYTHONSTARTUP: a cell run before the one it needs says which that is, from the kernel's first moment on;
# a start-up file of one's own runs after it
lab: setup
	@ESM2KIT_OWN_PYTHONSTARTUP="$$PYTHONSTARTUP" PYTHONSTARTUP="$(CURDIR)/docs/kernel_start.py" $(BIN)/jupyter lab notebooks/00_start_here.ipynb

lint: setup
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/lint-imports --config pyproject.toml

# The lock names versions only: the platform decides which build of torch (CPU or CUDA) comes with its own helpers.
lock: pyproject.toml
	$(BIN)/pip-compile --quiet --strip-extras --extra notebooks --extra dev --upgrade-package torch==2.13.0 \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options --no-annotate --output-file requirements.lock pyproject.toml
	sed -i -e 's/+cpu$$//' requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info
