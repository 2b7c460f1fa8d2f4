# Each command creates the virtual environment if it is missing. PYTHON: any Python >= 3.10.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 100
# What a shorter demo sets, e.g. make demo DEMO="--set num_epochs=2"
DEMO ?=

.PHONY: demo test clean-env

demo: $(VENV)/.run
	$(BIN)/python ASD.py --config config/demo_undefended.yaml --resume False --gpu cpu --set seed.seed=$(SEED) $(DEMO)
	$(BIN)/python ASD.py --config config/demo.yaml --resume False --gpu cpu --set seed.seed=$(SEED) $(DEMO)
	$(BIN)/python -m utils.compare demo/saved_data/demo_undefended demo/saved_data/demo --plot demo/comparison.png
	@echo "more plots: demo/saved_data/*/log/*.png"

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term

$(VENV)/.run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 10) else None'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.test: $(VENV)/.run requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean-env:
	rm -rf $(VENV)
