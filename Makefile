# `make demo` turns prompts into pictures with the embedded model; `make test` passes the tests. Both set up what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := "red heart" "grinning face" "no entry" "blue heart" "cat face" "red apple" "green heart" "eight oclock" \
	"globe showing americas"

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/paella-diffusers generate $(DEMO) --guidance-scale 4 --out demo.png

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch first and alone: what is installed after it then asks for no other build
$(VENV)/installed: requirements.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --disable-pip-version-check --quiet -r requirements.txt
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) demo*.png
