# Targets set themselves up in .venv: a fresh clone needs python3, a C++ compiler and nothing else. nvcc is used if found.
#
#   make demo    train AlexNet on handwritten digits with two processes, then show where the pictures are
#   make test    lint, then every test   (PYTEST="--slow" adds those that take minutes or install a second torch)
#   make soak    kills, restarts, four ranks, every planted fault, and many more random inputs: minutes each
#   make bench   time this machine, write benchmarks/results and render docs/performance.md
#                (more peers: .venv/bin/pip install -e '.[bench]')
#   make docs    the documents as a site, in build/site
#   make lint    ruff and clang-format, checking only
#   make asan    a copy of the clone in build/asan, its bindings with the address and undefined-behaviour sanitizers, and
#                the tests that call them most (TESTS=… for others)
#
# One uses the Python that is there, and no network:
#
#   make gpu-report   build the CUDA kernels, test and check them on the card, write benchmarks/results/<card>/
#                     (STEP=quick: what 90 seconds show; or another of those that -m benchmarks.gpu_report -h lists)

PYTHON ?= python3
VENV ?= .venv
PYTEST ?=
STEP ?=
TESTS ?= tests/nn/test_runs.py tests/nn/test_fused.py
BIN := $(VENV)/bin
# As many processes as cores. Their OpenMP threads do not spin while they wait: the cores are another process's meanwhile.
PARALLEL := OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses $$(nproc) --dist worksteal
NATIVE := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: demo test soak bench docs gpu-report lint asan clean

demo: $(VENV)/installed
	$(BIN)/alexnet-fast train digits --nproc 2 --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: lint
	$(PARALLEL) $(PYTEST)
	TRITON_INTERPRET=1 $(PARALLEL) tests/triton $(PYTEST)

soak: $(VENV)/installed
	$(PARALLEL) --soak -m soak $(PYTEST)
	TRITON_INTERPRET=1 $(PARALLEL) tests/triton --soak -m soak $(PYTEST)
	$(PARALLEL) --soak tests/test_fuzz.py $(PYTEST)

bench: $(VENV)/installed
	$(BIN)/pytest benchmarks --all --benchmark-only --results benchmarks/results $(PYTEST)
	$(BIN)/python -m benchmarks.report

docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict

gpu-report:
	$(PYTHON) -m benchmarks.gpu_report $(STEP)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# The bindings alone: sanitized, the vector kernels take half an hour to compile. CUDA is left out: csrc/host_simt has
# sanitizers of its own. Leaks of Python and torch are not looked for.
asan: $(VENV)/installed
	mkdir -p build/asan
	git ls-files -z | xargs -0 cp --parents --update -t build/asan
	cd build/asan && ALEXNET_FAST_CUDA=0 ALEXNET_FAST_SANITIZE=address,undefined $(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd build/asan && LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 $(abspath $(BIN))/python -m pytest -p no:cacheprovider $(TESTS) $(PYTEST)

# torch first and on its own: the extension is built against it, without pip's isolation.
$(VENV)/installed: $(NATIVE)
	@echo "Setting up $(VENV), once, and anew when native sources change. 1 of 2: torch and tools, by the network; minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch pybind11 'setuptools>=77'
	@echo "2 of 2: compiling the kernels on $$(nproc) cores. On two it takes a minute, with nvcc four."
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,demo]'
	touch $@

clean:
	rm -rf $(VENV) build alexnet_fast/_C*.so *.egg-info
