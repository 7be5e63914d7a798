# make quickstart   train, distil, stream and evaluate on the sprites world; ends with a report to open; goes on from the
#                   shipped weights, with FROM=scratch from nothing
# make test         checks and tests
# make zoo          train the shipped sprites weights again, from nothing; hours on two cores, goes on after a kill
# make ablations    train and judge the variants that the claims table compares, from the shipped weights; hours
# make clean        remove the caches of the tools; outputs/ (data, checkpoints, reports) stays
# Each makes the virtual environment it needs. VENV=/path uses another one; PYTHON picks the interpreter.
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin
WORKERS ?= 2
FROM ?= zoo

.PHONY: help install quickstart zoo ablations test check clean
help:
	@sed -n 's/^# //p' Makefile

$(RUN)/.installed: setup.py constraints.txt
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

install: $(RUN)/.installed

quickstart: install
	$(RUN)/python -m train.quickstart --start $(FROM)

zoo: install
	$(RUN)/python -m train.zoo

ablations: install
	$(RUN)/python -m train.ablations

check: install
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/lint-imports
	$(RUN)/mypy

test: check
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n $(WORKERS)

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
