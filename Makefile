# make demo   set up, then train a concept on Toybox and draw it: DIR/grid.png, residual.safetensors, report.json
# make bench  set up, then measure again what README and docs claim: benchmarks/results; SETTING=full for more
# make test   set up, then run every test: the kernel's once, tests/host against every ComfyUI found (tools/hosts.py),
#             each in an environment of its own beside it; FAST=1 leaves out what is marked slow
# make fuzz   set up, then mutate files of every kind, and prompts and workflows in every ComfyUI found; FILES=20000
# make kills  set up, then kill 20 servers in the middle of trainings in every ComfyUI found, and go on bit for bit
# make soak   set up, then watch every ComfyUI found at 1,000 prompts, some of them interrupted
VENV ?= .venv
PYTHON ?= python3
OUT ?= demo
SETTING ?= quick
JOBS ?= 2
FILES ?= 20000
BIN := $(VENV)/bin
TORCH := torch torchvision safetensors transformers einops numpy Pillow
TESTING := pytest pytest-xdist hypothesis ruff scipy POT scikit-learn open_clip_torch timm
HOST_TESTING := requests selenium websocket-client
PYTEST := -q -rs -n $(JOBS) --dist loadgroup $(if $(FAST),-m "not slow")
HOST = $(shell $(BIN)/python -c "from tools.hosts import find_host; print(find_host() or '')")

IN_HOSTS = $(BIN)/python -m tools.hosts --base $(VENV) --packages $(TESTING) $(HOST_TESTING) --

.PHONY: demo bench test fuzz kills soak lint clean
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
	$(IN_HOSTS) $(PYTEST)

kills: export OMP_NUM_THREADS = 1
kills: $(VENV)/.test
	KILLS=$(or $(KILLS),20) $(IN_HOSTS) -q -k survival

soak: export OMP_NUM_THREADS = 1
soak: $(VENV)/.test
	SOAK=$(or $(SOAK),1000) $(IN_HOSTS) -q -k soak

# A fixed seed and a random one, which is printed.
fuzz: export OMP_NUM_THREADS = 1
fuzz: export FUZZ = 2000
fuzz: $(VENV)/.test
	$(BIN)/python -m tools.fuzz --files $(FILES)
	$(IN_HOSTS) -q -s -k test_prompt_fuzz
	SEED=$$(date +%s) $(IN_HOSTS) -q -s -k test_prompt_fuzz

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
