# make demo   set up, then train a concept on Toybox and draw it: DIR/grid.png, residual.safetensors, report.json
# make bench  set up, then measure again what README and docs claim: benchmarks/results; SETTING=full for more
# make test   set up, then run every test; host tests run where a ComfyUI is found, and are named where it is not
VENV ?= .venv
PYTHON ?= python3
OUT ?= demo
SETTING ?= quick
HOST := $(firstword $(foreach d,$(COMFYUI_PATH) $(abspath ../..) $(HOME)/comfy/ComfyUI,$(if $(wildcard $(d)/main.py),$(d))))
BIN := $(VENV)/bin

.PHONY: demo bench test lint clean
demo: $(VENV)/.kernel
	$(BIN)/python -m profusion demo --out $(OUT)

bench: $(VENV)/.kernel $(if $(HOST),$(VENV)/.host)
	COMFYUI_PATH="$(HOST)" $(BIN)/python -m benchmarks.run --setting $(SETTING)

test: $(VENV)/.test $(if $(HOST),$(VENV)/.host)
	$(BIN)/ruff check .
	COMFYUI_PATH="$(HOST)" $(BIN)/python -m pytest tests -q -rs
	@$(if $(HOST),echo "host tests ran against $(HOST)",echo "SKIPPED all host tests: no ComfyUI at COMFYUI_PATH, around this checkout or at ~/comfy/ComfyUI")

lint: $(VENV)/.test
	$(BIN)/ruff check .

# torchvision is there because the host imports it: torch must be the build that goes with it.
$(VENV)/.kernel:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch torchvision safetensors tokenizers numpy Pillow einops
	touch $@

$(VENV)/.test: $(VENV)/.kernel
	$(BIN)/pip install --quiet pytest hypothesis ruff scipy POT scikit-learn open_clip_torch timm
	touch $@

$(VENV)/.host: $(VENV)/.test $(HOST)/requirements.txt
	$(BIN)/pip install --quiet -r $(HOST)/requirements.txt requests selenium websocket-client
	touch $@

clean:
	rm -rf $(VENV) $(OUT)
