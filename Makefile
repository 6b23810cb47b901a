# Everything runs in .venv, which is made on first use and again when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What the demo needs, and what tests need besides (quantisation and serving libraries among it).
DEMO := $(VENV)/installed-demo
DEV := $(VENV)/installed-dev
# No network at run time: nothing may depend on a hub or phone home. torchao's GPU kernels do not load beside a CPU torch.
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HUB_DISABLE_UPDATE_CHECK=1 TOKENIZERS_PARALLELISM=false \
	TORCHAO_FORCE_SKIP_LOADING_SO_FILES=1

# Tiny models gain nothing from threads, and lose much where cores are busy; two files at a time are tested instead.
TEST := $(OFFLINE) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}

.PHONY: demo demo-control study test test-slow test-releases test-newest lint clean

demo: $(DEMO)
	$(OFFLINE) $(BIN)/python examples/demo/run.py outputs/demo

demo-control: $(DEMO)
	$(OFFLINE) $(BIN)/python examples/demo/run.py outputs/demo --control

# Hours; goes on where it was stopped.
study: $(DEMO)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python examples/study/run.py outputs/study

test: lint
	$(TEST) $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: lint
	$(TEST) $(BIN)/python -m pytest

# Environments of their own in .releases, kept between runs.
test-releases: $(DEV)
	$(BIN)/python benchmarks/releases.py

test-newest: $(DEV)
	$(BIN)/python benchmarks/releases.py --newest

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "uni_moe_hf needs Python 3.11 or newer, $(PYTHON) is older; run make PYTHON=python3.12."; exit 1; }
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) .releases outputs build dist *.egg-info
