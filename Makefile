# make demo   set up, then train a concept on Toybox and draw it: DIR/grid.png, residual.safetensors, report.json
# make bench  set up, then measure again what README and docs claim: benchmarks/results; SETTING=full for more
# make test   set up, then run every test: the kernel's once, tests/host against every ComfyUI found (tools/hosts.py),
#             each in an environment of its own beside it; FAST=1 leaves out what is marked slow
VENV ?= .venv
PYTHON ?= python3
OUT ?= demo
SETTING ?= quick
JOBS ?= 2
BIN := $(VENV)/bin
TORCH := torch torchvision safetensors transformers einops numpy Pillow
TESTING := pytest pytest-xdist hypothesis ruff scipy POT scikit-learn open_clip_torch timm
HOST_TESTING := requests selenium websocket-client
PYTEST := -q -rs -n $(JOBS) --dist loadgroup $(if $(FAST),-m "not slow")
HOST = $(shell $(BIN)/python -c "from tools.hosts import find_host; print(find_host() or '')")

.PHONY: demo bench test lint clean
demo: $(VENV)/.kernel
	$(BIN)/python -m profusion demo --out $(OUT)

# What is measured in a host runs in the first one's classes.
bench: $(VENV)/.kernel
	$(if $(HOST),$(BIN)/pip install --quiet -r $(HOST)/requirements.txt)
	$(BIN)/python -m benchmarks.run --setting $(SETTING)

test: export OMP_NUM_THREADS = 1
test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests --ignore tests/host $(PYTEST)
	$(BIN)/python -m tools.hosts --base $(VENV) --packages $(TESTING) $(HOST_TESTING) -- $(PYTEST)

lint: $(VENV)/.test
	$(BIN)/ruff check .

# torchvision is there because the host imports it: torch must be the build that goes with it.
$(VENV)/.kernel:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	touch $@

$(VENV)/.test: $(VENV)/.kernel
	$(BIN)/pip install --quiet $(TESTING)
	touch $@

clean:
	rm -rf $(VENV) $(OUT) $(dir $(wildcard $(VENV)-*/made-of.txt))
