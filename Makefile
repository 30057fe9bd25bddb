# `make demo` turns prompts into pictures with the embedded model; `make test` passes the tests. Both set up what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := "red heart" "grinning face" "pizza" "dog face" "rocket" "sunflower" "green apple" "soccer ball" "guitar"

.PHONY: demo test test-oldest lint clean

demo: $(VENV)/installed
	$(BIN)/paella-diffusers generate $(DEMO) --out demo.png

# two processes with a thread each: most tests are too small to make use of two threads
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

# the same with the oldest diffusers that is supported
test-oldest:
	$(MAKE) test VENV=.venv-oldest DIFFUSERS=0.42.0

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch first and alone: what is installed after it then asks for no other build
$(VENV)/installed: requirements.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --disable-pip-version-check --quiet -r requirements.txt
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	$(if $(DIFFUSERS),$(BIN)/pip install --disable-pip-version-check --quiet --no-deps diffusers==$(DIFFUSERS))
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest demo*.png
