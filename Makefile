# Two commands do all the set-up on a fresh machine:
#   make demo    installs, trains three diffusions by SVI, prints their bounds term by term, draws pictures into out/
#   make test    installs, passes the tests
# PYTHON chooses the interpreter that the virtual environment is made from, VENV its folder.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test lint docs wheel bench clean

demo: $(VENV)/installed
	$(VENV)/bin/python examples/demo.py

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n auto --dist worksteal

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/installed-docs
	OMP_NUM_THREADS=1 $(VENV)/bin/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

wheel:
	PYTHON=$(PYTHON) .ci/wheel

bench: $(VENV)/installed
	$(VENV)/bin/python benchmarks/speed.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing pyrodiff and what it needs into $(VENV) ..."
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) install -c constraints.txt -e .[test]
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(PIP) install -c constraints.txt -e .[docs]
	@touch $@

clean:
	rm -rf $(VENV) out runs docs/_build docs/generated build dist *.egg-info .pytest_cache .ruff_cache
