# `make` alone lists the targets. Everything is installed into .venv, at the versions that requirements/ pins; but verl and
# the TRAINERS, whose pins contradict the others', into .venv-verl and .venv-<trainer>; and the site's tools, which need no
# torch, into .venv-docs.
PYTHON ?= python3
JOBS ?= 2
ARGS ?=
LIMIT ?= 480
# Owner and name of the repository on the Hugging Face Hub.
HUB_REPO ?= OWNER/grpo-kernels
OUT ?= gpu_output

# -s: each row says its median and its memory when it is done.
BENCHMARK := --benchmark-only --benchmark-columns=min,median,max,rounds -s -W ignore

VENV := .venv
PY := $(VENV)/bin/python
VERL := .venv-verl
# Each has a file in requirements/ and an environment to itself.
TRAINERS := ms_swift nemo_rl openrlhf prime_rl skyrl slime
DOCS := .venv-docs
NEWEST := .venv-newest
# Without a GPU the tests run the kernels in Triton's interpreter; with one, compiled.
INTERPRET := $(shell nvidia-smi -L >/dev/null 2>&1 || echo TRITON_INTERPRET=1)

# Fewer cases of each test (tests/pairwise.py), and fewer examples of hypothesis (tests/conftest.py).
QUICK := --pairwise --hypothesis-profile=quick
# The budgets of the variants with the most code and of those with unaligned rows, and a few emulated launches.
COMPILED := -m "compile or ptx" -k "sm_90 and (budget and (entropy or unaligned or odd) or every_mode) or reader \
	or 8ed1816 and place or each_barrier"
# Tests of parity whose kernels the emulator runs.
EMULATED := tests/losses/test_parity.py -k "triton and (every_loss or partition)" $(QUICK)
# Tests of loss and gradient, whose numbers depend on the processor's matrix products and vector instructions.
NUMERIC := tests/linear tests/distillation $(addprefix tests/losses/test_, $(addsuffix .py, parity hard_values hard_shapes \
	hard_invariants coupled_tokens sequence_hard_values sequence_hard_shapes sequence_invariants properties api_properties autograd \
	torch_compile modules selective_logps several_tokens sampling_mask sampling_mask_logps custom_losses token_loss twins \
	regressions))
# Tests of what depends on Triton's interpreter and on transformers.
NEW := tests/losses/test_parity.py tests/kernels/test_launches.py tests/kernels/test_variants.py tests/trainers

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all test-processors test-gpu sanitize-gpu gpu test-compile test-ptx test-verl test-trainer test-newest dist hub study bench bench-gpu experiments-gpu bench-tables bench-docs docs lint clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\): .*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

demo: $(VENV)/.trl  ## train a small model on addition and draw its curves (ARGS="..." is handed on)
	$(PY) examples/addition.py $(ARGS)

# pytest's status 5 is no error: ARGS may select no test of compiled kernels.
test: $(VENV)/.test  ## run the tests with a choice of their cases: six to ten minutes on two cores, no GPU needed
	$(INTERPRET) $(PY) -m pytest -n $(JOBS) tests -m "not compile and not ptx" $(QUICK) $(ARGS)
	env -u TRITON_INTERPRET $(PY) -m pytest tests/kernels/test_compile.py tests/ptx $(COMPILED) $(ARGS) || test $$? -eq 5

test-all: $(VENV)/.test  ## run every test with all of its cases, then test-compile and test-ptx (not test-verl and test-trainer)
	$(INTERPRET) $(PY) -m pytest -n $(JOBS) tests -m "not compile and not ptx" $(ARGS)
	$(MAKE) test-compile
	$(MAKE) test-ptx

test-processors: $(VENV)/.test  ## run the numeric tests with the code for older processors: first MKL's, then PyTorch's
	MKL_CBWR=COMPATIBLE $(INTERPRET) $(PY) -m pytest -n $(JOBS) $(NUMERIC) $(QUICK) $(ARGS)
	ATEN_CPU_CAPABILITY=default $(INTERPRET) $(PY) -m pytest -n $(JOBS) $(NUMERIC) $(QUICK) $(ARGS)

test-gpu:  ## run the tests on the GPU, with the Python at hand
	env -u TRITON_INTERPRET $(PYTHON) -m pytest -n $(JOBS) tests -m "not compile and not ptx" $(ARGS)

# Without PyTorch's cache every tensor is an allocation of its own, whose ends the sanitizer knows.
sanitize-gpu:  ## run every kernel under compute-sanitizer's memcheck, with the Python at hand
	env -u TRITON_INTERPRET PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(PYTHON) -m pytest -q tests/kernels/test_launches.py tests/kernels/test_token_statistics.py

test-compile: $(VENV)/.test  ## compile every kernel for seven GPUs and read its machine code; needs none of them
	env -u TRITON_INTERPRET $(PY) -m pytest tests -m compile $(ARGS)

test-ptx: $(VENV)/.test  ## compile the kernels and run them in an emulator of PTX, with checks of memory and races; no GPU needed
	env -u TRITON_INTERPRET $(PY) -m pytest -n $(JOBS) tests/ptx -m ptx $(ARGS)
	env -u TRITON_INTERPRET EMULATE=sm_80 $(PY) -m pytest -n $(JOBS) $(EMULATED) $(ARGS)

