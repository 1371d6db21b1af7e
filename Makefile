# make repro            the default pipeline, from nothing: environment, training, executed reports
# make repro PROFILE=x  the same at another scale (profiles/x.yaml), in runs/x, reports in reports/x
# make test             the tests; make lab: JupyterLab; make env: the environment alone
# make report           the reports as HTML without a network: site/digits/index.html (PROFILE=x: of another profile)
# make docs            the library's docstrings as pages without a network: site/api/ghnlib.html
# make plots           what dvc plots show draws, as a page without a network: site/plots/index.html
# make readme           writes the results in README.md from the reports
# make clean            removes what the pipeline made, reports too (not .venv): after it a run is cold
#
# Needs python3 (3.11 or newer; or PYTHON=...) and make.

PYTHON ?= python3
# Relative: the path of this folder may hold spaces.
BIN := .venv/bin
DONE := .venv/.installed
# Only there while an installation runs: an environment that still has it was left half-made.
HALF := .venv/.installing
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: env repro test report docs plots readme lab clean

# One installs at a time, where there is a flock: a second one waits, and then finds it done.
LOCK := $(if $(shell command -v flock),flock requirements.lock)

env:
	@$(MAKE) --silent --question $(DONE) 2> /dev/null || { \
		$(if $(LOCK),flock --nonblock requirements.lock true || echo "Another make installs here: waiting for it.";) \
		$(LOCK) $(MAKE) --silent --no-print-directory $(DONE); }

$(DONE): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@if [ -e $(HALF) ]; then echo "An earlier installation was interrupted: starting anew."; rm -rf .venv; fi
	@mkdir -p .venv && touch $(HALF) && rm -f $(DONE)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the locked environment into .venv (one to three minutes the first time)"
	@$(PIP) $$(grep '^uv==' requirements.lock) && \
		{ $(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.lock || \
		{ echo "uv could not: trying pip."; $(PIP) --no-compile --requirement requirements.lock; }; } && \
		$(PIP) --no-compile --no-deps --no-build-isolation --editable . || \
		{ echo "The installation failed, see above (network? disk full?). Run the same command again."; exit 1; }
	@rm -f $(HALF) && touch $(DONE)

repro: env
	@test -e .git || $(BIN)/python -m dvc config --local core.no_scm true
	@$(BIN)/python -m ghnlib.pipeline.profiles $(filter-out digits,$(PROFILE))

test: env
	@$(BIN)/python -m pytest

report: env
	@$(BIN)/python -m ghnlib.pipeline.site $(PROFILE)

# What docs and plots need is beside the environment, not in it: every stage depends on requirements.lock.
docs: env
	@test -d .venv/docs/pdoc || $(PIP) --no-deps --target .venv/docs pdoc==16.0.0 markdown2==2.5.5
	@PYTHONPATH=.venv/docs $(BIN)/python -m ghnlib.pipeline.api

plots: env
	@test -d .venv/plots/vl_convert || $(PIP) --no-deps --target .venv/plots vl-convert-python==1.9.0.post1
	@PYTHONPATH=.venv/plots $(BIN)/python -m ghnlib.pipeline.curves

readme: env
	@$(BIN)/python -m ghnlib.pipeline.readme

lab: env
	@$(BIN)/jupyter lab

clean:
	rm -rf .sources .training results models reports runs site .dvc/cache .dvc/tmp
