# Two commands: `make walkthrough` and `make test`; `make help` lists the others. Both need only Python 3.11+ and make; set-up runs once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
# the packages whose tests take seconds
QUICK := tests/core tests/sequences tests/tasks tests/cli tests/test_project.py

.PHONY: help walkthrough test check docs setup lab dist lint lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## only set up: install into .venv, once (about 3 minutes, 2.4 GB)

# pip in a few lines: the large files as they come, the rest in a log that is shown where it fails
define PIP
{ PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --progress-bar off --disable-pip-version-check $(1) 2>&1; echo "status $$?"; } | \
while read -r word rest; do \
  echo "$$word $$rest" >> $(VENV)/pip.log; \
  case "$$word $$rest" in \
    "Downloading "*[0-9][0-9]" MB)"|"Downloading "*[0-9][0-9].[0-9]" MB)"|"Downloading "*GB")") echo "      $$rest" ;; \
    "Installing collected"*) \
      echo "      unpacking"; \
      while sleep 15 >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do echo "      $$(du -sm $(VENV) | cut -f1) MB so far"; done & \
      beat=$$! ;; \
    "status "*) \
      kill $$beat 2>/dev/null; \
      [ "$$rest" = 0 ] && exit 0; \
      tail -n 20 $(VENV)/pip.log >&2; exit 1 ;; \
  esac; \
done
endef

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(f"esm2kit needs Python 3.11 or newer, found {sys.version.split()[0]}: make PYTHON=python3.12 $(MAKECMDGOALS)") if sys.version_info < (3, 11) else None'
	@echo "set-up, once, about 3 minutes and 2.4 GB: 1/3 an environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) && : > $(VENV)/pip.log
	@echo "  2/3 the $$(grep -c == requirements.lock) packages of requirements.lock; the large ones as they come:"
	@$(call PIP,-r requirements.lock)
	@echo "  3/3 esm2kit itself"
	@$(call PIP,--no-deps --editable .)
	@touch $@

walkthrough: setup  ## all eight notebooks, headless: make a model from real sequences and score it (about 7 minutes)
	@$(BIN)/esm2kit run --tier sample

test: setup  ## everything that can be tested here
	@$(BIN)/lint-imports --config pyproject.toml
	@$(BIN)/ruff check . && $(BIN)/codespell
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: setup  ## the quick part: lint, format, spelling, imports, unit tests (under a minute on two cores)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/codespell && $(BIN)/lint-imports --config pyproject.toml
	@$(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadfile $(QUICK)

# The tutorials are the notebooks as the newest finished sample run executed them; NOTEBOOKS=plain leaves outputs out.
docs: setup  ## build the documentation into docs/_build/html (runs the walkthrough first if there is no run to show; NOTEBOOKS=plain needs none)
	@[ "$(NOTEBOOKS)" = plain ] || $(BIN)/python docs/_ext/tutorials.py || \
	  { echo "no finished sample run for the tutorials: running the walkthrough first, about 7 minutes"; $(BIN)/esm2kit run --tier sample; }
	@rm -rf docs/_build/html
	@$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --nitpicky --doctree-dir docs/_build/doctrees \
	  -D tutorial_notebooks=$(or $(NOTEBOOKS),executed) docs docs/_build/html
	@echo "docs/_build/html/index.html"

# PYTHONSTARTUP: a cell run before the one it needs says which that is, from the kernel's first moment on;
# a start-up file of one's own runs after it. LAB=... is handed on, such as LAB="--no-browser --allow-root".
lab: setup  ## JupyterLab, at notebook 00
	@ESM2KIT_OWN_PYTHONSTARTUP="$$PYTHONSTARTUP" PYTHONSTARTUP="$(CURDIR)/docs/kernel_start.py" $(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" $(LAB) notebooks/00_start_here.ipynb

# builds the wheel from the source distribution, so that both are known to work
dist: setup  ## build the wheel and the source distribution into dist/, and check what they contain
	@rm -rf dist build
	@$(BIN)/python -m build --no-isolation --outdir dist > $(VENV)/build.log 2>&1 || { tail -n 20 $(VENV)/build.log >&2; exit 1; }
	@$(BIN)/python tests/support/check_dist.py dist

lint: setup  ## fix style, check that imports only go down
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/lint-imports --config pyproject.toml

# The lock names versions only: the platform decides which build of torch (CPU or CUDA) comes with its own helpers.
lock: pyproject.toml  ## update requirements.lock from pyproject.toml
	$(BIN)/pip-compile --quiet --strip-extras --extra notebooks --extra dev --extra docs --upgrade-package torch==2.13.0 \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options --no-annotate --output-file requirements.lock pyproject.toml
	sed -i -e 's/+cpu$$//' requirements.lock

clean:  ## remove .venv and what was built
	rm -rf $(VENV) build dist docs/_build *.egg-info
