# `make demo` turns prompts into pictures with the embedded model; `make test` passes the tests. Both set up what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := "red heart" "grinning face" "pizza" "dog face" "rocket" "sunflower" "green apple" "soccer ball" "guitar"

.PHONY: demo test test-golden test-kills test-ray test-compile test-oldest test-comfyui test-web test-docs coverage fuzz soak docs lint types clean

demo: $(VENV)/installed
	$(BIN)/paella-diffusers generate $(DEMO) --out demo.png

# two processes with a thread each: most tests are too small to make use of two threads
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

# what the published code computed, with the kernels of other processors: without vector units, and with AVX2 and two threads
PLAIN := OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_CBWR=COMPATIBLE
AVX2 := OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_CBWR=AVX2
test-golden: $(VENV)/installed
	$(PLAIN) $(BIN)/python -m pytest -k test_golden
	$(AVX2) $(BIN)/python -m pytest -k test_golden

# each of seven trainers killed at five moments in each of three ways of training; two nodes of which one dies; batches; and
# a launch with FSDP's configuration
test-kills: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v -m kills tests/examples tests/apps tests/cli

# a batch in a Ray cluster of two nodes on this machine, of which a worker is killed
test-ray: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v -m ray tests/apps

# `pipe.optimize()`: a walk through 20 calls, adapters, threads, and a second process that finds what the first one compiled
test-compile: $(VENV)/installed
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -v -m compile tests

# all tests with the lowest versions that setup.py allows of what the package and the extra `lora` need
test-oldest:
	$(MAKE) test VENV=.venv-oldest LOWEST=yes

# the nodes for ComfyUI in ComfyUI itself: COMFYUI is a clone of its repository, whose requirements choose the versions
test-comfyui:
	test -f "$(COMFYUI)/main.py" || { echo "make test-comfyui COMFYUI=FOLDER, where FOLDER is a clone of ComfyUI"; exit 2; }
	$(PYTHON) -m venv .venv-comfyui
	.venv-comfyui/bin/pip install --quiet -r "$(COMFYUI)/requirements.txt"
	.venv-comfyui/bin/pip install --quiet ".[lora]"
	.venv-comfyui/bin/python integrations/comfyui/run_workflows.py "$(COMFYUI)"

# the page in a browser, BROWSER; its screenshots go to SCREENSHOTS, a folder, if that is given
BROWSER ?= /usr/bin/chromium
test-web: $(VENV)/installed
	PAELLA_BROWSER="$(BROWSER)" PAELLA_SCREENSHOTS="$(SCREENSHOTS)" $(BIN)/python -m pytest -v -m browser tests/apps

# bad and hostile input of every kind, for MINUTES=10 unless given; docs/reliability.md says what is counted
MINUTES ?= 10
fuzz: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -m fuzz --minutes $(MINUTES)

# many calls in one process, kills of every writer, and threads; SOAK="--calls 100 --kills 5" tries less
soak: $(VENV)/installed
	PYTHONPATH=tests $(BIN)/python -m fuzz.soak $(SOAK)

# the code of all pages, and the notebooks
test-docs: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m pages tests/docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake --nbmake-timeout=600 docs/tutorials

# lines and branches that the tests reach, in this process alone: a table of what they do not, then the limits, all branches of
# the samplers and 92 % of all lines; the data are left in .coverage
SAMPLERS := src/paella_diffusers/sampling/*,src/paella_diffusers/schedulers/*
LINES := import json, sys; t = json.load(sys.stdin)["totals"]; lines = 100 * t["covered_lines"] / t["num_statements"]; \
	print(f"{lines:.1f} % of lines"); sys.exit(lines < 92)
coverage: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term-missing:skip-covered $(TESTS)
	$(BIN)/coverage report --include="$(SAMPLERS)" --fail-under=100
	$(BIN)/coverage json -q -o - | $(BIN)/python -c '$(LINES)'

# the site, into site/, without a network; a broken link or reference is an error
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=src $(BIN)/mkdocs build --quiet

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# pyright and its Node.js are pip packages: nothing is downloaded. Then the share of public symbols whose types it knows, which
# it measures with the first Python in PATH alone. `self.norm = LayerNorm(channels)` is not among them, nor are
# signatures that repeat those of another class
TYPED := import json, sys; score = 100 * json.load(sys.stdin)["typeCompleteness"]["completenessScore"]; \
	print(f"{score:.1f} % of public symbols are typed"); sys.exit(score < 70)
types: export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1
types: $(VENV)/installed
	$(BIN)/pyright --pythonpath $(BIN)/python
	PATH="$(BIN):$$PATH" $(BIN)/pyright --verifytypes paella_diffusers --ignoreexternal --outputjson | $(BIN)/python -c '$(TYPED)'

# torch first and alone: what is installed after it then asks for no other build
$(VENV)/installed: requirements.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --disable-pip-version-check --quiet -r requirements.txt
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	$(if $(LOWEST),$(BIN)/pip install --disable-pip-version-check --quiet $$($(BIN)/python tests/lowest.py))
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-comfyui site .coverage demo*.png
