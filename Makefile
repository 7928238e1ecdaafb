# `make test` and `make demo` set up everything they need in .venv; the rest of the repository needs no make.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup demo demo-distill test test-slow test-golden bench lint clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable '.[dev,plot,fast]'
	touch $@

demo: setup
	$(RUN) mae.py --demo
	$(RUN) finetune.py --demo --init out/mae-demo/encoder.pt
	$(RUN) probe.py out/mae-demo/encoder.pt --demo

demo-distill: setup
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash runs/demo_distill.sh

test: setup lint
	$(RUN) -m pytest -n 2

test-slow: setup
	$(RUN) -m pytest -m slow

# Recordings of another folder: GOLDEN=DIR make test-golden
test-golden: setup
	$(RUN) -m pytest -n 2 -m golden

bench: setup
	$(RUN) -m tools.bench $(if $(DATA),--data $(DATA))

lint: setup
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) out .pytest_cache .ruff_cache *.egg-info
