# Needs Python 3.11 or later and make; each target sets up its own environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

.PHONY: demo test test-faults test-browser check docs benchmark clean

demo: .venv/ready
	rm -rf $(DEMO)
	$(BIN)/fisher-ray run --model demo/model --corpus demo/corpus.jsonl --columns kind \
		--estimator deflated --rank 4 --num-samples 4 --output $(DEMO)
	$(BIN)/fisher-ray validate $(DEMO) --positions 8 --json > $(DEMO).json
	$(BIN)/fisher-ray report $(DEMO) --validation $(DEMO).json --output $(DEMO).html
	@echo
	@echo "Open $(DEMO).html in a browser, or look at the positions where the model is most sensitive:"
	@echo "  $(BIN)/python demo/look.py $(DEMO)"

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadscope

test-faults: .venv/ready
	$(BIN)/python -m pytest -m faults -n 2

# Needs Debian's chromium.
test-browser: .venv/ready
	$(BIN)/python -m pytest -m browser

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Pages in build/docs that load nothing from elsewhere. The variable silences a notice about the tool's own future.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

benchmark: .venv/ready
	$(BIN)/python benchmarks/engine.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build $(DEMO) $(DEMO).json $(DEMO).html
