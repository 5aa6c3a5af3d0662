# `make demo` and `make test` set everything up from a fresh clone: Python 3.11 or newer is all they need.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin

.PHONY: install demo test test-slow lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --constraint constraints.txt torch
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(RUN)/python -m compileall -q raysegment tests  # every process of Ray imports them, and may not be allowed to keep what it compiled
	touch $@

demo: install
	$(RUN)/raysegment demo --out demo $(ARGS)

lint: install
	$(RUN)/ruff check .
	$(RUN)/basedpyright --pythonpath $(RUN)/python

test: lint
	$(RUN)/pytest

test-slow: install
	$(RUN)/pytest -m slow --timeout 1800

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache
