# One command a goal. Every goal that runs something first makes the environment in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OLD_TRITON := .cache/triton-3.6
# processes of the tests: one a core, but where a GPU answers at most 8, because each has a CUDA context of its own
JOBS   ?= $(shell n=$$(nproc 2>/dev/null || echo 2); if [ $$n -gt 8 ] && nvidia-smi -L >/dev/null 2>&1; then n=8; fi; echo $$n)

.PHONY: setup demo study test lint aot aot-old-triton bench gpu-report clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*.cpp csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch triton
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,dev]"
	$(BIN)/cacr doctor
	@touch $@

demo: setup
	$(BIN)/cacr demo

study: setup
	$(BIN)/cacr study

test: setup $(OLD_TRITON)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

aot: setup
	$(BIN)/python -m cacr_kernels.triton.aot
	$(BIN)/python -m cacr_kernels.triton.qk_aot

# the oldest supported Triton, beside the pinned one: a subset of the gates runs in the tests, all of it here
$(OLD_TRITON): | $(STAMP)
	rm -rf $@ $@.new
	$(BIN)/python -m pip install --quiet --no-deps --target $@.new triton==3.6.0
	mv $@.new $@

aot-old-triton: setup $(OLD_TRITON)
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -m cacr_kernels.triton.aot
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -m cacr_kernels.triton.qk_aot

bench: setup
	$(BIN)/cacr bench

gpu-report: setup
	$(BIN)/cacr bench gpu-report

clean:
	rm -rf $(VENV) build .cache cacr_kernels/_native*.so
