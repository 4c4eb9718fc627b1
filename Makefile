# make help lists the targets. Every step prints the plain command that it runs ("+ command").
# Needs only make and Python 3.10 or newer; another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV   ?= .venv
PAPER  ?= il_cldm
ARGS   ?=
# Test processes, each on one thread: networks of the tests are small, and threads that wait for each other cost more than they give.
JOBS   ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); [ $$n -gt 4 ] && echo 4 || echo $$n)

# What `make demo` runs for each paper, and the order of PAPER=all.
PAPERS          := il_cldm lapt neuroldm3d ldae mgdcr
DEMO_il_cldm    := il_cldm/reproduce.py --preset smoke
DEMO_lapt       := lapt/reproduce.py --preset smoke
DEMO_neuroldm3d := neuroldm3d/reproduce.py --preset smoke
DEMO_ldae       := ldae/reproduce.py --preset smoke
DEMO_mgdcr      := mgdcr/reproduce.py --preset smoke
PRESENT         := $(strip $(foreach paper,$(PAPERS),$(if $(wildcard $(firstword $(DEMO_$(paper)))),$(paper))))
CHOSEN          := $(if $(filter all,$(PAPER)),$(PRESENT),$(PAPER))

# CPU build of torch, used where no NVIDIA GPU answers (the range is in requirements.txt).
TORCH_CPU       := torch==2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install -qq --no-compile --prefer-binary

# The index is used only when it answers within three seconds, so that a machine without it does not wait for retries.
ANSWERS := import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=3).close()

.DEFAULT_GOAL := help
.PHONY: help check-paper setup setup-dev demo test bench lint clean

help:
	@echo "make demo [PAPER=il_cldm]   set up, make a phantom, run that paper's pipeline, print its table (PAPER=all: every paper here)"
	@echo "make test [ARGS='-k nifti'] set up, ruff, the whole test suite; REAL_DATA_DIR=DIR adds the tests on real volumes"
	@echo "make bench                  set up, print speed and memory of the full-size networks"
	@echo "make lint                   set up, ruff only"
	@echo "make setup | setup-dev      only create $(VENV) and install requirements.txt | requirements-dev.txt"
	@echo "make clean                  remove $(VENV) and caches; data and results stay"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) PAPER=$(PAPER) JOBS=$(JOBS)"

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "error: Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1); name another: make PYTHON=python3.12 ..." >&2; exit 2; }
	@set -x; $(PYTHON) -m venv $(VENV) || { set +x; rm -f $(PY); \
	  echo "error: $(PYTHON) cannot create $(VENV); on Debian and Ubuntu install the package python3-venv" >&2; exit 2; }

# A stamp exists only after a complete installation; a change of the requirements installs again. A torch that is already there is kept.
$(VENV)/.installed: requirements.txt | $(PY)
	@echo "installing into $(VENV): a minute or a few, 1.6 GB on disk (several more with CUDA)"
	@set -e; \
	if $(PY) -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then :; \
	elif nvidia-smi -L >/dev/null 2>&1; then echo "NVIDIA GPU found: torch with CUDA, as requirements.txt asks"; \
	elif $(PY) -c '$(ANSWERS)' $(TORCH_CPU_INDEX) 2>/dev/null; then \
	  set -x; $(PIP) '$(TORCH_CPU)' --extra-index-url $(TORCH_CPU_INDEX); \
	else set -x; $(PIP) '$(TORCH_CPU)'; fi
	@set -x; $(PIP) -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	@set -x; $(PIP) -r requirements-dev.txt
	@touch $@

# Whether the paper is here is told before anything is installed.
check-paper:
	@for paper in $(CHOSEN); do case ' $(PRESENT) ' in *" $$paper "*) ;; *) \
	  echo "error: $$paper is not in this version; in it: $(PRESENT); the table in README.md tells what is planned" >&2; exit 2;; esac; done

demo: check-paper setup
	@set -e; $(foreach paper,$(CHOSEN),(set -x; $(PY) $(DEMO_$(paper)) $(ARGS));)

test: lint
	@set -x; OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile --durations=15 $(ARGS)

bench: setup-dev
	@set -x; $(PY) -m tests.bench $(ARGS)

lint: setup-dev
	@set -x; $(PY) -m ruff check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
