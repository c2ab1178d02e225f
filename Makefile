# make repro   the whole pipeline at the scale of params.yaml: data, metrics, plots, report
# make test    all tests            make lint    ruff and mypy
# make smoke   the whole pipeline at a tiny scale, in a clone: DIR=path (default: a fresh folder)
# make torture   kills each stage and dvc at 20 random moments, compares bytes, queues (hours)
# make bench   every benchmark, quickly
# make reference   after repro: make the trained WeightNet the one that the package ships
#
# Each makes .venv from requirements.txt first, when it is missing or stale. Python 3.11 or newer,
# its venv module, git and make are all that has to be there.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := repro
.PHONY: repro test smoke lint torture bench reference

activate := . .venv/bin/activate
# a dvc that is killed while it writes its list of locks leaves a list that dvc itself cannot read
locks := .dvc/tmp/rwlock
mend := { [ ! -e $(locks) ] || python -m json.tool $(locks) >/dev/null 2>&1 || rm -f $(locks); }
code := $(wildcard src stages tests benchmarks)

repro: .venv/ready
	$(activate) && $(mend) && dvc repro

test: .venv/ready
	$(activate) && pytest

lint: .venv/ready
	$(activate) && ruff check $(code) && ruff format --check $(code) && mypy src stages

torture: .venv/ready
	$(activate) && dir=$$(mktemp -d) && python tests/killing.py "$$dir" --moments 20

bench: .venv/ready
	$(activate) && for benchmark in benchmarks/*.py; do \
	  echo "== $$benchmark"; python "$$benchmark" --quick; done

reference: .venv/ready
	$(activate) && weightnet reference data/predictors/weightnet-iid

# The clone holds what is committed. In a DIR that is there already, the work continues.
smoke: .venv/ready
	$(activate) && dir='$(DIR)' && dir=$${dir:-$$(mktemp -d)/weightnet} && \
	if [ ! -e "$$dir/.git" ]; then \
	  git diff --quiet HEAD || echo "note: uncommitted changes are left out" >&2; \
	  git clone --quiet . "$$dir"; fi && \
	cd "$$dir" && python tests/smoke.py params.yaml && dvc repro && \
	echo "smoke: $$PWD/results/results.md"

.venv/ready: requirements.txt pyproject.toml
	@if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then \
	  for python in python3.12 python3.11 python3; do \
	    if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	      >/dev/null 2>&1; then found=$$python; break; fi; done; \
	  if [ -z "$${found:-}" ]; then \
	    echo "Python 3.11 or newer with its venv module must be installed, however: none of" >&2; \
	    echo "python3.12, python3.11, python3 is both; on Debian: apt install python3-venv" >&2; \
	    exit 2; fi; \
	  "$$found" -m venv --clear .venv; fi
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --no-build-isolation -e .
	@touch $@
