# `make help` lists what can be asked for.
# An active virtual environment or named conda environment is used as it is; otherwise .venv is made
# here. (conda's "base" does not count: it is active in every new shell, chosen for nothing.)

ifneq ($(VIRTUAL_ENV),)
ENV := $(VIRTUAL_ENV)
else ifneq ($(filter-out base,$(CONDA_DEFAULT_ENV)),)
ENV := $(CONDA_PREFIX)
else
ENV := $(CURDIR)/.venv
OWN := yes
endif
PY := "$(ENV)/bin/python"

BUILD := book/_build
HTML := $(BUILD)/html

# One thread per process: two chapters run side by side, and small matrices gain nothing from more.
export OMP_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export OMP_WAIT_POLICY := passive
# Kernels take their settings from the book, not from the reader's home directory.
export IPYTHONDIR := $(CURDIR)/book/_ipython
# The same for matplotlib, whose list of fonts is made once (`fonts`), before two kernels need it at once.
export MPLCONFIGDIR := $(CURDIR)/$(BUILD)/matplotlib
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help book test check run clean environment install-book install-test

help:  ## this list
	@echo "make TARGET, with TARGET one of"
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-8s %s\n", $$1, $$2}' Makefile
	@echo "Environment: $(ENV)"

book: install-book  ## execute every chapter and render the book; the last line is its start page
	@rm -rf $(BUILD)/executed
	@$(fonts)
	@$(PY) book/run_chapters.py --into $(BUILD)/executed
	@$(PY) -m sphinx -q -E -a -n -W --keep-going -D fresh_outputs=_build/executed \
		-d $(BUILD)/doctrees -b html book $(HTML)
	@echo "$(CURDIR)/$(HTML)/index.html"

test: install-test  ## everything: style, unit tests, every chapter's outputs and figures, the rendered book
	@$(fonts)
	@status=0; \
	$(PY) -m ruff check . || status=1; \
	$(PY) -m ruff format --check . || status=1; \
	$(PY) -m mypy || status=1; \
	$(PY) -m pytest -q -n 2 --dist loadfile \
		--nbval --nbval-current-env --nbval-cell-timeout=60 tests book || status=1; \
	exit $$status

check: install-test  ## seconds: style, types and the unit tests of the reference half
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -m pytest -q tests/reference

run: install-book  ## make run CHAPTER=06: execute one chapter in a fresh kernel and store its outputs
	@test -n "$(CHAPTER)" || { echo "make run CHAPTER=06, please: which chapter?" >&2; exit 2; }
	@$(fonts)
	@$(PY) book/run_chapters.py "$(CHAPTER)"

clean:  ## remove what was built (.venv stays)
	rm -rf $(BUILD) .pytest_cache .mypy_cache .ruff_cache .hypothesis

fonts = mkdir -p "$(MPLCONFIGDIR)" && $(PY) -c "import matplotlib.font_manager"

# The environment remembers which project folder, requirements and pins it was set up for.
state = { pwd; cat pyproject.toml constraints.txt; }

install-book: environment
	@$(state) | cmp -s - "$(ENV)/.tekfac-edu-book" || { \
		echo "Installing tekfac-edu[book] into $(ENV)"; \
		$(PY) -m pip install -q -c constraints.txt -e '.[book]' && \
		$(state) > "$(ENV)/.tekfac-edu-book"; }

install-test: environment
	@$(state) | cmp -s - "$(ENV)/.tekfac-edu-test" || { \
		echo "Installing tekfac-edu[book,test] into $(ENV)"; \
		$(PY) -m pip install -q -c constraints.txt -e '.[book,test]' && \
		$(state) > "$(ENV)/.tekfac-edu-book" && \
		$(state) > "$(ENV)/.tekfac-edu-test"; }

new_enough = -c 'import sys; sys.exit(sys.version_info < (3, 11))'

environment:
ifeq ($(OWN),yes)
	@test -x $(PY) || { \
		for python in python3 python3.13 python3.12 python3.11 python3.14 python; do \
			if "$$python" $(new_enough) 2>/dev/null; then \
				echo "Making .venv with $$python"; \
				"$$python" -m venv .venv && exit 0; exit 1; \
			fi; \
		done; \
		echo "tekfac_edu needs Python 3.11 or newer, and none is on the PATH." >&2; \
		exit 1; }
endif
	@$(PY) $(new_enough) || { \
		echo "tekfac_edu needs Python 3.11 or newer; $(ENV) has $$($(PY) --version 2>&1)." >&2; \
		exit 1; }
