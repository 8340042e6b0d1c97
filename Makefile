# Every target sets up what it needs in .venv. `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
OUT ?= runs/demo
# tests in a process per core; one by one: make test WORKERS=0
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 8 --dist worksteal
# threads of PyTorch that wait for one another sleep: a spinning one takes another process's core
export OMP_WAIT_POLICY ?= PASSIVE
KERNEL_TESTS := $(patsubst %,tests/kernels/test_%.py,attention decode append hidden operator \
	bench_tiles cross_entropy layer_norm few_rows)
TUTORIALS = $(wildcard tutorials/$(or $(NAME),[0-9])*.py)

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo lint test test-kernels fuzz check format test-official
.PHONY: compile compile-all sass bench bench-cpu bench-gpu bench-pretrain paper notebooks
.PHONY: docs linkcheck reliability environments sbom clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

.venv/.user: requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	@# scripts in tutorials/ and notebooks import this checkout, wherever they are started
	$(BIN)/python -c 'import pathlib as p, sysconfig; p.Path(sysconfig.get_path("purelib"), "minprefix.pth").write_text(str(p.Path.cwd()) + "\n")'
	touch $@

.venv/.dev: requirements-dev.txt .venv/.user
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	touch $@

.venv/.docs: requirements-docs.txt .venv/.dev
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements-docs.txt
	touch $@

setup: .venv/.user ## make .venv with what a user needs

setup-dev: .venv/.dev ## add to .venv what the tests need

demo: .venv/.user ## tune a prefix on the embedded tables, generate texts and score them (OUT=runs/demo)
	$(BIN)/python -m minprefix demo --out $(OUT)

lint: .venv/.dev ## check format, lint, imports, types and spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/codespell

test: lint ## lint, then all tests
	$(PYTEST) -m "not official" --durations=10
	TRITON_INTERPRET=1 $(PYTEST) $(KERNEL_TESTS) --durations=10

test-kernels: .venv/.dev ## test the Triton kernels in Triton's interpreter on the CPU
	TRITON_INTERPRET=1 $(PYTEST) $(KERNEL_TESTS) --durations=10

fuzz: .venv/.dev ## read damaged files and command lines, for FUZZ_SECONDS=120 or CASES=10000
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --cases $(or $(CASES),10000) --seconds $(or $(FUZZ_SECONDS),120)

compile: .venv/.dev ## compile the tiles at D = 64 in bf16 and report their registers and spills, without a GPU
	$(BIN)/python -m kernels.tools.compile_offline --all --dtype bf16 --head_dim 64 \
		--batch_size 1000 --prefix_len 10 200 --prefix_dtype fp32 --causal True --prefix_index False \
		--prefix_lens False --kv_lens False --q_offset False --need all --dlse False --append no --n_head 12 \
		--out benchmarks/compiled.csv

compile-all: .venv/.dev ## compile the kernels for every GPU in the table, in every form (takes hours)
	for target in sm_90 sm_100 sm_80; do \
		$(BIN)/python -m kernels.tools.sass --target $$target || exit 1; done
	$(BIN)/python -m kernels.tools.compile_offline --all

sass: .venv/.dev ## look for miscompiled kernels at D = 64 on Hopper, without a GPU (PTXAS=path)
	$(BIN)/python -m kernels.tools.sass --quick $(if $(PTXAS),--ptxas $(PTXAS))

check: lint ## lint, then the fast tests, for use while you work
	$(PYTEST) -m "not slow and not official" -x

format: .venv/.dev ## let ruff format and fix the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-official: .venv/.dev ## compare official gpt2 with transformers (needs a network, or MINPREFIX_GPT2=folder)
	$(BIN)/python -m pytest -q -rs -m official tests

bench: .venv/.dev ## time the attention operator: on a CPU its CPU path, on a GPU the kernels
	$(BIN)/python -m benchmarks.kernels.reference --out benchmarks/cpu_attention.csv
	$(BIN)/python -m benchmarks.kernels.overhead --out benchmarks/call_overhead.csv
	$(BIN)/python -m benchmarks.kernels.attention --out runs/bench
	$(BIN)/python -m benchmarks.kernels.decode --out runs/bench

bench-cpu: .venv/.dev ## time training and generation against PEFT on this CPU, into benchmarks/cpu
	benchmarks/cpu.sh

bench-gpu: ## on a GPU: PART=tests, attention, decode, steps, generate or train (default: all), four minutes each
	OUT=$(or $(GPU_OUT),benchmarks/gpu) benchmarks/gpu.sh $(PART)

bench-pretrain: .venv/.user ## on a GPU: pretrain mini's recipe in ten minutes (CORPUS=folder), into benchmarks/pretrain
	OUT=$(or $(GPU_OUT),benchmarks/pretrain) benchmarks/pretrain.sh

paper: .venv/.user ## make every table and figure of the paper with mini (DATA=folder, JOBS=4 on a GPU)
	benchmarks/paper.sh

notebooks: .venv/.dev ## run every tutorial as a notebook, into runs/notebooks (NAME=02: only that one)
	@test -n "$(TUTORIALS)" || { echo "no tutorial begins with $(NAME): they are" tutorials/[0-9]*.py; exit 1; }
	mkdir -p runs/notebooks
	for path in $(TUTORIALS); do name=$$(basename $$path .py); \
		PYTHONPATH=$(CURDIR) PYTHONWARNINGS="ignore:IProgress" $(BIN)/python -m jupytext --quiet --to ipynb --set-kernel python3 --execute \
		--run-path tutorials --output runs/notebooks/$$name.ipynb $$path || exit 1; done

docs: .venv/.docs ## build the site and run and check the tutorials, into runs/docs/html
	$(BIN)/python -m sphinx -W --keep-going -q -d runs/docs/doctrees docs runs/docs/html
	$(BIN)/python -m docs.check_site runs/docs/html

linkcheck: .venv/.docs ## check the site's links to other sites (needs a network)
	MINPREFIX_DOCS_EXECUTE=off $(BIN)/python -m sphinx -q -b linkcheck docs runs/docs/linkcheck

reliability: .venv/.dev ## count kills, flipped bytes, two processes, ranks for RELIABILITY.md (Linux)
	$(BIN)/python -m tests.reliability
	$(BIN)/python -m benchmarks.readme

environments: .venv/.dev ## run a few tests with other versions of Triton, NumPy, PyTorch and Python (needs a network)
	$(BIN)/python -m tools.environments
	$(BIN)/python -m benchmarks.readme

sbom: .venv/.dev ## write runs/sbom.json (CycloneDX) and the page of licences (needs a network)
	test -x runs/sbom/bin/cyclonedx-py || $(PYTHON) -m venv runs/sbom
	runs/sbom/bin/python -m pip install --disable-pip-version-check --quiet -r requirements-sbom.txt
	runs/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-format JSON --output-file runs/sbom.json $(BIN)/python
	$(BIN)/python -m tools.licences

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
