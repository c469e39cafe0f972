# Every target sets up .venv by itself; a second run installs nothing.
PYTHON_VENV := .venv/bin/python
# A free worker takes the next file, so that what a file's tests share is made once. In their order: the long files of
# tests/distributed come first and the short ones of tests/unit last, and the workers end together. SLURM's tests come
# behind them, alone: under load its nodes are lost and found at other moments than the tests make.
PYTEST := $(PYTHON_VENV) -m pytest
SIDE_BY_SIDE := --numprocesses=logical --maxprocesses=8 --dist=loadfile --no-loadscope-reorder --ignore=tests/slurm

.PHONY: help env wheels demo real test test-all serving-env serving-test gpu-check checks clean
help:           ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 18

env:            ## set up .venv: Python 3.12 or newer, the tested versions (CPU=1: torch for CPUs; WHEELS=DIR: offline)
	@tools/setup_env.sh $(if $(CPU),--cpu) $(if $(WHEELS),--from $(WHEELS))

wheels:         ## download all that env installs into WHEELS=DIR, for a machine without a network
	@tools/setup_env.sh $(if $(CPU),--cpu) --download $(or $(WHEELS),wheels)

demo: env       ## the whole pipeline, small, on this machine
	@$(PYTHON_VENV) -m examples.tiny.demo

real: env       ## the same with SmolLM2-135M, to an aligned student and a report: 20 to 60 minutes of two cores
	@$(PYTHON_VENV) -m examples.smollm2_135m.run

test: env       ## the tests that need no GPU, without the slow ones
	@$(PYTEST) $(SIDE_BY_SIDE) -m "not slow and not gpu"
	@HYDRA_TEST_TE=1 $(PYTEST) $(SIDE_BY_SIDE) tests/te -m "not slow and not gpu"
	@$(PYTEST) tests/slurm -m "not slow and not gpu"

test-all: env   ## all tests that need no GPU
	@$(PYTEST) $(SIDE_BY_SIDE) -m "not gpu"
	@HYDRA_TEST_TE=1 $(PYTEST) $(SIDE_BY_SIDE) tests/te -m "not gpu"
	@$(PYTEST) tests/slurm -m "not gpu"

serving-env:    ## .venv/serving: vLLM for CPUs, with the package of serving/
	@serving/setup_env.sh

serving-test: env serving-env ## the tests of serving/, against references that the project's own environment writes
	@$(PYTHON_VENV) serving/tests/make_references.py serving/tests/references
	@cd serving && ../.venv/serving/bin/python -m pytest -q

gpu-check:      ## the tests and benchmarks that need a GPU, on its machine (tools/gpu_check.sh --help)
	@tools/gpu_check.sh

checks: env     ## lint and format
	@$(PYTHON_VENV) -m ruff check .
	@$(PYTHON_VENV) -m ruff format --check .

clean:          ## remove the environment and what tests and builds leave behind
	rm -rf .venv .venv.lock build *.egg-info serving/*.egg-info serving/tests/references
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
