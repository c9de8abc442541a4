# Two commands do all the set-up on a fresh machine:
#   make demo    installs, trains three diffusions by SVI, prints their bounds term by term, draws pictures into out/
#   make test    installs, passes the tests
# PYTHON chooses the interpreter that the virtual environment is made from, VENV its folder.
PYTHON ?= python3
VENV ?= .venv
# --no-compile: most of torch is never imported here, so its modules are compiled as they are asked for, once: what is
# compiled is kept, whatever the environment says, or each of the many processes of the tests would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet install --no-compile -c constraints.txt
NEEDED = pyproject.toml constraints.txt | $(VENV)/bin/python

.PHONY: demo test lint docs wheel all-installed bench clean

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

wheel: $(VENV)/installed-test
	VENV=$(VENV) .ci/wheel

bench: $(VENV)/installed
	$(VENV)/bin/python benchmarks/speed.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	@echo "installing pyrodiff and what it needs into $(VENV) ..."

$(VENV)/installed: $(NEEDED)
	$(INSTALL) -e .
	@touch $@

$(VENV)/installed-test: $(NEEDED)
	$(INSTALL) -e .[test]
	@touch $@ $(VENV)/installed

$(VENV)/installed-docs: $(NEEDED)
	$(INSTALL) -e .[docs]
	@touch $@ $(VENV)/installed

# All of it at once, where several of the above are to be made beside each other.
all-installed: $(NEEDED)
	$(INSTALL) -e .[test,docs]
	@touch $(VENV)/installed $(VENV)/installed-test $(VENV)/installed-docs

clean:
	rm -rf $(VENV) out runs docs/_build docs/generated build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
