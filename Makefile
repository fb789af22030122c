# demo, test, lint, bench, bench-peers, zoo, accuracy, accuracy-peers, wheel, clean; each makes .venv and .data first and is instant when they exist
PYTHON ?= python3
# any build of torch will do; whatever pip accepts may stand here
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# one stamp for each version of torch asked for
TORCH_STAMP := $(VENV)/torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1).stamp
QPASS_STAMP := $(VENV)/qpass.stamp
TRITON_STAMP := $(VENV)/triton.stamp
MODEL_STAMP := .data/smollm2/config.json
NATIVE := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.hpp)

.PHONY: demo test lint bench bench-peers zoo accuracy accuracy-full accuracy-peers wheel clean install test-gpu-interpret gpu-aot gpu-check
.DELETE_ON_ERROR:

demo: $(QPASS_STAMP) $(MODEL_STAMP)
	$(BIN)/python -m examples.demo $(ARGS)

test: $(QPASS_STAMP) $(MODEL_STAMP)
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: $(QPASS_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(if $(NATIVE),$(BIN)/clang-format --dry-run -Werror $(NATIVE))

# kernels beside torch; with ARGS=--table beside what the machine can do, into kernels/cpu/README.md
bench: $(QPASS_STAMP)
	$(BIN)/python -m tests.bench $(ARGS)

# a tiny model of every architecture in transformers; what has been measured is not measured again
zoo: $(QPASS_STAMP)
	$(BIN)/python -m tests.architectures $(ARGS)

accuracy: $(QPASS_STAMP) $(MODEL_STAMP)
	$(BIN)/python -m tests.accuracy $(ARGS)

accuracy-full: $(QPASS_STAMP) $(MODEL_STAMP)
	$(BIN)/python -m tests.accuracy --full --minutes inf $(ARGS)

# other tools on the same tokens, each in an environment of its own (about 2 GB each)
accuracy-peers: $(QPASS_STAMP) $(MODEL_STAMP)
	$(BIN)/python -m tests.peers $(ARGS)

# how fast other engines are beside qpass; each has an environment of its own, and PEERS= selects
# (llama.cpp is compiled, which takes some minutes)
bench-peers: $(QPASS_STAMP) $(MODEL_STAMP)
	PEERS='$(PEERS)' $(BIN)/python -m tests.bench.engines $(ARGS)

# the GPU kernels on a machine without a GPU: what they compute, and what they are compiled to
test-gpu-interpret: $(TRITON_STAMP)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/kernels/gpu $(ARGS)

gpu-aot: $(TRITON_STAMP)
	$(BIN)/python -m tests.kernels.gpu.aot $(ARGS)

# on a machine with one: everything is checked and timed
gpu-check: $(TRITON_STAMP)
	$(BIN)/python tests/gpu_check.py $(ARGS)

wheel: $(QPASS_STAMP)
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

install: $(QPASS_STAMP)

clean:
	rm -rf $(VENV) .data build dist

# torch comes first and by itself: it is large, users choose its build, and the kernels are compiled
# against it, which is why nothing is built in isolation
$(TORCH_STAMP):
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	rm -f $(VENV)/torch-*.stamp
	touch $@

$(QPASS_STAMP): $(TORCH_STAMP) pyproject.toml constraints.txt CMakeLists.txt $(NATIVE)
	$(PIP) install -c constraints.txt scikit-build-core cmake ninja
	$(PIP) install -c constraints.txt --no-build-isolation --editable '.[all,dev]'
	touch $@

# about 1 GB, so nothing else asks for it
$(TRITON_STAMP): $(QPASS_STAMP)
	$(PIP) install -c constraints.txt triton
	touch $@

$(MODEL_STAMP): | $(QPASS_STAMP)
	$(BIN)/python -m tests.data.fetch
