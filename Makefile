# Every target makes what it needs in a fresh clone. TORCH_INDEX (optional) is the index that torch itself is taken from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RAY := $(VENV)/.ready-ray
FOLDERS := cloud compress device_profiles export reference runtime tools

.PHONY: demo test check bars format

demo: $(READY)
	$(BIN)/latentrelay demo

test: $(READY)
	$(BIN)/python -m pytest -q

# Slow, full-size and soak checks by name, Ray's among them; figures go to docs/measured/.
bars: $(READY) $(RAY)
	$(BIN)/python -m pytest -q -m "slow or full_size"

check: $(READY)
	$(BIN)/python .ci/link_typing.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/check_imports.py
	$(BIN)/python .ci/check_wheel.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes first and constrains the rest: unpinned, another package would swap it for a build of several gigabytes.
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "latentrelay needs Python 3.11 or newer; run: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	echo torch==2.13.0 > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt -e ".[dev]"
	touch $(READY)

$(RAY): $(READY)
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt -e ".[dev,ray]"
	touch $(RAY)
