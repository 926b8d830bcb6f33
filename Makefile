# `make` alone lists the targets. Everything is installed into .venv, at the versions that setup.py pins; but verl,
# whose pins contradict the others', into .venv-verl.
PYTHON ?= python3
JOBS ?= 2
ARGS ?=

# -s: each row says its median and its memory when it is done.
BENCHMARK := --benchmark-only --benchmark-columns=min,median,max,rounds -s -W ignore

VENV := .venv
PY := $(VENV)/bin/python
VERL := .venv-verl
# Without a GPU the tests run the kernels in Triton's interpreter; with one, compiled.
INTERPRET := $(shell nvidia-smi -L >/dev/null 2>&1 || echo TRITON_INTERPRET=1)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-compile test-verl study bench lint clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\): .*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

demo: $(VENV)/.trl  ## train a small model on addition and draw its curves (ARGS="..." is handed on)
	$(PY) examples/addition.py $(ARGS)

test: $(VENV)/.test  ## run the tests (in Triton's interpreter where there is no GPU)
	$(INTERPRET) $(PY) -m pytest -n $(JOBS) tests -m "not compile" $(ARGS)

test-compile: $(VENV)/.test  ## compile every kernel for seven GPUs and read its machine code; needs none of them
	env -u TRITON_INTERPRET $(PY) -m pytest tests -m compile -s $(ARGS)

test-verl: $(VERL)/.verl  ## compare every loss with verl's; needs Python 3.10 to 3.12, as verl does
	$(VERL)/bin/python -m pytest tests/verl $(ARGS)

study: $(VENV)/.trl  ## train the demo's task under five losses; figure and table into docs/ (ARGS="..." is handed on)
	$(PY) examples/study.py $(ARGS)

bench: $(VENV)/.bench  ## run the benchmarks (those of verl where `make test-verl` has installed it)
	$(PY) -m pytest benchmarks/ $(BENCHMARK) $(ARGS)
	! test -x $(VERL)/bin/python || $(VERL)/bin/python -m pytest benchmarks/test_cpu_trainers.py -k verl $(BENCHMARK) $(ARGS)

lint: $(VENV)/.dev  ## ruff (lint and format) and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:  ## remove .venv, .venv-verl and everything else that was made here
	rm -rf $(VENV) $(VERL) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks demo_output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# One stamp per extra: installed once, and again when setup.py changes.
$(VENV)/.%: setup.py pyproject.toml | $(PY)
	@echo "Installing grpo_kernels[$*] into $(VENV) (the first time takes a few minutes)"
	@$(PY) -m pip install -q --disable-pip-version-check -e '.[$*]'
	@touch $@

# Its .gitignore keeps git and ruff out of it.
$(VERL)/.verl: setup.py pyproject.toml
	@echo "Installing grpo_kernels[verl] into $(VERL) (the first time takes a few minutes)"
	@test -x $(VERL)/bin/python || $(PYTHON) -m venv $(VERL)
	@echo '*' > $(VERL)/.gitignore
	@$(VERL)/bin/python -m pip install -q --disable-pip-version-check -e '.[verl]'
	@touch $@
