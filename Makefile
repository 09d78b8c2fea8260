# Set-up happens once, in .venv, from the pins in constraints.txt; every target needs nothing but python3.11 or 3.12.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PEERS  := $(VENV)/.peers

.PHONY: demo test check bench soak clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,chat]"
	touch $(READY)

demo: $(READY)        ## the main job on embedded data, offline: about 8 minutes on 2 cores
	$(BIN)/python scripts/demo.py

test: $(READY)        ## the test suite
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: $(READY)       ## lint, format, types, and pins against versions known to be bad
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/audit_pins.py

soak: $(READY)        ## runs killed, stopped, starved of room and damaged, whole suite and 30 minutes of SIGKILLs: about an hour
	$(BIN)/python scripts/soak.py
	$(BIN)/python scripts/soak.py --minutes 30

$(PEERS): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[bench]"
	touch $(PEERS)

bench: $(PEERS)       ## time and memory against TRL, Liger-Kernel and a plain step; prints tables, writes JSON: about 25 minutes
	$(BIN)/python benchmarks/run_all.py

clean:
	rm -rf $(VENV) demo_output
