# make setup       a virtual environment in .venv with everything pinned in constraints.txt
# make quickstart  train a small grouped ViT on handwritten digits (minutes on a laptop CPU)
# make test        the test suite that needs no GPU
# make lint        formatting, lint and types
# make gpu         tests and benchmarks that need a GPU; says so and ends well without one
# make schema      write configs/schema.json anew

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
# Installed anew only when one of these changes.
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: setup quickstart test lint gpu schema

setup: $(STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "scalevit needs Python 3.10 or newer; give one as PYTHON=..."; exit 2; }
	@command -v c++ > /dev/null || command -v g++ > /dev/null || \
		{ echo "scalevit needs a C++ compiler (Debian: apt install g++)"; exit 2; }
	@# An interrupted installation leaves no stamp, and starts anew here.
	@if command -v uv > /dev/null; then \
		uv venv --quiet --clear --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV) && \
		uv pip install --quiet --compile-bytecode --python $(VENV)/bin/python --constraint constraints.txt --editable '.[dev]'; \
	else \
		$(PYTHON) -m venv --clear $(VENV) && \
		$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
			--constraint constraints.txt --editable '.[dev]'; \
	fi
	@touch $@

quickstart: setup
	@$(RUN) deepspeed --num_accelerators 1 launch/train.py --config configs/quickstart.json

test: setup
	@$(RUN) python -m pytest -m "not gpu and not slow"

lint: setup
	@$(RUN) ruff format --check .
	@$(RUN) ruff check .
	@$(RUN) mypy

schema: setup
	@$(RUN) scalevit schema > configs/schema.json

gpu: setup
	@if $(RUN) python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(RUN) python -m pytest -m gpu && \
		$(RUN) python -m scalevit.kernels.bench --output "$${OUT:-docs/results}" && \
		$(RUN) scalevit bench train --config configs/grouped.json --output "$${OUT:-docs/results}"; \
	else \
		echo "no GPU on this machine: the tests and benchmarks that need one were not run"; \
	fi