test-verl: $(VERL)/.trainer  ## compare every loss with verl's; needs Python 3.10 to 3.12, as verl does
	$(VERL)/bin/python -m pytest tests/verl $(ARGS)

test-trainer:  ## train a tiny model with a trainer's own code, with and without our adapter: TRAINER=openrlhf; needs no GPU
	$(if $(filter $(TRAINER),$(TRAINERS)),,$(error TRAINER must be one of: $(TRAINERS)))
	$(MAKE) .venv-$(TRAINER)/.trainer
	.venv-$(TRAINER)/bin/python -m pytest tests/trainers/test_$(TRAINER).py tests/trainers/test_$(TRAINER)_runs.py $(ARGS)

# An environment on top of .venv: what is installed into it hides .venv's version. torch stays as pinned, because the
# newest one may be a build of several gigabytes. Triton comes without dependencies: a torch for GPUs asks for one version.
test-newest: $(VENV)/.test  ## run some of the tests with the newest Triton and transformers, and the pinned torch
	$(PY) -m venv --clear --without-pip $(NEWEST)
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(NEWEST)/lib/python*/site-packages)/venv.pth
	$(PY) -m pip --python $(NEWEST)/bin/python install -q --upgrade --no-deps triton
	$(PY) -m pip --python $(NEWEST)/bin/python install -q --upgrade transformers -c requirements/torch.txt
	$(INTERPRET) PYTHONPATH=. $(NEWEST)/bin/python -m pytest -n $(JOBS) $(NEW) $(QUICK) $(ARGS)

dist: $(VENV)/.test  ## build wheel and sdist into dist/, then install and test each in an environment of its own
	$(PY) -m release.dist dist
	$(PY) -m release.check dist

hub: $(VENV)/.test  ## lay the package out for the Hugging Face Hub, in dist/hub (HUB_REPO=owner/name)
	$(PY) -m release.hub dist/hub --repo-id $(HUB_REPO)

study: $(VENV)/.trl  ## train the demo's task under five losses; figure and table into docs/ (ARGS="..." is handed on)
	$(PY) examples/study.py $(ARGS)

bench: $(VENV)/.bench  ## run the benchmarks on the CPU (those of verl where `make test-verl` has installed it)
	$(PY) -m pytest benchmarks/ $(BENCHMARK) $(ARGS)
	! test -x $(VERL)/bin/python || $(VERL)/bin/python -m pytest benchmarks/training_step/test_cpu_trainers.py -k verl $(BENCHMARK) $(ARGS)

bench-gpu:  ## run them all on the GPU, with the Python at hand: nothing is installed (starts nothing new after LIMIT=480 seconds)
	env -u TRITON_INTERPRET $(PYTHON) -m benchmarks --device cuda --limit $(LIMIT) $(ARGS)

gpu:  ## make the most of a GPU in LIMIT=540 seconds: tests, headline shapes, experiments, into OUT; again goes on (ARGS=--dry: here)
	$(PYTHON) -m benchmarks.gpu --out $(OUT) --limit $(if $(filter file,$(origin LIMIT)),540,$(LIMIT)) $(ARGS)

experiments-gpu:  ## run the experiments of docs/dev/tuning.md on the GPU, with the Python at hand
	env -u TRITON_INTERPRET $(PYTHON) -m benchmarks.experiments --device cuda --limit $(LIMIT) $(ARGS)

bench-tables: $(VENV)/.bench  ## machine code and traffic of ours and the peers' kernels; needs no GPU
	$(PY) -m benchmarks.compiled
	$(PY) -m benchmarks.traffic

bench-docs: $(VENV)/.bench  ## figures and tables of docs/benchmarks.md from benchmarks/results/*.csv
	$(PY) -m benchmarks.plot
	$(PY) -m benchmarks.report

docs: $(DOCS)/.docs  ## build the documentation site into build/site; a broken link fails the build
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --clean -f docs/mkdocs.yml
	@echo "The site: build/site/index.html"

lint: $(VENV)/.dev  ## ruff (lint and format) and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:  ## remove .venv, .venv-*, and everything else that was made here
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks demo_output gpu_output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# One stamp per file of requirements: installed once, and again when a version changes.
REQUIREMENTS := $(wildcard requirements/*.txt) setup.py pyproject.toml

$(VENV)/.%: $(REQUIREMENTS) | $(PY)
	@echo "Installing requirements/$*.txt into $(VENV) (the first time takes a few minutes)"
	@$(PY) -m pip install -q --disable-pip-version-check -r requirements/$*.txt -e .
	@touch $@

# A trainer whose dependencies need a GPU is installed without them, from <trainer>-nodeps.txt. The .gitignore keeps git and
# ruff out of the environment.
.venv-%/.trainer: $(REQUIREMENTS)
	@echo "Installing requirements/$*.txt into $(@D) (the first time takes a few minutes)"
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@echo '*' > $(@D)/.gitignore
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check -r requirements/$*.txt -e .
	@test ! -f requirements/$*-nodeps.txt || \
		$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-deps --ignore-requires-python -r requirements/$*-nodeps.txt
	@touch $@

$(DOCS)/.docs: requirements/docs.txt
	@echo "Installing the site's tools into $(DOCS)"
	@test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip install -q --disable-pip-version-check -r requirements/docs.txt
	@touch $@
