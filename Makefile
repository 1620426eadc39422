# make setup       a virtual environment in .venv with everything pinned in constraints.txt
# make quickstart  train a small grouped ViT on handwritten digits (minutes on a laptop CPU)
# make test        the test suite that needs no GPU
# make test-slow   the cases that `make test` leaves out: whole tables of engines, splits, resumes and kernels, in hours
# make test-isa    the numeric tests again with another instruction set (AVX2) and other orders of summation
# make test-oldest the kernel tests against the oldest supported torch and Triton
# make lint        formatting, lint and types
# make gpu         tests and benchmarks that need a GPU, within 9 minutes; says so and ends well without one.
#                  `make gpu VENV= PYTHON=python3` takes a Python that has torch already and installs nothing
# make schema      write configs/schema.json, docs/config.md and docs/from-timm.md from the config classes and tables
# make docs        the documentation as a site in build/site; a dead link is an error
# make wheel       the package in dist/

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
# Installed anew only when one of these changes.
stamp = $(1)/.installed-$(shell cat pyproject.toml $(2) | cksum | cut -d' ' -f1)
STAMP := $(call stamp,$(VENV),constraints.txt)
OLDEST_STAMP := $(call stamp,$(OLDEST),constraints-oldest.txt)
# In a variable, because make would take the comma for the end of an argument.
EXTRAS := '.[dev,docs]'
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: setup quickstart test test-slow test-isa test-oldest lint gpu schema docs wheel

setup: $(STAMP)

# $(1) the environment, $(2) the constraints, $(3) what to install into it, $(4) what to install without its needs.
# An interrupted installation leaves no stamp, and starts anew here.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "scalevit needs Python 3.10 or newer; give one as PYTHON=..."; exit 2; }
	@command -v c++ > /dev/null || command -v g++ > /dev/null || \
		{ echo "scalevit needs a C++ compiler (Debian: apt install g++)"; exit 2; }
	@if command -v uv > /dev/null; then \
		uv venv --quiet --clear --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(1) && \
		uv pip install --quiet --compile-bytecode --python $(1)/bin/python --constraint $(2) $(3) && \
		$(if $(4),uv pip install --quiet --python $(1)/bin/python --no-deps $(4),true); \
	else \
		$(PYTHON) -m venv --clear $(1) && \
		$(1)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(2) $(3) && \
		$(if $(4),$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(4),true); \
	fi
	@touch $@
endef

$(STAMP):
	$(call install,$(VENV),constraints.txt,--editable $(EXTRAS))

$(OLDEST_STAMP):
	$(call install,$(OLDEST),constraints-oldest.txt,torch triton numpy pytest,--editable .)

quickstart: setup
	@$(RUN) scalevit train --config configs/quickstart.json

# Two files of tests at a time, with a thread each: more threads than cores would wait for each other. In the order of
# tests/conftest.py, which has the longest files first.
test: setup
	@$(RUN) OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not slow"

# The interpreter's cases need a process of their own.
test-slow: setup
	@$(RUN) OMP_NUM_THREADS=1 python -m pytest -m "slow and not gpu"
	@$(RUN) OMP_NUM_THREADS=1 TRITON_INTERPRET=1 python -m pytest -m slow tests/kernels/interpreted

# What torch, MKL, oneDNN and numpy's OpenBLAS run on a CPU without AVX-512, MKL without FMA: a tolerance that holds on
# this machine only fails here. Inductor's cache does not tell instruction sets apart and hands out loops of the wrong
# vector width, which write past their buffers: hence a cache of its own.
ISA := OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell \
	TORCHINDUCTOR_CACHE_DIR=$${TMPDIR:-/tmp}/torchinductor_avx2_$$(id -u)
NUMERIC := tests/kernels/test_error_bounds.py tests/kernels/test_fused_mlp_arguments.py tests/models \
	tests/engines/test_parity.py \
	$(foreach m,test_fused_mlp_numerics test_gelu_kernels,'tests/kernels/test_interpreted.py::test_interpreted[$(m)]')

test-isa: setup
	@$(RUN) $(ISA) python -m pytest -m "not gpu and not slow" $(NUMERIC)

# Of the compiled kernels only Hopper's are checked: spills differ between versions of Triton.
test-oldest: $(OLDEST_STAMP)
	@$(OLDEST)/bin/python -m pytest -m "not gpu and not slow" tests/kernels -k "not shipped_tile or sm_90"

lint: setup
	@$(RUN) ruff format --check .
	@$(RUN) ruff check .
	@$(RUN) mypy

schema: setup
	@$(RUN) scalevit schema > configs/.schema.json && mv configs/.schema.json configs/schema.json
	@$(RUN) scalevit schema --markdown > docs/.config.md && mv docs/.config.md docs/config.md
	@$(RUN) scalevit from-timm --markdown > docs/.from-timm.md && mv docs/.from-timm.md docs/from-timm.md

docs: setup
	@NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --quiet --strict

# From a copy: setuptools would put what an earlier build left into the wheel.
wheel: setup
	@folder=$$(mktemp -d) && trap 'rm -r "$$folder"' EXIT && mkdir -p dist && \
		cp -r pyproject.toml README.md LICENSE scalevit kernels configs "$$folder" && cd "$$folder" && \
		$(RUN) python -c 'from setuptools import build_meta; build_meta.build_wheel("$(CURDIR)/dist")' > /dev/null

gpu: $(if $(VENV),setup)
	@$(if $(VENV),$(VENV)/bin/python,$(PYTHON)) tests/support/gpu_session.py --output "$${OUT:-docs/results}"
