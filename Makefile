# A fresh machine needs two commands: make quickstart, make test.

PYTHON ?= python3
READY := .venv/.installed
DIGITS := data/digits
PIP := .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt

# One shell per recipe; it stops at the first error and finds the tools of .venv first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
export PATH := $(CURDIR)/.venv/bin:$(PATH)
unexport PYTHONHOME PYTHONPATH VIRTUAL_ENV

.PHONY: help setup quickstart check test test-slow test-gpu gpu-day lint format

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## Install into .venv; every other target does so when needed

quickstart: $(DIGITS)/train.beton $(DIGITS)/val.beton ## Install, convert a small real dataset, train, evaluate
	@echo "==> Training; the first time, operators are compiled"
	export OMP_NUM_THREADS=1
	train="launch/train.py --config launch/configs/quickstart.yaml --resume auto"
	if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
	then deepspeed --num_gpus 1 $$train
	else # without bf16 instructions bf16 is emulated, several times slower than fp32
	    bf16="import sys, torch; sys.exit(not torch.cpu._is_avx512_bf16_supported())"
	    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 $$train \
	        $$(python -c "$$bf16" || echo train.precision=fp32)
	fi
	echo "==> Evaluation"
	python launch/evaluate.py --run runs/quickstart
	python launch/summary.py runs/quickstart

# Tests that start several processes use the cores themselves: two files of them at a time, for
# they also wait. The others run side by side.
check: lint ## The inner loop: style, types and the tests that take seconds
	@OMP_NUM_THREADS=1 pytest -q -n logical --maxprocesses 8 -m "not (gpu or dist or slow or thorough)"

test: $(READY) ## Everything that proves what README promises, without a GPU
	@OMP_NUM_THREADS=1 pytest -q -n logical --maxprocesses 8 --durations=10 -m "not (gpu or dist or slow)"
	pytest -q -n 2 --dist loadfile --durations=10 -m "dist and not (gpu or slow)"

test-slow: $(READY) ## The rest: whole matrices, benchmarks, the wheel
	@OMP_NUM_THREADS=1 pytest -q -n logical --maxprocesses 8 --durations=10 -m "slow and not (gpu or dist)"
	pytest -q -n 2 --dist loadfile --durations=10 -m "slow and dist and not gpu"

test-gpu: $(READY) ## The tests that need an NVIDIA GPU
	@pytest -q --durations=10 -m gpu

gpu-day: $(READY) ## All that is to be measured on an NVIDIA GPU; UPSTREAM=rpe_ops times the released op too
	@python -m irpe_ds.ops.bench.gpu_day $(UPSTREAM:%=--upstream %)

lint: $(READY) ## Check style and types
	@ruff check .
	ruff format --check .
	mypy

format: $(READY) ## Apply the style
	@ruff check -q --fix .
	ruff format -q .

$(DIGITS): | $(READY)
	@python data_prep/digits.py --out $@

$(DIGITS)/%.beton: | $(DIGITS)
	@python data_prep/convert.py --source $(@D)/$* --out $@

# System packages as far as they are missing, then .venv, then PyTorch, which the rest builds on.
$(READY): setup.py constraints.txt
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo 3)
	if [ $$version != 3 ] && ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
	    echo "error: $(PYTHON) is Python $$version, 3.10 or later is needed: make PYTHON=..." >&2
	    exit 1
	fi
	missing=$$(
	    command -v g++ >/dev/null || echo g++
	    command -v pkg-config >/dev/null || echo pkg-config
	    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
	    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
	    pkg-config --exists libjpeg 2>/dev/null || echo libjpeg-dev
	    $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || echo python$$version-venv
	    header='import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")'
	    $(PYTHON) -c "$$header" 2>/dev/null || echo python$$version-dev
	)
	if [ "$$missing" ]; then
	    echo "==> System packages:" $$missing
	    root=$$([ $$(id -u) = 0 ] || echo sudo)
	    if ! { type apt-get $$root >/dev/null 2>&1 && $$root apt-get -qq update &&
	           $$root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
	               install $$missing >/dev/null; }; then
	        echo "error: cannot install the system packages, please do:" $$missing >&2
	        exit 1
	    fi
	fi
	[ -x .venv/bin/pip ] || $(PYTHON) -m venv --clear .venv
	echo "==> PyTorch (several gigabytes) and build tools"
	$(PIP) torch torchvision ninja packaging setuptools wheel
	echo "==> DeepSpeed, FFCV and the rest; some are built from source"
	$(PIP) --no-build-isolation -e '.[all]'
	touch $@
