# The long-sequence lab. `make` alone prints what there is.
# Every target stands on .venv; a second run skips what is done.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
PEERS  := $(VENV)/.peers
ARGS   ?=
JOBS   ?= 2
LABS    = $(shell find labs -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*')

# One thread per worker, in tests and in labs: numbers and times then depend on the code.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

SHELL       := bash
.SHELLFLAGS := -o pipefail -c

.PHONY: help lab test quick run-lab book bench gpu-check lint clean

help:
	@echo "make lab                open JupyterLab on the first lab (ARGS=--no-browser for servers)"
	@echo "make test               run everything: tests, kernel gates, all labs, the book in a browser"
	@echo "make quick              the fast tests of what changed, under two minutes"
	@echo "make run-lab LAB=002    execute one lab in a fresh kernel and write its outputs"
	@echo "make book               build the book into build/book/_build/html (needs no network)"
	@echo "make bench              race corelib against its peers and write the table"
	@echo "make gpu-check          the kernels' tests and races on this machine's GPU"
	@echo "make clean              remove build/ and .venv"

# Exact versions where the lock has them (Python 3.11 and newer), ranges elsewhere.
$(STAMP): pyproject.toml requirements/lock.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "The lab needs Python 3.10 or newer. Name one: make lab PYTHON=python3.12"; exit 1; }
	@test -x $(PY) || { echo "· creating $(VENV)"; $(PYTHON) -m venv $(VENV) || \
	  { echo "Could not create $(VENV). On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }; }
	@echo "· installing (a few minutes the first time)"
	@if $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	  $(PY) -m pip install -r requirements/lock.txt | { grep -v "already satisfied" || true; }; else \
	  $(PY) -m pip install "torch==2.13.0" "triton==3.7.1; platform_system == 'Linux'"; fi || \
	  { echo "Installing failed: read the last lines above. 'make clean' and a second try start afresh."; exit 1; }
	@$(PY) -m pip install --quiet -e '.[labs,book,test,hf]'
	@touch $@

$(PEERS): $(STAMP) requirements/peers.txt
	@echo "· installing the peers that are raced against"
	@$(PY) -m pip install --quiet -r requirements/peers.txt
	@touch $@

lab: $(STAMP)
	$(PY) -m jupyterlab labs/00_foundations/001_start_here.ipynb $(ARGS)

test: $(STAMP)
	$(ONE_THREAD) $(PY) tests/run.py --jobs $(JOBS) $(ARGS)

quick: $(STAMP)
	$(ONE_THREAD) $(PY) tests/run.py --quick --jobs $(JOBS) $(ARGS)

run-lab: $(STAMP)
	@test -n "$(LAB)" || { echo "Which lab? For example: make run-lab LAB=002"; exit 1; }
	$(ONE_THREAD) $(PY) labs/run_lab.py $(LAB)

book: $(STAMP)
	$(PY) book/build.py $(ARGS)

bench: $(PEERS)
	$(PY) -m corelib.measure.bench $(ARGS)

gpu-check: $(STAMP)
	$(PY) -m corelib.kernels.gates.gpu_check $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

clean:
	rm -rf build $(VENV) *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
