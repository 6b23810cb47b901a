# Everything runs in .venv, which is made on first use and again when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# No network at run time: nothing may depend on a hub or phone home.
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo demo-control test test-slow lint clean

demo: $(STAMP)
	$(OFFLINE) $(BIN)/python examples/demo/run.py outputs/demo

demo-control: $(STAMP)
	$(OFFLINE) $(BIN)/python examples/demo/run.py outputs/demo --control

test: lint
	$(OFFLINE) $(BIN)/python -m pytest -m "not slow"

test-slow: lint
	$(OFFLINE) $(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "uni_moe_hf needs Python 3.11 or newer, $(PYTHON) is older; run make PYTHON=python3.12."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) outputs build dist *.egg-info
